"""minprefix: prefix-tuning (Li & Liang 2021) on a small GPT-2 and a small BART of its own.

model, tokenizer = minprefix.load("mini")
prefix = minprefix.Prefix.from_words(model, tokenizer, "table-to-text:")
texts = minprefix.generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)
"""

from minprefix.bart import BART, BARTConfig
from minprefix.bart_prefix import BARTPrefix
from minprefix.generation import generate
from minprefix.gpt2 import GPT2, GPT2Config
from minprefix.prefix import Prefix, PrefixBank
from minprefix.weights import load

__all__ = [
    "BART", "BARTConfig", "BARTPrefix", "GPT2", "GPT2Config", "Prefix", "PrefixBank", "generate",
    "load",
]  # fmt: skip
