"""The table at the end of a part of gpu.sh: `python -m benchmarks.gpu_summary PART OUT`.

It shows which targets were reached, the tiles that are faster than the defaults, and ratios to
PEFT, from the rows that this commit measured. From the results of `benchmarks.gpu_steps` and
`benchmarks.e2e` it also makes the files in OUT: steps-DEVICE.csv, profile-, kernels- and
train-DEVICE.csv, and figures.
"""

import argparse
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import attention as bench_attention
from benchmarks.kernels import decode as bench_decode
from benchmarks.kernels import fused as bench_fused
from benchmarks.kernels.clock import device_name, rows_of_this_commit
from benchmarks.kernels.tiles import table
from benchmarks.machine import add_row, read_rows
from benchmarks.peft.results import KEY, LONGEST

PARTS = ("tests", "attention", "decode", "steps", "generate", "train")
Row = dict[str, str]
SHOWN = {"work": 8, "model": 13, "data": 11, "B": 3, "T": 4, "beams": 5, "method": 13, "ms": 9,
         "calls": 5, "tokens_per_s": 12, "examples_per_s": 14, "peak_mib": 8,
         "ratio": 6}  # columns of a printed row, and their widths  # fmt: skip


class Aim(NamedTuple):
    """A target for a measurement of `benchmarks.gpu_steps`: a ratio to a peer's speed or memory."""

    work: str
    model: str
    data: str  # "random", or "texts" for anything else
    B: str
    beams: str
    peer: str
    target: float
    stretch: float
    memory: bool = False  # whether it is the largest allowed share of the peer's peak memory


MEDIUM = "random-medium"
AIMS = (
    Aim("train", MEDIUM, "random", "10", "", "peft", 7, 10),
    Aim("train", MEDIUM, "random", "64", "", "peft", 3, 4),
    Aim("train", MEDIUM, "random", "64", "", "peft-compiled", 1.3, 1.8),
    Aim("train", MEDIUM, "random", "64", "", "peft", 0.4, 0.25, memory=True),
    Aim("train", MEDIUM, "texts", "10", "", "peft", 6, 10),
    Aim("generate", MEDIUM, "random", "1", "1", "peft", 15, 35),
    Aim("generate", MEDIUM, "random", "32", "1", "peft", 14, 25),
    Aim("generate", MEDIUM, "random", "16", "5", "peft", 10, 20),
)


def tests(log: str) -> list[str]:
    """The runner's counts, the failures, and the findings of compute-sanitizer."""
    wanted = re.compile(r"^(tests: |verdict: |=+ (ERROR SUMMARY|RACECHECK SUMMARY))")
    return [line for line in log.splitlines() if wanted.match(line)]


def tiles(out: Path, what: str) -> list[str]:
    """All tiles that were tried, by stage and shape."""
    rows = rows_of_this_commit(out / f"tiles-{device_name()}.csv")
    return table([row for row in rows if row["what"] == what])


def attention(out: Path) -> list[str]:
    rows = rows_of_this_commit(out / f"attention-{device_name()}.csv")
    return [*bench_attention.verdicts(rows), "", *tiles(out, "attention")]


def decode(out: Path) -> list[str]:
    rows = rows_of_this_commit(out / f"decode-{device_name()}.csv")
    return [*bench_decode.verdicts(bench_decode.Times(rows)), "", *tiles(out, "decode")]


def of_work(row: Row) -> tuple[str, ...]:
    """The fields that identify a measurement, as in `Aim`."""
    data = "random" if row["data"] == "random" else "texts"
    return row["work"], row["model"], data, row["B"], row["beams"]


def steps(out: Path, work: Path, kind: str) -> list[str]:
    """Write steps-DEVICE.csv, move the other files; returns lines for rows, verdicts, kernels."""
    path = out / f"steps-{device_name()}.csv"
    lines = [" ".join(f"{name:>{width}}" for name, width in SHOWN.items())]
    for row in read_rows(work / "bench.csv"):
        add_row(path, row, KEY)
        cells = (f"{row.get(name) or '':>{width}}" for name, width in SHOWN.items())
        lines.append(f"{' '.join(cells)} {row['note']}".rstrip())
    lines += ["", *verdicts(rows_of_this_commit(path), kind), ""]
    lines += kernel_lines(read_rows(work / "kernels.csv"))
    for name in ("profile", "kernels"):
        for found in work.glob(f"{name}.csv"):
            shutil.copy(found, out / f"{name}-{kind}-{device_name()}.csv")
        for found in work.glob(f"{name}-*.png"):
            shutil.copy(found, out / found.name.replace("random", device_name()))
    return lines


def kernel_lines(rows: list[Row]) -> list[str]:
    """The kernels that take longest in a training step or in the step of a token."""
    lines = []
    for work, found in groupby(rows, key=lambda row: row["work"]):
        what = "a training step" if work == "train" else "a token"
        ordered = sorted(found, key=lambda row: -float(row["us"]))
        lines.append(f"the kernels of {what}, the {LONGEST} longest of {len(ordered)}:")
        lines += [
            f"{row['us']:>10} us {row['share']:>5} % {row['count']:>6} x {row['kernel']}"
            for row in ordered[:LONGEST]
        ]
    return lines


def verdict(name: str, value: float | None, target: float, stretch: float, most: bool) -> str:
    """One line: the value, the target and the stretch target, and whether they were reached."""
    sign = "<=" if most else ">="
    aims = f"{sign} {target:g} (stretch {stretch:g})"
    if value is None:
        return f"{name:48} not measured {aims}"
    reached = [value <= aim if most else value >= aim for aim in (target, stretch)]
    mark = "stretch" if reached[1] else "ok" if reached[0] else "MISSED"
    return f"{name:48} {value:6.2f} {aims}  {mark}"


def verdicts(rows: list[Row], work: str) -> list[str]:
    """A line for each aim, and one for ours compared with ours with a switch off."""
    lines = []
    by_work: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        by_work.setdefault(of_work(row), {})[row["method"]] = row
    for aim in AIMS:
        if aim.work != work:
            continue
        found = by_work.get(aim[:5], {})
        peer, ours = found.get(aim.peer, {}), found.get("minprefix", {})
        what, value = "ours /", peer.get("ratio")
        if aim.memory:
            what = "peak memory, ours /"
            peaks = [row.get("peak_mib") for row in (ours, peer)]
            value = str(int(peaks[0]) / int(peaks[1])) if all(peaks) else None
        beams = f" beams {aim.beams}" if aim.beams not in ("", "1") else ""
        name = f"{work} {aim.data} B {aim.B}{beams}: {what} {aim.peer}"
        lines.append(verdict(name, float(value) if value else None, *aim[6:8], aim.memory))
    for sizes, found in by_work.items():
        for method, switch in (
            ("eager", "without graphs"), ("unfused", "without fused kernels"),
            ("many-rows", "with PyTorch's products"),
        ):  # fmt: skip
            if sizes[0] == work and (ratio := found.get(method, {}).get("ratio")):
                name = " ".join(word for word in sizes if word)
                mark = "ok" if float(ratio) >= 1 else "MISSED"
                lines.append(f"{name}: ours / {switch} {ratio} >= 1  {mark}")
    return lines


def train(out: Path, work: Path) -> list[str]:
    """The README's training run, in train-DEVICE.csv, BART-large, in bart-DEVICE.csv, and the
    kernels other than attention."""
    rows = read_rows(work / "e2e.csv")
    lines = [] if rows else ["mini, 2,500 steps: not measured"]
    for row in rows:
        add_row(out / f"train-{device_name()}.csv", row, ("data", "seed", "split", "decoding"))
        lines.append(
            f"mini, {row['steps']} steps on {row['data']} in {row['train_seconds']} s: "
            f"{row['split']}, {row['decoding']}: BLEU {row['bleu']} ({row['score_seconds']} s)"
        )
    for row in read_rows(work / "bart.csv"):
        names = ("work", "method", "batch_size", "prefix_len", "dtype")
        add_row(out / f"bart-{device_name()}.csv", row, names)
        lines.append(f"BART-large, {row['work']}, {row['method']}: {row['seconds']} s")
    fused = bench_fused.verdicts(rows_of_this_commit(out / f"fused-{device_name()}.csv"))
    return [*lines, "", *fused]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The verdicts of a part of gpu.sh.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="the folder with the CSVs")
    parser.add_argument("--log", type=Path, help="tests: what was printed")
    parser.add_argument(
        "--work", type=Path, help="steps, generate, train: the folder with what they wrote"
    )
    args = parser.parse_args(arguments)
    lines = {
        "tests": lambda: tests(args.log.read_text(encoding="utf-8", errors="replace")),
        "attention": lambda: attention(args.out),
        "decode": lambda: decode(args.out),
        "steps": lambda: steps(args.out, args.work, "train"),
        "generate": lambda: steps(args.out, args.work, "generate"),
        "train": lambda: train(args.out, args.work),
    }[args.part]()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
