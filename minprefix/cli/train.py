"""The command `train`: creates a run folder from the options, or continues one.

    python -m minprefix train --data e2e --out runs/e2e
    python -m minprefix train --resume runs/e2e
    python -m minprefix train --resume runs/e2e --steps 400    a longer run

Read `run`. `trainer.py` describes a step and `run_folder.py` the files of the folder; config.json
holds the options of the command, and the settings that were derived from the data.
"""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from minprefix.checks import from_saved
from minprefix.cli.commands import TrainOptions
from minprefix.cli.options import examples_of, resolve_paths
from minprefix.cli.parse import WrongUsage
from minprefix.cli.report import plot_loss, tensorboard
from minprefix.cli.run_report import print_end, print_start
from minprefix.files import names_file, read_json, write_text
from minprefix.methods.by_name import ignored_fields, make_tuned
from minprefix.methods.config import BaselineConfig
from minprefix.methods.paper import paper_settings
from minprefix.models import weights
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import TrainConfig
from minprefix.training.interrupts import Interrupted, resume_hint
from minprefix.training.lock import alone_in
from minprefix.training.ranks import process_group
from minprefix.training.run_folder import has_lost_state, has_state, read_log, remove_state
from minprefix.training.trainer import Trainer

LENGTH = ("steps", "epochs", "time")  # the length of a run: only one of them may be given
MAY_CHANGE = (
    "--steps", "--epochs", "--time", "--patience", "--auto-batch", "--track", "--no-keep-state",
)  # fmt: skip


def run(options: TrainOptions) -> dict | None:
    """Train; returns the file or folder of the weights and the best dev loss, on the first rank."""
    options = after_restart(options)
    out, settings = folder_and_settings(options)
    with process_group(settings["device"]) as ranks:
        ranks.barrier()  # all ranks must have looked into `out` before one of them writes there
        trainer, note = make_trainer(settings, out)
        with alone_in(out) if ranks.first else nullcontext():
            return train(options, settings, trainer, note)


def train(options: TrainOptions, settings: dict, trainer: Trainer, note: str) -> dict | None:
    """The work of `run`, once the run folder is locked; `note` is about the dev data."""
    out, first = trainer.out, trainer.ranks.first
    if first:
        options.check_folder(has_state, MAY_CHANGE)  # another process may have finished a run there
    resumed = options.resume is not None and trainer.resume()
    if first:
        settings["train"] = asdict(trainer.config)
        write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
        print_start(trainer, note, resumed)
    if options.track and first:
        trainer.watch = tensorboard(out / "tensorboard")
    resume_command = f"python -m minprefix train --resume {shlex.quote(str(out))}"
    try:
        with resume_hint(resume_command):
            result = trainer.run()
    except Interrupted:
        if first:
            draw(trainer)
        raise
    if not first:
        return None
    draw(trainer)
    if not options.keep_state:
        remove_state(out)
    print_end(trainer, settings, resume_command)
    trainer.check_result()
    if not trainer.measured:
        result["best_dev_loss"] = None  # without dev data; JSON has no infinity
    return result | {"kept": str(trainer.kept)}


def draw(trainer: Trainer) -> None:
    """Write loss.png from the log."""
    if log := read_log(trainer.out):
        plot_loss(log, trainer.out / "loss.png", f"Loss of the run {trainer.out.name}")


def folder_and_settings(options: TrainOptions) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    options.check_folder(has_state, MAY_CHANGE)
    lengths = [f"--{name}" for name in LENGTH if getattr(options.train, name) is not None]
    if len(lengths) > 1:
        raise WrongUsage(f"{' and '.join(lengths)} set the length of the run: give only one")
    if options.resume:
        settings = read_settings(options.resume)
        if has_lost_state(options.resume, settings["train"].get("eval_every") or 1):
            raise ValueError(
                f"{options.resume} has no state (runs --slim or --no-keep-state removes it), so it "
                "cannot be resumed: start a new run with --out"
            )
        given = asdict(options.train)
        if lengths:
            settings["train"] |= {name: given[name] for name in (*LENGTH, "most_steps")}
        if options.train.patience != TrainConfig.patience:
            settings["train"]["patience"] = options.train.patience
        if options.train.auto_batch:
            settings["train"]["auto_batch"] = True
        return options.resume, settings | ({"device": options.device} if options.device else {})
    assert options.out is not None
    return options.out, new_settings(options)


def new_settings(options: TrainOptions) -> dict:
    """The contents of config.json for a new run with these options."""
    check_no_ignored_options(options)
    if options.preset:
        options = with_preset(options, options.preset)
    names = ("train", "prefix", "baseline")
    return options.settings() | {n: asdict(getattr(options, n)) for n in names}


def after_restart(options: TrainOptions) -> TrainOptions:
    """The options. If torchrun (--max-restarts) has restarted this command, and the run in --out
    has the same settings, they are changed to resume that run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or options.out is None:
        return options
    if not (options.out / "config.json").is_file():
        return options
    ours = json.loads(json.dumps(new_settings(options)))
    theirs = read_json(options.out / "config.json")
    # in config.json, None and "auto" were replaced by values from the data, and epochs by steps
    given = {n: x for n, x in ours.pop("train").items() if x not in (None, "auto")}
    given.pop("epochs", None)
    if not given.items() <= theirs.pop("train", {}).items() or ours != theirs:
        return options
    same = ("device", "json", "debug", "track", "keep_state")
    return TrainOptions(resume=options.out, **{name: getattr(options, name) for name in same})


def with_preset(options: TrainOptions, data: str) -> TrainOptions:
    """The options, with the paper's settings for those that are not given."""
    length = any(getattr(options.train, name) is not None for name in LENGTH)
    paper, prefix_len = paper_settings(options.train.method, data)
    given = asdict(options.train)
    train = {
        name: value for name, value in paper.items()
        if given[name] is None and not (name == "epochs" and length)
    }  # fmt: skip
    prefix = options.prefix
    if options.train.method == "prefix" and prefix.prefix_len is None:
        prefix = replace(prefix, prefix_len=prefix_len)
    return replace(options, train=replace(options.train, patience=0, **train), prefix=prefix)


def check_no_ignored_options(options: TrainOptions) -> None:
    """WrongUsage if an option is given that the method, or the start of the prefix, ignores."""
    for name, why in ignored_fields(options.train, options.prefix, options.baseline):
        raise WrongUsage(f"--{name.replace('_', '-')} {why}")


@names_file
def read_settings(run_folder: Path) -> dict:
    """The checked contents of a run's config.json: the options with which `train` was started."""
    path = run_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_folder}: not a run of the command train ({path.name} is missing)")
    settings = read_json(path)
    if "search" in settings:
        raise ValueError(f"{run_folder}: a run of the command search, not of train")
    try:
        if "patience" not in settings["train"]:  # older runs: no early stop, fp32 on every CPU
            settings["train"]["patience"] = 0
            if settings["device"] == "cpu" and settings["train"]["precision"] == "auto":
                settings["train"]["precision"] = "fp32"
        if str(settings["train"].get("time"))[-1:].isdigit():  # in older runs, seconds
            settings["train"]["time"] += "s"
        from_saved(TrainConfig, settings["train"])
        from_saved(PrefixConfig, settings["prefix"])
        from_saved(BaselineConfig, settings.setdefault("baseline", {}))  # older runs have none
        settings = resolve_paths(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, not the settings of a run ({error})") from error
    return settings


@contextmanager
def naming_settings_file(path: Path) -> Iterator[None]:
    """Within the block, errors about the settings of an earlier run also name their file."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not path.is_file():  # a new run
            raise
        raise ValueError(f"{error} (named in {path})") from error


def make_trainer(settings: dict, out: Path) -> tuple[Trainer, str]:
    """The run for these settings, at step 0, and a note about its dev data, or ""."""
    config = TrainConfig(**settings["train"])
    prefix, baseline = PrefixConfig(**settings["prefix"]), BaselineConfig(**settings["baseline"])
    with naming_settings_file(out / "config.json"):
        model, tokenizer = weights.load(settings["model"], device=settings["device"])
        train, dev, note = examples_of(settings)
        tuned = make_tuned(model, tokenizer, config, prefix, baseline)
        trainer = Trainer(
            model, tokenizer, config, train, dev, out, tuned, settings["linearisation"]
        )
    return trainer, note
