"""The pictures of tutorials 6 to 10, which have the explanations. Each makes one figure."""

import torch
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from matplotlib.colors import ListedColormap

METHODS = {"FT-FULL": ("fine-tuning", TEXT), "PREFIX": ("prefix", PREFIX)}
LOSS = "loss (nats per target token)"


def over_sizes(axes, sizes: list[int], ylabel: str) -> None:
    """A logarithmic axis of training pairs."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="training pairs of E2E", ylabel=ylabel)


def beside(axes) -> None:
    """The legend, to the right of the axes."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def crossover(bleu: dict[tuple[str, int], list[float]], gaps: dict) -> None:
    """BLEU of every run by (method, pairs), and the paired differences by pairs."""
    figure, (left, right) = new(2, width=4.4)
    for name, (method, colour) in METHODS.items():
        means = [sum(dots) / len(dots) for key, dots in bleu.items() if key[0] == name]
        left.plot(list(gaps), means, color=colour, label=method)
        for size in gaps:
            dots = bleu[name, size]
            left.plot([size] * len(dots), dots, "o", color=colour, ms=4, alpha=0.5)
    left.set(title="each dot is one training")
    left.legend(frameon=False)
    means, margins = zip(*((gap.mean, gap.margin) for gap in gaps.values()), strict=True)
    right.errorbar(list(gaps), means, margins, fmt="o-", capsize=4, color=OTHER)
    right.axhline(0, color=FAINT)
    right.set(title="mean and 95 % interval")
    over_sizes(left, list(gaps), "BLEU (0 to 100)")
    over_sizes(right, list(gaps), "prefix - fine-tuning (BLEU)")
    show(figure, "06_crossover")


def by_heart(losses: dict[tuple[str, int], list[float]]) -> None:
    """Training and dev loss by (method, pairs)."""
    figure, axes = new(width=5.6)
    for name, (method, colour) in METHODS.items():
        sizes = [size for other, size in losses if other == name]
        seen, unseen = zip(*(losses[name, size] for size in sizes), strict=True)
        axes.plot(sizes, unseen, "o-", color=colour, label=f"{method}, dev")
        axes.plot(sizes, seen, "o:", color=colour, label=f"{method}, training")
    over_sizes(axes, sizes, LOSS)
    axes.set_ylim(0, None)
    beside(axes)
    show(figure, "06_by_heart")


def twenty_pairs(curves: dict[str, tuple[list[float], list[tuple[int, float]]]]) -> None:
    """By method the training loss of each step, and (step, dev loss)."""
    figure, axes = new(width=5.6)
    for name, colour in METHODS.values():
        seen, unseen = curves[name]
        steps = range(1, len(seen) + 1)
        axes.plot(steps, seen, ":", color=colour, label=f"{name}, training")
        axes.plot(*zip(*unseen, strict=True), "o-", color=colour, label=f"{name}, dev")
    axes.set(xlabel="step (8 rows each)", ylabel=LOSS)
    axes.set_ylim(0, None)
    beside(axes)
    show(figure, "06_twenty_pairs")


def starts(bleu: dict[str, list[float]]) -> None:
    """BLEU of every run, by the start of its prefix."""
    figure, axes = new(width=6, height=3)
    for i, (name, dots) in enumerate(bleu.items()):
        axes.plot(dots, [i] * len(dots), "o", color=FAINT if name == "random" else PREFIX)
    axes.set_yticks(range(len(bleu)), list(bleu))
    axes.set(xlabel="BLEU at 100 pairs (0 to 100)", ylabel="start of the prefix")
    show(figure, "06_starts")


def who_got_what(shares, writers: list[str], styles: list[str]) -> None:
    """shares (writers, styles): of a writer's texts, those in a style."""
    figure, axes = new(width=5.4)
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1)
    for y, of_writer in enumerate(shares):
        for x, share in enumerate(of_writer):
            colour = "white" if share > 0.6 else "black"
            axes.text(x, y, f"{share:.0%}", ha="center", color=colour)
    axes.set_xticks(range(len(styles)), [f"{user}'s" for user in styles])
    axes.set_yticks(range(len(writers)), writers)
    axes.set(xlabel="style", ylabel="prefix", title="In whose style the texts are")
    show(figure, "07_who_got_what")


def three_attentions(sites: tuple[str, ...], P: int, S: int, T: int) -> None:
    """What the queries of each of BART's attentions see, with S source and T summary tokens."""
    figure, axes = new(columns=3, width=3.4, height=3.3)
    for axis, site in zip(axes, sites, strict=True):
        queries = "x" * S if site == "encoder" else "y" * T
        keys = "y" * T if site == "decoder" else "x" * S
        sees = torch.ones(len(queries), len(keys))
        sees = sees.tril() if site == "decoder" else sees
        grid = torch.cat([torch.full((len(queries), P), 2.0), sees], dim=1)
        colours = ListedColormap(["#f4f4f4", TEXT, PREFIX])
        axis.pcolormesh(grid, cmap=colours, vmin=0, vmax=2, edgecolors="white")
        axis.set(aspect="equal", ylim=(len(queries), 0), xlim=(0, P + S))
        axis.set_anchor("N")
        axis.set_xticks(torch.arange(P + len(keys)) + 0.5, [*("p" * P), *keys])
        axis.set_yticks(torch.arange(len(queries)) + 0.5, [*queries])
        axis.set(title=site, xlabel="keys and values")
    axes[0].set(ylabel="queries")
    show(figure, "08_three_attentions")


def parts_of_a_step(profile: dict[str, dict[str, dict]], parts: tuple[str, ...]) -> None:
    """A CPU's training step by dtype and method, in ms of each part."""
    figure, axes = new(len(profile), width=5.0)
    colours = "#8c6bb1", OTHER, PREFIX, TEXT, "#c44e52", FAINT
    for axis, (dtype, methods) in zip(axes, profile.items(), strict=True):
        left = [0.0] * len(methods)
        for part, colour in zip(parts, colours, strict=True):
            widths = [float(r[part]) for r in methods.values()]
            axis.barh(list(methods), widths, left=left, color=colour, label=part)
            left = [x + y for x, y in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set(xlabel="a training step (ms)", title=f"CPU, {dtype}")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=3, loc="outside lower center")
    show(figure, "09_parts")


def on_the_gpu(profiled: list[dict[str, str]], floors: dict[str, float]) -> None:
    """A GPU's training step and one decoded token by part; floors (s) of the step's parts."""
    figure, axes = new(2, width=6.0, height=3.4)
    for axis, work in zip(axes, ("train", "one token"), strict=True):
        rows = [r for r in profiled if r["work"] == work]
        names = [r["part"] for r in rows]
        colours = [PREFIX if x == "attention" else TEXT for x in names]
        axis.barh(names, [float(r["ms"]) for r in rows], color=colours)
        axis.invert_yaxis()
        axis.set(xlabel="time (ms)", title=f"{rows[0]['gpu']}, {work}")
    marks = [1e3 * floor for floor in floors.values()]
    axes[0].plot(marks, list(floors), "k|", ms=14, label="floor")
    axes[0].legend(frameon=False)
    show(figure, "09_gpu")


def pretraining(
    sizes: list[float], log: list[dict], held_out: list[dict], guess: float, entropy: float
) -> None:
    """Bytes per token after each merge, and the losses of a run between two levels (nats)."""
    figure, (left, right) = new(columns=2)
    left.plot(range(257, 257 + len(sizes)), sizes, color=TEXT)
    left.set(
        xlabel="bytes + merges (tokens)", ylabel="bytes per token",
        title="Merges shorten the text",
    )  # fmt: skip
    points = [(entry["step"], entry["loss"]) for entry in log]
    right.plot(*zip(*points, strict=True), color=FAINT, label="training")
    points = [(entry["step"], entry["dev_loss"]) for entry in held_out]
    right.plot(*zip(*points, strict=True), "o-", color=PREFIX, label="held out")
    right.axhline(guess, color=TEXT, ls=":", label="log V")
    right.axhline(entropy, color=OTHER, ls="--", label="unigram entropy")
    right.set(title="Below the dashed line, context is used")
    right.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    right.legend(frameon=False)
    show(figure, "10_pretrain_your_own")
