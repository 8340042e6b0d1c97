"""minprefix: prefix-tuning (Li & Liang 2021) on a small GPT-2 and a small BART of its own.

model, tokenizer = minprefix.load("mini")
prefix = minprefix.Prefix.from_words(model, tokenizer, "table-to-text:")
texts = minprefix.generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)
"""

from minprefix.generation.texts import generate
from minprefix.models.bart import BART, BARTConfig
from minprefix.models.gpt2 import GPT2, GPT2Config
from minprefix.models.weights import load
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix, PrefixBank

__all__ = [
    "BART", "BARTConfig", "BARTPrefix", "GPT2", "GPT2Config", "Prefix", "PrefixBank", "generate",
    "load",
]  # fmt: skip
