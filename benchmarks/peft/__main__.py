"""python -m benchmarks.peft: the options of `run.py`, and its rows as a table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from benchmarks.peft.run import RANDOM, BenchConfig, run_bench
from minprefix.cli.main import execute
from minprefix.cli.options import Flat, WithDevice
from minprefix.cli.report import format_rows
from minprefix.models.config import MODELS

NAMES = f"{', '.join(MODELS)}, the name of a model on the hub, a folder, or "
NAMES += f"{', '.join(RANDOM)} (official sizes, random weights)"


@dataclass(frozen=True, kw_only=True)
class Options(WithDevice):
    """Time training steps or generation, also with transformers + PEFT if installed."""

    work: Positional[Literal["train", "generate"]]  # what is timed
    model: Annotated[str, arg(help=NAMES)] = "mini"
    bench: Flat[BenchConfig] = BenchConfig()


def run(options: Options) -> dict | None:
    rows = run_bench(options.work, options.model, options.where, options.bench)
    if options.json:
        return {"rows": rows}
    print(format_rows(rows))
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return execute(Options, run, words, "python -m benchmarks.peft")


if __name__ == "__main__":
    sys.exit(main())
