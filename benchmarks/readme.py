"""Writes the tables and figures of the README and the guides: python -m benchmarks.readme

They are made from the CSVs. `PAGES` lists the tables of each page; the README has the short ones.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from benchmarks import defaults
from benchmarks.kernels import attention, decode
from benchmarks.machine import read_rows
from benchmarks.peft.pictures import LOSS_AT
from benchmarks.peft.results import KEY
from minprefix.files import atomic_write, write_text
from minprefix.palette import PREFIX, TEXT, colour_of

HERE = Path(__file__).parent
GPU = HERE / "gpu"
README, GUIDES = HERE.parent / "README.md", HERE.parent / "docs" / "guides"
END = "<!-- end of table -->"
ORDER = ("hard prompt", "examples in context", "prefix", "finetune")
NAMES = {
    "hard prompt": "hard prompt",
    "examples in context": "examples in context",
    "prefix": "prefix (10 positions)",
    "finetune": "fine-tuning",
}

BART_METHODS = {
    "first sentence": "first sentence (lead-1)",
    "best sentence (oracle)": "each note's best sentence (oracle)",
    "prefix": "prefix (10 positions at each site)",
    "finetune": "fine-tuning",
}


def markdown(columns: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. `columns` is its first line, with | between the names."""
    lines = [f"| {columns} |", f"|{'---|' * len(columns.split('|'))}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def final_rows() -> list[dict[str, str]]:
    """Rows of the test set, in the order of ORDER, then decoding, then seed."""
    rows = [row for row in read_rows(HERE / "e2e.csv") if row["split"] == "test"]
    return sorted(
        rows, key=lambda r: (ORDER.index(r["method"]), r["decoding"] != "greedy", r["seed"])
    )


def e2e_table() -> str:
    """The Markdown table of the test rows."""
    columns = "method | decoding | seed | BLEU | ROUGE-L | slot values in the text"
    rows = []
    for row in final_rows():
        minutes = float(row["train_seconds"]) / 60
        rows.append((
            NAMES[row["method"]], row["decoding"], row["seed"], row["bleu"], row["rouge_l"],
            f"{row['slot_coverage']} %", f"{int(row['parameters']):,}",
            f"{minutes:.0f} min" if minutes else "none",
        ))  # fmt: skip
    return markdown(f"{columns} | parameters kept | training", rows)


def bart_table(short: bool = False) -> str:
    """mini-bart on tables and on notes: the test rows, including parts of the notes as summaries.

    For a method with several seeds: the mean, the standard deviation and the number of seeds. The
    short table has only beam search, and among the parts of the notes only the first sentence.
    """
    columns = ("bleu", "slot_coverage", "R-1", "R-2", "R-L")
    lines = []
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_rows(HERE / "bart_tasks.csv"):
        left_out = short and (row["decoding"] == "greedy" or "oracle" in row["method"])
        if row["split"] == "test" and row["method"] in BART_METHODS and not left_out:
            key = (row["task"], row["method"], row["decoding"])
            groups.setdefault(key, []).append(row)
    order = {name: n for n, name in enumerate(BART_METHODS)}
    for (task, method, decoding), rows in sorted(
        groups.items(), key=lambda g: (g[0][0], order[g[0][1]], g[0][2] != "greedy")
    ):
        cells = []
        for column in columns:
            found = [float(row[column]) for row in rows if row.get(column)]
            spread = f" ± {np.std(found, ddof=1):.1f} ({len(found)})" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.1f}{spread}" if found else "")
        seconds = [float(row["train_seconds"]) for row in rows if row["train_seconds"]]
        training = f"{np.mean(seconds) / 60:.0f} min" if seconds else "none"
        lines.append((task, BART_METHODS[method], decoding, *cells, training))
    head = "data | method | decoding | BLEU | slot values | R-1 | R-2 | R-L | training"
    return markdown(head, lines)


def speed_table(short: bool = False) -> str:
    """Ours and PEFT on a CPU, P = 10. The short table has only `mini`, in a few cases."""
    lines = []
    rows = [row for row in read_rows(HERE / "cpu" / "bench.csv") if row["P"] == "10"]
    ours = [row for row in rows if row["method"] == "minprefix" and shown(row)]
    for row in sorted(ours, key=lambda r: (r["work"] != "train", r["model"] != "mini")):
        if short and not shown_in_short(row):
            continue
        (peft,) = (r for r in rows if r["method"] == "peft" and case(r) == case(row))
        if not peft["ms"]:  # its results were wrong, see its note
            continue
        both = [f"{float(one['tokens_per_s']):,.0f}" for one in (row, peft)]
        lines.append((work_of(row), row["dtype"], *both, f"{float(peft['ratio']):.2f}"))
    return markdown("work | dtype | tokens/s | PEFT | ratio", lines)


def shown(row: dict[str, str]) -> bool:
    """Whether a row is shown: of mini only T = 128 or real tables, and few batch sizes."""
    if row["model"] != "mini":
        return True
    if row["work"] == "generate":
        return row["B"] in ("1", "16")
    return row["B"] in ("10", "32") and (row["T"] == "128" or row["data"] != "random")


def shown_in_short(row: dict[str, str]) -> bool:
    """Whether a row is in the short table: `mini`, training on 10 random rows, one greedy text, and
    many beams."""
    if row["work"] == "generate":
        return row["model"] == "mini" and (row["B"], row["beams"]) in (("1", "1"), ("16", "5"))
    return (
        row["model"] == "mini"
        and row["B"] == "10"
        and row["labels"] == "all"
        and (row["data"] == "random")
    )


def case(row: dict[str, str]) -> tuple[str, ...]:
    """The case on which several methods were measured."""
    return tuple(value for name, value in row.items() if name in KEY and name != "method")


def work_of(row: dict[str, str]) -> str:
    """One measurement in words."""
    model = row["model"].replace("random-gpt2", "GPT-2 small")
    if row["work"] == "generate":
        search = "greedy" if row["beams"] == "1" else f"{row['beams']} beams"
        return f"{model}: write {row['new']} tokens, B {row['B']}, {search}"
    if row["data"] != "random":
        return f"{model}: train on {row['data']}, B {row['B']}, T {row['T']} on average"
    return f"{model}: train, B {row['B']}, T {row['T']}, {LOSS_AT[row['labels']]}"


def gpu_attention_table() -> str:
    """Ours, attention without a prefix, and the best peer, at the shapes with targets."""
    times = attention.Times(read_rows(GPU / "attention-h200.csv"))
    noted = {tuple(r[n] for n in ("B", "T", "H", "P", "pass")): float(r["ratio"])
             for r in read_rows(GPU / "peers-h200.csv")}  # fmt: skip
    lines = []
    for shape in attention.ISSUE + attention.MORE:
        for which, aim in attention.aims(shape).items():
            ours = times.of(shape, which, "ours_qkv")
            peer = [times.of(shape, which, *attention.PEERS) / ours]
            peer += [noted[key]] if (key := (*map(str, shape[:4]), which)) in noted else []
            peer = [ratio for ratio in peer if ratio > 0]  # NaN where none was measured
            lines.append((
                ", ".join(map(str, shape[:4])), which.replace("+", " + "), f"{ours:.1f}",
                f"{times.bare(shape, which):.1f}", f"{times.adjusted(shape, which):.2f}",
                f"{aim:g}", f"{min(peer):.1f}" if peer else "",
            ))  # fmt: skip
    head = "B, T, H, P | pass | ours, µs | no prefix, µs | adjusted ratio | target, at most"
    return markdown(f"{head} | best peer / ours", lines)


def gpu_decode_table() -> str:
    """One step of decoding: ours, and a cache that holds the prefix."""
    times = decode.Times(read_rows(GPU / "decode-h200.csv"))
    lines = []
    for shape in dict.fromkeys(decode.REFERENCE + decode.BANKS):
        us = [times.of(shape, method) for method in ("ours", "static", "grown")]
        share = f"{100 * times.of(shape, 'ours_only', 'of_copy'):.0f} %"
        sizes = (", ".join(map(str, shape[:4])), max(1, shape.N))
        lines.append((*sizes, *(f"{x:.1f}" for x in us), share))
    head = "B, H, S, P | prefixes | ours, µs | static cache, µs | growing cache, µs"
    return markdown(f"{head} | the kernel's share of a copy's bandwidth", lines)


def gpu_steps_table() -> str:
    """Whole steps and texts, with PEFT where it was also measured."""
    rows = read_rows(GPU / "steps-h200.csv")
    lines = []
    peers = {case(row): row for row in rows if row["method"] == "peft" and row["ratio"]}
    for row in sorted(rows, key=lambda row: row["work"] != "train"):
        peft = peers.get(case(row))
        if row["method"] != "minprefix" or peft is None:
            continue
        work = f"train, B {row['B']}, T {row['T']}"
        if row["work"] == "generate":
            beams = "" if row["beams"] == "1" else f", {row['beams']} beams"
            work = f"write {row['new']} tokens, B {row['B']}{beams}"
            work += f" ({float(row['tokens_per_s']):,.0f} tokens/s)"
        if row["data"] != "random":
            work += f", {row['data']} ({float(row['examples_per_s']):,.0f} examples/s)"
        if row["model"] != "random-medium":
            work = f"{row['model'].replace('random-', 'GPT-2 ')}: {work}"
        memory = ""  # of a text the peak is that of the check in fp64
        if row["work"] == "train":
            memory = f"{int(row['peak_mib']):,} MiB, PEFT {int(peft['peak_mib']):,} MiB"
        times = [f"{float(x['ms']):.1f}" for x in (row, peft)]
        lines.append((work, *times, f"{float(peft['ratio']):.1f}", memory))
    return markdown("work | ours, ms | PEFT, ms | ratio | peak memory", lines)


def defaults_table() -> str:
    """The rule for open settings against the best of a grid around it."""
    lines = []
    for row in defaults.summary():
        lines.append((
            row["model"], row["data"], f"{row['pairs']:,}", f"{row['seed 0']:.3f}",
            f"{row['best of grid']:.3f}", f"{row['excess']:.1f} %", row["grid"],
            f"{row['spread']:.3f} ({row['seeds']})" if row["seeds"] > 1 else "one seed",
        ))  # fmt: skip
    head = "model | data | pairs | dev loss of the rule, seed 0 | lowest in the grid | difference"
    return markdown(f"{head} | runs in the grid | range of the rule over seeds", lines)


def copying_table() -> str:
    """How each choice changes the facts in the texts."""
    names = ("choice", "decoding", "steps", "bleu", "slot_coverage")
    names += ("missing_per_text", "wrong_per_text")
    head = "choice | decoding | steps | BLEU | slot values | missing per text | wrong per text"
    rows = read_rows(HERE / "copying.csv")
    rows = [row | {"slot_coverage": f"{row['slot_coverage']} %"} for row in rows]
    return markdown(head, [[row[name] for name in names] for row in rows])


def of_columns(file: str, names: Sequence[str], head: str) -> str:
    """A table of these columns of a CSV."""
    return markdown(head, [[row[name] for name in names] for row in read_rows(HERE / file)])


def threads_table() -> str:
    """Seconds of a training step by threads and by how they wait, alone and with other work."""
    lines: dict[tuple, list] = {}  # a line has the quiet machine first, as the CSV does
    for row in read_rows(HERE / "threads.csv"):
        key = row["precision"], row["threads_set"], row["policy"]
        lines.setdefault(key, [*key]).append(row["seconds"])
    head = "precision | threads | OMP_WAIT_POLICY | seconds per step, alone | next to another run"
    return markdown(head, lines.values())


def reliability_table() -> str:
    """The counts of tests/reliability.py."""
    names = ("what", "cases", "failures", "more", "commit")
    return of_columns("reliability.csv", names, "what | cases | failures | | commit")


def environments_table() -> str:
    """The results of tools/environments.py."""
    names = ("environment", "python", "torch", "triton", "numpy", "passed", "failed", "skipped")
    return of_columns("environments.csv", (*names, "note"), f"{' | '.join(names)} |")


PAGES = {  # page: {CSV named in the mark before a table: function that makes the table}
    README: {
        "benchmarks/e2e.csv": e2e_table,
        "benchmarks/bart_tasks.csv": partial(bart_table, short=True),
        "benchmarks/cpu/bench.csv": partial(speed_table, short=True),
        "benchmarks/gpu/steps-h200.csv": gpu_steps_table,
    },
    HERE.parent / "RELIABILITY.md": {"benchmarks/reliability.csv": reliability_table},
    GUIDES / "e2e.md": {"benchmarks/e2e.csv": e2e_table},
    GUIDES / "bart.md": {"benchmarks/bart_tasks.csv": bart_table},
    GUIDES / "your_data.md": {
        "benchmarks/defaults.csv": defaults_table,
        "benchmarks/copying.csv": copying_table,
        "benchmarks/threads.csv": threads_table,
    },
    GUIDES / "verification.md": {"benchmarks/environments.csv": environments_table},
    GUIDES / "speed_cpu.md": {"benchmarks/cpu/bench.csv": speed_table},
    GUIDES / "speed_gpu.md": {
        "benchmarks/gpu/steps-h200.csv": gpu_steps_table,
        "benchmarks/gpu/attention-h200.csv": gpu_attention_table,
        "benchmarks/gpu/decode-h200.csv": gpu_decode_table,
    },
}


def with_tables(page: Path) -> str:
    """The text of a page, with each table inserted between its two marks."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        begin = f"<!-- table: {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + table() + END + rest.split(END, 1)[1]
    return text


def draw(path: Path) -> None:
    """Left: the visible columns of [prefix; sequence]. Right: test BLEU, greedy."""
    figure = Figure(figsize=(10, 3.9), dpi=130, layout="constrained")
    seen, bars = figure.subplots(1, 2, width_ratios=(1.15, 1))
    P, T = 4, 8
    grid = np.zeros((T, P + T))
    grid[:, :P] = 2
    grid[:, P:] = np.tril(np.ones((T, T)))
    seen.imshow(grid, cmap=ListedColormap(["#f2f2f2", TEXT, PREFIX]))
    seen.set_xticks(np.arange(-0.5, P + T), [], minor=False)
    seen.set_yticks(np.arange(-0.5, T), [])
    seen.grid(color="white", lw=1.5)
    seen.tick_params(length=0)
    seen.text((P - 1) / 2, T - 0.2, "prefix: trained keys\nand values, P", ha="center", va="top")
    seen.text(P + (T - 1) / 2, T - 0.2, "tokens: keys and values\nof the frozen model, T",
              ha="center", va="top")  # fmt: skip
    seen.set(ylabel="query token i", title="What each query sees, in every layer")

    rows = {row["method"]: row for row in final_rows() if row["decoding"] == "greedy"}
    shown = [method for method in ORDER if method in rows]
    scores = [float(rows[method]["bleu"]) for method in shown]
    kept = [int(rows[method]["parameters"]) for method in shown]
    colours = [colour_of(method) for method in shown]
    names = [f"{NAMES[m]}\n{k:,} parameters kept" for m, k in zip(shown, kept, strict=True)]
    drawn = bars.barh(range(len(shown)), scores, color=colours)
    bars.bar_label(drawn, fmt="%.1f", padding=3)
    bars.set_yticks(range(len(shown)), names)
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    bars.set(
        xlabel="test BLEU on E2E (0 to 100), greedy",
        xlim=(0, 80),
        title="The same small GPT-2, four ways",
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    draw(HERE / "readme.png")
    for name, bench in (("attention", attention), ("decode", decode)):
        path = GPU / f"{name}-h200.csv"
        bench.draw(read_rows(path), path.with_suffix(".png"))
    for page in PAGES:
        write_text(page, with_tables(page))
        print(page)


if __name__ == "__main__":
    main()
