"""Figures of the tutorials: drawn without a display, shown in a notebook, kept as files elsewhere.

`new` makes one, `show` ends its cell. Colours mean the same in every tutorial: PREFIX is what is
trained or read from the prefix, TEXT the frozen model's own, OTHER a method to compare with.
"""

import builtins
import io
from pathlib import Path

from matplotlib.figure import Figure

from minprefix.palette import FAINT, OTHER, PREFIX, TEXT

__all__ = ["FAINT", "OTHER", "PREFIX", "TEXT", "new", "show"]
FOLDER = Path(__file__).parents[1] / "runs" / "tutorials"


def new(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.6):
    """A figure of `columns` x `rows` panels of so many inches, and its axes (as `subplots`)."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def show(figure: Figure, name: str) -> None:
    """Show it in a notebook; elsewhere write runs/tutorials/NAME.png and say so."""
    if hasattr(builtins, "__IPYTHON__"):
        from IPython.display import Image, display

        png = io.BytesIO()  # a Figure without pyplot has no picture of its own in a notebook
        figure.savefig(png, format="png")
        display(Image(png.getvalue()))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path.relative_to(FOLDER.parents[1])}")
