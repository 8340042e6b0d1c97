"""The settings of a training run, and the rule for settings that the user does not give.

Read `TrainConfig`, then `settle`: the number of steps, the batch size, the warm-up and the interval
of evaluations follow from the number of training pairs. Some data take more steps than others of
the same size, which only the run itself can show: see `steps_so_far`. benchmarks/defaults.py
compares the rule with a grid of other settings; docs/guides/your_data.md shows the result.
`PretrainConfig` has the settings of `pretrain.py`. This file does not import PyTorch.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minprefix.checks import check_at_least_one, check_choice, check_not_negative, check_positive

METHOD_NAMES = ("prefix", "finetune", "ft-top", "adapter")  # each is a `tuned.Tuned`
PRECISIONS = ("auto", "fp32", "bf16")  # see precision.py
LOSSES = ("token", "sentence")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. None = depends on the number of training pairs."""

    method: str = "prefix"  # "prefix", "finetune" (all weights), "ft-top" (top layers), "adapter"
    epochs: float | None = None  # passes over the training pairs
    steps: int | None = None  # optimizer steps, instead of epochs
    time: str | None = None  # wall time such as 90s, 10m or 2h, instead of steps or epochs
    most_steps: int | None = None  # steps to which a run without steps, epochs or time may grow
    batch_size: int | None = None  # pairs per forward pass
    accumulation: int = 1  # forward passes per optimizer step, on each rank of torchrun
    # if memory runs out, continue the same steps with fewer pairs per forward pass
    auto_batch: bool = False
    # peak learning rate of AdamW, which then falls linearly to 0; None = depends on the method, the
    # model's width and the number of training pairs
    lr: float | None = None
    warmup_steps: int | None = None  # steps of linear warm-up before the decay
    patience: int = 5  # stop after this many evaluations without a lower dev loss; 0 = never
    weight_decay: float = 0.0  # weight decay of AdamW, per step and times the learning rate
    prefix_dropout: float = 0.0  # probability that an entry of the prefix is dropped in a step
    clip: float = 1.0  # largest norm of the whole gradient; a larger gradient is scaled down
    max_source: int | None = None  # cut sources to this many tokens (XSum: 512); None = do not cut
    loss: str = "token"  # mean per target "token", or sum per "sentence" (the authors' code)
    # "fp32", "bf16", or "auto", which is bf16 on CUDA and on CPUs with bf16 instructions
    precision: str = "auto"
    activation_checkpointing: bool = False  # save memory: recompute blocks in the backward pass
    compile: bool = False  # torch.compile each layer: the first steps are slow, the others faster
    seed: int = 0  # seed of the order of batches, of dropout and of the random start of a prefix
    log_every: int = 10  # steps between lines of the log
    eval_every: int | None = None  # steps between dev evaluations and between saved states
    eval_pairs: int = 300  # largest number of dev pairs in an evaluation, evenly spaced
    samples: int = 2  # texts to generate for dev inputs at each evaluation

    def __post_init__(self):
        check_choice("method", self.method, METHOD_NAMES)
        check_choice("loss", self.loss, LOSSES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.compile and self.method == "adapter":
            raise ValueError("compile does not work with method adapter: adapters are not compiled")
        check_at_least_one(
            self, "steps", "most_steps", "batch_size", "accumulation", "log_every", "eval_every",
            "eval_pairs",
        )  # fmt: skip
        check_positive(self, "epochs", "lr", "clip")
        for name in ("warmup_steps", "patience", "weight_decay", "seed", "samples"):
            check_not_negative(self, name)
        if not 0 <= self.prefix_dropout < 1:
            raise ValueError(f"prefix_dropout must lie in [0, 1), got {self.prefix_dropout}")
        if self.prefix_dropout and self.method != "prefix":
            raise ValueError(f"prefix_dropout needs method 'prefix', got {self.method!r}")
        if self.time is not None:
            seconds_of(self.time)
            if self.steps is not None or self.epochs is not None:
                raise ValueError("time replaces steps and epochs: give only one of them")

    @property
    def seconds(self) -> float | None:
        """The wall time that the run may take; None where steps decide."""
        return None if self.time is None else seconds_of(self.time)

    def rate(self, step: int, seconds: float, steps: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then linear decay to 0. Needs `settle`.

        Args:
            seconds: how long the run has taken so far; used if `time` is given.
            steps: at which the rate is 0 otherwise.
        """
        assert self.lr is not None and self.warmup_steps is not None
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.seconds is not None:
            return self.lr * max(0.0, 1 - seconds / self.seconds)
        return self.lr * (steps - step) / max(1, steps - self.warmup_steps)


def seconds_of(time: str) -> float:
    """The seconds in a time such as "90s", "10m" or "1.5h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", time.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not seconds:
        raise ValueError(f"time must have a unit, such as 90s, 10m or 2h, got {time!r}")
    return seconds


def duration(seconds: float) -> str:
    """Format seconds as, for example, "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# the rule -----------------------------------------------------------------------------------------

FEW, BATCH_SIZES = 100, (8, 16)  # pairs in a batch: up to FEW training pairs, and above
LEAST_STEPS = 150
WARMUP, LEAST_WARMUP = 0.05, 30  # share of the steps, and least number of steps
EVALUATIONS, LEAST_EVERY = 15, 10  # evaluations in a run, and least steps between two of them
# a dev loss falls "fast" by this share of itself and this many nats; how far a run may grow then
FAST, MUCH, MOST_GROWTH = 0.2, 0.15, 4


def usual_steps(n_pairs: int) -> int:
    """Number of optimizer steps: 150 for 20 pairs, 280 for 200, 670 for 1,000."""
    return max(LEAST_STEPS, round(15 * n_pairs**0.55))


def settle(config: TrainConfig, n_pairs: int, lr: float, ranks: int = 1) -> TrainConfig:
    """Fill in by the rule all settings that are None.

    Args:
        n_pairs: training pairs.
        lr: the peak rate, see `tuned.Tuned.default_lr`.
        ranks: processes that share a step.
    """
    batch_size, most = config.batch_size or BATCH_SIZES[n_pairs > FEW], config.most_steps
    if config.epochs is not None and config.steps is None:
        per_epoch = math.ceil(n_pairs / batch_size) / (config.accumulation * ranks)
        steps = max(1, round(config.epochs * per_epoch))
    elif config.steps is not None:
        steps = config.steps
    elif config.time is None:
        steps = usual_steps(n_pairs) if most is None else min(usual_steps(n_pairs), most)
        most = most or MOST_GROWTH * steps
    else:
        steps = None
    warmup = LEAST_WARMUP if steps is None else max(LEAST_WARMUP, round(WARMUP * steps))
    if steps is not None:
        warmup = min(warmup, steps // 3)  # the user may ask for a short run
    # with `time` the number of steps is unknown; evaluations are then as frequent as by the rule
    every = max(LEAST_EVERY, (steps or usual_steps(n_pairs)) // EVALUATIONS)
    return replace(
        config, batch_size=batch_size, steps=steps, most_steps=most, epochs=None,
        lr=config.lr or lr,
        warmup_steps=warmup if config.warmup_steps is None else config.warmup_steps,
        eval_every=config.eval_every or every,
    )  # fmt: skip


def steps_so_far(config: TrainConfig, measured: Sequence[tuple[int, float]]) -> int:
    """The length of a run, given its evaluations (step, dev loss) so far. Needs `steps`.

    It starts as `steps`. If the dev loss falls fast between a quarter and half of the steps, the
    length is doubled, up to `most_steps`, and the same is asked again there.
    """
    steps, most = config.steps or 0, config.most_steps or 0

    def loss_at(share: float) -> float:
        """The first loss from this share of the steps on; NaN = it is not known yet."""
        return next((loss for step, loss in measured if step >= share * steps), math.nan)

    def fast(before: float, now: float) -> bool:
        return now <= (1 - FAST) * before and now <= before - MUCH

    while steps < most and fast(loss_at(0.25), loss_at(0.5)):
        steps = min(2 * steps, most)
    return steps


# pretraining --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """The sizes of a model and the settings of its training; the defaults suit a CPU."""

    vocab_size: int = 4096  # V, tokens of the tokenizer that is trained on the text
    n_positions: int = 256  # T, tokens of a window, which is also the longest text of the model
    n_embd: int = 192  # C, width
    n_layer: int = 4  # L, number of layers
    n_head: int = 3  # H, number of heads per layer
    steps: int = 1000  # optimizer steps
    batch_tokens: int = 8192  # tokens per optimizer step
    micro_tokens: int | None = None  # tokens per forward pass; fewer save memory; None = all
    muon_lr: float = 0.02  # peak learning rate of Muon, which trains the matrices in the layers
    weight_decay: float = 0.02  # weight decay of Muon, per step and times the learning rate
    # peak learning rate of AdamW, which trains embeddings, biases and layer norms without weight
    # decay
    adamw_lr: float = 2e-3
    warmup_steps: int = 100  # steps of linear warm-up
    hold: float = 0.3  # share of the run at the peak rate, which then falls linearly
    lr_end: float = 0.03  # learning rate at the end, as a share of the peak
    clip: float = 1.0  # largest norm of the whole gradient; a larger gradient is scaled down
    dropout: float = 0.0  # on embeddings and residuals; 0 suits runs of few passes over the text
    time: str | None = None  # wall time such as 10m or 2h by which the run and its schedule end
    precision: str = "auto"  # "fp32", "bf16" (autocast), or "auto" = bf16 on CUDA, fp32 on a CPU
    compile: bool = False  # torch.compile each layer: slow first steps, then fewer memory passes
    seed: int = 0  # seed of the first weights, the order of windows and dropout
    val_share: float = 0.02  # share of the text to hold out if no file is named val*
    eval_tokens: int = 131072  # largest number of held-out tokens in an evaluation, evenly spaced
    eval_every: int = 100  # steps between evaluations and between saved states
    log_every: int = 10  # steps between lines of the log

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        check_at_least_one(
            self, "n_positions", "n_embd", "n_layer", "n_head", "steps", "eval_tokens",
            "eval_every", "log_every",
        )  # fmt: skip
        check_positive(self, "muon_lr", "adamw_lr", "clip")
        check_not_negative(self, "warmup_steps", "weight_decay", "seed")
        for name in ("hold", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.lr_end <= 1 or not 0 < self.val_share < 1:
            given = f"{self.lr_end} and {self.val_share}"
            raise ValueError(f"lr_end must lie in [0, 1], val_share in (0, 1), got {given}")
        for name in ("batch_tokens", "micro_tokens"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % self.n_positions):
                n = self.n_positions
                raise ValueError(f"{name} must be a multiple of n_positions {n}, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        assert self.seconds is None or self.seconds > 0  # a time that cannot be read is an error

    @property
    def seconds(self) -> float | None:
        """The wall time that the run may take; None where steps decide."""
        return None if self.time is None else seconds_of(self.time)


# `mini` is the recipe of the embedded model: assets/mini/MODEL_CARD.md
PRESETS = {
    "small": PretrainConfig(),
    "mini": PretrainConfig(
        vocab_size=8192, n_positions=512, n_embd=384, n_layer=8, n_head=6,
        steps=7789, batch_tokens=256 * 512, micro_tokens=128 * 512,
        muon_lr=0.02, weight_decay=0.02, adamw_lr=2e-3, warmup_steps=100, hold=0.3, lr_end=0.03,
        eval_tokens=2**21, eval_every=500, log_every=50,
    ),
}  # fmt: skip
