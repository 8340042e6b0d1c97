"""The command `train`: a run folder from the options, or one to go on with; and `export`.

    python -m minprefix train --data e2e --out runs/e2e
    python -m minprefix train --resume runs/e2e

Read `run`. `training.py` says what a step is and `run_folder.py` what the folder holds; config.json
is what the command was started with.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

from minprefix.cli.options import add_fields, from_args
from minprefix.data.load import load_train_and_dev
from minprefix.data.splits import add_subset, choose, low_data
from minprefix.files import load_tensors, read_json, write_text
from minprefix.methods.by_name import TUNED, BaselineConfig, describe, make_tuned
from minprefix.models import weights
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.training.loop import tells_how_to_go_on
from minprefix.training.precision import in_bf16
from minprefix.training.ranks import joined
from minprefix.training.run_folder import read_state, state_path
from minprefix.training.trainer import TrainConfig, Trainer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command, beside those of model and data."""
    parser.add_argument("--dev", help="dev file, where --data is a file")
    add_subset(parser)
    parser.add_argument("--out", type=Path, help="run folder to make")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    add_fields(parser, TrainConfig)
    add_fields(parser, PrefixConfig)
    add_fields(parser, BaselineConfig)


def run(args) -> dict | None:
    """Train; where the weights are kept and the best dev loss. None on ranks but the first."""
    out, settings = run_to_train(args)
    with joined(settings["device"]) as ranks:
        ranks.wait()  # all have looked into `out` before one writes there
        trainer = make_trainer(settings, out)
        if not (args.resume and trainer.resume()) and ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
        with tells_how_to_go_on(f"python -m minprefix train --resume {shlex.quote(str(out))}"):
            result = trainer.run()
    if not ranks.first:
        return None
    if not math.isfinite(result["best_dev_loss"]):
        result["best_dev_loss"] = None  # without dev data; JSON has no infinity
    return result | {"kept": str(trainer.kept)}


def run_to_train(args) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    if (args.out is None) == (args.resume is None):
        raise ValueError("give either --out (a new run) or --resume (a run folder to go on with)")
    if args.resume:
        allowed = ("--resume", "--device", "--json", "--debug")
        given = [word.split("=")[0] for word in args.argv if word.startswith("--")]
        for option in given:
            if option not in allowed:
                raise ValueError(
                    f"{args.resume}: a run keeps its settings, {option} cannot go with --resume"
                )
        settings = read_settings(args.resume)
        return args.resume, settings | ({"device": args.device} if "--device" in given else {})
    if (args.out / "config.json").exists() or state_path(args.out).exists():
        raise ValueError(
            f"{args.out} holds a run: go on with --resume {args.out}, or choose another"
        )
    train = from_args(TrainConfig, args)
    check_read(train.method, args.argv)
    prefix = from_args(PrefixConfig, args)
    check_start(prefix, args.argv)
    settings = {
        "model": args.model, "device": args.device, "data": args.data, "dev": args.dev,
        "linearisation": args.linearisation or "paper", "topics": args.topics,
        "subset": args.subset, "subset_seed": args.subset_seed,
        "train": asdict(train),
        "prefix": asdict(prefix),
        "baseline": asdict(from_args(BaselineConfig, args)),
    }  # fmt: skip
    return args.out, settings


def check_read(method: str, argv: list[str]) -> None:
    """ValueError if the words of the command line have an option that only other methods read."""
    given = {word.split("=")[0] for word in argv}
    for field in (*fields(PrefixConfig), *fields(BaselineConfig)):
        flag = field.name.replace("_", "-")
        options = sorted(given & {f"--{flag}", f"--no-{flag}"})  # the latter of a bool
        if options and field.name not in TUNED[method].reads:
            readers = " or ".join(name for name in TUNED if field.name in TUNED[name].reads)
            raise ValueError(f"{options[0]} is for method {readers}, not for {method}")


def check_start(prefix: PrefixConfig, argv: list[str]) -> None:
    """ValueError if the command line has an option that a prefix of this form does not read."""
    given = {word.split("=")[0] for word in argv}
    if "--init-text" in given and prefix.init == "random":
        raise ValueError("--init-text is for --init words or prompt, not for random")


def read_settings(run_folder: Path) -> dict:
    """What config.json of a run says, checked: the options that `train` was started with."""
    path = run_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_folder}: no run of the command train ({path.name} is missing)")
    settings = read_json(path)
    try:
        TrainConfig(**settings["train"]), PrefixConfig(**settings["prefix"])
        BaselineConfig(**settings.setdefault("baseline", {}))  # older runs have none
        missing = {"model", "device", "data", "dev", "linearisation"} - set(settings)
        if missing:
            raise KeyError(min(missing))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, not the settings of a run ({error})") from error
    return settings


def make_trainer(settings: dict, out: Path) -> Trainer:
    """The run that the settings describe, at step 0."""
    config = TrainConfig(**settings["train"])
    model, tokenizer = weights.load(settings["model"], device=settings["device"])
    linearisation = settings["linearisation"]
    train, dev = load_train_and_dev(settings["data"], settings["dev"], linearisation)
    topics, size = settings.get("topics"), settings.get("subset")
    train, dev = choose(train, topics, "train"), choose(dev, topics, "dev") if dev else dev
    if size is not None:
        train, dev = low_data(train, dev, size, settings["subset_seed"])
    prefix, baseline = PrefixConfig(**settings["prefix"]), BaselineConfig(**settings["baseline"])
    tuned = make_tuned(model, tokenizer, config, prefix, baseline)
    if config.method in ("ft-top", "adapter"):
        print(describe(tuned, model), file=sys.stderr)
    if tuned.prefix is not None and tuned.prefix.init_residual:
        print(f"MLP fitted to the words, largest difference {tuned.prefix.init_residual:.1e}",
              file=sys.stderr)  # fmt: skip
    return Trainer(model, tokenizer, config, train, dev, out, tuned, linearisation)


def run_export(args) -> dict:
    """Write the latest prefix of a run, without its MLP."""
    settings = read_settings(args.run_folder)
    config = TrainConfig(**settings["train"])
    if config.method != "prefix":
        raise ValueError(
            f"{args.run_folder} is a run of method {config.method}: "
            f"{args.run_folder / TUNED[config.method].kept} is all that it keeps"
        )
    state = read_state(args.run_folder)
    model, tokenizer = weights.load(settings["model"])
    prefix = make_prefix(model, tokenizer, PrefixConfig(**settings["prefix"]), config.seed)
    if state["settings"].get("base model") != prefix.base:
        raise ValueError(f"{args.run_folder}: {settings['model']} is not the model of this run")
    if state["settings"].get("bf16", False):  # virtual tokens were read by the model in bf16
        prefix.bind(in_bf16(model))
    try:
        prefix.load_state_dict(state["trained"])
    except RuntimeError as error:
        raise ValueError(f"{args.run_folder}: the state is of another model or prefix") from error
    prefix.linearisation, prefix.max_source = settings["linearisation"], config.max_source
    prefix.save(args.out)
    tensors, _ = load_tensors(args.out)
    return {
        "file": str(args.out),
        "step": state["step"],
        "trained_parameters": sum(p.numel() for p in prefix.parameters()),
        "kept_parameters": sum(t.numel() for t in tensors.values()),
        "bytes": args.out.stat().st_size,
    }
