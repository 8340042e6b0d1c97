"""Settings of what the paper compares with: baselines that train, prompts in words, the search for
a prompt. Imports nothing of PyTorch."""

from dataclasses import dataclass

from minprefix.checks import check_at_least_one, check_choice, check_not_negative
from minprefix.training.config import PRECISIONS

SUBLAYERS = {
    "lin": ("block",),
    "houlsby": ("attn", "mlp"),
}  # by design: what an adapter comes after
DESIGNS = tuple(SUBLAYERS)

# Ways to ask for a text, tried in this order; `{table}` stands for the linearised table.
TEMPLATES = (
    "{table}\n\nDescription:",
    "{table}\n\nSummary:",
    "Restaurant: {table}\nReview:",
)


@dataclass(frozen=True)
class BaselineConfig:
    """What the methods "ft-top" and "adapter" train; `make_tuned` follows it."""

    top_layers: int = 2  # ft-top: layers, from the top, beside the last layer norm; the paper's: 2
    top_embedding: bool = False  # ft-top: the token embedding, too, which is the head
    adapter_design: str = "lin"  # adapter: "lin" (one per layer) or "houlsby" (two per layer)
    bottleneck: int | None = None  # adapter: its width m; None = by adapter_share
    adapter_share: float | None = None  # adapter: its part of the model's parameters; None = 0.03

    def __post_init__(self):
        check_choice("adapter_design", self.adapter_design, DESIGNS)
        check_at_least_one(self, "top_layers", "bottleneck")
        if self.adapter_share is not None and not 0 < self.adapter_share <= 1:
            raise ValueError(f"adapter_share must lie in (0, 1], got {self.adapter_share}")
        if self.bottleneck is not None and self.adapter_share is not None:
            raise ValueError(
                f"bottleneck {self.bottleneck} and adapter_share {self.adapter_share} both say how "
                "wide an adapter is: give one"
            )


@dataclass(frozen=True)
class SearchConfig:
    """One search."""

    prompt_len: int = 10  # P, tokens
    after: int = 0  # A, how many of them stand after the source, in the place of the bos
    steps: int = 100  # rounds of gradient, race and judgement
    budget: int | None = None  # row-evaluations, beside steps: no step begins after so many
    candidates: int = 64  # prompts in a race
    top_k: int = 64  # tokens per place that candidates are drawn from, by their gradient
    batch_size: int = 64  # training pairs of a step: gradient, and last round of the race
    judge_rows: int = 256  # training pairs that accept or refuse, always the same
    chains: int = 2  # prompts improved side by side; halved after each quarter of the steps
    starts: int = 128  # prompts that race to be a chain's start
    start: tuple[str, ...] = ()  # a text to start from, beside the built-in ones
    patience: int = 4  # steps without an accepted prompt before the minibatch is doubled
    printable: bool = False  # only prompts whose text, tokenised again, gives the same tokens
    precision: str = "auto"  # "fp32", "bf16", or "auto" = bf16 on CUDA and fp32 on a CPU
    seed: int = 0  # of all draws
    eval_every: int = 10  # steps between evaluations on the dev set
    eval_pairs: int = 1000  # dev pairs in an evaluation, at most; evenly spread

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
    """The config from `asdict` of it, as config.json holds it; older versions say "behind"."""
    saved = {"after" if name == "behind" else name: value for name, value in saved.items()}
    return SearchConfig(**saved | {"start": tuple(saved["start"])})
