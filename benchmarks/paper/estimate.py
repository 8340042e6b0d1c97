"""Estimates how long the runs will take, from similar finished runs or from a few timed steps.

Read `seconds_of`, the estimate before the first run, and `seconds_left`, which corrects it by the
time of the runs so far. The estimate does not include dev evaluations, assumes texts of the
greatest length, and ignores how much of an interrupted run is done.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.paper.run import Run, data_path, make_training, write_texts
from minprefix.data.batches import spread
from minprefix.data.load import load_examples
from minprefix.files import read_json

STEPS = 3  # timed steps, after one that is not timed
TABLES = 8  # tables that are decoded for the timing
SHORT = 10 * (STEPS + 1)  # runs of up to this many steps are not timed themselves


class Speed(NamedTuple):
    """The speed of one kind of run."""

    step: float  # s per optimizer step
    table: float  # s per text
    start: float = 0.0  # s to load model and data


def kind(run: Run) -> tuple:
    """Runs of the same kind take the same time per step and per text."""
    settings = run.train or run.search
    return run.data, run.model, run.method, settings.batch_size, run.decoding.num_beams


def measured(run: Run, data_dir: Path | None, device: str) -> Speed:
    """Measure the speed with a few steps in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        training = make_training(run, data_dir, Path(folder), device)
        start = time.perf_counter() - began
        training.step()
        began = time.perf_counter()
        for _ in range(STEPS):
            last = training.step()
        float(last["nats"])  # waits for a GPU
        per_step = (time.perf_counter() - began) / STEPS
        examples = spread(load_examples(data_path(run.data, data_dir), run.split), TABLES)
        began = time.perf_counter()
        prefix = training.prefix if run.method == "prefix" else None
        write_texts(run, training.model, training.tokenizer, prefix, examples)
    return Speed(per_step, (time.perf_counter() - began) / len(examples), start)


def steps_of(run: Run, pairs: int) -> int:
    """The number of optimizer steps; `pairs` is that of the whole training data."""
    if run.train is None or run.train.steps is not None:
        return (run.train or run.search).steps
    pairs = run.size or round((run.share or 1) * pairs)
    return max(1, round(run.train.epochs * math.ceil(pairs / run.train.batch_size)))


def seconds_of(
    runs: Sequence[Run], root: Path, data_dir: Path | None, device: str
) -> dict[str, float | None]:
    """The seconds that each run takes from its start on one process, by the run's id.

    The steps of a search for a prompt differ in cost, so its seconds are None unless a similar one
    has been finished. Short runs (--quick), for which the timing would take too long, are assumed
    to be as fast as the first kind that was timed.
    """
    speeds: dict[tuple, list[Speed]] = {}
    wanted = {kind(run) for run in runs}
    for run in runs:
        path = root / run.id / "scores.json"
        if path.exists():
            record = read_json(path)
            step = record["train_seconds"] / max(1, record["steps"])
            speed = Speed(step, record["decode_seconds"] / max(1, record["tables"]))
            speeds.setdefault(kind(run), []).append(speed)
    first = {kind(run): run for run in reversed(runs)}
    quick: Speed | None = None
    for name in sorted(wanted - set(speeds)):
        train = first[name].train
        if train is None:
            continue
        short = train.steps is not None and train.steps <= SHORT
        if short and quick is not None:
            speeds[name] = [quick]
            continue
        speeds[name] = [Speed(0, 0)]
        with suppress(Exception):  # the run itself will say what is wrong
            speeds[name] = [measured(first[name], data_dir, device)]
            quick = speeds[name][0]
    sizes: dict[tuple[str, str], int] = {}
    seconds = {}
    for run in runs:
        for split in ("train", run.split):
            if (run.data, split) not in sizes:
                examples = load_examples(data_path(run.data, data_dir), split)
                counts = (len(e.targets) if split == "train" else 1 for e in examples)
                sizes[run.data, split] = sum(counts)
        if kind(run) not in speeds:
            seconds[run.id] = None
            continue
        step, table, start = map(statistics.median, zip(*speeds[kind(run)], strict=True))
        tables = min(run.tables or math.inf, sizes[run.data, run.split])
        seconds[run.id] = start + step * steps_of(run, sizes[run.data, "train"]) + table * tables
    return seconds


def seconds_left(
    seconds: dict[str, float | None], todo: Sequence[str], done: Sequence[str], elapsed: float
) -> float:
    """How long the remaining runs will take, given the time of the finished ones.

    Args:
        seconds: the result of `seconds_of`; a run of unknown time counts as an average one.
        todo, done: ids of all runs and of those that are done, at least one.
        elapsed: s since the first began.
    """
    known = [s for name in todo if (s := seconds[name]) is not None]
    usual = statistics.fmean(known) if known else 1.0
    weights = {name: seconds[name] if seconds[name] is not None else usual for name in todo}
    weights = {name: max(weight, 1e-9) for name, weight in weights.items()}  # s; 0 = not timed
    finished = sum(weights[name] for name in done)
    return elapsed * (sum(weights.values()) - finished) / finished
