"""Runs the tests of the kernels on a GPU, in parallel processes that survive a CUDA error in one.

    python -m benchmarks.gpu_tests [--workers 15] [--seconds 160] [FILE ...]

After an illegal memory access every later call of CUDA in that process fails, so one wrong kernel
would fail all later tests. Here a process stops at the first test whose failure looks like that.
The test is run again, alone in a new process, and that result counts; the remaining tests go to
another process. A test that hangs or ends its process is run again in the same way, and fails if
that happens a second time. Needs pytest, but no plugin.

Read `main`, then `Pool`. The module is also the plugin that each process loads
(`pytest_runtest_logreport`): it writes a line for each test to the file that RESULTS names.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from itertools import zip_longest
from pathlib import Path

FILES = [
    f"tests/{name}.py"
    for name in (
        "training/test_fast_training", "generation/test_fast_generation", "kernels/test_attention",
        "kernels/test_decode", "kernels/test_append", "kernels/test_operator",
        "kernels/test_bench_tiles", "kernels/test_cross_entropy", "kernels/test_layer_norm",
        "kernels/test_few_rows",
    )
]  # fmt: skip
RESULTS = "MINPREFIX_TEST_RESULTS"  # environment: where the plugin writes
CHUNK = 12  # tests for a process: starting it takes as long as a few tests
TEST_SECONDS = 75  # of one test, its compilations included
DEAD = re.compile(r"CUDA error|CUBLAS_STATUS|cudaError|illegal memory access|device-side assert")


def pytest_runtest_logreport(report) -> None:
    """pytest's hook: write one line for each test, and end the process after a CUDA error."""
    if RESULTS not in os.environ or (report.when == "teardown" and report.passed):
        return
    if report.when == "setup" and report.passed:
        return
    text = "" if report.passed else str(report.longrepr)
    dead = report.failed and bool(DEAD.search(text))
    line = {"id": report.nodeid, "outcome": report.outcome, "dead": dead, "text": text[-1500:]}
    with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if dead:
        os._exit(3)  # without cleaning up, which would wait for a GPU that does not answer


class Worker:
    """One process and its tests."""

    def __init__(self, tests: list[str], folder: Path, number: int) -> None:
        self.tests, self.path = tests, folder / f"{number}.jsonl"
        self.log = folder / f"{number}.log"
        self.read, self.seen, self.since = 0, set(), time.monotonic()
        words = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_tests"]
        words += ["-p", "no:cacheprovider", *tests]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                words, env=os.environ | {RESULTS: str(self.path)}, stdout=out, stderr=out
            )

    def results(self) -> list[dict]:
        """What the process has written since the last look."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        found, self.read = [json.loads(line) for line in lines[self.read :]], len(lines)
        if found:
            self.since = time.monotonic()
        self.seen |= {row["id"] for row in found}
        return found

    def left(self) -> list[str]:
        return [test for test in self.tests if test not in self.seen]


class Pool:
    """Runs tests until all have a result or the time is over."""

    def __init__(self, workers: int, seconds: float) -> None:
        self.n, self.end = workers, time.monotonic() + seconds
        self.queue: deque[list[str]] = deque()
        self.results: dict[str, dict] = {}
        self.alone: set[str] = set()  # tests that have run in a process of their own
        self.running: list[Worker] = []

    def run(self, tests: list[str]) -> None:
        self.queue.extend(chunks(tests, max(1, min(CHUNK, -(-len(tests) // self.n)))))
        with tempfile.TemporaryDirectory() as folder:
            number = 0
            while (self.queue or self.running) and time.monotonic() < self.end:
                while self.queue and len(self.running) < self.n:
                    number += 1
                    self.running.append(Worker(self.queue.popleft(), Path(folder), number))
                time.sleep(0.05)
                for worker in list(self.running):
                    self.look(worker)
            for worker in self.running:
                worker.process.kill()
                worker.process.wait()

    def look(self, worker: Worker) -> None:
        """Read a worker's results; if it has ended or hangs, redistribute its remaining tests."""
        ended = worker.process.poll() is not None  # must be checked before reading the results
        for row in worker.results():
            if row["dead"] and row["id"] not in self.alone:
                self.again(row["id"])
            elif self.results.get(row["id"], {}).get("outcome") != "failed":  # test, then teardown
                self.results[row["id"]] = row
        hangs = not ended and time.monotonic() - worker.since > TEST_SECONDS
        if not ended and not hangs:
            return
        if hangs:
            worker.process.kill()
            worker.process.wait()
        self.running.remove(worker)
        left = worker.left()
        if left and worker.process.returncode not in (0, 1, 3):  # it ended in the first of them
            reason = f"exit code {worker.process.returncode}: {worker.log.read_text()[-600:]}"
            reason = f"no end after {TEST_SECONDS} s" if hangs else reason
            first, *left = left
            if first in self.alone:
                self.results[first] = {"id": first, "outcome": "failed", "text": reason}
            else:
                self.again(first)
        if left:
            self.queue.appendleft(left)

    def again(self, test: str) -> None:
        """Give a test a process of its own."""
        self.alone.add(test)
        self.queue.append([test])


def chunks(tests: list[str], size: int) -> list[list[str]]:
    """Chunks of tests of one file, the files in turn, so that all are tried if time runs out."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.split("::")[0], []).append(test)
    parts = [[x[at : at + size] for at in range(0, len(x), size)] for x in by_file.values()]
    return [part for turn in zip_longest(*parts) for part in turn if part]


def collect(files: list[str]) -> list[str]:
    """The ids of the tests in these files; exits if pytest finds none."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*words, *files], capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line and " - " not in line]
    if not tests or done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
        sys.exit("no tests were collected, or not all")
    return tests


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the tests of the kernels.")
    workers = max(1, min(15, (os.cpu_count() or 2) - 1))  # compiling takes a core each
    parser.add_argument("--workers", type=int, default=workers, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=160, help="for all")
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("pytest") is None:
        print("tests: pytest is not installed, so none was run")
        return 1
    began = time.monotonic()
    tests = collect(args.files)
    pool = Pool(args.workers, args.seconds - (time.monotonic() - began))
    pool.run(tests)
    by = {outcome: [] for outcome in ("passed", "failed", "skipped")}
    for row in pool.results.values():
        by[row["outcome"]].append(row)
    for row in by["failed"]:
        last = [line for line in row["text"].splitlines() if line.strip()][-6:]
        print(f"FAILED {row['id']}\n    " + "\n    ".join(last))
    counts = ", ".join(f"{len(rows)} {outcome}" for outcome, rows in by.items())
    left = [test for test in tests if test not in pool.results]
    print(f"tests: {counts}, {len(left)} not run of {len(tests)}; "
          f"{len(pool.alone)} were run alone; {time.monotonic() - began:.0f} s")  # fmt: skip
    for row in by["failed"]:
        print(f"verdict: {row['id']} FAILED")
    for test in left[:10]:
        print(f"verdict: {test} not run")
    return 0 if tests and not by["failed"] and not left else 1


if __name__ == "__main__":
    sys.exit(main())
