"""The command `paper`: a table or figure of the paper, from its runs to CSV, figure and claims.

    python -m minprefix paper sweep --data-dir DATA        what the dev set chooses for mini
    python -m minprefix paper table4 --data-dir DATA       the same command goes on where it was
    python -m minprefix paper all --quick                  a look around, in minutes
    python -m minprefix paper report --out benchmarks/paper

DATA holds the folders e2e, webnlg and dart; without it they are those that `python -m minprefix
data` fetched. Read `run`, then `run_experiment`.
"""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.claims import judge
from benchmarks.paper.estimate import seconds_of
from benchmarks.paper.experiments import EXPERIMENTS, NOT_HERE, Cell, restaurants_for, sweep
from benchmarks.paper.figures import draw
from benchmarks.paper.pool import free_gpus, problem_of, run_all
from benchmarks.paper.presets import SWEEP, Plan
from benchmarks.paper.report import write_report
from benchmarks.paper.results import KEY, quality, read_rows, row_of, write_rows
from benchmarks.paper.run import Run, check_origin, data_digest, record_of, why_missing
from minprefix.metrics.meteor import why_not
from minprefix.models import weights
from minprefix.training.loop import Interrupted
from minprefix.training.precision import PRECISIONS

DATA = ("e2e", "webnlg", "dart")  # in the order of the CSVs
WHAT = (*EXPERIMENTS, "all", "sweep", "report")


def add_options(parser) -> None:
    """Options of the command, beside that of the model and its device."""
    add = parser.add_argument
    # fmt: off
    add("what", choices=WHAT, metavar="WHAT", help=f"one of {', '.join(WHAT)}; all: tables and "
        "figures; sweep: choose the settings of mini, or of a model of your own, on the dev set; "
        "report: RESULTS.md from the CSVs")
    add("--data-dir", type=Path, help="folder with e2e, webnlg, dart in it (default: what the "
        "command data has fetched)")
    add("--only", nargs="+", metavar="DATA", help="only these data sets; the CSV keeps its rows of "
        "the others")
    add("--quick", action="store_true", help="to look around: few steps, few tables, one seed")
    add("--seeds", type=int, help="number of seeds (default: 3; low data: 2)")
    add("--subsets", type=int, help="low data: number of subsets (default: 5)")
    add("--steps", type=int, help="optimiser steps, instead of the preset's; low data: at most so "
        "many")
    add("--num-beams", type=int, help="(default: 5 as in the paper, with --quick 1)")
    add("--precision", choices=PRECISIONS, default="auto", help="of training")
    add("--batch-size", type=int, default=64, help="tables decoded at a time")
    add("--jobs", type=int, help="processes (default: one for each free GPU, or 1)")
    add("--runs", type=Path, default=Path("runs/paper"), help="run folders; commands share them "
        "(default: %(default)s)")
    add("--out", type=Path, help="CSVs, figures, RESULTS.md (default: RUNS/results)")
    add("--sweep-file", type=Path, help="CSV of a sweep, for the settings of mini or of a model of "
        "your own (default: for mini the committed one)")
    # fmt: on


def run(args) -> dict | None:
    """The command; a dict with --json.

    Raises:
        ValueError: options that make no sense, or runs that failed (the others are done).
        Interrupted: Ctrl-C; the same command goes on.
    """
    out = args.out or args.runs / "results"
    if args.what == "report":
        return {"report": str(write_report(out))}
    plan, jobs = plan_of(args), jobs_of(args)
    if problem := why_not():
        say(problem)
    failed, files, count = [], [], 0
    for name in EXPERIMENTS if args.what == "all" else (args.what,):
        path, problems = run_experiment(name, plan, args, out, jobs)
        failed += [f"{name}: {problem}" for problem in problems if problem]
        count += len(problems)
        files += [str(path)] if path.exists() else []
    if not files:
        raise ValueError("nothing to run: `python -m minprefix data` fetches what is not at hand")
    report = write_report(out)
    if failed:
        others = ", the others are done" if len(failed) < count else ""
        raise ValueError(f"{len(failed)} runs failed{others}: {failed[0]}")
    return {"files": files, "report": str(report)} if args.json else None


def plan_of(args) -> Plan:
    """The plan that the options describe."""
    for name in ("seeds", "subsets", "steps", "num_beams", "batch_size", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    plan = Plan(
        model=args.model, quick=args.quick, steps=args.steps, beams=args.num_beams,
        precision=args.precision, batch_size=args.batch_size, sweep=args.sweep_file or SWEEP,
        swept=args.what == "sweep" or args.sweep_file is not None,
    )  # fmt: skip
    if args.sweep_file and not args.sweep_file.is_file():
        raise ValueError(f"--sweep-file {args.sweep_file}: there is no such file")
    if args.sweep_file and not any("lr" in row for row in read_rows(args.sweep_file)):
        raise ValueError(f"--sweep-file {args.sweep_file}: no trials in it (see `paper sweep`)")
    if args.data_dir and not args.data_dir.is_dir():
        raise ValueError(f"--data-dir {args.data_dir}: there is no such folder")
    needs_sweep = plan.presets == "mini" and not args.quick and args.what != "sweep"
    if needs_sweep and not plan.sweep.exists():
        say("no sweep: learning rates are the defaults, no dev set chose them (see paper sweep)")
    if args.quick:
        plan = replace(plan, seeds=(0,), low_seeds=(0,), subsets=(0,), sizes=(50, 100))
    if args.seeds:
        plan = replace(plan, seeds=tuple(range(args.seeds)), low_seeds=tuple(range(args.seeds)))
    if args.subsets:
        plan = replace(plan, subsets=tuple(range(args.subsets)))
    dart = (cell.run for cell in EXPERIMENTS["figure4"](plan))
    if why_missing("dart", args.data_dir) and not any(record_of(args.runs / r.id) for r in dart):
        plan = replace(plan, length_data="e2e")
    return plan


def jobs_of(args) -> tuple[int, list[str]]:
    """Number of processes, and the GPUs that they are spread over."""
    gpus = free_gpus() if args.device == "cuda" else []  # cuda:1 is that one
    jobs = args.jobs or max(1, len(gpus))
    if jobs == 1 and gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        args.device = f"cuda:{gpus[0]}"
    return jobs, gpus


def cells_of(name: str, plan: Plan, args) -> tuple[list[Cell], dict[str, str]]:
    """The cells of a table or figure, and why those of a data set cannot be run: {data: reason}."""
    cells = sweep(plan) if name == "sweep" else EXPERIMENTS[name](plan)
    if args.only:
        if unknown := set(args.only) - set(DATA):
            raise ValueError(f"--only knows e2e, webnlg and dart, got {min(unknown)}")
        cells = [cell for cell in cells if cell.run.data in args.only]
    wanted = dict.fromkeys(cell.run.data for cell in cells)
    missing = {data: why for data in wanted if (why := why_missing(data, args.data_dir))}
    if args.quick and "e2e" in missing:
        say(f"{missing.pop('e2e')}: the embedded restaurant tables stand in for it")
        others = [cell for cell in cells if cell.run.data != "e2e"]
        cells = restaurants_for(cells) + others
    return cells, missing


def run_experiment(
    name: str, plan: Plan, args, out: Path, jobs: tuple[int, list[str]]
) -> tuple[Path, list[str]]:
    """Run what is missing of a table or figure; its CSV, and for each run why it failed, or "".

    CSV and figure are written anew after each run, so that they show what there is. Rows with
    scores that are in the file stay (`stay`).
    """
    cells, missing = cells_of(name, plan, args)
    model = Path(args.model).name
    path = out / f"{name}-{model}{'-quick' if args.quick else ''}.csv"
    before = read_rows(path)
    if not cells and not before:
        say(f"{name}: has no runs on {', '.join(args.only)}")
        return path, []
    runs = list({c.run.id: c.run for c in cells if c.run.data not in missing}.values())
    todo = [run for run in runs if record_of(args.runs / run.id) is None]
    say(f"{name}: {len(runs)} runs, {len(runs) - len(todo)} of them are done")
    for reason in missing.values():
        say(f"not tested: {reason}")
    if not runs and not any(record_of(args.runs / c.run.id) for c in cells) and not before:
        return path, []
    check_ready(runs, todo, args)

    def write() -> list[dict]:
        rows = []
        for cell in cells:
            why, problem = missing.get(cell.run.data), problem_of(cell.run, args.runs)
            if why and problem:  # it has no scores, and cannot have
                problem = f"not tested: {why}"
            record = record_of(args.runs / cell.run.id)
            rows.append(row_of(name, plan.scale_of(cell.run), model, cell, record, problem))
        rows = stay(rows, before, set(args.only or DATA), trials=name == "sweep")
        rows.sort(key=lambda row: DATA.index(row["data"]) if row["data"] in DATA else -1)
        write_rows(path, rows)
        return rows

    keep_old(path, before, write())
    if todo:
        go(todo, runs, args, jobs, write)
    rows = write()
    tell(name, rows, path, sys.stderr if args.json else sys.stdout)
    return path, [problem_of(run, args.runs) for run in runs]


def check_ready(runs: list[Run], todo: list[Run], args) -> None:
    """Load the model once, before the first run: its errors are all runs' errors. And compare what
    finished runs were made from with what is here (`run.check_origin`)."""
    finished = [(run, record) for run in runs if (record := record_of(args.runs / run.id))]
    finished = [(run, record) for run, record in finished if "origin" in record]
    if not todo and not finished:
        return
    try:
        model, _ = weights.load(args.model, device=args.device)
        weights.need_gpt2(model, "tables and figures")
    except (OSError, ValueError) as error:
        if todo:
            raise
        say(f"whether the finished runs are of this model is not known: {error}")
        return
    now = {"weights": weights.fingerprint(model)}
    data = {name: data_digest(name, args.data_dir) for name in {run.data for run, _ in finished}}
    for run, record in finished:
        check_origin(args.runs / run.id, record, now | {"data": data[run.data]})


def stay(
    rows: list[dict], before: list[dict], wanted: set[str], trials: bool = False
) -> list[dict]:
    """The new rows of a CSV, with those that were in it before and stay.

    A run's name is a digest of its settings: what was scored under it stands, also where its folder
    or data is no longer at hand. So do all rows of data that --only leaves out, and scored rows at
    other places of the table (of more seeds, say) at the same scale; trials of a sweep do not.
    """
    scored = {row["run"]: row for row in before if not row["problem"]}
    rows = [scored.get(row["run"], row) if row["problem"] else row for row in rows]
    places = {tuple(row.get(name, "") for name in KEY) for row in rows}
    scales = {row["scale"] for row in rows}
    for row in before:
        place = tuple(row.get(name, "") for name in KEY)
        more = place not in places and row["scale"] in scales and not row["problem"] and not trials
        if row["data"] not in wanted and row["data"] in DATA or more:
            rows.append(row)
    return rows


def keep_old(path: Path, before: list[dict], rows: list[dict]) -> None:
    """The CSV as it was, beside the new one, if that lost rows with scores."""
    here = {row["run"] for row in rows}
    lost = [row for row in before if not row["problem"] and row["run"] not in here]
    if lost:
        numbers = (path.with_suffix(f".csv.{n}") for n in itertools.count(1))
        old = next(one for one in numbers if not one.exists())
        write_rows(old, before)
        say(f"{len(lost)} rows of {path} are of other settings: it is kept as {old.name}")


def go(todo: list[Run], runs: list[Run], args, jobs: tuple[int, list[str]], write) -> None:
    """Run `todo`, with an estimate before and a line after each."""
    count, gpus = jobs
    count = min(count, len(todo))
    seconds = seconds_of(runs, args.runs, args.data_dir, args.device)
    known = [seconds[run.id] for run in todo if seconds[run.id] is not None]
    total, unknown = sum(known) / count, len(todo) - len(known)
    beside = f", beside {unknown} searches of unknown time" if unknown else ""
    say(f"{len(todo)} runs to go, about {duration(total)} with {count} at a time{beside}")
    done = []

    def after(run: Run) -> None:
        done.append(run)
        record = record_of(args.runs / run.id)
        said = problem_of(run, args.runs)
        if record is not None:
            bleu = quality({name: str(v) for name, v in record["scores"].items()})
            said = f"BLEU {bleu:.2f}, {record['train_seconds'] + record['decode_seconds']:.0f} s"
        write()
        left = max(0.0, total - sum(seconds[r.id] or 0 for r in done) / count)
        say(f"[{len(done)}/{len(todo)}] {run.id}: {said}; about {duration(left)} left")

    try:
        run_all(todo, args.runs, args.data_dir, args.device, count, gpus, after)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"{str(stop) or 'interrupted'}. The same command goes on") from None


def tell(name: str, rows: list[dict], path: Path, stream) -> None:
    """Draw the figure, print the claims."""
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
    """Seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
