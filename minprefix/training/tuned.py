"""What a run trains: a prefix or, with other methods, an adapter, the top layers or all weights.

`Tuned` is the interface that the trainer uses. Read `Tuned`, `TunedPrefix` (the paper's method) and
`TunedModel` (fine-tuning); methods/top_layers.py and methods/adapters.py have the others.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from minprefix.models.bart import BART
from minprefix.models.base import check_free
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import save_model
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.prefix import Prefix

OFFICIAL_WIDTH = 512  # models of at least this width use the paper's learning rates
SMALL = 500  # training pairs


class Tuned(Protocol):
    """What a method trains, how it is attached to a model, and how it is saved.

    Attributes:
        method: the name of the method, as in `TrainConfig.method` and in config.json.
        kept: the file or folder in the run folder that holds the result.
        reads: the fields of PrefixConfig and BaselineConfig that the method uses.
        rates: default peak learning rates by the family of the model: for models narrower than
            `OFFICIAL_WIDTH`, and for others.
        small_data: factor on a narrow model's default rate for `SMALL` pairs or fewer.
        frozen: whether the model's own weights are not trained.
        prefix: the prefix that the model reads, if any.
    """

    method: str
    kept: str
    reads: tuple[str, ...] = ()
    rates: dict[str, tuple[float, float]]
    small_data: float = 0.5
    frozen: bool = True
    prefix: Prefix | BARTPrefix | None = None

    @property
    def weights(self) -> nn.Module:
        """A module that has exactly the trained parameters."""
        ...

    def bind(self, model: GPT2 | BART, linearisation: str, max_source: int | None) -> dict:
        """Prepare for training with `model`, whose weights are all frozen before the call.

        Args:
            linearisation, max_source: the frame of the texts, to be stored for generation.
        Returns:
            what must be unchanged when a run is continued.
        Raises:
            ValueError: it does not fit the model, or belongs to another one.
        """
        ...

    def attached(self, model: GPT2 | BART) -> AbstractContextManager:
        """Within the block `model` computes with what is trained. A prefix does not need this,
        because it is an argument of the model."""
        return nullcontext()

    def save(self, path: Path, model: GPT2 | BART, tokenizer) -> None:
        """Write the file or folder `kept`."""
        ...

    def default_lr(self, family: str, n_embd: int, n_pairs: int) -> float:
        """The default peak learning rate for a model and a number of training pairs."""
        narrow, official = self.rates[family]
        if n_embd >= OFFICIAL_WIDTH:
            return official
        return narrow * (self.small_data if n_pairs <= SMALL else 1)


def bind_added(added, model, linearisation: str, max_source: int | None) -> dict:
    """`Tuned.bind` for an addition to a frozen model: a prefix or an adapter."""
    check_free(model)
    added.linearisation, added.max_source = linearisation, max_source
    added.check_base(model)
    added.bind(model)
    return {"base model": added.base}


def bind_own(weights: nn.Module, model, linearisation: str, max_source: int | None) -> None:
    """`Tuned.bind` for weights of the model itself: makes them trainable, with dropout."""
    check_free(model)
    weights.requires_grad_().train()
    model.config = replace(model.config, linearisation=linearisation, max_source=max_source)


@dataclass
class TunedPrefix(Tuned):
    """Prefix-tuning."""

    prefix: Prefix | BARTPrefix

    method = "prefix"
    kept = "prefix.safetensors"
    reads = tuple(field.name for field in fields(PrefixConfig))
    # for widths below 512: the best of the embedded models on E2E's dev set; the others are from
    # the paper's appendix, for GPT-2 medium on E2E and for BART on XSum
    rates = {"GPT-2": (1e-3, 8e-5), "BART": (2e-3, 5e-5)}  # noqa: RUF012

    @property
    def weights(self) -> nn.Module:
        return self.prefix

    def bind(self, model, linearisation, max_source) -> dict:
        bound = bind_added(self.prefix, model, linearisation, max_source)
        return bound | self.prefix.settings()

    def save(self, path, model, tokenizer) -> None:
        self.prefix.save(path)


@dataclass
class TunedModel(Tuned):
    """Fine-tuning of all weights of the model."""

    model: GPT2 | BART

    method = "finetune"
    kept = "model"
    frozen = False
    # chosen like those of the prefix; the last is the paper's for "within-news"
    rates = {"GPT-2": (1e-3, 5e-5), "BART": (5e-4, 3e-5)}  # noqa: RUF012
    small_data = 0.3  # by benchmarks/paper/sweep-mini.csv

    @property
    def weights(self) -> nn.Module:
        return self.model

    def bind(self, model, linearisation, max_source) -> dict:
        bind_own(self.model, model, linearisation, max_source)
        return {}

    def save(self, path, model, tokenizer) -> None:
        save_model(model, tokenizer, path)


Trainable = Tuned | Prefix | BARTPrefix | None  # what `Trainer` accepts


def tuned_from(given: Trainable, model: GPT2 | BART) -> Tuned:
    """The `Tuned` for a prefix, or for None (all weights of the model); ValueError for others."""
    if given is None:
        return TunedModel(model)
    if isinstance(given, Prefix | BARTPrefix):
        return TunedPrefix(given)
    if not hasattr(given, "attached"):
        raise ValueError(f"a run trains one prefix, or a `Tuned`, got a {type(given).__name__}")
    return given
