"""Pretraining: a GPT-2 from scratch, from token windows to a folder that `minprefix.load` reads.

The objective is the language model's, the sum over all tokens of log p(z_i | z_<i), as a mean per
token. Weights start as GPT-2's do (`GPT2.init_weights`: N(0, 0.02), what is added to the residual
stream scaled by 1 / sqrt(2 L); Radford et al. 2019 [1], section 2.3, and its code [2]). The
matrices of the layers are trained by Muon [3]: the momentum of the gradient, G = U S V^T, is
replaced by about U V^T, so that all its directions move equally far. Embeddings, biases and layer
norms are trained by AdamW.

Read `PretrainConfig`, `make_optimizers`, `Pretrainer.step` and `Pretrainer.run`. As in
`training.py`, what step s does depends on the settings, the weights before it and (seed, s) alone,
and a run that was killed goes on to the very losses of an unbroken one; not so with `time_limit`,
which makes the schedule follow the clock. The run folder holds the model with the lowest
validation loss so far, in the official format, and log.jsonl and state/ (`run_folder.py`).

[1] https://cdn.openai.com/better-language-models/language_models.pdf
[2] https://github.com/openai/gpt-2/blob/master/src/model.py
[3] https://kellerjordan.github.io/posts/muon/
"""

import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minprefix.checks import check_choice
from minprefix.data.batches import pinned
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import save_model
from minprefix.training.blocks import wrap_blocks
from minprefix.training.corpus import Corpus, Windows, unigram_entropy, validation_windows
from minprefix.training.run_folder import append_log, cut_log, read_state, state_path, write_state
from minprefix.training.trainer import PRECISIONS, Interrupted, deferred_interrupt

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
    time_limit: float | None = None  # seconds: the run and its schedule end by then; None = steps
    precision: str = "auto"  # "fp32", "bf16" (autocast), or "auto" = bf16 on CUDA, fp32 on a CPU
    compile: bool = False  # torch.compile each layer: slow first steps, then fewer memory passes
    seed: int = 0  # first weights, order of windows, dropout
    val_share: float = 0.02  # share of the text that is held out where no file is named val*
    eval_tokens: int = 131072  # held-out tokens per evaluation, at most; evenly spread
    eval_every: int = 100  # steps between evaluations, and between saved states
    log_every: int = 10  # steps per line of the log

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        for name in (
            "n_positions", "n_embd", "n_layer", "n_head", "steps", "eval_tokens", "eval_every",
            "log_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("muon_lr", "adamw_lr", "clip", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
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
        done: 0 <= done < 1, the share of the run that lies behind.
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


class Pretrainer:
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
        self.corpus, self.config, self.out = corpus, config, Path(out)
        self.tokenizer, self.device = corpus.tokenizer, torch.device(device)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )
        T = config.n_positions
        rows = config.batch_tokens // T
        self.micro_rows = (config.micro_tokens or config.batch_tokens) // T
        self.windows = Windows(corpus.train, T, rows, config.seed)
        self.val_windows = validation_windows(corpus.val, T, config.eval_tokens)
        self.model = self._first_model().to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        texts = {"text": corpus.train, "held-out text": corpus.val}
        self.digests = {name: hashlib.sha256(ids).hexdigest() for name, ids in texts.items()}
        self.step_done, self.best, self.seconds = 0, math.inf, 0.0
        self.started: float | None = None  # of a run that is going on: when it would have begun

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
        """The share of the run that lies behind, by steps or by the clock; 1 at the end."""
        config = self.config
        by_time = self.seconds_so_far() / config.time_limit if config.time_limit else 0.0
        return max(self.step_done / config.steps, by_time)

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
        return {"nats": nats, "tokens": labels, "norm": norm, "lr_share": share}

    # the loop ------------------------------------------------------------------------------------

    def run(self, progress: bool = True) -> dict[str, float]:
        """Train to the end. Returns what was reached, in nats per token where it is a loss.

        Raises:
            Interrupted: Ctrl-C; the running step was finished, model and state saved.
            FloatingPointError: the loss is no longer finite; the last saved state stays.
        """
        config = self.config
        if self.step_done == 0 and state_path(self.out).exists():
            raise ValueError(f"{self.out} holds a run: load_state() goes on with it")
        self.out.mkdir(parents=True, exist_ok=True)
        cut_log(self.out, self.step_done)
        self.started, window = time.perf_counter() - self.seconds, []
        every = 0.1 if sys.stderr.isatty() else 30  # s, in a log file each update is a line
        bar = tqdm(
            total=config.steps, initial=self.step_done, unit="step", disable=not progress,
            mininterval=every, miniters=1,
        )  # fmt: skip
        with bar, deferred_interrupt() as interrupted:
            clock = time.perf_counter()
            while self.done() < 1:
                window.append(self.step())
                bar.update()
                stop, last = interrupted(), self.done() >= 1
                evaluate = last or self.step_done % config.eval_every == 0
                if evaluate or stop or self.step_done % config.log_every == 0:
                    entry = self._log(window, time.perf_counter() - clock)
                    shown = f"loss {entry['loss']:.3f}, {entry['tokens_per_s']} tok/s"
                    bar.set_postfix_str(shown, refresh=False)
                    window, clock = [], time.perf_counter()
                if evaluate:
                    self.evaluate()
                if evaluate or stop:
                    self.save_state()
                    clock = time.perf_counter()
                if stop and not last:
                    self._stop_early()
        self.started = None
        self.model.eval()
        return self._result()

    def seconds_so_far(self) -> float:
        """Wall time of the run, pauses between its parts left out."""
        return self.seconds if self.started is None else time.perf_counter() - self.started

    def _result(self) -> dict[str, float]:
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

    def _log(self, window: list[dict], seconds: float) -> dict:
        """Append the means over `window` to the log; the one place that waits for a GPU."""
        tokens = sum(entry["tokens"] for entry in window)
        entry = {
            "step": self.step_done,
            "loss": self._finite(float(sum(entry["nats"] for entry in window)) / tokens, "loss"),
            "grad_norm": self._finite(float(window[-1]["norm"]), "norm of the gradient"),
            "lr_share": window[-1]["lr_share"],
            "seconds": round(self.seconds_so_far(), 2),
            "tokens_per_s": round(tokens / seconds),
        }
        append_log(self.out, entry)
        return entry

    def _finite(self, value: float, name: str) -> float:
        if not math.isfinite(value):
            lrs = f"muon_lr {self.config.muon_lr}, adamw_lr {self.config.adamw_lr}"
            raise FloatingPointError(
                f"the {name} is {value} after step {self.step_done}: try smaller rates than {lrs}"
            )
        return value

    def _stop_early(self) -> None:
        if not math.isfinite(self.best):
            save_model(self.model, self.tokenizer, self.out)
        self.started, steps = None, self.config.steps
        raise Interrupted(f"stopped after step {self.step_done} of {steps}; state saved")

    @torch.no_grad()
    def evaluate(self) -> None:
        """Log the loss on held-out text, nats per token; keep the best weights."""
        self.model.eval()
        full = [w for w in self.val_windows if len(w) == self.config.n_positions + 1]
        batches = [full[i : i + self.micro_rows] for i in range(0, len(full), self.micro_rows)]
        batches += [[w] for w in self.val_windows if len(w) <= self.config.n_positions]
        sums = [self.nats(torch.from_numpy(np.stack(b).astype(np.int64))) for b in batches]
        tokens = sum(len(w) - 1 for w in self.val_windows)
        loss = self._finite(float(torch.stack(sums).double().sum()) / tokens, "validation loss")
        self.model.train()
        if loss < self.best:
            self.best = loss
            save_model(self.model, self.tokenizer, self.out)
        seconds = round(self.seconds_so_far(), 2)
        append_log(self.out, {"step": self.step_done, "dev_loss": loss, "seconds": seconds})

    # state ---------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """What resuming needs, all of it or nothing."""
        self.seconds = self.seconds_so_far()
        state = {
            "settings": self._settings(),
            "step": self.step_done,
            "best": self.best,
            "seconds": self.seconds,
            "trained": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_state(self.out, state)

    def load_state(self) -> None:
        """Go back to the last saved state of this run folder.

        Raises:
            ValueError: no state, a damaged one, or one of other settings or text.
        """
        path, state = state_path(self.out), read_state(self.out, self.device)
        ours, theirs = self._settings(), state["settings"]
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        if changed:
            raise ValueError(f"{path}: the saved run has another {', '.join(changed)}")
        self.model.load_state_dict(state["trained"])
        for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
        self.step_done, self.best, self.seconds = (state[k] for k in ("step", "best", "seconds"))

    def _settings(self) -> dict:
        """What must be the same when a run goes on."""
        return asdict(self.config) | self.digests | {"bf16": self.bf16}
