"""Damaged files, states and command lines: each is read, or rejected in one line. `make fuzz`.

    python -m tests.fuzz --cases 10000 --seconds 900 --seed 0
    python -m tests.fuzz --only 1234                            repeat one case, with its traceback

The first cases are those with a name (`named.py`), then 200 flipped bits in a prefix file and 200
in a state, then mutations (`mutations.py`) of the files in `valid.py`, and of command lines. A
child process reads them; its parent ends a case after `MOST_SECONDS` or `MOST_MEMORY`. The kinds of
failure are

    traceback   an error that is neither ValueError nor OSError, or a process that died
    unnamed     an error that does not name the file, or has control characters in it
    silent      a file with a checksum was changed, but is read
    hang, memory

The number and the seed determine a case. The last line has the numbers of passed and failed cases.
"""

import argparse
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before the libraries are imported
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MINPREFIX_MAX_SILENCE": "1"}

import torch

from minprefix.cli.main import describe
from tests.fuzz.mutations import flipped, mutated, other_words
from tests.fuzz.named import named
from tests.fuzz.valid import Valid, command, make

MOST_SECONDS = 30  # for a case, on a busy machine
MOST_MEMORY = 2**30  # bytes, in addition to the libraries
FLIPS = 200
SHARE = 0.05  # of command lines, which are slower
LONG = 200  # characters; errors should not be longer


class Fuzz:
    """The cases, by number, for a folder of valid files."""

    def __init__(self, folder: Path, seed: int):
        self.seed, self.folder, self.valid = seed, folder, make(folder)
        self.named = list(named())
        self.flips = [kind for kind in ("prefix", "state") for _ in range(FLIPS)]
        self.commands = self.lines()
        self.shutil = folder.with_name("whole")
        shutil.copytree(folder, self.shutil)

    @property
    def fixed(self) -> int:
        """How many cases come before the random ones."""
        return len(self.named) + len(self.flips)

    def lines(self) -> list[list[str]]:
        """Command lines that work."""
        model, cpu = ["--model", "gpt2"], ["--device", "cpu"]
        few = ["--max-new-tokens", "3"]
        return [
            ["info", *model, "--prefix", "run"],
            ["generate", "a boat", *model, "--prefix", "run", *few, *cpu],
            ["generate", "a boat", "--model", "bart", *few, "--json"],
            ["evaluate", *model, "--data", "data/rows.jsonl", "--prefix", "run", "--limit", "2",
             "--max-new-tokens", "3", *cpu],
            ["score", "data/news.source", "data/news.target"],
            ["convert", "peft", "--to", "minprefix", "--out", "made.safetensors", *model],
            ["export", "run", "--out", "exported"],
            ["runs", "run", "adapted"],
            ["train", "--resume", "run", *cpu],
        ]  # fmt: skip

    def run(self, number: int) -> tuple[str, str, str]:
        """(kind, outcome, message) of a case."""
        rng = random.Random(f"{self.seed} {number}")
        if number < len(self.named):
            name, kind, change, refused = self.named[number]
            outcome, message = self.read(kind, change)
            if (outcome == "read") == refused:
                outcome = "silent" if refused else "traceback"
            return f"named: {name}", outcome, message
        if number < self.fixed:
            kind = self.flips[number - len(self.named)]
            path = self.valid[kind].path
            data = flipped(path.read_bytes(), rng)
            return f"flipped: {kind}", *self.read(kind, lambda path: path.write_bytes(data))
        if rng.random() < SHARE:
            return self.type(other_words(rng.choice(self.commands), rng))
        kind = rng.choice(list(self.valid))
        if change := self.valid[kind].change:
            return kind, *self.read(kind, lambda path: change(path, rng))
        data = mutated(self.valid[kind].path.read_bytes(), rng)
        return kind, *self.read(kind, lambda path: path.write_bytes(data))

    def read(self, kind: str, change: Callable[[Path], object]) -> tuple[str, str]:
        """Outcome and message of reading a file after a change, which is then undone."""
        valid: Valid = self.valid[kind]
        whole = valid.path.read_bytes()
        try:
            change(valid.path)
            same = valid.path.is_file() and valid.path.read_bytes() == whole
            return self.outcome(valid, same)
        finally:
            valid.path.unlink(missing_ok=True)
            for place in (valid.path.parent, *valid.path.parent.glob("state")):
                for name in os.listdir(self.shutil / place.relative_to(self.folder)):
                    source = self.shutil / place.relative_to(self.folder) / name
                    if source.is_file():
                        shutil.copyfile(source, place / name)

    def outcome(self, valid: Valid, same: bool) -> tuple[str, str]:
        try:
            valid.read()
        except (ValueError, OSError) as error:
            line = describe(error)
            if str(valid.path.parent) not in line and str(self.folder) not in line:
                return "unnamed", line
            return ("refused" if line.isprintable() else "unnamed"), line
        except BaseException as error:
            if type(error) is KeyboardInterrupt:
                raise
            return "traceback", "".join(traceback.format_exception(error)[-3:])
        return ("silent" if valid.has_checksum and not same else "read"), ""

    def type(self, words: list[str]) -> tuple[str, str, str]:
        """Kind, outcome and message of a command line."""
        try:
            code, err = command(*words)
        except BaseException:
            return f"command {words[0]}", "traceback", f"{words} {traceback.format_exc()[-600:]}"
        last = err.rstrip("\n").split("\n")[-1]
        if code not in (0, 1, 2) or "Traceback" in err:
            return f"command {words[0]}", "traceback", f"{words} {code} {err[-600:]}"
        if code and ("error: " not in last or not last.isprintable()):
            return f"command {words[0]}", "unnamed", f"{words} {last}"
        return f"command {words[0]}", "refused" if code else "read", last


def child(fuzz: Fuzz, pipe) -> None:
    """Receive numbers of cases, and answer with their outcomes."""
    warnings.simplefilter("ignore")
    logging.disable()
    while (number := pipe.recv()) is not None:
        pipe.send(fuzz.run(number))


def memory(pid: int) -> int:
    """The memory of a process in bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


class Child:
    """A process that reads cases, and is replaced when one of them ends it."""

    def __init__(self, fuzz: Fuzz):
        self.fuzz, self.peak = fuzz, 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=child, args=(self.fuzz, end), daemon=True)
        self.process.start()
        end.close()
        self.usual = memory(self.process.pid)

    def run(self, number: int) -> tuple[str, str, str]:
        self.pipe.send(number)
        begun = time.monotonic()
        while not self.pipe.poll(0.02):
            used = memory(self.process.pid) - self.usual
            self.peak = max(self.peak, used)
            failed = "hang" if time.monotonic() - begun > MOST_SECONDS else ""
            if failed := "memory" if used > MOST_MEMORY else failed:
                return self.replace(number, failed)
        try:
            return self.pipe.recv()
        except EOFError:
            return self.replace(number, "traceback")

    def replace(self, number: int, outcome: str) -> tuple[str, str, str]:
        """End the process, restore the files, and start another process."""
        self.process.kill()
        self.process.join()
        shutil.copytree(self.fuzz.shutil, self.fuzz.folder, dirs_exist_ok=True)
        self.start()
        return f"case {number}", outcome, f"exit code {self.process.exitcode}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="random ones, at most")
    parser.add_argument("--seconds", type=float, default=900, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case alone, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, home = time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        (folder := Path(place, "valid")).mkdir()
        fuzz = Fuzz(folder, options.seed)
        if options.only is not None:
            print(*fuzz.run(options.only), sep="\n")
            os.chdir(home)
            return 0
        worker, counts, errors, long = Child(fuzz), Counter(), [], 0
        numbers = range(fuzz.fixed + options.cases)
        for number in numbers:
            if time.monotonic() - begun > options.seconds:
                break
            kind, outcome, message = worker.run(number)
            counts[kind.split(":")[0], outcome] += 1
            long += outcome == "refused" and len(message) > LONG
            if outcome not in ("read", "refused"):
                errors.append(f"{number} {kind}: {outcome}: {message}")
                print(errors[-1], flush=True)
        os.chdir(home)
    done = sum(counts.values())
    for kind in sorted({kind for kind, _ in counts}):
        told = (f"{n} {what}" for (k, what), n in sorted(counts.items()) if k == kind)
        print(f"{kind:32} {', '.join(told)}")
    seconds, more = time.monotonic() - begun, worker.peak / 2**20
    print(
        f"seed {options.seed}: {done} cases in {seconds:.0f} s, at most {more:.0f} MiB more than "
        f"before a case; {long} errors of more than {LONG} characters"
    )
    print(f"{done - len(errors)} passed, {len(errors)} failed")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
