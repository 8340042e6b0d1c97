"""The command `runs`: compares runs of the command `train`, makes them smaller, or deletes them.

    python -m minprefix runs runs/*
    python -m minprefix runs runs/* --figure curves.png
    python -m minprefix runs --slim runs/first

Read `run`. A run folder has config.json and log.jsonl, see training/run_folder.py.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minprefix.cli.commands import RunsOptions
from minprefix.cli.parse import WrongUsage
from minprefix.cli.report import format_rows, plot_curves, say, size_of
from minprefix.files import read_json
from minprefix.prefix.make import USUAL_LEN
from minprefix.training.lock import alone_in
from minprefix.training.run_folder import read_log, remove_state


def run(options: RunsOptions) -> dict | None:
    """A table of the runs and of the settings in which they differ."""
    if not options.folders:
        raise WrongUsage("give run folders, such as runs/*")
    runs = {folder: read_run(folder) for folder in options.folders}
    if options.delete or options.slim:
        if options.delete and options.slim:
            raise WrongUsage("--slim and --delete cannot be combined: choose one")
        rows = [{"run": str(folder), **remove(folder, options.delete)} for folder in runs]
        if options.slim:
            say("These runs can still be used, but no longer resumed.")
    else:
        rows = rows_of(runs)
    if options.figure:
        curves = {str(folder): log for folder, (_, log) in runs.items()}
        plot_curves(curves, options.figure)
    if options.json:
        return {"runs": rows}
    print(format_rows(rows))
    if (
        not (options.delete or options.slim)
        and len({dev_data(run) for run, _ in runs.values()}) > 1
    ):
        say("note: the runs have different dev data, so their dev losses cannot be compared")
    return None


def dev_data(settings: dict[str, Any]) -> tuple:
    """The settings that determine the dev examples of a run."""
    names = ("topics", "subset", "subset_seed", "language")
    return settings.get("dev") or settings.get("data"), *(settings.get(name) for name in names)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict]]:
    """The flat settings and the log of a run; ValueError if the folder holds no run."""
    if not (folder / "config.json").is_file() or not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: not a run folder (config.json or log.jsonl is missing)")
    settings = dict(flat(read_json(folder / "config.json")))
    if "prefix_len" in settings and settings.get("init") != "prompt":
        settings["prefix_len"] = settings["prefix_len"] or USUAL_LEN
    return settings, read_log(folder)


def flat(settings: dict) -> Iterator[tuple[str, Any]]:
    """The settings of all groups, without the groups."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value)
        else:
            yield name, value


def remove(folder: Path, whole: bool) -> dict[str, str]:
    """Remove a run, or the files that only resuming needs; returns its size before and after."""
    before = size_of(folder)
    with alone_in(folder):  # ValueError if the run is in progress
        if not whole:
            remove_state(folder)
    if whole:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # names a file of the folder only
            raise OSError(f"{folder}: cannot be deleted ({error.strerror})") from error
    return {"before": before, "after": size_of(folder) if folder.exists() else "deleted"}


def rows_of(runs: dict[Path, tuple[dict[str, Any], list[dict]]]) -> list[dict]:
    """For each run: steps, best dev loss, time, size, last scores, and settings that differ."""
    settings = [config for config, _ in runs.values()]
    names = differing(settings)
    rows = []
    for folder, (config, log) in runs.items():
        dev = [(entry["dev_loss"], entry["step"]) for entry in log if "dev_loss" in entry]
        best, at = min(dev, default=(None, None))
        scores = read_log(folder, "scores.jsonl")[-1:]
        row = {
            "run": str(folder),
            "steps done": max((entry["step"] for entry in log), default=0),
            "best dev loss": "-" if best is None else f"{best:.3f}",
            "at step": "-" if at is None else str(at),
            "seconds": max((entry.get("seconds", 0) for entry in log), default=0),
            "size": size_of(folder),
        }
        for entry in scores:  # the last evaluation wins
            what = f"{Path(str(entry.get('data'))).name} {entry.get('split')}"
            row |= {f"{what} {k}": v for k, v in entry.items() if isinstance(v, float)}
        rows.append(row | {name: str(config.get(name, "-")) for name in names})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "-") for name in columns} for row in rows]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the settings that are not the same in all runs, in the order of the first."""
    names = dict.fromkeys(name for config in settings for name in config)
    return [
        name for name in names
        if any(config.get(name) != settings[0].get(name) for config in settings)
    ]  # fmt: skip
