"""Pretraining: a GPT-2 from scratch, from token windows to a folder that `minprefix.load` reads.

The objective is the language model's, the sum over all tokens of log p(z_i | z_<i), as a mean per
token. Weights start as GPT-2's do (`GPT2.init_weights`: N(0, 0.02), what is added to the residual
stream scaled by 1 / sqrt(2 L); Radford et al. 2019 [1], section 2.3, and its code [2]). The
matrices of the layers are trained by Muon [3]: the momentum of the gradient, G = U S V^T, is
replaced by about U V^T, so that all its directions move equally far. Embeddings, biases and layer
norms are trained by AdamW.

Read `PretrainConfig`, `make_optimizers` and `Pretrainer.step`; `loop.py` has the loop. As in
`trainer.py`, what step s does depends on the settings, the weights before it and (seed, s) alone,
and a run that was killed goes on to the very losses of an unbroken one; not so with `time`,
which makes the schedule follow the clock. The run folder holds the model with the lowest
validation loss so far, in the official format, and log.jsonl and state/ (`run_folder.py`).

[1] https://cdn.openai.com/better-language-models/language_models.pdf
[2] https://github.com/openai/gpt-2/blob/master/src/model.py
[3] https://kellerjordan.github.io/posts/muon/
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.checks import check_at_least_one, check_choice, check_not_negative, check_positive
from minprefix.data.batches import pinned
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import save_model
from minprefix.training.blocks import wrap_blocks
from minprefix.training.config import PRECISIONS, seconds_of
from minprefix.training.corpus import Corpus, Windows, unigram_entropy, validation_windows
from minprefix.training.loop import Loop
from minprefix.training.precision import uses_bf16

MOMENTUM = 0.95  # Muon
BETAS = (0.9, 0.95)  # AdamW


@dataclass(frozen=True)
class PretrainConfig:
    """A model and the run that makes it. Defaults: small enough for a CPU."""

    vocab_size: int = 4096  # V, of a tokenizer that is trained on the text
    n_positions: int = 256  # T, tokens of a window; no text can be longer for this model
    n_embd: int = 192  # C
    n_layer: int = 4  # L
    n_head: int = 3  # H
    steps: int = 1000  # optimiser steps
    batch_tokens: int = 8192  # tokens per optimiser step
    micro_tokens: int | None = None  # tokens per forward pass, to save memory; None = batch_tokens
    muon_lr: float = 0.02  # Muon, peak: matrices in the layers
    weight_decay: float = 0.02  # Muon, per step and lr
    adamw_lr: float = 2e-3  # AdamW, peak: embeddings, biases, layer norms; no weight decay
    warmup_steps: int = 100  # steps of linear warm-up
    hold: float = 0.3  # share of the run at the peak, then linear decay
    lr_end: float = 0.03  # share of the peak that is left at the end
    clip: float = 1.0  # largest norm of the whole gradient
    dropout: float = 0.0  # probability, on embeddings and residuals; 0 suits few epochs
    time: str | None = None  # wall time such as 10m or 2h by which the run and its schedule end
    precision: str = "auto"  # "fp32", "bf16" (autocast), or "auto" = bf16 on CUDA, fp32 on a CPU
    compile: bool = False  # torch.compile each layer: slow first steps, then fewer memory passes
    seed: int = 0  # first weights, order of windows, dropout
    val_share: float = 0.02  # share of the text that is held out where no file is named val*
    eval_tokens: int = 131072  # held-out tokens per evaluation, at most; evenly spread
    eval_every: int = 100  # steps between evaluations, and between saved states
    log_every: int = 10  # steps per line of the log

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
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
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


def schedule(step: int, done: float, config: PretrainConfig) -> float:
    """The learning rates of step 0, 1, ... as a share of their peaks.

    Linear up over warmup_steps, 1 until the share `hold` of the run is done, linear to lr_end.

    Args:
        done: 0 <= done < 1, the share of the run that is done.
    """
    up = min(1.0, (step + 1) / max(1, config.warmup_steps))
    down = 1 - (1 - config.lr_end) * max(0.0, done - config.hold) / (1 - config.hold)
    return up * down


def make_optimizers(model: GPT2, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else.

    An orthogonal update of a matrix from n_in to n_out features is scaled by
    sqrt(max(1, n_out / n_in)) in [3]. `torch.optim.Muon` takes that from a weight [out, in]; ours
    are [in, out] (`Conv1D`), for which it scales by sqrt(max(1, n_in / n_out)). The ratio of the
    two is sqrt(n_out / n_in): a factor of the learning rate, and not of the weight decay.
    """
    matrices = [weight for weight in model.h.parameters() if weight.dim() == 2]
    shaped: dict[torch.Size, list[Tensor]] = {}
    for weight in matrices:
        shaped.setdefault(weight.shape, []).append(weight)
    groups = []
    for (n_in, n_out), weights in shaped.items():
        factor = math.sqrt(n_out / n_in)
        groups.append({
            "params": weights, "peak": config.muon_lr * factor,
            "weight_decay": config.weight_decay / factor,
        })  # fmt: skip
    muon = torch.optim.Muon(groups, lr=config.muon_lr, momentum=MOMENTUM)
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    adamw = torch.optim.AdamW(
        [{"params": rest, "peak": config.adamw_lr}], lr=config.adamw_lr, betas=BETAS,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    return [muon, adamw]


class Pretrainer(Loop):
    """One run: `run()` trains from the current step to the end.

    Args:
        corpus: ids to train on and to measure by, and their tokenizer.
        out: the run folder; the model that is kept is in it.
        device: such as cpu or cuda.
    Raises:
        ValueError: less text than one window, or than a loss needs.
    """

    def __init__(
        self, corpus: Corpus, config: PretrainConfig, out: str | Path, device: str = "cpu"
    ):
        super().__init__(
            config, out, torch.device(device), steps=config.steps, log_every=config.log_every,
            eval_every=config.eval_every,
        )  # fmt: skip
        self.corpus, self.tokenizer = corpus, corpus.tokenizer
        self.bf16 = uses_bf16(config.precision, self.device)
        self.advice = f"try smaller rates than muon_lr {config.muon_lr}, adamw_lr {config.adamw_lr}"
        T = config.n_positions
        rows = config.batch_tokens // T
        self.micro_rows = (config.micro_tokens or config.batch_tokens) // T
        self.windows = Windows(corpus.train, T, rows, config.seed)
        self.val_windows = validation_windows(corpus.val, T, config.eval_tokens)
        self.model = self._first_model().to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        texts: dict[str, Any] = {"text": corpus.train, "held-out text": corpus.val}
        self.digests = {name: hashlib.sha256(ids).hexdigest() for name, ids in texts.items()}

    def _first_model(self) -> GPT2:
        """With random weights, in training mode."""
        config, eos = self.config, self.tokenizer.eos_id
        sizes = {name: getattr(config, name) for name in ("n_positions", "n_embd", "n_layer")}
        model = GPT2(
            GPT2Config(
                vocab_size=self.tokenizer.vocab_size, n_head=config.n_head, bos_token_id=eos,
                eos_token_id=eos, **sizes,
            )
        )  # fmt: skip
        for module in model.modules():
            # config.json keeps GPT-2's own probability: it is for those who fine-tune the model
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        wrap_blocks(model, compiled=config.compile)
        return model.init_weights(config.seed).train()

    # one step ------------------------------------------------------------------------------------

    def nats(self, windows: Tensor) -> Tensor:
        """-log p of every label, summed; windows (B, T + 1), inputs [:, :-1], labels [:, 1:]."""
        windows = pinned(windows, self.device).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(windows[:, :-1])  # (B, T, V)
        labels = windows[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")

    def done(self) -> float:
        """The share of the run that is done, by steps or by the clock; 1 at the end."""
        limit = self.config.seconds
        return max(super().done(), self.seconds_so_far() / limit if limit else 0.0)

    def step(self) -> dict:
        """One optimiser step over batch_tokens tokens; what it measured."""
        config = self.config
        torch.manual_seed(config.seed * config.steps + self.step_done)  # dropout
        windows = self.windows.batch(self.step_done)  # (B, T + 1)
        labels, nats = windows[:, 1:].numel(), torch.zeros((), device=self.device)
        for rows in windows.split(self.micro_rows):
            loss = self.nats(rows)
            (loss / labels).backward()
            nats += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        share = schedule(self.step_done, min(1.0, self.done()), config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_done += 1
        return {"nats": nats, "targets": labels, "tokens": labels, "norm": norm, "lr_share": share}

    # the loop ------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Log the loss on held-out text, nats per token; keep the best weights."""
        self.model.eval()
        full = [w for w in self.val_windows if len(w) == self.config.n_positions + 1]
        batches = [full[i : i + self.micro_rows] for i in range(0, len(full), self.micro_rows)]
        batches += [[w] for w in self.val_windows if len(w) <= self.config.n_positions]
        sums = [self.nats(torch.from_numpy(np.stack(b).astype(np.int64))) for b in batches]
        tokens = sum(len(w) - 1 for w in self.val_windows)
        loss = self.finite(float(torch.stack(sums).double().sum()) / tokens, "validation loss")
        self.model.train()
        self.note_loss(loss)

    def end(self) -> None:
        self.model.eval()

    def result(self) -> dict[str, float]:
        """What was reached, in nats per token where it is a loss."""
        tokenizer, val = self.tokenizer, self.corpus.val
        n_bytes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
        per_byte = len(val) / max(1, int(n_bytes[val].sum()))
        return {
            "steps": self.step_done,
            "tokens": self.step_done * self.config.batch_tokens,
            "val_loss": self.best,
            "bits_per_byte": self.best * per_byte / math.log(2),
            "unigram_entropy": unigram_entropy(val, tokenizer.vocab_size),
            "seconds": round(self.seconds, 1),
        }

    # files ---------------------------------------------------------------------------------------

    def keep(self) -> None:
        save_model(self.model, self.tokenizer, self.out)

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"trained": self.model.state_dict(), "optimizer": optimizers}

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["trained"])
        for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)

    def settings(self) -> dict:
        """Settings and text."""
        return asdict(self.config) | self.digests | {"bf16": self.bf16}
