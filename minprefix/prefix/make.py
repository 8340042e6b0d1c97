"""Makes a prefix from settings. Read `make_prefix`, the last function."""

from typing import Any

from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.prefix import Prefix

USUAL_LEN = 10  # the paper's best for table-to-text


def make_gpt2_prefix(model: GPT2, tokenizer, config: PrefixConfig, seed: int) -> Prefix:
    """`make_prefix` for a GPT-2."""
    if config.sites:
        raise ValueError(f"sites {', '.join(config.sites)} are BART's; GPT-2 has one attention")
    options = {
        "parametrisation": config.parametrisation,
        "mid_dim": config.mid_dim,
        "gate": config.gate,
        "position_offset": config.position_offset,
        "place": config.place,
    }
    if config.init == "prompt":
        if config.position_offset is None and not config.gate:
            del options["position_offset"]  # the prompt's length
        return Prefix.from_prompt(model, tokenizer, config.init_text, seed=seed, **options)
    if config.init == "words":
        return Prefix.from_words(
            model, tokenizer, config.init_text, config.prefix_len or USUAL_LEN, seed=seed, **options
        )
    prefix = Prefix.random(model.config, config.prefix_len or USUAL_LEN, seed, **options)
    prefix.bind(model)
    return prefix.to(model.wte.weight.device)


def make_bart_prefix(model: BART, tokenizer, config: PrefixConfig, seed: int) -> BARTPrefix:
    """`make_prefix` for a BART."""
    if config.place != "prefix":
        raise ValueError(
            f"BART has no place {config.place!r}: its prefix belongs to attention layers"
        )
    if config.init == "prompt":
        raise ValueError(
            "init 'prompt' is for GPT-2: no prefix of a BART equals a hard prompt exactly"
        )
    options = {
        "sites": config.sites, "parametrisation": config.parametrisation,
        "mid_dim": config.mid_dim, "gate": config.gate, "position_offset": config.position_offset,
    }  # fmt: skip
    if config.init == "words":
        return BARTPrefix.from_words(
            model, tokenizer, config.init_text, config.prefix_len or USUAL_LEN, seed=seed, **options
        )
    prefix = BARTPrefix.random(model.config, config.prefix_len or USUAL_LEN, seed, **options)
    prefix.bind(model)
    return prefix.to(model.wte.weight.device)


MAKERS: dict[str, Any] = {Prefix.family: make_gpt2_prefix, BARTPrefix.family: make_bart_prefix}


def make_prefix(
    model: GPT2 | BART, tokenizer, config: PrefixConfig, seed: int
) -> Prefix | BARTPrefix:
    """The prefix that `config` describes, on the model's device and bound to the model."""
    return MAKERS[model.config.family](model, tokenizer, config, seed)
