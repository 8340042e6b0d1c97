"""Makes a prefix from settings. Read `make_prefix`, the last function."""

from typing import Any

from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.prefix import Prefix

USUAL_LEN = 10  # the paper's best for table-to-text


def gpt2_options(config: PrefixConfig) -> dict[str, Any]:
    """What only the prefix of a GPT-2 has; ValueError for what it lacks."""
    if config.sites:
        raise ValueError(f"sites {', '.join(config.sites)} are BART's; GPT-2 has one attention")
    return {"place": config.place}


def bart_options(config: PrefixConfig) -> dict[str, Any]:
    """What only the prefix of a BART has; ValueError for what it lacks."""
    if config.place != "prefix":
        raise ValueError(
            f"BART has no place {config.place!r}: its prefix belongs to attention layers"
        )
    if config.init == "prompt":
        raise ValueError(
            "init 'prompt' is for GPT-2: no prefix of a BART equals a hard prompt exactly"
        )
    return {"sites": config.sites}


FAMILIES: dict[str, Any] = {
    Prefix.family: (Prefix, gpt2_options), BARTPrefix.family: (BARTPrefix, bart_options),
}  # fmt: skip


def make_prefix(
    model: GPT2 | BART, tokenizer, config: PrefixConfig, seed: int
) -> Prefix | BARTPrefix:
    """The prefix that `config` describes, on the model's device and bound to the model."""
    kind, own_options = FAMILIES[model.config.family]
    options = {
        "parametrisation": config.parametrisation, "mid_dim": config.mid_dim, "gate": config.gate,
        "position_offset": config.position_offset, **own_options(config),
    }  # fmt: skip
    if config.init == "prompt":
        if config.position_offset is None and not config.gate:
            del options["position_offset"]  # the prompt's length
        return kind.from_prompt(model, tokenizer, config.init_text, seed=seed, **options)
    prefix_len = config.prefix_len or USUAL_LEN
    if config.init == "words":
        return kind.from_words(model, tokenizer, config.init_text, prefix_len, seed=seed, **options)
    prefix = kind.random(model.config, prefix_len, seed, **options)
    prefix.bind(model)
    return prefix.to(model.wte.weight.device)
