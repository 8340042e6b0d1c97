"""How texts are written: the settings of `generate`. Imports nothing of PyTorch."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minprefix.models.base import LanguageModel


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen. Without `num_beams` or `do_sample`: always the likeliest."""

    max_new_tokens: int = 100  # a text ends here at the latest
    min_new_tokens: int = 0  # the end-of-text token is forbidden before
    num_beams: int = 1  # K of beam search; 1 = off (the paper: 5 for tables)
    # of the next three, None = as the model's config.json says; GPT-2: 1, off, 0
    length_penalty: float | None = None  # beams: score = sum of log p / (tokens with end) ** this
    early_stopping: bool | None = None  # beams: end when K have ended, whatever might still come
    no_repeat_ngram_size: int | None = None  # no n tokens in a row come twice in a text; 0 = off
    do_sample: bool = False  # draw tokens at random
    temperature: float = 1.0  # sampling: logits are divided by it
    top_k: int = 0  # sampling: only the k likeliest tokens; 0 = off
    top_p: float = 1.0  # sampling: only the likeliest tokens that together reach this; 1 = off
    seed: int = 0  # sampling: prompt b draws with seed + b
    bad_words: tuple[str, ...] = ()  # texts whose tokens are never generated in a row, like "\n"

    def __post_init__(self):
        for name, low in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must lie in [0, max_new_tokens], got {self.min_new_tokens} of "
                f"{self.max_new_tokens}"
            )
        if (self.no_repeat_ngram_size or 0) < 0:
            raise ValueError(f"no_repeat_ngram_size must be >= 0, got {self.no_repeat_ngram_size}")
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; greedy (do_sample=False) "
                "takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample=True and num_beams={self.num_beams} exclude each other")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p} have no "
                "effect without do_sample=True"
            )
        if isinstance(self.bad_words, str) or "" in self.bad_words:
            raise ValueError(f"bad_words must be a tuple of texts, got {self.bad_words!r}")

    def for_model(self, model: "LanguageModel") -> "GenerationConfig":
        """With the model's own values where nothing is said."""
        names = ("length_penalty", "early_stopping", "no_repeat_ngram_size")
        silent = [name for name in names if getattr(self, name) is None]
        return replace(self, **{name: getattr(model.config, name) for name in silent})
