"""Settings of the methods that the paper compares with: trained baselines, prompts in words, and
the search for a prompt. This file does not import PyTorch."""

from dataclasses import dataclass

from minprefix.checks import (
    check_at_least_one,
    check_choice,
    check_limit,
    check_not_negative,
    from_saved,
)
from minprefix.limits import WIDTH
from minprefix.training.config import PRECISIONS

SUBLAYERS = {
    "lin": ("block",),
    "houlsby": ("attn", "mlp"),
}  # by design: the parts of a layer that an adapter follows
DESIGNS = tuple(SUBLAYERS)

# Instructions for the frozen model, tried in this order; `{table}` is replaced by the linearised
# table.
TEMPLATES = (
    "{table}\n\nDescription:",
    "{table}\n\nSummary:",
    "Restaurant: {table}\nReview:",
)


@dataclass(frozen=True)
class BaselineConfig:
    """What the methods "ft-top" and "adapter" train."""

    top_layers: int = 2  # ft-top: number of top layers that are trained (2 in the paper)
    top_embedding: bool = False  # ft-top: also train the token embedding, which is the head
    adapter_design: str = "lin"  # adapter: "lin" (one per layer) or "houlsby" (two per layer)
    bottleneck: int | None = None  # adapter: its width m; None = by the adapter share
    adapter_share: float | None = None  # adapter: share of the model's parameters; None = 0.03

    def __post_init__(self):
        check_choice("adapter_design", self.adapter_design, DESIGNS)
        check_at_least_one(self, "top_layers", "bottleneck")
        check_limit(self, "bottleneck", WIDTH)
        if self.adapter_share is not None and not 0 < self.adapter_share <= 1:
            raise ValueError(f"adapter_share must lie in (0, 1], got {self.adapter_share}")
        if self.bottleneck is not None and self.adapter_share is not None:
            raise ValueError(
                f"bottleneck {self.bottleneck} and adapter_share {self.adapter_share} both say how "
                "wide an adapter is: give one"
            )


@dataclass(frozen=True)
class SearchConfig:
    """A search for a discrete prompt."""

    prompt_len: int = 10  # P, number of tokens in the prompt
    after: int = 0  # A, how many of them come after the source, instead of the bos token
    steps: int = 100  # rounds, each with a gradient, a race and a decision
    budget: int | None = None  # start no step after this many evaluations of training pairs
    candidates: int = 64  # number of prompts in a race
    top_k: int = 64  # draw new tokens from the k with the best gradient at a position
    batch_size: int = 64  # training pairs for the gradient and for the last round of the race
    judge_rows: int = 256  # training pairs, always the same, that decide if a prompt is accepted
    chains: int = 2  # prompts that are improved; after each quarter of the steps half remain
    starts: int = 128  # prompts that compete to be the start of a chain
    start: tuple[str, ...] = ()  # texts to start from, in addition to the built-in ones
    patience: int = 4  # steps without an accepted prompt before the minibatch is doubled
    printable: bool = False  # allow only prompts whose text gives the same tokens again
    precision: str = "auto"  # "fp32", "bf16", or "auto" = bf16 on CUDA and fp32 on a CPU
    seed: int = 0  # seed of all random choices
    eval_every: int = 10  # steps between evaluations on the dev set
    eval_pairs: int = 1000  # largest number of dev pairs in an evaluation, evenly spaced

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        check_at_least_one(
            self, "prompt_len", "steps", "budget", "candidates", "top_k", "batch_size",
            "judge_rows", "chains", "starts", "patience", "eval_every", "eval_pairs",
        )  # fmt: skip
        check_not_negative(self, "seed")
        if not 0 <= self.after <= self.prompt_len:
            raise ValueError(f"after must lie in [0, {self.prompt_len}], got {self.after}")
        if not all(text.strip() for text in self.start):
            raise ValueError("start must be a text, got an empty one")
        if self.chains > self.starts:
            raise ValueError(f"chains {self.chains} must not be more than starts {self.starts}")


def saved_config(saved: dict) -> SearchConfig:
    """The config from its `asdict` in config.json; older versions write "behind" for "after"."""
    saved = {"after" if name == "behind" else name: value for name, value in saved.items()}
    return from_saved(SearchConfig, saved | {"start": tuple(saved["start"])})
