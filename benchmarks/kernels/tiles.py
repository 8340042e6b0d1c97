"""Times every tile and plan of the kernels at the shapes with targets, and names the fastest.

    python -m benchmarks.kernels.tiles [--out FOLDER] [--what attention] [--seconds 60]

`kernels.launch.TILES` has several tiles for a kernel, of which the first is the default. The
candidates are found automatically: during a call of training or decoding, `Choice` replaces
`launch.run_best`, which receives them. A candidate that launches several kernels is a plan; its
stages are found in the same way and are named after it (`bwd_dq in split`). Each candidate is first
compared with the definition in fp64, as part of a whole call; then its launches are timed in a CUDA
graph (`clock.py`) on inputs of 160 MB. The stages inside a plan come first, so that the plan is
timed with the best of them.

A row of tiles-DEVICE.csv has a stage, a candidate and its time in microseconds; default is 1 for
the candidate that runs without tuning. Stage "whole" is the whole call, with the defaults and with
all winners. The table at the end shows what to change in TILES: `stage | shape | default us | best
us tile`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import attention as bench
from benchmarks.kernels import decode as steps
from benchmarks.kernels.clock import (
    device_name,
    go_on_if_lost,
    graph_times,
    need_kernels,
    rows_of_this_commit,
    sets_of,
)
from benchmarks.kernels.peers import METHODS, Truth, make_sample, reason, run
from benchmarks.machine import add_row, machine
from kernels import attention, launch  # attention: and with it all modules that launch
from kernels.launch import Tile

KEY = ("what", "B", "T", "H", "P", "N", "S", "stage", "tile")
ATTENTION = [*bench.ISSUE, *(bank for bank in bench.BANKS if bank.N), *bench.MORE]
# first a text of 64 tokens after 128, where the second tile was faster for 32 rows, not for 8
DECODE = [*(steps.Shape(B, 16, 192, 10) for B in (32, 64, 16)), *steps.REFERENCE,
          *(bank for bank in steps.BANKS if bank.N)]  # fmt: skip
WHOLE = "whole"


def label(candidate: Any) -> str:
    """A tile as its four numbers; None is the plan of several kernels."""
    if isinstance(candidate, Tile):
        return ",".join(map(str, candidate))
    return "split" if candidate is None else str(candidate)


@dataclass
class Stage:
    """The candidates of one call of `run_best`, collected from several calls."""

    kernel: str
    tiles: list[Any]
    path: dict[str, Any]  # the choices in outer stages that lead to it
    under: str  # the path as text, for the name
    runs: list[Callable[[Any], Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernel + self.under


class Choice:
    """A replacement for `run_best` that takes `chosen`, by the names of stages, or the default.

    With `record` it also runs every plan, to find its stages; with `every` it also runs each tile.
    """

    def __init__(self, chosen: dict[str, Any] | None = None, record=False, every=False) -> None:
        self.chosen, self.record, self.every = chosen or {}, record, every
        self.stages: dict[str, Stage] = {}
        self.path, self.under, self.hidden = {}, "", False

    def __call__(self, kernel: str, tiles: list[Any], run: Callable[[Any], Any]) -> Any:
        name, path, under, hidden = kernel + self.under, self.path, self.under, self.hidden
        taken = self.chosen.get(name, tiles[0])
        candidates = [taken]
        if self.record and not hidden:
            stage = self.stages.setdefault(name, Stage(kernel, tiles, path, under))
            stage.runs.append(run)
            candidates = [x for x in tiles if x != taken and (self.every or not is_tile(x))]
            candidates.append(taken)  # the last one, so that its results remain
        for candidate in candidates:
            self.path = path | {name: candidate}
            self.under = under + ("" if candidate == tiles[0] else f" in {label(candidate)}")
            self.hidden = hidden or (is_tile(candidate) and candidate != taken and not self.every)
            result = run(candidate)
        self.path, self.under, self.hidden = path, under, hidden
        return result

    @contextmanager
    def at_work(self):
        """Within the block, the launchers use this object."""

        def run_best(kernel, x, key, run, tiles=None):
            return self(kernel, launch.tiles_of(kernel, x) if tiles is None else tiles, run)

        original = launch.run_best
        users = [m for m in sys.modules.values() if getattr(m, "run_best", None) is original]
        assert attention in users
        for module in users:
            module.run_best = run_best
        try:
            yield self
        finally:
            for module in users:
                module.run_best = original


def is_tile(candidate: Any) -> bool:
    return isinstance(candidate, Tile)


@dataclass
class Case:
    """A shape: its columns, whole calls on several inputs, and a check of the first."""

    columns: dict[str, int | str]
    calls: list[Callable[[], Any]]
    problem: Callable[[], str]


def attention_case(
    shape: bench.Shape, device: str, sets: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Forward and backward of ours_qkv."""
    first = make_sample(shape, device, 0, dtype)
    n = sets or sets_of(first.qkv.nbytes + 2 * first.prefix_k.nbytes + first.do.nbytes, device)
    samples = [first, *(make_sample(shape, device, seed, dtype) for seed in range(1, n))]
    attend, truth = METHODS["ours_qkv"], None

    def problem() -> str:
        nonlocal truth
        truth = truth or Truth(first)
        return truth.problem("ours_qkv", attend)

    columns = {"what": "attention", **shape._asdict(), "S": ""}
    return Case(columns, [partial(run, attend, s, True) for s in samples], problem)


def decode_case(shape: steps.Shape, device: str, sets: int | None = None) -> Case:
    """One step of ours, which also writes the cache."""
    n = sets or sets_of(steps.work(shape, "ours"), device)
    samples = [steps.make_sample(shape, device, seed) for seed in range(n)]
    calls, truth = [steps.ours(s) for s in samples], None

    def problem() -> str:
        nonlocal truth
        truth = truth or steps.Truth(samples[0])
        return truth.problem(calls[0]())

    return Case({"what": "decode", "T": 1, **shape._asdict()}, calls, problem)


def stages_of(case: Case) -> list[Stage]:
    """The stages of a case, inner ones first."""
    with Choice(record=True).at_work() as choice:
        for call in case.calls:
            call()
    return list(choice.stages.values())[::-1]


def time_of(calls: list[Callable[[], Any]], chosen: dict[str, Any], stage: Stage | None = None):
    """Microseconds of a call: median, and the quantiles 0.2 and 0.8."""
    choice = Choice(chosen)
    if stage:
        choice.path, choice.under = stage.path, stage.under
        calls = [partial(choice, stage.kernel, stage.tiles, run) for run in stage.runs]
    with choice.at_work():
        times = sorted(graph_times(calls))
    return tuple(round(times[round(q * (len(times) - 1))], 2) for q in (0.5, 0.2, 0.8))


def explore(case: Case, done: set[tuple]) -> Iterator[dict]:
    """A row for each candidate of each stage, then the whole call; `done`: keys that have a row."""
    winners: dict[str, Any] = {}

    def row(stage: str, tile: str, default: bool) -> dict:
        empty = {"us": "", "us_20": "", "us_80": "", "default": int(default), "note": ""}
        return case.columns | {"stage": stage, "tile": tile, "D": bench.D, "dtype": "bf16"} | empty

    for stage in stages_of(case):
        best = float("inf")
        for tile in stage.tiles:
            one = row(stage.name, label(tile), tile == stage.tiles[0])
            if tuple(str(one[name]) for name in KEY) in done:
                continue
            try:
                with Choice(winners | stage.path | {stage.name: tile}).at_work():
                    one["note"] = case.problem()
                if not one["note"]:
                    us = time_of(case.calls, winners | {stage.name: tile}, stage)
                    one |= dict(zip(("us", "us_20", "us_80"), us, strict=True))
            except Exception as error:  # a tile that this GPU cannot run is part of the result
                one["note"] = reason(error)
            if one["us"] and one["us"] < best:
                best, winners[stage.name] = one["us"], tile
            yield one
    for tile, chosen in (("defaults", {}), ("winners", winners)):
        one = row(WHOLE, tile, not chosen)
        us = time_of(case.calls, chosen)
        yield one | dict(zip(("us", "us_20", "us_80"), us, strict=True))


def table(rows: list[dict]) -> list[str]:
    """`stage | shape | default us | best us tile`, the stages with more than one candidate."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        shape = " ".join(f"{n}={row[n]}" for n in "BTHPNS" if str(row[n]) not in ("", "0"))
        groups.setdefault((row["stage"], shape), []).append(row)
    lines = [f"{'stage':24} | {'shape':32} | {'default us':>10} | best us  tile"]
    for (stage, shape), group in groups.items():
        timed = [row for row in group if row["us"]]
        default = [float(row["us"]) for row in timed if str(row["default"]) == "1"]
        if len(group) > 1 and timed:
            best = min(timed, key=lambda row: float(row["us"]))
            before = f"{default[0]:10.2f}" if default else f"{'none':>10}"
            same = "" if str(best["default"]) == "1" else "  <- better than the default"
            lines.append(f"{stage:24} | {shape:32} | {before} | {float(best['us']):7.2f}  "
                         f"{best['tile']}{same}")  # fmt: skip
        lines += [f"{stage:24} | {shape:32} | {row['tile']}: {row['note']}"
                  for row in group if row["note"]]  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time all tiles and plans of the kernels.")
    parser.add_argument("--out", type=Path, help="folder for tiles-DEVICE.csv")
    parser.add_argument("--what", choices=("attention", "decode"), default="attention")
    parser.add_argument("--seconds", type=float, default=200, help="start no shape after this")
    parser.add_argument("--resume", action="store_true", help="only what the CSV lacks")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tiles: no GPU")
        return 1
    need_kernels()
    began, path = time.monotonic(), None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"tiles-{device_name()}.csv"
    rows = rows_of_this_commit(path) if path and args.resume else []
    rows = [row for row in rows if row["what"] == args.what]
    done = {tuple(row[name] for name in KEY) for row in rows}

    def put(row: dict) -> None:
        rows.append(row)
        print(*(row[name] for name in KEY), row["us"], "us", row["note"], flush=True)
        if path:
            add_row(path, row | machine(), KEY)

    make, shapes = attention_case, ATTENTION
    if args.what == "decode":
        make, shapes = decode_case, DECODE
    list(bench.bench_shape(bench.WARM_UP, ("ours_qkv",), "cuda"))
    for shape in shapes:
        if time.monotonic() - began > args.seconds:
            print(f"{shape}: left out, {args.seconds:.0f} s are over", flush=True)
            continue
        columns = {"what": args.what, "T": 1, "S": "", **shape._asdict()}
        failed = columns | {"stage": "all", "tile": "", "us": "", "default": 0}
        if tuple(str(failed[name]) for name in KEY) in done:
            continue
        try:
            for row in explore(make(shape, "cuda"), done):
                put(row)
                if row["note"]:
                    go_on_if_lost(args, began)
        except Exception as error:  # already with the defaults
            put(failed | {"note": reason(error)})
            go_on_if_lost(args, began)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
