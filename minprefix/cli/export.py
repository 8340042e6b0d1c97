"""The command `export`: writes the latest prefix of a run without its MLP, as a folder with a model
card or as a file."""

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
    file, metrics = options.out, {}
    if file.suffix != ".safetensors":
        file /= PREFIX_FILE
    best = options.run_folder / TUNED[config.method].kept
    if file.resolve() == best.resolve():
        raise ValueError(
            f"--out {options.out}: the run keeps its best prefix in {best}, which the latest one "
            "would replace: choose another --out"
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
    if file != options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        at, loss = (state.get("measured") or [(None, None)])[-1]
        if at == state["step"]:  # not of an earlier, better prefix
            metrics["loss on the dev set, nats per token"] = round(loss, 4)
        if not write_card(options.out, prefix, settings["model"], metrics=metrics):
            note = f"note: {options.out} already has a README.md, which was not changed"
            print(note, file=sys.stderr)
    prefix.save(file)
    tensors, _ = load_tensors(file)
    return {
        "file": str(file),
        "step": state["step"],
        "trained_parameters": sum(p.numel() for p in prefix.parameters()),
        "kept_parameters": sum(t.numel() for t in tensors.values()),
        "bytes": file.stat().st_size,
    }
