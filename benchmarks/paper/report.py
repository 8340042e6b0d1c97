"""Writes RESULTS.md from the CSVs: every table and figure, with the paper's numbers and ours.

`python -m benchmarks.paper report --out FOLDER` writes it; a test keeps the committed one equal to
what the committed CSVs give. Read `report`.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.claims import judge, verdicts
from benchmarks.paper.experiments import EXPERIMENTS, NOT_HERE
from benchmarks.paper.figures import AXES, names_of, title
from benchmarks.paper.published import ACL, COLUMNS, published
from benchmarks.paper.results import Mean, Row, mean_sd, pick, quality, read_rows, scales_of
from minprefix.files import write_text

HEAD = """# The paper's tables and figures, repeated here

`python -m benchmarks.paper report` writes this page from the CSVs in this folder. Each row of a CSV
is one run, with its seed, settings, machine and commit. A cell of a table here holds the mean ± the
standard deviation, with the number of runs in brackets. Numbers after "paper" are those of GPT-2
medium in [v1], version 1 of the paper on arXiv; [ACL] is the published version.

A claim is judged by the differences between two methods in n pairs of runs. The runs of a pair have
the same seed or, where training pairs are few, the same subset of them.

- ✓ holds here, ✗ does not hold here: the 95 % interval of the mean difference does not contain 0.
- ? undecided: the interval contains 0. By Student's t it reaches 12.7 standard errors to each side
  with n = 2, and 4.3 with n = 3, so even a large difference may decide nothing.
- – not tested: there are no runs.

[v1]: https://arxiv.org/abs/2101.00190v1
[ACL]: https://aclanthology.org/2021.acl-long.353
"""
HEADINGS = {"slots %": "slot values (%)"}  # of columns whose name in the CSV is short


def digits(data: str, column: str) -> int:
    """The number of decimal places in the paper."""
    small = column.startswith(("NIST", "CIDEr", "TER"))
    return 2 if small or (column.startswith("MET") and data in ("webnlg", "dart")) else 1


def cell(found: Mean | None, places: int, said: float | None) -> str:
    """One cell of a table: our number, then the paper's."""
    ours = "" if found is None else f"{found.mean:.{places}f}"
    if found is not None and found.n > 1:
        ours += f" ± {found.sd:.{places}f}"
    if found is not None:
        ours += f" ({found.n})"
    return ours if said is None else f"{ours}<br>*paper {said:.{places}f}*"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def table(experiment: str, rows: Sequence[Row], data: str) -> str:
    """The rows of one data set: by name and x."""
    rows = pick(rows, data=data)
    wanted = (*COLUMNS.get(data, COLUMNS["e2e"]), "slots %")
    columns = [column for column in wanted if mean_sd(rows, column)]
    xs = names_of(rows, "x")
    header = ["", *([AXES.get(experiment, "x")] if any(xs) else [])]
    header += [HEADINGS.get(column, column) for column in columns]
    header += ["parameters trained", "parameters kept"]
    lines = []
    for name in names_of(rows):
        for x in xs:
            here = pick(rows, name=name, x=x)
            if not here or not columns:
                continue
            said = published(experiment, data, name)
            cells = [cell(mean_sd(here, c), digits(data, c), said.get(c)) for c in columns]
            counts = [f"{int(here[0][c]):,}" if here[0].get(c) else "" for c in ("trained", "kept")]
            lines.append([name, *([x] if any(xs) else []), *cells, *counts])
    text = f"**{data}**\n\n" + markdown(header, lines) if lines else ""
    shown = names_of(rows)
    changed = [f"{name} {said}" for (d, name), said in ACL.items() if d == data and name in shown]
    if experiment in ("table1", "table3", "table4") and changed and lines:
        text += f"\nIn [ACL] some rows differ: {'; '.join(changed)}.\n"
    return text


def problems(rows: Sequence[Row]) -> list[str]:
    """One line for each reason why runs have no scores."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["problem"]:
            key = (row["data"], row["problem"])
            found[key] = found.get(key, 0) + 1
    return [
        f"- {problem} ({n} run{'s' * (n > 1)} on {data})" for (data, problem), n in found.items()
    ]


def settings(rows: Sequence[Row]) -> str:
    """A paragraph with the settings of the runs."""

    def said(column: str) -> str:
        return ", ".join(dict.fromkeys(v for row in rows if (v := row.get(column)))) or "none"

    device = "gpu" if any(row.get("gpu") for row in rows) else "cpu"
    parts = {"Model": said("model"), "Training": scales_of(rows), "Seeds": said("seed")}
    parts |= {"Decoding": said("decoding"), "Processor": said(device)}
    return " ".join(f"{name}: {text}." for name, text in parts.items())


def passes(rows: Sequence[Row]) -> str:
    """How often runs saw their training pairs at the ends of x; "" if they differ in steps."""
    drawn = {int(r["steps"]) * int(r["batch_size"]) if r.get("steps") else None for r in rows}
    pairs = {row["x"]: int(row["pairs"]) for row in rows if row.get("pairs")}
    if len(drawn) != 1 or None in drawn or len(pairs) < 2:
        return ""
    (read,), ends = drawn, [*pairs][:: len(pairs) - 1]
    first, last = (f"{read / pairs[x]:.2g} passes over {x}" for x in ends)
    return f"Each run reads {read:,} pairs: {first} of the training pairs, or {last}."


def results(path: Path) -> list[Row]:
    """The rows of a CSV; ValueError if it is empty or is not a CSV of this command."""
    rows = read_rows(path)
    if not rows or not {"name", "data", "problem", "scale", "model"} <= set(rows[0]):
        raise ValueError(
            f"{path}: empty or damaged: no rows of `paper`; remove it to make it again"
        )
    return rows


def section(path: Path, experiment: str) -> str:
    """One table or figure."""
    rows = results(path)
    done = [row for row in rows if not row["problem"]]
    parts = [f"## {title(experiment)}, with {rows[0]['model']}\n", settings(rows) + "\n"]
    parts += [text for data in names_of(done, "data") if (text := table(experiment, done, data))]
    if experiment == "figure6" and (said := passes(done)):
        parts.append(said + "\n")
    if path.with_suffix(".png").exists():
        parts.append(f"![{title(experiment)}]({path.stem}.png)\n")
    parts.append("\n".join(f"- {line}" for line in judge(experiment, rows)) + "\n")
    missing = [*problems(rows), *([f"- {NOT_HERE[experiment]}"] if experiment in NOT_HERE else [])]
    if missing:
        parts.append("\n".join(missing) + "\n")
    return "\n".join(parts)


def summary(folder: Path) -> str:
    """A line for each claim: whether it holds here. The numbers are in its section."""
    lines = []
    for experiment in EXPERIMENTS:
        for path in sorted(folder.glob(f"{experiment}-*.csv")):
            rows = results(path)
            for claim, said in verdicts(experiment, rows):
                lines.append([title(experiment), rows[0]["model"], claim.text, said.marked])
    header = ["", "model", "claim of the paper", "result here"]
    return "## Summary\n\n" + markdown(header, lines) if lines else ""


def sweep_section(path: Path) -> str:
    """The trials on the dev set, and for each method and size the setting with the best BLEU."""
    rows = [row for row in read_rows(path) if quality(row) is not None]
    lines = []
    for data in names_of(rows, "data"):
        for size in names_of(rows, "size"):
            for name in names_of(rows):
                here = pick(rows, data=data, size=size, name=name)
                if not here:
                    continue
                best = max(here, key=quality)
                edges = {min(float(r["lr"]) for r in here), max(float(r["lr"]) for r in here)}
                edge = " (edge of the grid)" if float(best["lr"]) in edges else ""
                tried = ", ".join(f"{r['lr']} x {r['steps']}: {quality(r):.1f}" for r in here)
                lines.append([data, size or "all", name, f"{best['lr']} x {best['steps']}{edge}",
                              str(len(here)), tried])  # fmt: skip
    header = [
        "data",
        "pairs",
        "method",
        "chosen learning rate x steps",
        "trials",
        "dev BLEU of each",
    ]
    return "## Settings chosen on the dev set\n\n" + markdown(header, lines)


def report(folder: Path) -> str:
    """The text of RESULTS.md for the CSVs of a folder.

    Raises:
        ValueError: there is none.
    """
    parts = [HEAD, *([text] if (text := summary(folder)) else [])]
    for experiment in EXPERIMENTS:
        parts += [section(path, experiment) for path in sorted(folder.glob(f"{experiment}-*.csv"))]
    parts += [sweep_section(path) for path in sorted(folder.glob("sweep-*.csv"))]
    if parts == [HEAD]:
        raise ValueError(f"{folder}: no results there, such as table4-mini.csv")
    return "\n".join(parts)


def write_report(folder: Path) -> Path:
    path = folder / "RESULTS.md"
    write_text(path, report(folder))
    return path
