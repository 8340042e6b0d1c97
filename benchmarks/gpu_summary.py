"""The table at the end of a part of gpu.sh: `python -m benchmarks.gpu_summary PART OUT`.

What was reached of what was aimed at, the tiles that are faster than the defaults, ratios to PEFT;
from the rows that this commit measured. Of the part `steps` it also makes steps-DEVICE.csv out of
the folders that `python -m benchmarks.peft` wrote.
"""

import argparse
import re
import shutil
from pathlib import Path

from benchmarks.kernels import attention as bench_attention
from benchmarks.kernels import decode as bench_decode
from benchmarks.kernels import fused as bench_fused
from benchmarks.kernels.clock import device_name, rows_of_this_commit
from benchmarks.kernels.tiles import table
from benchmarks.machine import add_row, read_rows
from benchmarks.peft.results import KEY

PARTS = ("tests", "attention", "decode", "steps", "generate")
STEP_KEY = (*KEY, "graphs")
# (work, B, beams): tokens a second of ours over those of PEFT, what is aimed at and what is hoped
AIMS = {("generate", "1", "1"): (15, 35), ("generate", "32", "1"): (14, 25),
        ("generate", "16", "5"): (10, 20)}  # fmt: skip


def tests(log: str) -> list[str]:
    """The runner's counts, what failed, and what compute-sanitizer found."""
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


def steps(out: Path, work: Path) -> list[str]:
    """Writes steps-DEVICE.csv and moves the pictures; a line per row."""
    path = out / f"steps-{device_name()}.csv"
    lines = [f"{'work':9} {'B':>3} {'T':>4} {'beams':>5} {'graphs':6} {'method':14} {'ms':>9} "
             f"{'tokens/s':>9} {'peak MiB':>9} {'ratio':>6}"]  # fmt: skip
    for folder in ("graphs", "eager", "compiled"):
        for row in read_rows(work / folder / "bench.csv"):
            graphs = {"graphs": "0" if folder == "eager" else "1"}
            if folder == "compiled" and row["method"] == "minprefix":
                continue  # measured before
            add_row(path, row | graphs, STEP_KEY)
            numbers = [row.get(name) or "" for name in ("ms", "tokens_per_s", "peak_mib", "ratio")]
            lines.append(
                f"{row['work']:9} {row['B']:>3} {row['T']:>4} {row['beams']:>5} "
                f"{graphs['graphs']:6} {row['method']:14} {numbers[0]:>9} {numbers[1]:>9} "
                f"{numbers[2]:>9} {numbers[3]:>6} {row['note']}".rstrip()
            )
    lines += ["", *verdicts(rows_of_this_commit(path))]
    for found in (work / "graphs").glob("*.png"):
        shutil.copy(found, out / found.name.replace("random", device_name()))
    for found in (work / "graphs").glob("profile.csv"):
        shutil.copy(found, out / f"profile-{device_name()}.csv")
    return lines


def fused(out: Path) -> list[str]:
    """The kernels beside attention."""
    return bench_fused.verdicts(rows_of_this_commit(out / f"fused-{device_name()}.csv"))


def verdicts(rows: list[dict[str, str]]) -> list[str]:
    """Generation beside PEFT, and with CUDA graphs beside without; a line each."""
    lines = []
    for sizes, (aim, hope) in AIMS.items():
        mine = [row for row in rows if (row["work"], row["B"], row["beams"]) == sizes]
        name = "{} B={} beams={}".format(*sizes)
        for row in mine:
            if row["method"] == "peft" and row.get("ratio"):
                mark = "ok" if float(row["ratio"]) >= aim else "MISSED"
                lines.append(f"{name:24} ours / PEFT {row['ratio']:>6} >= {aim} ({hope})  {mark}")
        ms = {row["graphs"]: row["ms"] for row in mine if row["method"] == "minprefix"}
        if ms.get("0") and ms.get("1"):
            ratio = float(ms["0"]) / float(ms["1"])
            mark = "ok" if ratio >= 1 else "MISSED"
            lines.append(f"{name:24} without graphs / with {ratio:6.2f} >= 1  {mark}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The verdicts of a part of gpu.sh.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="the folder with the CSVs")
    parser.add_argument("--log", type=Path, help="tests: what was printed")
    parser.add_argument("--work", type=Path, help="steps: the folders of benchmarks.peft")
    args = parser.parse_args(arguments)
    lines = {
        "tests": lambda: tests(args.log.read_text(encoding="utf-8", errors="replace")),
        "attention": lambda: attention(args.out),
        "decode": lambda: decode(args.out),
        "steps": lambda: [*steps(args.out, args.work), "", *fused(args.out)],
        "generate": lambda: steps(args.out, args.work),
    }[args.part]()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
