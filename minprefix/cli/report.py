"""The readable results of a run: tables, sample texts of several methods, and figures."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minprefix.data.examples import Example
from minprefix.files import atomic_write, write_text
from minprefix.methods.adapters import count
from minprefix.metrics.quick import facts, known_values
from minprefix.models.bart import BART
from minprefix.models.base import adapter_of
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.palette import PALE, PREFIX, colour_of
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix


def say(text: str) -> None:
    """Print a message that is not part of the result, on stderr."""
    print(text, file=sys.stderr, flush=True)


def size_of(path: Path) -> str:
    """The size of a file, or of all files of a folder, such as "123 KB" (1000 bytes)."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def tensorboard(folder: Path) -> Callable[[dict], None]:
    """A function that writes the numbers of a log line as TensorBoard files in a folder.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--track needs the package tensorboard: pip install tensorboard") from None
    writer: Any = SummaryWriter(str(folder))

    def watch(entry: dict) -> None:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return watch


def format_rows(rows: list[dict]) -> str:
    """Format dicts with equal keys as a table: numbers on the right, floats with two digits."""
    if not rows:
        return ""
    heads = [name.replace("slot_coverage", "slot values %") for name in rows[0]]
    cells = [heads] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    lines = [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def gpt2_parts(config: GPT2Config) -> list[tuple[str, str, str]]:
    """For each part: its name, its shape, and a substring of its parameters' names."""
    L = config.n_layer
    return [
        ("token embedding = head", "(V, C)", ".wte."),
        ("position embedding", "(n_positions, C)", ".wpe."),
        (f"{L} layers: attention", "L x (C, 3C), (C, C)", ".attn."),
        (f"{L} layers: MLP", "L x (C, 4C), (4C, C)", ".mlp."),
        ("layer norms", "(2L + 1) x 2 x (C,)", ".ln"),
    ]


def bart_parts(config: BARTConfig) -> list[tuple[str, str, str]]:
    """The same for a BART."""
    L, E = config.n_layer, config.n_encoder_layer
    return [
        ("token embedding = head", "(V, C)", ".wte."),
        ("position embeddings", "2 x (2 + n_positions, C)", ".wpe."),
        (f"{E} + {L} layers: self-attention", "each (C, 3C), (C, C)", ".attn."),
        (f"{L} layers: cross attention", "each (C, C), (C, 2C), (C, C)", ".cross."),
        (f"{E} + {L} layers: MLP", "each (C, 4C), (4C, C)", ".mlp."),
        ("layer norms", f"({2 * E} + {3 * L} + 2) x 2 x (C,)", ".ln"),
    ]


PARTS: dict[str, Callable[[Any], list[tuple[str, str, str]]]] = {
    "GPT-2": gpt2_parts,
    "BART": bart_parts,
}


def prefix_rows(prefix: Prefix | BARTPrefix) -> list[tuple[str, str, int]]:
    """Name, shape and size of the trained and the kept parameters of a prefix."""
    rows = []
    if prefix.n_trained:
        rows.append((f"trained ({prefix.parametrisation})", "", prefix.n_trained))
    names = {
        "prefix_table": f"{prefix.place} table",
        "gate": f"{prefix.place} gate",
        "virtual_embd": "virtual tokens of the source",
    }
    kept = prefix.tensors()
    for key, x in kept.items():
        *site, name = key.split(".")  # of a BART's attention
        rows.append((", ".join([names[name], *site]), str(tuple(x.shape)), x.numel()))
    if len(kept) > 1:
        rows.append(("prefix in all", "", sum(x.numel() for x in kept.values())))
    return rows


def parameter_rows(model: GPT2 | BART, prefix: Prefix | BARTPrefix | None = None) -> list[dict]:
    """Where the parameters are: part, shape, number, percent of the model. An attached adapter has
    a row of its own."""
    total = sum(weight.numel() for weight in model.parameters())
    config = model.config
    rows = []
    for name, shape, part in PARTS[config.family](config):
        n = sum(w.numel() for key, w in model.named_parameters() if part in f".{key}")
        rows.append((name, shape, n))
    rows.append(("model", f"L={config.n_layer} H={config.n_head} C={config.n_embd}", total))
    if prefix is not None:
        rows += prefix_rows(prefix)
    adapter = adapter_of(model)
    if adapter is not None:
        shape = f"bottleneck {adapter.bottleneck}"
        rows.append((f"adapter, design {adapter.design}", shape, count(adapter)))
    return [
        {"part": name, "shape": shape, "parameters": n, "percent": round(100 * n / total, 4)}
        for name, shape, n in rows
    ]


def write_samples(path: Path, examples: list[Example], texts: dict[str, list[str]]) -> None:
    """Write, for each table, the table, its references and each method's text, with the facts that
    are missing or wrong in the text."""
    width, known = max(map(len, texts)), known_values(examples)
    blocks = []
    for i, example in enumerate(examples):
        fields = example.table or (("source", example.source),)
        lines = [f"[{i + 1}]"] + [f"  {field}: {value}" for field, value in fields]
        lines += ["  references:"] + [f"    - {target}" for target in example.targets]
        for name in texts:
            lines.append(f"  {name:<{width}} | {texts[name][i]}")
            lines += [
                f"  {'':<{width}} | {line}" for line in faults(texts[name][i], example, known)
            ]
        blocks.append("\n".join(lines) + "\n")
    write_text(path, "\n".join(blocks))


def faults(text: str, example: Example, known: dict[str, tuple[str, ...]]) -> list[str]:
    """Lines about missing and wrong facts; [] without a table or without a fault."""
    found = facts(text, example.table or (), known if example.table else {})
    return [
        f"  {name}: " + "; ".join(f"{field} = {value}" for field, value in pairs)
        for name, pairs in (("missing", found.missing), ("wrong", found.wrong))
        if pairs
    ]


def plot_loss(
    log: list[dict], path: Path, title: str, levels: dict[str, float] | None = None
) -> None:
    """Plot training and dev loss against the step, with named constant levels for comparison."""
    figure, axes = new_figure()
    train = [entry for entry in log if "loss" in entry]
    dev = [entry for entry in log if "dev_loss" in entry]
    axes.plot(
        [e["step"] for e in train], [e["loss"] for e in train], color=PALE, label="training", lw=1.2
    )
    axes.plot(
        [e["step"] for e in dev], [e["dev_loss"] for e in dev], "o-", color=PREFIX, label="dev"
    )
    for name, level in (levels or {}).items():
        axes.axhline(level, color="grey", lw=1, ls="--", label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_curves(logs: dict[str, list[dict]], path: Path) -> None:
    """Plot the dev losses of several runs, by name."""
    figure, axes = new_figure()
    for name, log in logs.items():
        dev = [entry for entry in log if "dev_loss" in entry]
        axes.plot([e["step"] for e in dev], [e["dev_loss"] for e in dev], "o-", label=name, lw=1.2)
    axes.set(xlabel="optimizer step", ylabel="dev loss (nats per target token)")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_comparison(rows: list[dict], path: Path, title: str) -> None:
    """Plot one group of bars per score, with one bar per method. Rows: method and scores in 0 ..
    100."""
    scores = {"BLEU": "BLEU", "ROUGE-L": "ROUGE-L", "slots %": "slot values in the text"}
    figure, axes = new_figure()
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        at = [x + (i - (len(rows) - 1) / 2) * width for x in range(len(scores))]
        bars = axes.bar(
            at,
            [row[name] for name in scores],
            width * 0.92,
            color=colour_of(row["method"]),
            label=row["method"],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(scores)), scores.values())
    axes.set(ylabel="score (0 to 100)", ylim=(0, 118), title=title)
    axes.legend(frameon=False, ncols=len(rows), loc="upper center", fontsize=9)
    save_figure(figure, path)


def new_figure():
    """A figure and its axes, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
