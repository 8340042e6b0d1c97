"""Figures like the paper's, from the rows of a CSV: means with one standard deviation.

Read `draw`. Tables become bars with the paper's numbers, and figures become curves.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.published import published
from benchmarks.paper.results import Row, mean_sd, pick, scales_of, value
from minprefix.files import atomic_write
from minprefix.palette import INK, PREFIX, colour_of

BAND, DOT = 0.18, 0.5  # opacity of a band and of a single run
SCORES = {  # the scores in each figure: column, label
    "figure3": (("BLEU", "BLEU"), ("R-L", "ROUGE-L")),
    "figure4": (
        ("BLEU", "BLEU"),
        ("TER", "TER (lower is better)"),
        ("R-L", "ROUGE-L"),
        ("train_loss", "loss, last tenth of steps (nats per token)"),
    ),
    "figure6": (("BLEU", "BLEU"), ("R-L", "ROUGE-L")),
}
AXES = {  # the label of each figure's x axis
    "figure3": "training pairs",
    "figure4": "prefix length (positions)",
    "figure5": "training pairs",
    "figure6": "share of the training pairs (%)",
}
WHISKERS = "whiskers: 1 standard deviation over runs"
BANDS = "bands: 1 standard deviation over runs; small dots: single runs"


def title(experiment: str) -> str:
    """The name of a table or figure in the paper: "Table 1" for "table1"."""
    return f"{experiment[:-1].capitalize()} {experiment[-1]}"


def names_of(rows: Sequence[Row], column: str = "name") -> list[str]:
    """The different cells of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def new_figure(panels: int):
    """A figure and its panels, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 4.0), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(axes, rows: Sequence[Row], experiment: str, data: str, column: str) -> None:
    """A bar for each name, with the paper's number (GPT-2 medium) as a black mark."""
    names = [name for name in names_of(rows) if mean_sd(pick(rows, name=name), column)]
    for i, name in enumerate(names):
        mean, sd, n = mean_sd(pick(rows, name=name), column)
        axes.barh(i, mean, 0.7, xerr=sd if n > 1 else None, capsize=3, color=colour_of(name))
        said = published(experiment, data, name).get(column)
        if said is not None:
            axes.plot([said, said], [i - 0.38, i + 0.38], color=INK, lw=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"{column} (0 to 100)", title=data)


def draw_table(experiment: str, rows: Sequence[Row]):
    """Bars for each data set."""
    columns = ("BLEU S", "BLEU U") if experiment == "table3" else ("BLEU", "BLEU A")
    panels = [
        (data, column)
        for data in names_of(rows, "data")
        for column in columns
        if mean_sd(pick(rows, data=data), column)
    ]
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for one, (data, column) in zip(axes, panels, strict=True):
        bars(one, pick(rows, data=data), experiment, data, column)
    return figure


def draw_starts(rows: Sequence[Row]):
    """Figure 5: a point for each start, in low data and with all data."""
    panels = [x for x in ("100", "all") if mean_sd(pick(rows, x=x), "BLEU")]
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for one, x in zip(axes, panels, strict=True):
        found = {n: mean_sd(pick(rows, x=x, name=n), "BLEU") for n in names_of(rows)}
        found = {name: mean for name, mean in found.items() if mean is not None}
        for i, (mean, sd, _) in enumerate(found.values()):
            one.errorbar(mean, i, xerr=sd, fmt="o", color=PREFIX, ecolor=INK, capsize=3)
        one.set_yticks(range(len(found)), list(found))
        one.set_ylim(len(found) - 0.5, -0.5)
        one.set(title=f"{x} training pairs", xlabel="BLEU (0 to 100)")
    return figure


def place(x: str) -> float:
    """The position of an x on the axis: a number of pairs or positions, or percent."""
    return float(x.rstrip("%"))


def draw_curves(experiment: str, rows: Sequence[Row]):
    """A curve with its band for each name."""
    panels = [p for p in SCORES[experiment] if mean_sd(rows, p[0])]
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for one, (column, label) in zip(axes, panels, strict=True):
        for name in names_of(rows):
            curve = []
            for x in names_of(rows, "x"):
                found = mean_sd(pick(rows, name=name, x=x), column)
                if found is not None:
                    curve.append((place(x), found.mean, found.sd))
            if not curve:
                continue
            xs, means, sds = zip(*sorted(curve), strict=True)
            colour = colour_of(name)
            one.plot(xs, means, "o-", color=colour, label=name, ms=4)
            low = [m - sd for m, sd in zip(means, sds, strict=True)]
            high = [m + sd for m, sd in zip(means, sds, strict=True)]
            one.fill_between(xs, low, high, color=colour, alpha=BAND, lw=0)
            runs = pick(rows, name=name)
            places, scores = [place(row["x"]) for row in runs], [value(row, column) for row in runs]
            one.plot(places, scores, ".", color=colour, alpha=DOT, ms=5, mew=0)
        if experiment == "figure3":
            one.set_xscale("log")
            ticks = sorted({int(x) for x in names_of(rows, "x")})
            one.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            one.minorticks_off()
        one.set(xlabel=AXES[experiment], ylabel=label)
        one.legend(frameon=False)
    return figure


def draw(experiment: str, rows: Sequence[Row], path: Path) -> bool:
    """Write the figure of a table or figure; returns False if no row has a score."""
    rows = [row for row in rows if not row.get("problem")]
    if experiment == "figure5":
        figure = draw_starts(rows)
    elif experiment in SCORES:
        figure = draw_curves(experiment, rows)
    else:
        figure = draw_table(experiment, rows)
    if figure is None:
        return False
    lines = [f"{title(experiment)}, with {rows[0]['model']} ({scales_of(rows)})"]
    lines.append(BANDS if experiment in SCORES else WHISKERS)
    if experiment.startswith("table"):
        lines.append("black marks: the paper's GPT-2 medium")
    figure.suptitle("\n".join(lines), fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
    return True
