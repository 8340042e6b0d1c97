"""Shared by the benchmarks that train: a run that can be continued, and its result."""

from pathlib import Path

from benchmarks.machine import read_rows
from minprefix.data.examples import Example
from minprefix.models.weights import load
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.files import load_prefix
from minprefix.prefix.make import make_prefix
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer


def train(
    name: str, config: TrainConfig, prefix: PrefixConfig, data: tuple[list[Example], list[Example]],
    out: Path, device: str = "cpu",
) -> Trainer:  # fmt: skip
    """Train model `name` on (train, dev) in `out`, from its last state if it has one. `out` then
    holds the best weights on dev. Only the method "prefix" reads `prefix`."""
    model, tokenizer = load(name, device=device)
    made = None
    if config.method == "prefix":
        made = make_prefix(model, tokenizer, prefix, config.seed)
    run = Trainer(model, tokenizer, config, *data, out, made)
    run.resume()
    run.run()
    return run


def best_of(name: str, method: str, out: Path, device: str = "cpu"):
    """Model, tokenizer and prefix (or None) that the training of model `name` kept in `out`."""
    model, tokenizer = load(out / "model" if method == "finetune" else name, device=device)
    prefix = None
    if method == "prefix":
        prefix = load_prefix(out / "prefix.safetensors").to(device)
    return model, tokenizer, prefix


def rows_of(path: Path, key: dict) -> list[dict[str, str]]:
    """The rows of the CSV with these values."""
    key = {name: str(value) for name, value in key.items()}
    return [row for row in read_rows(path) if key.items() <= row.items()]
