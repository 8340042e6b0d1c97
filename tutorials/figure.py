"""Figures of the tutorials: drawn without a display, shown in a notebook, kept as files elsewhere.

`new` makes one, `show` ends its cell. `lines` and `shares` draw a whole figure in one call, and
`two_ways` is the picture at the beginning of tutorial 1. Colours mean the same in every tutorial:
PREFIX is what is trained or read from the prefix, TEXT the frozen model's own, OTHER a method to
compare with.
"""

import builtins
import io
from pathlib import Path

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from minprefix.palette import FAINT, INK, OTHER, PALE, PREFIX, TEXT

__all__ = [
    "FAINT", "INK", "OTHER", "PALE", "PREFIX", "TEXT", "lines", "new", "shares", "show", "two_ways",
]  # fmt: skip
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


def lines(name: str, curves: dict, marks: dict | None = None, **labels) -> None:
    """Curves in one panel, with their legend beside it.

    Args:
        curves: {label: (x, y, colour, style)}; the style is matplotlib's, as "o-" or ":".
        marks: {label: (y, colour)}, dashed horizontal lines.
        labels: arguments of `Axes.set`, such as xlabel.
    """
    figure, axes = new(width=6.8)
    for label, (x, y, colour, style) in curves.items():
        axes.plot(x, y, style, color=colour, label=label)
    for label, (y, colour) in (marks or {}).items():
        axes.axhline(y, color=colour, ls="--", lw=1, label=label)
    axes.set(**labels)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    show(figure, name)


def shares(
    name: str, panels: dict, label: str, colours: str = "Blues", line: float | None = None, **labels
) -> None:
    """Matrices of numbers from 0 to 1 side by side, with one colour bar.

    Args:
        panels: {title: matrix}.
        label: of the colour bar.
        colours: matplotlib's name of a colour map.
        line: where a vertical line is drawn in every panel.
        labels: arguments of `Axes.set` for every panel.
    """
    figure, axes = new(len(panels), width=4.8, height=4.6)
    for ax, (title, matrix) in zip(figure.axes, panels.items(), strict=True):
        image = ax.imshow(matrix, cmap=colours, vmin=0, vmax=1, aspect="auto")
        ax.set(title=title, **labels)
        if line is not None:
            ax.axvline(line, color=TEXT)
        if "xticklabels" in labels:
            ax.tick_params(axis="x", labelrotation=90)
    figure.colorbar(image, ax=axes, label=label)
    show(figure, name)


def two_ways() -> None:
    """What each layer computes at each position, after fine-tuning and with a prefix."""
    figure, axes = new(2, width=4.6, height=2.2)
    ways = {"fine-tuning": (OTHER, 0), "prefix-tuning": (TEXT, 3)}
    for ax, (way, (colour, n)) in zip(axes, ways.items(), strict=True):
        cells = torch.tensor(to_rgb(colour)).repeat(4, n + 11, 1)  # 4 layers
        cells[:, :n] = torch.tensor(to_rgb(PREFIX))
        ax.pcolormesh(cells, edgecolors="white", linewidth=3)
        ax.axvline(n + 6, color="black", lw=1)
        parts = {"table": n + 3, "sentence": n + 8.5} | ({"prefix": n / 2} if n else {})
        ax.set_xticks([*parts.values()], [*parts])
        ax.set(xlabel="position", ylabel="layer", yticks=[], title=way)
    show(figure, "01_two_ways")
