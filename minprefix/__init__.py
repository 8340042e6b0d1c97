"""minprefix: prefix-tuning (Li & Liang 2021) on a small GPT-2 and a small BART of its own.

    model, tokenizer = minprefix.load("mini")
    prefix = minprefix.Prefix.from_words(model, tokenizer, "table-to-text:")
    texts = minprefix.generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)

A name is imported when it is first used: `import minprefix` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minprefix.generation.texts import generate
    from minprefix.models.bart import BART
    from minprefix.models.config import BARTConfig, GPT2Config
    from minprefix.models.gpt2 import GPT2
    from minprefix.models.weights import load
    from minprefix.prefix.bank import PrefixBank
    from minprefix.prefix.bart import BARTPrefix
    from minprefix.prefix.prefix import Prefix

MODULES = {
    "BART": "models.bart", "BARTConfig": "models.config", "BARTPrefix": "prefix.bart",
    "GPT2": "models.gpt2", "GPT2Config": "models.config", "Prefix": "prefix.prefix",
    "PrefixBank": "prefix.bank", "generate": "generation.texts", "load": "models.weights",
}  # fmt: skip
__all__ = [
    "BART", "GPT2", "BARTConfig", "BARTPrefix", "GPT2Config", "Prefix", "PrefixBank", "generate",
    "load",
]  # fmt: skip


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
