"""The command: options of `run.py`, and its rows as a table."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from benchmarks.peft.run import RANDOM, BenchConfig, run_bench
from minprefix.cli.options import Flat, WithDevice
from minprefix.cli.report import format_rows
from minprefix.models import weights

NAMES = f"{', '.join(weights.MODELS)}, the name of a model on the hub, a folder, or "
NAMES += f"{', '.join(RANDOM)} (official sizes, random weights)"


@dataclass(frozen=True, kw_only=True)
class Options(WithDevice):
    work: Positional[Literal["train", "generate"]]  # what is timed
    model: Annotated[str, arg(help=NAMES)] = "mini"
    bench: Flat[BenchConfig] = BenchConfig()


def run(options: Options) -> dict | None:
    rows = run_bench(options.work, options.model, options.where, options.bench)
    if options.json:
        return {"rows": rows}
    print(format_rows(rows))
    return None
