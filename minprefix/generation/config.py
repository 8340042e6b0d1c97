"""How tokens are chosen: the settings of `generate`, with the model's own settings as defaults.

This file does not import PyTorch.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minprefix.models.base import LanguageModel

LONGEST = 100  # new tokens, if neither the caller nor the checkpoint gives a number
# settings that a checkpoint may have (`models/settings.py`), with the names of the fields below
SAID = (
    "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping",
    "no_repeat_ngram_size", "repetition_penalty", "temperature", "top_k", "top_p",
)  # fmt: skip
AT_LEAST = {
    "max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0,
    "no_repeat_ngram_size": 0, "num_return_sequences": 1,
}  # fmt: skip
EARLY = (None, True, False, "never")  # values of early_stopping; a checkpoint may say "never"


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen; by default it is the most likely one. None = the value in the
    model's checkpoint, or the value in brackets if it has none."""

    max_new_tokens: int | None = None  # largest number of new tokens (100)
    # smallest number of new tokens; the end token is forbidden before it is reached (0)
    min_new_tokens: int | None = None
    num_beams: int | None = None  # beams K; 1 = no beam search (1; the paper uses 5 for tables)
    # beam search divides the sum of log p by (tokens and end token) ** this; values above 1 favour
    # long texts (1)
    length_penalty: float | None = None
    early_stopping: bool | None = None  # beam search stops as soon as K beams have ended (False)
    no_repeat_ngram_size: int | None = None  # no sequence of this many tokens twice; 0 = off (0)
    # logits of tokens that have already occurred are divided by this if they are positive, and
    # multiplied by it if they are negative (1)
    repetition_penalty: float | None = None
    do_sample: bool = False  # sample tokens at random
    temperature: float | None = None  # sampling divides the logits by this (1)
    top_k: int | None = None  # sample only from the k most likely tokens; 0 = off (0)
    # sample only from the fewest tokens whose probabilities have at least this sum; 1 = off (1)
    top_p: float | None = None
    seed: int = 0  # seed of sampling; text n uses seed + n
    num_return_sequences: int = 1  # texts for each prompt: samples, or the best beams
    # end a text before the first of these; if none is given, before those of the model
    stop: tuple[str, ...] = ()
    # words that are never generated: "cat" forbids " cat" as well; also texts such as "\n"
    bad_words: tuple[str, ...] = ()

    def __post_init__(self):
        for name, low in AT_LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, Integral | None):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not (isinstance(self.seed, Integral) and abs(self.seed) < 2**63):
            raise ValueError(f"seed must be an integer between -2**63 and 2**63, got {self.seed}")
        if (self.min_new_tokens or 0) > (self.max_new_tokens or math.inf):
            raise ValueError(
                f"min_new_tokens must lie in [0, max_new_tokens], got {self.min_new_tokens} of "
                f"{self.max_new_tokens}"
            )
        for name in ("length_penalty", "repetition_penalty", "temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real | None):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for name, values in (("do_sample", (True, False)), ("early_stopping", EARLY)):
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} must be True or False, got {value!r}")
        # a larger power of the length overflows
        if self.length_penalty is not None and not abs(self.length_penalty) <= 50:
            raise ValueError(f"length_penalty must lie in [-50, 50], got {self.length_penalty}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; greedy (do_sample=False) "
                "takes the most likely token"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        self._check_together()
        for name in ("bad_words", "stop"):
            texts = getattr(self, name)
            if not isinstance(texts, tuple | list) or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"{name} must be a tuple of texts, got {texts!r}")
            if "" in texts:
                raise ValueError(f"{name} must not be an empty text")

    def _check_together(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.do_sample and (self.num_beams or 1) > 1:
            raise ValueError(f"do_sample=True and num_beams={self.num_beams} exclude each other")
        usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        given = {n: getattr(self, n) for n in usual if getattr(self, n) not in (None, usual[n])}
        if given and not self.do_sample:
            said = " and ".join(f"{name} {value}" for name, value in given.items())
            verb = "has" if len(given) == 1 else "have"
            raise ValueError(f"{said} {verb} no effect without do_sample=True")
        n = self.num_return_sequences
        if not self.do_sample and self.num_beams is not None and n > self.num_beams:
            raise ValueError(
                f"num_return_sequences {n} needs do_sample=True or as many beams, got num_beams "
                f"{self.num_beams}: all texts would be the same"
            )

    def for_model(self, model: "LanguageModel") -> "Decided":
        """Replace None by the model's own values."""
        theirs = model.config
        values: dict[str, Any] = {
            name: getattr(theirs, name) for name in SAID if getattr(self, name) is None
        }
        if self.do_sample:
            values |= {"num_beams": 1}
        else:
            values |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        longest = values.setdefault("max_new_tokens", self.max_new_tokens) or LONGEST
        values["max_new_tokens"] = longest
        if "min_new_tokens" in values:  # the model's own may be larger than max_new_tokens
            values["min_new_tokens"] = min(values["min_new_tokens"], longest)
        return Decided(**vars(self) | values | {"stop": self.stop or theirs.stop_strings})


@dataclass(frozen=True)
class Decided(GenerationConfig):
    """A `GenerationConfig` for one model, in which no field is None."""

    max_new_tokens: int = LONGEST
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Any = False  # or "never"
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
