"""Describes the machine of a measurement, for every row of the CSVs."""

import csv
import io
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from minprefix.files import write_text


def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def machine() -> dict[str, str | int]:
    """CPU, threads, versions and commit, as they are at the first call, so call it at the start.

    A "+" after the commit means uncommitted changes; without git it is empty. With a GPU, also its
    name, the versions of CUDA and Triton, and (on NVIDIA) the assembler of the kernels.
    """

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    row = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    }
    if torch.cuda.is_available():
        import triton

        row |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "triton": triton.__version__,
            "assembler": assembler_name(),
        }
    return row


def assembler_name() -> str:
    """Such as "ptxas 13.0.88"; empty on AMD, or if there is none."""
    from kernels.assembler import choose, dotted

    major, minor = torch.cuda.get_device_capability()
    found = None if torch.version.hip else choose(10 * major + minor)
    return f"ptxas {dotted(found.version)}" if found else ""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []


def add_row(path: Path, row: dict, key: tuple[str, ...]) -> None:
    """Add a row to a CSV, replacing one with the same values in the `key` columns.

    Columns that only other rows have come after those of this row; missing values are empty.
    """
    same = [str(row[name]) for name in key]
    rows = [old for old in read_rows(path) if [old[name] for name in key] != same] + [row]
    columns = list(dict.fromkeys(name for one in reversed(rows) for name in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
