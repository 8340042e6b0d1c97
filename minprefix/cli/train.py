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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minprefix.cli.options import Flat, WithRun, examples_of
from minprefix.cli.parse import changed
from minprefix.files import read_json, write_text
from minprefix.methods.adapters import BaselineConfig, describe_baseline, make_baseline
from minprefix.models import weights
from minprefix.prefix.prefix import PrefixConfig, make_prefix
from minprefix.training.ranks import joined
from minprefix.training.run_folder import state_path
from minprefix.training.trainer import TrainConfig, Trainer, tells_how_to_go_on

# by method: the fields of PrefixConfig and BaselineConfig that it reads
READ = {
    "prefix": tuple(field.name for field in fields(PrefixConfig)),
    "finetune": (),
    "ft-top": ("top_layers", "top_embedding"),
    "adapter": ("adapter_design", "bottleneck", "adapter_share"),
}


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
        if options.resume and state_path(out).exists():
            trainer.load_state()
        elif ranks.first:
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
    return options.out, options.settings() | {n: asdict(getattr(options, n)) for n in names}


def check_read(options: Options) -> None:
    """ValueError if an option is given that the method, or the start of the prefix, ignores."""
    method = options.train.method
    for config in (options.prefix, options.baseline):
        for option in changed(config, type(config)()):
            name = option.removeprefix("--").replace("-", "_")
            if name not in READ[method]:
                readers = " or ".join(other for other in READ if name in READ[other])
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
    prefix = None
    if config.method == "prefix":
        prefix = make_prefix(model, tokenizer, PrefixConfig(**settings["prefix"]), config.seed)
        if prefix.init_residual:
            print(f"MLP fitted to the words, largest difference {prefix.init_residual:.1e}",
                  file=sys.stderr)  # fmt: skip
    choice = BaselineConfig(**settings["baseline"])
    baseline = make_baseline(model, config.method, choice, config.seed)
    if baseline is not None:
        print(describe_baseline(baseline, model), file=sys.stderr)
    return Trainer(
        model, tokenizer, config, train, dev, out, prefix, settings["linearisation"], baseline
    )
