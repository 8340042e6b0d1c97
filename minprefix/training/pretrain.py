"""Trains a GPT-2 from scratch on token windows, and writes a folder that `minprefix.load` reads.

The objective is that of a language model, the mean over all tokens of log p(z_i | z_<i). Weights
are initialised like GPT-2's (`GPT2.init_weights`: N(0, 0.02), divided by sqrt(2 L) in layers that
add to the residual stream; Radford et al. 2019 [1], section 2.3, and its code [2]). The matrices of
the layers are trained by Muon [3]: the momentum of the gradient, G = U S V^T, is replaced by
approximately U V^T, so that the update is equally large in all its directions. Embeddings, biases
and layer norms are trained by AdamW.

Read `PretrainConfig`, `make_optimizers` and `Pretrainer.step`; `loop.py` has the loop. As in
`trainer.py`, step s depends only on the settings, the weights before it and (seed, s), so a run
that was killed continues with exactly the losses of an uninterrupted run. This does not hold with
`time`, which makes the schedule follow the clock. The run folder holds the model with the lowest
validation loss so far, in the official format, and log.jsonl and state/ (`run_folder.py`).

[1] https://cdn.openai.com/better-language-models/language_models.pdf
[2] https://github.com/openai/gpt-2/blob/master/src/model.py
[3] https://kellerjordan.github.io/posts/muon/
"""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.data.batches import pinned
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import save_model
from minprefix.training.blocks import wrap_blocks
from minprefix.training.config import PretrainConfig
from minprefix.training.corpus import Corpus, Windows, unigram_entropy, validation_windows
from minprefix.training.loop import Loop
from minprefix.training.precision import uses_bf16
from minprefix.training.state import checked_optimizer_state, checked_weights

MOMENTUM = 0.95  # Muon
BETAS = (0.9, 0.95)  # AdamW


def schedule(step: int, done: float, config: PretrainConfig) -> float:
    """The learning rates of step 0, 1, ... as a share of their peaks.

    It rises linearly over warmup_steps, is 1 until the share `hold` of the run is done, and then
    falls linearly to lr_end.

    Args:
        done: the share of the run that is done, 0 <= done < 1.
    """
    up = min(1.0, (step + 1) / max(1, config.warmup_steps))
    down = 1 - (1 - config.lr_end) * max(0.0, done - config.hold) / (1 - config.hold)
    return up * down


def make_optimizers(model: GPT2, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else.

    In [3], the orthogonal update of a matrix from n_in to n_out features is scaled by
    sqrt(max(1, n_out / n_in)). `torch.optim.Muon` assumes weights [out, in], but ours are [in, out]
    (`Conv1D`), so it scales by sqrt(max(1, n_in / n_out)). We correct for the ratio of the two,
    sqrt(n_out / n_in), in the learning rate, but not in the weight decay.
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
        corpus: ids for training and for evaluation, and their tokenizer.
        out: the run folder, which will also hold the model.
        device: such as cpu or cuda.
    Raises:
        ValueError: the text is shorter than one window, or too short for an evaluation.
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
        """A model with random weights, in training mode."""
        config, eos = self.config, self.tokenizer.eos_id
        sizes = {name: getattr(config, name) for name in ("n_positions", "n_embd", "n_layer")}
        model = GPT2(
            GPT2Config(
                vocab_size=self.tokenizer.vocab_size, n_head=config.n_head, bos_token_id=eos,
                eos_token_id=eos, **sizes,
            )
        )  # fmt: skip
        for module in model.modules():
            # config.json keeps GPT-2's own probability, for users who fine-tune the model
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

    def share_done(self) -> float:
        """The share of the run that is done, by steps or by the clock; 1 at the end."""
        limit = self.config.seconds
        return max(super().share_done(), self.seconds_so_far() / limit if limit else 0.0)

    def step(self) -> dict:
        """One optimizer step over batch_tokens tokens; returns its measures."""
        config = self.config
        torch.manual_seed(config.seed * config.steps + self.step_done)  # dropout
        windows = self.windows.batch(self.step_done)  # (B, T + 1)
        labels, nats = windows[:, 1:].numel(), torch.zeros((), device=self.device)
        for rows in windows.split(self.micro_rows):
            loss = self.nats(rows)
            (loss / labels).backward()
            nats += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        share = schedule(self.step_done, min(1.0, self.share_done()), config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_done += 1
        return {"nats": nats, "targets": labels, "tokens": labels, "norm": norm, "lr_share": share}

    # the loop ------------------------------------------------------------------------------------

    extends = ("micro_tokens",)

    def out_of_memory_hint(self) -> str:
        return (
            f"after step {self.step_done}, with {self.micro_rows} windows of "
            f"{self.config.n_positions} tokens in a pass: lower --micro-tokens and run the same "
            "command to continue"
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Log the loss on held-out text (nats per token); keep the best weights."""
        self.model.eval()
        full = [w for w in self.val_windows if len(w) == self.config.n_positions + 1]
        batches = [full[i : i + self.micro_rows] for i in range(0, len(full), self.micro_rows)]
        batches += [[w] for w in self.val_windows if len(w) <= self.config.n_positions]
        sums = [self.nats(torch.from_numpy(np.stack(b).astype(np.int64))) for b in batches]
        tokens = sum(len(w) - 1 for w in self.val_windows)
        loss = self.finite(float(torch.stack(sums).double().sum()) / tokens, "validation loss")
        self.model.train()
        self.log_dev_loss(loss)

    def end(self) -> None:
        self.model.eval()

    def result(self) -> dict[str, float]:
        """The results; losses are in nats per token."""
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

    @property
    def kept(self) -> Path:
        return self.out

    def keep(self) -> None:
        save_model(self.model, self.tokenizer, self.out)

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"trained": self.model.state_dict(), "optimizer": optimizers}

    def restore(self, state: dict) -> None:
        weights, saved = checked_weights(self.model, state["trained"]), state["optimizer"]
        if not isinstance(saved, list) or len(saved) != len(self.optimizers):
            raise ValueError(f"optimizer must be a list of {len(self.optimizers)}")
        both = list(zip(self.optimizers, saved, strict=True))
        checked = [
            checked_optimizer_state(optimizer, one, state["step"]) for optimizer, one in both
        ]
        self.model.load_state_dict(weights)
        for optimizer, one in zip(self.optimizers, checked, strict=True):
            optimizer.load_state_dict(one)

    def settings(self) -> dict:
        """The settings and the text."""
        return asdict(self.config) | self.digests | {"bf16": self.bf16}
