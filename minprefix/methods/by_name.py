"""The methods by their names on the command line and in config.json."""

from collections.abc import Iterator
from dataclasses import fields

from minprefix.methods.adapters import TunedAdapter, count, make_adapter
from minprefix.methods.config import BaselineConfig
from minprefix.methods.top_layers import TopLayers, TunedTopLayers
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import need_gpt2
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.training.config import TrainConfig
from minprefix.training.tuned import Tuned, TunedModel, TunedPrefix

TUNED = {kind.method: kind for kind in (TunedPrefix, TunedModel, TunedTopLayers, TunedAdapter)}


def ignored_fields(
    train: TrainConfig, prefix: PrefixConfig, baseline: BaselineConfig
) -> Iterator[tuple[str, str]]:
    """The fields that differ from their defaults although `train.method` does not read them.

    Yields:
        (name, why), such as ("gate", "is for method prefix, not for adapter").
    """
    for config in (prefix, baseline):
        for field in fields(config):
            name, method = field.name, train.method
            if getattr(config, name) == field.default:
                continue
            if name not in TUNED[method].reads:
                readers = " or ".join(other for other in TUNED if name in TUNED[other].reads)
                yield name, f"is for method {readers}, not for {method}"
            elif name == "init_text" and prefix.init == "random":
                yield name, "is for init words or prompt, not for random"


def make_tuned(
    model: GPT2 | BART, tokenizer, train: TrainConfig, prefix: PrefixConfig | None = None,
    baseline: BaselineConfig | None = None,
) -> Tuned:  # fmt: skip
    """What `Trainer` trains with `train.method`, newly initialised and on the model's device.

    Args:
        prefix, baseline: its settings; None = the defaults.
    Raises:
        ValueError: an adapter or top layers for a BART, which are not implemented.
    """
    baseline = baseline or BaselineConfig()
    if train.method == "prefix":
        return TunedPrefix(make_prefix(model, tokenizer, prefix or PrefixConfig(), train.seed))
    if train.method == "finetune":
        return TunedModel(model)
    need_gpt2(model, f"method {train.method!r}")
    assert isinstance(model, GPT2)
    if train.method == "ft-top":
        return TunedTopLayers(TopLayers(model, baseline.top_layers, baseline.top_embedding))
    design, width = baseline.adapter_design, baseline.bottleneck
    return TunedAdapter(make_adapter(model, design, width, baseline.adapter_share, train.seed))


def describe(tuned: Tuned, model: GPT2 | BART) -> str:
    """One line that describes an adapter or top layers, with their size."""
    n, total = count(tuned.weights), count(model)
    return f"{tuned}: {n:,} parameters, {100 * n / total:.3f} % of the model's {total:,}"
