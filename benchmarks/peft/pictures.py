"""The benchmark's pictures: throughput against B, T and P, and the parts of a training step.

`results.py` calls them.
"""

from pathlib import Path

from benchmarks.peft.traces import PARTS, REST
from minprefix import palette
from minprefix.files import atomic_write

AXES = {"B": "batch size B (rows)", "T": "tokens per row T", "P": "prefix positions P"}
LOSS_AT = {"all": "loss at all positions", "targets": "loss at the targets"}  # the column labels


def fixed(row: dict) -> str:
    """What the title of a picture says of the sizes that are the same in all of it."""
    said = [f"{name} {row[name]}" for name in AXES if row.get(name)]
    if row.get("labels"):
        said.append(LOSS_AT[row["labels"]])
    return ", ".join(said)


def longest_series(rows: list[dict[str, str]], x: str) -> tuple[dict, list[dict[str, str]]]:
    """The rows that differ only in column x (and method and beams), and their common values.

    Among several such series, the one with most values of x.
    """
    same = [n for n in ("B", "T", "P", "data", "labels", "mlp", "new") if n != x]
    series: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        series.setdefault(tuple(row[n] for n in same), []).append(row)
    key = max(series, key=lambda k: len({row[x] for row in series[k]}))
    return dict(zip(same, key, strict=True)), series[key]


def draw(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Plot throughput against those of B, T and P that vary; nothing if none does.

    The title of a panel names the fixed values.
    """
    from matplotlib.figure import Figure

    panels = []
    for work in ("train", "generate"):
        done = [row for row in rows if row["work"] == work and row["ms"]]
        found = [(work, x, *longest_series(done, x)) for x in AXES] if done else []
        panels += [panel for panel in found if len({row[panel[1]] for row in panel[3]}) > 1]
    if not panels:
        return
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * n_rows + 0.4), dpi=130, layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)
    grid = figure.subplots(n_rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (work, x, common, series) in zip(grid, panels, strict=False):
        for method, beams in dict.fromkeys((row["method"], row["beams"]) for row in series):
            points = sorted(
                (int(row[x]), float(row["tokens_per_s"]))
                for row in series
                if (row["method"], row["beams"]) == (method, beams)
            )
            label = method if beams in ("", "1") else f"{method}, {beams} beams"
            style = "^:" if "-" in method else "o-" if beams in ("", "1") else "s--"
            axes.plot(
                *zip(*points, strict=True), style, color=palette.colour_of(method), label=label
            )
        top = max(float(row["tokens_per_s"]) for row in series)
        axes.set(xlabel=AXES[x], ylabel="tokens/s", ylim=(0, 1.1 * top))
        axes.set_title(f"{work}: {fixed(common)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def draw_profile(rows: list[dict], path: Path, title: str) -> None:
    """One bar per method: the parts of a step, in ms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.6 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for part, colour in zip((*PARTS, REST), (*palette.PARTS, palette.FAINT), strict=True):
        widths = [float(row[part]) for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="one training step (ms)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=3, loc="outside lower center", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
