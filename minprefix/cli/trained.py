"""Loads the model, and the prefix or adapter that --prefix or --adapter names."""

from pathlib import Path

import torch

from minprefix.cli.options import WithTrained
from minprefix.cli.parse import WrongUsage
from minprefix.files import read_json
from minprefix.methods.adapters import Adapter
from minprefix.models import weights
from minprefix.prefix.prefix import Prefix


def load_model(options: WithTrained) -> tuple:
    """The model, with the dtype and device of the options, and its tokenizer."""
    return weights.load(options.model, dtype=getattr(torch, options.dtype), device=options.where)


def load_trained(options: WithTrained, model) -> Prefix | None:
    """The prefix of --prefix, on the model's device, checked to belong to the model.

    For --adapter, the adapter is attached to the model instead.
    """
    if options.adapter and options.prefix:
        raise WrongUsage("--prefix and --adapter are different methods: choose one")
    if options.adapter:
        adapter = Adapter.load(options.adapter).to(model.wte.weight)
        check_base(adapter, model, options.adapter)
        adapter.attach(model)
    if not options.prefix:
        return None
    prefix = Prefix.load(options.prefix).to(options.where)
    check_base(prefix, model, options.prefix)
    return prefix


def check_base(trained: Prefix | Adapter, model, path: Path) -> None:
    """`trained.check_base`; the message also names the model of the run next to the file."""
    try:
        trained.check_base(model)
    except ValueError as error:
        settings = path.parent / "config.json"
        base = read_json(settings).get("model") if settings.is_file() else None
        advice = f"; its run was of --model {base}" if base else ""
        raise ValueError(f"{error}{advice}") from error
