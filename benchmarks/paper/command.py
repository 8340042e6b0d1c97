"""The command: runs a table or figure of the paper, and writes its CSV, figure and claims.

    python -m benchmarks.paper sweep --data-dir DATA      choose settings for mini on the dev set
    python -m benchmarks.paper table4 --data-dir DATA     the same command continues a stopped one
    python -m benchmarks.paper all --quick                a quick try, in minutes
    python -m benchmarks.paper report --out benchmarks/paper

DATA holds the folders e2e, webnlg and dart; by default they are those that `python -m minprefix
data` has downloaded. Read `run`, then `run_experiment`.
"""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from benchmarks.paper.claims import judge
from benchmarks.paper.estimate import seconds_left, seconds_of
from benchmarks.paper.experiments import EXPERIMENTS, NOT_HERE, Cell, restaurants_for, sweep
from benchmarks.paper.figures import draw
from benchmarks.paper.pool import free_gpus, problem_of, run_all
from benchmarks.paper.presets import SWEEP, Plan
from benchmarks.paper.report import write_report
from benchmarks.paper.results import KEY, quality, read_rows, row_of, write_rows
from benchmarks.paper.run import Run, check_origin, data_digest, record_of, why_missing
from minprefix.cli.main import execute
from minprefix.cli.options import WithModel
from minprefix.cli.report import say
from minprefix.metrics.meteor import why_unavailable
from minprefix.models import weights
from minprefix.training.config import PRECISIONS
from minprefix.training.interrupts import Interrupted

DATA = ("e2e", "webnlg", "dart")  # in the order of the CSVs
WHAT = (*EXPERIMENTS, "all", "sweep", "report")


@dataclass(frozen=True, kw_only=True)
class Options(WithModel):
    """Repeat a table or figure of the paper; write its CSV and figure, and judge its claims."""

    # a table or figure of the paper; all: all of them; sweep: choose the settings of mini, or of a
    # model of your own, on the dev set; report: write RESULTS.md from the CSVs
    what: Positional[Literal[*WHAT]]
    # folder with e2e, webnlg and dart in it; None = what `python -m minprefix data` has fetched
    data_dir: Path | None = None
    only: tuple[str, ...] = ()  # run only these data sets; the rows of others stay in the CSV
    quick: FlagCreatePairsOff[bool] = False  # a first look: few steps, few tables, one seed
    seeds: int | None = None  # number of seeds; None = 3, and 2 for low data
    subsets: int | None = None  # low data: number of subsets; None = 5
    # optimizer steps, instead of the preset's; for low data, their largest number
    steps: int | None = None
    num_beams: int | None = None  # None = 5 as in the paper, and 1 with --quick
    precision: Literal[*PRECISIONS] = "auto"  # of training
    batch_size: int = 64  # tables decoded at a time
    jobs: int | None = None  # processes; None = one for each free GPU, or 1
    runs: Path = Path("runs/paper")  # run folders; commands share them
    out: Path | None = None  # folder for CSVs, figures, RESULTS.md; None = RUNS/results
    # CSV of a sweep, for the settings of mini or of a model of your own; None = for mini the
    # committed one
    sweep_file: Path | None = None


def run(options: Options) -> dict | None:
    """Run the command; returns a dict with --json.

    Raises:
        ValueError: options that contradict each other, or failed runs (the others are done).
        Interrupted: Ctrl-C; the same command continues.
    """
    out = options.out or options.runs / "results"
    if options.what == "report":
        return {"report": str(write_report(out))}
    plan = plan_of(options)
    options, gpus = with_jobs(options)
    if problem := why_unavailable():
        say(problem)
    failed, files, count = [], [], 0
    for name in EXPERIMENTS if options.what == "all" else (options.what,):
        path, problems = run_experiment(name, plan, options, out, gpus)
        failed += [f"{name}: {problem}" for problem in problems if problem]
        count += len(problems)
        files += [str(path)] if path.exists() else []
    if not files:
        raise ValueError("nothing to run: `python -m minprefix data` downloads what is missing")
    report = write_report(out)
    if failed:
        others = " (the others are done)" if len(failed) < count else ""
        raise ValueError(f"{len(failed)} runs failed{others}: {failed[0]}")
    return {"files": files, "report": str(report)} if options.json else None


def plan_of(options: Options) -> Plan:
    """The plan that the options describe."""
    for name in ("seeds", "subsets", "steps", "num_beams", "batch_size", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    plan = Plan(
        model=options.model, quick=options.quick, steps=options.steps, beams=options.num_beams,
        precision=options.precision, batch_size=options.batch_size,
        sweep=options.sweep_file or SWEEP,
        swept=options.what == "sweep" or options.sweep_file is not None,
    )  # fmt: skip
    if options.sweep_file and not options.sweep_file.is_file():
        raise ValueError(f"--sweep-file {options.sweep_file}: there is no such file")
    if options.sweep_file and not any("lr" in row for row in read_rows(options.sweep_file)):
        raise ValueError(f"--sweep-file {options.sweep_file}: no trials of the command sweep in it")
    if options.data_dir and not options.data_dir.is_dir():
        raise ValueError(f"--data-dir {options.data_dir}: there is no such folder")
    needs_sweep = plan.presets == "mini" and not options.quick and options.what != "sweep"
    if needs_sweep and not plan.sweep.exists():
        say(
            "there is no sweep, so the learning rates are the defaults (the command sweep chooses "
            "them on the dev set)"
        )
    if options.quick:
        plan = replace(plan, seeds=(0,), low_seeds=(0,), subsets=(0,), sizes=(50, 100))
    if options.seeds:
        seeds = tuple(range(options.seeds))
        plan = replace(plan, seeds=seeds, low_seeds=seeds)
    if options.subsets:
        plan = replace(plan, subsets=tuple(range(options.subsets)))
    dart = (cell.run for cell in EXPERIMENTS["figure4"](plan))
    if why_missing("dart", options.data_dir) and not any(
        record_of(options.runs / r.id) for r in dart
    ):
        plan = replace(plan, length_data="e2e")
    return plan


def with_jobs(options: Options) -> tuple[Options, list[str]]:
    """The options with device and number of processes, and the GPUs that the processes use."""
    device = options.where
    gpus = free_gpus() if device == "cuda" else []  # cuda:1 means exactly that GPU
    jobs = options.jobs or max(1, len(gpus))
    if jobs == 1 and gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        device = f"cuda:{gpus[0]}"
    return replace(options, device=device, jobs=jobs), gpus


def cells_of(name: str, plan: Plan, options: Options) -> tuple[list[Cell], dict[str, str]]:
    """The cells of a table or figure, and why those of a data set cannot be run: {data: reason}."""
    cells = sweep(plan) if name == "sweep" else EXPERIMENTS[name](plan)
    if options.only:
        if unknown := set(options.only) - set(DATA):
            raise ValueError(f"--only knows e2e, webnlg and dart, got {min(unknown)}")
        cells = [cell for cell in cells if cell.run.data in options.only]
    wanted = dict.fromkeys(cell.run.data for cell in cells)
    missing = {data: why for data in wanted if (why := why_missing(data, options.data_dir))}
    if options.quick and "e2e" in missing:
        say(f"{missing.pop('e2e')}: the embedded restaurant tables stand in for it")
        others = [cell for cell in cells if cell.run.data != "e2e"]
        cells = restaurants_for(cells) + others
    return cells, missing


def run_experiment(
    name: str, plan: Plan, options: Options, out: Path, gpus: list[str]
) -> tuple[Path, list[str]]:
    """Run what is missing of a table or figure; returns its CSV and each run's failure, or "".

    CSV and figure are rewritten after each run, so that they are up to date. Rows with scores that
    are already in the file are kept (`stay`).
    """
    cells, missing = cells_of(name, plan, options)
    model = Path(options.model).name
    path = out / f"{name}-{model}{'-quick' if options.quick else ''}.csv"
    before = read_rows(path)
    if not cells and not before:
        say(f"{name} has no runs on {', '.join(options.only)}")
        return path, []
    runs = list({c.run.id: c.run for c in cells if c.run.data not in missing}.values())
    todo = [run for run in runs if record_of(options.runs / run.id) is None]
    say(f"{name} has {len(runs)} runs; {len(runs) - len(todo)} of them are done")
    for reason in missing.values():
        say(f"not tested: {reason}")
    if not runs and not any(record_of(options.runs / c.run.id) for c in cells) and not before:
        return path, []
    check_ready(runs, todo, options)

    def write() -> list[dict]:
        rows = []
        for cell in cells:
            why, problem = missing.get(cell.run.data), problem_of(cell.run, options.runs)
            if why and problem:  # it has no scores, and cannot get any
                problem = f"not tested: {why}"
            record = record_of(options.runs / cell.run.id)
            rows.append(row_of(name, plan.scale_of(cell.run), model, cell, record, problem))
        rows = stay(rows, before, set(options.only or DATA), trials=name == "sweep")
        rows.sort(key=lambda row: DATA.index(row["data"]) if row["data"] in DATA else -1)
        write_rows(path, rows)
        return rows

    keep_old(path, before, write())
    if todo:
        go(name, todo, runs, options, gpus, write)
    rows = write()
    show_result(name, rows, path, sys.stderr if options.json else sys.stdout)
    return path, [problem_of(run, options.runs) for run in runs]


def check_ready(runs: list[Run], todo: list[Run], options: Options) -> None:
    """Load the model once before the first run, since its errors would be those of all runs. Also
    compare the model and data of finished runs with the present ones (`run.check_origin`)."""
    finished = [(run, record) for run in runs if (record := record_of(options.runs / run.id))]
    finished = [(run, record) for run, record in finished if "origin" in record]
    if not todo and not finished:
        return
    try:
        model, _ = weights.load(options.model, device=options.device)
        weights.need_gpt2(model, "tables and figures")
    except (OSError, ValueError) as error:
        if todo:
            raise
        say(f"it is unknown whether the finished runs have this model: {error}")
        return
    now = {"weights": weights.fingerprint(model)}
    data = {name: data_digest(name, options.data_dir) for name in {run.data for run, _ in finished}}
    for run, record in finished:
        check_origin(options.runs / run.id, record, now | {"data": data[run.data]})


def stay(
    rows: list[dict], before: list[dict], wanted: set[str], trials: bool = False
) -> list[dict]:
    """The new rows of a CSV, and the old ones that are kept.

    A run's name is a digest of its settings, so its old scores are kept even if its folder or data
    no longer exists. Rows of data that --only leaves out are kept too, and so are scored rows in
    other places of the table (for example of more seeds) at the same scale, except in a sweep.
    """
    scored = {row["run"]: row for row in before if not row["problem"]}
    rows = [scored.get(row["run"], row) if row["problem"] else row for row in rows]
    places = {tuple(row.get(name, "") for name in KEY) for row in rows}
    scales = {row["scale"] for row in rows}
    for row in before:
        place = tuple(row.get(name, "") for name in KEY)
        more = place not in places and row["scale"] in scales and not row["problem"] and not trials
        if (row["data"] not in wanted and row["data"] in DATA) or more:
            rows.append(row)
    return rows


def keep_old(path: Path, before: list[dict], rows: list[dict]) -> None:
    """Keep a copy of the old CSV if the new one has lost rows with scores."""
    here = {row["run"] for row in rows}
    lost = [row for row in before if not row["problem"] and row["run"] not in here]
    if lost:
        numbers = (path.with_suffix(f".csv.{n}") for n in itertools.count(1))
        old = next(one for one in numbers if not one.exists())
        write_rows(old, before)
        say(f"{len(lost)} rows of {path} have other settings: the old file is kept as {old.name}")


def go(
    name: str, todo: list[Run], runs: list[Run], options: Options, gpus: list[str], write
) -> None:
    """Run `todo` of a table or figure, with an estimate before and a line after each."""
    count = min(options.jobs, len(todo))
    seconds = seconds_of(runs, options.runs, options.data_dir, options.device)
    known = [seconds[run.id] for run in todo if seconds[run.id] is not None]
    total, unknown = sum(known) / count, len(todo) - len(known)
    others = f", and {unknown} searches of unknown time" if unknown else ""
    say(f"{len(todo)} runs to go, about {duration(total)} with {count} at a time{others}")
    done, began = [], time.perf_counter()
    of = f" of {name}" if options.what == "all" else ""

    def after(run: Run) -> None:
        done.append(run.id)
        record = record_of(options.runs / run.id)
        said = problem_of(run, options.runs)
        if record is not None:
            bleu = quality({name: str(v) for name, v in record["scores"].items()})
            said = f"BLEU {bleu:.2f}, {record['train_seconds'] + record['decode_seconds']:.0f} s"
        write()
        elapsed = time.perf_counter() - began
        left = seconds_left(seconds, [run.id for run in todo], done, elapsed)
        say(f"[{len(done)}/{len(todo)}] {run.id}: {said}; about {duration(left)} left{of}")

    try:
        run_all(todo, options.runs, options.data_dir, options.device, count, gpus, after)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted"
        raise Interrupted(f"{reason}. Run the same command to continue") from None


def show_result(name: str, rows: list[dict], path: Path, stream) -> None:
    """Draw the figure and print the verdict on each claim."""
    if name == "sweep":
        say(f"wrote {path}")
        return
    drawn = draw(name, rows, path.with_suffix(".png"))
    say(f"wrote {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    for line in judge(name, rows):
        print(line, file=stream, flush=True)
    if name in NOT_HERE:
        print(NOT_HERE[name], file=stream, flush=True)


def duration(seconds: float) -> str:
    """Format a number of seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return execute(Options, run, words, "python -m benchmarks.paper")
