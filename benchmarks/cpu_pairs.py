"""Compares each row of cpu/bench.csv at an earlier commit and now, in turn on the same machine.

    python -m benchmarks.cpu_pairs [--before 01f771b] [--minutes 10] [--e2e FOLDER]

Two processes, one with each version of the code, make the same call one after the other, in pairs
of alternating order, so that other work on the machine affects both equally. A row of cpu/pairs.csv
has the medians, and the ratios now / before of the pairs: the median, and the fastest and slowest
fifth. All rows get the same share of the minutes, and at least MIN_PAIRS. The packages have moved
since 01f771b, so `made` and `Side` import either path.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = ("work", "model", "dtype", "data", "labels", "mlp", "B", "T", "P", "beams", "new")
MIN_PAIRS, MAX_PAIRS = 3, 25
SLOWER = 1.03  # now / before that counts as slower, if four fifths of the pairs agree


# in a process of one version -------------------------------------------------------------------


def made(case: dict[str, str], data: str | None, folder: str) -> Callable[[], object]:
    """A training step or the texts of a row, of the version that this process imports."""
    try:
        from benchmarks.peft import peers, run
    except ImportError:
        from minprefix import bench as run  # type: ignore[attr-defined, no-redef]
        from minprefix import bench_peers as peers  # type: ignore[attr-defined, no-redef]
    options: dict[str, Any] = {"data": data}
    if case["work"] == "train":
        options |= {"labels": case["labels"], "mlp": case["mlp"] == "True"}
    B, T, P = (int(case[name]) for name in ("B", "T", "P"))
    model, tokenizer = run.load_model(case["model"], peers.DTYPES[case["dtype"]], "cpu")
    sizes = (case["dtype"], "cpu", B, T, P)
    task = run.make_task(model, tokenizer, run.BenchConfig(**options), *sizes)
    if case["work"] == "train":
        return peers.Ours(task, folder).step
    texts, prompts = peers.OurTexts(task, int(case["beams"])), run.random_ids(model.config, B, T)
    return lambda: texts.texts(prompts, int(case["new"]))


def work() -> None:
    """Answer requests: a case is prepared; `null` makes one call and returns its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    call: Callable[[], object] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            began = time.perf_counter()
            if request is None:
                assert call is not None
                call()
            else:
                call = None  # free the previous case first
                call = made(*request, folder)
                call()
            print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


class Side:
    """A process that runs the code of a checkout."""

    def __init__(self, checkout: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--work"], cwd=checkout, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(checkout)},
        )  # fmt: skip

    def ask(self, request: Any = None) -> float:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


# the comparison ---------------------------------------------------------------------------------


@contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """The files of a commit, in a temporary folder."""
    git = ["git", "-C", str(ROOT), "archive", commit]
    packed = subprocess.run(git, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def pairs(before: Side, now: Side, seconds: float) -> list[tuple[float, float]]:
    """Seconds of a call before and now, for as many pairs as fit into the time."""
    found: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(found) < MIN_PAIRS or (
        len(found) < MAX_PAIRS and time.perf_counter() - began < seconds
    ):
        first, second = (before, now) if len(found) % 2 else (now, before)
        one = first.ask(), second.ask()
        found.append(one if first is before else one[::-1])
    return found


def columns(found: list[tuple[float, float]]) -> dict[str, Any]:
    """A row's numbers."""
    ratios = sorted(b / a for a, b in found)
    low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.2, 0.8))
    ratio = statistics.median(ratios)
    before, now = (round(1e3 * statistics.median(x), 2) for x in zip(*found, strict=True))
    slower = ratio > SLOWER and low > 1
    return {
        "before_ms": before, "now_ms": now, "ratio": round(ratio, 3), "ratio_20": round(low, 3),
        "ratio_80": round(high, 3), "pairs": len(found), "slower": int(slower),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the rows of cpu/bench.csv by version.")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", default="01f771b", help="the commit to compare with")
    parser.add_argument("--minutes", type=float, default=10, help="for all rows together")
    parser.add_argument("--e2e", help="the folder with E2E's CSVs; without it, no such rows")
    parser.add_argument("--rows", type=int, help="only this many rows, from the first on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "cpu" / "pairs.csv")
    args = parser.parse_args()
    if args.work:
        return work()
    from benchmarks.machine import add_row, machine, read_rows

    places = {"random": None, "restaurants": "restaurants", "e2e": args.e2e}
    rows = read_rows(ROOT / "benchmarks" / "cpu" / "bench.csv")
    cases = [{name: row[name] for name in SIZES} for row in rows if row["method"] == "minprefix"]
    cases = [case for case in cases if case["data"] != "e2e" or args.e2e][: args.rows]
    end, slower = time.monotonic() + 60 * args.minutes, 0
    machine()  # record the commit at the start, not at the end
    with checkout_of(args.before) as checkout:
        before, now = Side(checkout), Side(ROOT)
        for n, case in enumerate(cases):
            share = (end - time.monotonic()) / (len(cases) - n)
            began = time.monotonic()
            for side in (before, now):
                side.ask([case, places[case["data"]]])
            row = case | columns(pairs(before, now, share - (time.monotonic() - began)))
            add_row(args.out, row | {"before": args.before} | machine(), SIZES)
            slower += row["slower"]
            print(" ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)
    print(f"{slower} of {len(cases)} rows are slower")


if __name__ == "__main__":
    main()
