"""On what a figure was measured: goes into every row of a CSV here."""

import csv
import io
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from minprefix.files import write_text


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def machine() -> dict[str, str | int]:
    """CPU, threads, versions and commit, as they are at the first call: make it at the start.

    A "+" behind the commit: with changes that are not committed.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []


def add_row(path: Path, row: dict, key: tuple[str, ...]) -> None:
    """Add a row to a CSV, in the place of one with the same values of the `key` columns."""
    same = [str(row[name]) for name in key]
    rows = [old for old in read_rows(path) if [old[name] for name in key] != same] + [row]
    text = io.StringIO()
    writer = csv.DictWriter(text, row.keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
