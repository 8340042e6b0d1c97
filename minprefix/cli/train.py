"""The command `train`: a run folder from the options, or one to go on with.

    python -m minprefix train --data e2e --out runs/e2e
    python -m minprefix train --resume runs/e2e

Read `run`. `trainer.py` says what a step is and `run_folder.py` what the folder holds; config.json
has what the command was started with.
"""

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from minprefix.cli.options import Flat, WithRun, examples_of
from minprefix.cli.parse import changed
from minprefix.files import read_json, write_text
from minprefix.methods.by_name import TUNED, BaselineConfig, describe, make_tuned
from minprefix.models import weights
from minprefix.prefix.config import PrefixConfig
from minprefix.training.loop import tells_how_to_go_on
from minprefix.training.ranks import joined
from minprefix.training.run_folder import state_path
from minprefix.training.trainer import TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class Options(WithRun):
    train: Flat[TrainConfig] = TrainConfig()
    prefix: Flat[PrefixConfig] = PrefixConfig()
    baseline: Flat[BaselineConfig] = BaselineConfig()


def run(options: Options) -> dict | None:
    """Train; where the weights are kept and the best dev loss. None on ranks but the first."""
    out, settings = run_to_train(options)
    with joined(settings["device"]) as ranks:
        ranks.wait()  # all have looked into `out` before one writes there
        trainer = make_trainer(settings, out)
        if not (options.resume and trainer.resume()) and ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
        with tells_how_to_go_on(f"python -m minprefix train --resume {shlex.quote(str(out))}"):
            result = trainer.run()
    if not ranks.first:
        return None
    if not math.isfinite(result["best_dev_loss"]):
        result["best_dev_loss"] = None  # without dev data; JSON has no infinity
    return result | {"kept": str(trainer.kept)}


def run_to_train(options: Options) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    options.check_folder(state_path)
    if options.resume:
        settings = read_settings(options.resume)
        return options.resume, settings | ({"device": options.device} if options.device else {})
    check_read(options)
    names = ("train", "prefix", "baseline")
    assert options.out is not None
    return options.out, options.settings() | {n: asdict(getattr(options, n)) for n in names}


def check_read(options: Options) -> None:
    """ValueError if an option is given that the method, or the start of the prefix, ignores."""
    method = options.train.method
    for config in (options.prefix, options.baseline):
        for option in changed(config, type(config)()):
            name = option.removeprefix("--").replace("-", "_")
            if name not in TUNED[method].reads:
                readers = " or ".join(other for other in TUNED if name in TUNED[other].reads)
                raise ValueError(f"{option} is for method {readers}, not for {method}")
            if name == "init_text" and options.prefix.init == "random":
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
    train, dev = examples_of(settings)
    prefix, baseline = PrefixConfig(**settings["prefix"]), BaselineConfig(**settings["baseline"])
    tuned = make_tuned(model, tokenizer, config, prefix, baseline)
    if config.method in ("ft-top", "adapter"):
        print(describe(tuned, model), file=sys.stderr)
    if tuned.prefix is not None and tuned.prefix.init_residual:
        print(f"MLP fitted to the words, largest difference {tuned.prefix.init_residual:.1e}",
              file=sys.stderr)  # fmt: skip
    return Trainer(model, tokenizer, config, train, dev, out, tuned, settings["linearisation"])
