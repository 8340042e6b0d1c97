"""The command `export`: writes the latest prefix of a run without its MLP, as a folder with a model
card or as a file."""

import math
import sys

from minprefix.cli.commands import ExportOptions
from minprefix.cli.train import read_settings
from minprefix.methods.by_name import TUNED
from minprefix.models import weights
from minprefix.prefix.card import PREFIX_FILE, write_card
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.tensors import load_tensors
from minprefix.training.config import TrainConfig
from minprefix.training.loop import UNBOUNDED
from minprefix.training.precision import in_bf16
from minprefix.training.run_folder import read_state, state_path
from minprefix.training.state import check_progress, checked_weights


def run(options: ExportOptions) -> dict:
    """Write the latest prefix of a run, without its MLP."""
    settings = read_settings(options.run_folder)
    config = TrainConfig(**settings["train"])
    if config.method != "prefix":
        raise ValueError(
            f"{options.run_folder} is a run of method {config.method}: "
            f"its result is {options.run_folder / TUNED[config.method].kept}"
        )
    state = read_state(options.run_folder)
    try:
        check_progress(state, UNBOUNDED)
    except ValueError as error:
        raise ValueError(f"{state_path(options.run_folder)}: damaged, {error}") from error
    model, tokenizer = weights.load(settings["model"])
    prefix = make_prefix(model, tokenizer, PrefixConfig(**settings["prefix"]), config.seed)
    if not weights.same_model(state["settings"].get("base model") or "", prefix.base):
        raise ValueError(f"{options.run_folder}: {settings['model']} is not the model of this run")
    if state["settings"].get("bf16", False):  # in training, the model read virtual tokens in bf16
        prefix.bind(in_bf16(model))
    try:
        prefix.load_state_dict(checked_weights(prefix, state["trained"]))
    except ValueError as error:
        other = "it is of another model or prefix, or damaged"
        raise ValueError(f"{state_path(options.run_folder)}: {error}; {other}") from error
    prefix.linearisation, prefix.max_source = settings["linearisation"], config.max_source
    file, metrics = options.out, {}
    if file.suffix != ".safetensors":
        file.mkdir(parents=True, exist_ok=True)
        if state["best"] is not None and math.isfinite(state["best"]):
            metrics["best loss on the dev set, nats per token"] = round(state["best"], 4)
        if not write_card(file, prefix, settings["model"], metrics=metrics):
            print(f"note: {file} already has a README.md, which was not changed", file=sys.stderr)
        file /= PREFIX_FILE
    prefix.save(file)
    tensors, _ = load_tensors(file)
    return {
        "file": str(file),
        "step": state["step"],
        "trained_parameters": sum(p.numel() for p in prefix.parameters()),
        "kept_parameters": sum(t.numel() for t in tensors.values()),
        "bytes": file.stat().st_size,
    }
