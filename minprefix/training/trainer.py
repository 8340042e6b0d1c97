"""Training: AdamW on the prefix (or, to compare, on a baseline's weights), resumable at any step.

The objective is eq. (2) of Li & Liang 2021 [1], the sum over target tokens of log p(z_i | h_<i): as
a mean per target token of the whole effective batch, or summed per sentence as in the authors' code
[2]. Read `TrainConfig`, `Trainer.step` (one step), `Trainer.run` (the loop around it).

Everything that step s does depends on the settings, the weights before it and (seed, s): the order
of batches and the dropout masks are functions of them. A run that was killed therefore continues
from its last saved state to the very losses of an unbroken run.

`run_folder.py` says what a run leaves on disk.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

import hashlib
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minprefix.checks import check_choice
from minprefix.data.batches import Batch, BatchOrder, collate, encode_examples, encode_prompt
from minprefix.data.examples import Example
from minprefix.generation.graphs import uses_graphs
from minprefix.generation.texts import generate
from minprefix.methods.adapters import Adapter, TopLayers, check_free
from minprefix.models.activations import BARTActivations, PrefixActivations
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint, need_gpt2, save_model
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.blocks import unwrap_blocks, wrap_blocks
from minprefix.training.graphs import Eager, Graphed, dropped, leaves
from minprefix.training.ranks import Ranks
from minprefix.training.run_folder import append_log, cut_log, read_state, state_path, write_state

# methods, and what each leaves in the run folder for use; "ft-top" and "adapter": `baselines.py`
KEPT = {"prefix": "prefix.safetensors", "finetune": "model", "ft-top": "model",
        "adapter": "adapter.safetensors"}  # fmt: skip
METHODS = tuple(KEPT)
PRECISIONS = ("auto", "fp32", "bf16")

# Peak learning rates where none is given, for models (below 512 wide, of official size): what the
# E2E dev set chose for the embedded model, and the paper's for GPT-2 medium on E2E.
DEFAULT_LR = {
    "prefix": (1e-3, 8e-5),
    "finetune": (1e-3, 5e-5),
    "ft-top": (5e-3, 5e-5),
    "adapter": (1e-2, 5e-5),  # of three widths; the second for 3 %, the paper has 8e-5 for 0.1 %
}

# Likewise for BART: the first of the prefix from a trial on E2E's dev set, the second are XSum's in
# the paper (its appendix: prefix; fine-tuning within the news).
BART_LR = {"prefix": (2e-3, 5e-5), "finetune": (5e-4, 3e-5)}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Defaults are the paper's for table-to-text (appendix, hyper-parameters)."""

    method: str = "prefix"  # "prefix", "finetune" (all weights), "ft-top" (top layers), "adapter"
    epochs: float = 5.0  # passes over the training pairs
    steps: int | None = None  # optimiser steps, instead of epochs
    batch_size: int = 10  # pairs per forward pass
    accumulation: int = 1  # forward passes per optimiser step, on each rank of torchrun
    lr: float | None = None  # AdamW, peak, then linear to 0; None = by method and width, see log
    warmup_steps: int = 0  # steps of linear warm-up before the decay
    weight_decay: float = 0.0  # AdamW, per step and lr
    prefix_dropout: float = 0.0  # probability, on the entries of the prefix, anew in each step
    clip: float = 1.0  # largest norm of the whole gradient
    max_source: int | None = None  # cut sources to their first tokens (512 for XSum); None = never
    loss: str = "token"  # mean per target "token", or sum per "sentence" as in the authors' code
    precision: str = "auto"  # "fp32", "bf16", or "auto" = bf16 on CUDA and fp32 on a CPU
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory
    compile: bool = False  # torch.compile each layer: slow first steps, then fewer memory passes
    seed: int = 0  # order of batches, dropout, random start of the prefix
    log_every: int = 10  # steps per line of the log
    eval_every: int = 200  # steps between evaluations on the dev set, and between saved states
    eval_pairs: int = 1000  # dev pairs in an evaluation, at most; evenly spread
    samples: int = 2  # dev tables to write a text for at each evaluation

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_choice("loss", self.loss, ("token", "sentence"))
        check_choice("precision", self.precision, PRECISIONS)
        if self.compile and self.method == "adapter":
            raise ValueError("compile does not go with method adapter: it compiles around adapters")
        for name in ("batch_size", "accumulation", "log_every", "eval_every", "eval_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "seed", "samples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.prefix_dropout < 1:
            raise ValueError(f"prefix_dropout must lie in [0, 1), got {self.prefix_dropout}")
        if self.prefix_dropout and self.method != "prefix":
            raise ValueError(f"prefix_dropout needs method 'prefix', got {self.method!r}")
        if not 0 < (self.epochs if self.steps is None else self.steps) < math.inf:
            raise ValueError(f"nothing to train: epochs {self.epochs}, steps {self.steps}")


class Interrupted(Exception):
    """Ctrl-C during training; the state is saved."""


def in_bf16(model: GPT2 | BART) -> GPT2 | BART:
    """A model with the same weights in bf16; `model` stays as it is."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    weights = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.train(model.training)


class Trainer:
    """One run: `run()` trains from the current step to the end.

    In bf16 a frozen model is copied, with its weights in bf16, and the prefix or adapter stays in
    fp32; fine-tuning keeps the weights in fp32 and computes products in bf16 (autocast).
    Dropout acts in what is fine-tuned, nowhere else. An adapter is attached within steps only.

    Args:
        train: examples; each (source, target) pair is one training row.
        dev: examples to choose the best step by; may be empty, then the last step is kept.
        out: the run folder.
        prefix: what to train with method "prefix"; it is bound to the model.
        linearisation: frame of the token rows, see `batches.encode_pair`.
        baseline: what to train with "ft-top" or "adapter", see `baselines.make_baseline`.
    Raises:
        ValueError: a row too long for the model, an empty target, no training data, a prefix or
            baseline of another model.
    """

    def __init__(
        self, model: GPT2 | BART, tokenizer, config: TrainConfig, train: list[Example],
        dev: list[Example], out: str | Path, prefix: Prefix | BARTPrefix | None = None,
        linearisation: str = "paper", baseline: Adapter | TopLayers | None = None,
    ):  # fmt: skip
        kind = {"adapter": Adapter, "ft-top": TopLayers}.get(config.method, type(None))
        if (prefix is not None) != (config.method == "prefix") or not isinstance(baseline, kind):
            given = f"prefix {type(prefix)} and baseline {type(baseline)}"
            raise ValueError(f"method {config.method!r}, {given} do not fit")
        if config.method not in ("prefix", "finetune"):
            need_gpt2(model, f"method {config.method!r}")
        check_free(model)
        if isinstance(baseline, TopLayers) and baseline.ln_f is not model.ln_f:
            raise ValueError("the top layers to train are those of another model")
        self.device, self.ranks = model.wte.weight.device, Ranks.here()
        self.adapter = baseline if isinstance(baseline, Adapter) else None
        added = self.adapter if prefix is None else prefix  # to a frozen model
        self.tuning = tuning = added is None  # weights of the model itself
        bf16 = config.precision == "bf16"
        self.bf16 = bf16 or (config.precision == "auto" and self.device.type == "cuda")
        if self.bf16 and not tuning:
            model = in_bf16(model)
        self.model, self.tokenizer, self.config, self.prefix = model, tokenizer, config, prefix
        self.dev, self.out, self.linearisation = dev, Path(out), linearisation
        model.requires_grad_(False).eval()
        wrap_blocks(model, compiled=config.compile, recomputed=config.activation_checkpointing)
        self.trained = prefix or baseline or model
        self.base = ""  # fingerprint of what stays frozen
        if config.method != "finetune":
            self.base = fingerprint(model)
        if tuning:
            self.trained.requires_grad_().train()
            frame = {"linearisation": linearisation, "max_source": config.max_source}
            model.config = replace(model.config, **frame)
        else:
            added.linearisation, added.max_source = linearisation, config.max_source
            added.check_base(model)
            added.bind(model)
        default = BART_LR if isinstance(model, BART) else DEFAULT_LR
        self.lr = config.lr or default[config.method][model.config.n_embd >= 512]
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=self.lr, weight_decay=config.weight_decay, fused=True
        )
        max_len = model.config.n_positions + 1 - (0 if prefix is None else prefix.position_offset)
        frame = (linearisation, max_len, config.max_source)
        self.rows = encode_examples(tokenizer, train, *frame)
        dev_rows = encode_examples(tokenizer, dev, *frame)
        spread = np.linspace(0, len(dev_rows) - 1, min(len(dev_rows), config.eval_pairs))
        self.dev_rows = [dev_rows[int(i)] for i in spread]
        self.order = BatchOrder([row.length for row in self.rows], config.batch_size, config.seed)
        self.per_step = config.accumulation * self.ranks.count  # batches per optimiser step
        per_epoch = self.order.steps_per_epoch / self.per_step
        self.steps = config.steps or max(1, round(config.epochs * per_epoch))
        self.step_done, self.best, self.seconds = 0, float("inf"), 0.0
        self.passes: Eager | Graphed | None = None  # made in the first step

    # one step ------------------------------------------------------------------------------------

    def autocast(self):
        """While fine-tuning in bf16: products in bf16, weights, softmax and loss as they are.

        A frozen model has its weights in bf16 and needs none.
        """
        cast = self.bf16 and self.tuning
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cast)

    def adapted(self):
        """Within it, the model has the adapter that is trained, if one is."""
        return nullcontext() if self.adapter is None else self.adapter.attached(self.model)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1: linear up, then linear down to 0."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * (self.steps - step) / max(1, self.steps - warmup)

    def losses(self, batch: Batch, prefix) -> torch.Tensor:
        """-log p of each target token of the batch, in nats: (number of target tokens,)."""
        batch = batch.to(self.device)
        with self.autocast():
            return self.model.token_losses(
                batch.input_ids, batch.labels, batch.at, prefix=prefix, **batch.beside()
            )

    def step(self) -> dict:
        """One optimiser step over `accumulation` batches on each rank; what it measured, summed."""
        config = self.config
        # dropout: a function of seed, step and rank
        number = config.seed * self.steps + self.step_done
        torch.manual_seed(number * self.ranks.count + self.ranks.rank)
        first = self.step_done * self.per_step
        batches = [self.order.batch(number) for number in range(first, first + self.per_step)]
        rows = [self.rows[i] for batch in batches for i in batch]  # of all ranks
        targets = sum(len(row.ids) - row.prompt_len for row in rows)
        divisor = targets if config.loss == "token" else len(rows)
        acts = None if self.prefix is None else self.prefix.activations()  # once for all batches
        if config.prefix_dropout:
            acts = dropped(acts, config.prefix_dropout, seed=number)  # on all ranks the same
        if self.passes is None:
            self.passes = self._passes(acts)
        self.passes.begin(acts, 1 / divisor)
        with self.adapted():
            for batch in batches[self.ranks.rank :: self.ranks.count]:
                self.passes.add(collate([self.rows[i] for i in batch], self.tokenizer.eos_id))
        nats, grads = self.passes.end()
        if acts is not None:  # from the activations on to what is trained
            torch.autograd.backward(leaves(acts), grads)
        for weight in self.trained.parameters():
            self.ranks.sum(weight.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), config.clip)
        lr = self.lr_at(self.step_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.prefix is not None:
            self.prefix.project()
        self.step_done += 1
        return {
            "nats": self.ranks.sum(nats),
            "targets": targets,
            "norm": norm,
            "lr": lr,
            "tokens": sum(row.length - 1 for row in rows),
        }

    def _passes(self, acts: PrefixActivations | BARTActivations | None) -> Eager | Graphed:
        if not isinstance(acts, PrefixActivations) or not uses_graphs(self.device):
            return Eager(self.losses)
        return Graphed(self.losses, acts, self.model.config.n_positions - acts.max_offset)

    # the loop ------------------------------------------------------------------------------------

    def run(self, progress: bool = True) -> dict[str, float]:
        """Train to the last step. Returns step, best dev loss and seconds; see the module's header.

        Raises:
            Interrupted: Ctrl-C; the running step was finished and the state saved.
            FloatingPointError: the loss is no longer finite; the last saved state stays.
            ValueError: the folder holds a run and `load_state` was not called.
        """
        if self.step_done == 0 and state_path(self.out).exists():
            raise ValueError(f"{self.out} holds a run: load_state() goes on with it")
        self.ranks.wait()
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            cut_log(self.out, self.step_done)
        started, window = time.perf_counter() - self.seconds, []
        # in a log file each update would be a line: one every 30 s
        every = 0.1 if sys.stderr.isatty() else 30  # s
        bar = tqdm(
            total=self.steps, initial=self.step_done, unit="step",
            disable=not (progress and self.ranks.first), mininterval=every, miniters=1,
        )  # fmt: skip
        with bar, deferred_interrupt() as interrupted:
            clock = time.perf_counter()
            while self.step_done < self.steps:
                window.append(self.step())
                bar.update()
                last = self.step_done == self.steps
                evaluate = last or self.step_done % self.config.eval_every == 0
                log = evaluate or self.step_done % self.config.log_every == 0
                # several ranks must stop at the same step: they ask one another when they log
                stop = (log or self.ranks.count == 1) and self.ranks.any(interrupted(), self.device)
                if log or stop:
                    entry = self._log(window, time.perf_counter() - clock)
                    shown = f"loss {entry['loss']:.3f}, {entry['tokens_per_s']} tok/s"
                    bar.set_postfix_str(shown, refresh=False)
                    window, clock = [], time.perf_counter()
                if evaluate and self.ranks.first:
                    self.evaluate()
                if (evaluate or stop) and self.ranks.first:
                    self.seconds = time.perf_counter() - started
                    self.save_state()
                    clock = time.perf_counter()
                if stop:
                    self._stop_early()
        self.ranks.wait()
        self.model.eval()  # as `load` gives it
        unwrap_blocks(self.model)
        return {
            "steps": self.step_done,
            "best_dev_loss": self.best,
            "seconds": round(self.seconds, 1),  # of the whole run, resumed or not
        }

    def _log(self, window: list[dict], seconds: float) -> dict:
        """Append the means over `window` to the log; the one place that waits for a GPU."""
        targets = sum(entry["targets"] for entry in window)
        loss = self._finite(float(sum(entry["nats"] for entry in window)) / targets, "loss")
        entry = {
            "step": self.step_done,
            "loss": loss,  # nats per target token
            "grad_norm": self._finite(float(window[-1]["norm"]), "norm of the gradient"),
            "lr": window[-1]["lr"],
            "tokens_per_s": round(sum(entry["tokens"] for entry in window) / seconds),
        }
        if self.ranks.first:
            append_log(self.out, entry)
        return entry

    def _finite(self, loss: float, name: str) -> float:
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the {name} is {loss} after step {self.step_done}: try a smaller lr than {self.lr}"
            )
        return loss

    def _stop_early(self) -> None:
        if self.ranks.first and not np.isfinite(self.best):
            self.save_trained()
        raise Interrupted(f"stopped after step {self.step_done} of {self.steps}; state saved")

    @torch.no_grad()
    def evaluate(self) -> None:
        """Log the dev loss, nats per target token, and sample texts; keep the best weights."""
        if not self.dev_rows:
            self.save_trained()
            return
        self.model.eval()
        rows = sorted(self.dev_rows, key=lambda row: row.length)
        with self.adapted():
            losses = [
                self.losses(collate(rows[i : i + 32], self.tokenizer.eos_id), self.prefix)
                for i in range(0, len(rows), 32)
            ]
            loss = self._finite(torch.cat(losses).double().mean().item(), "dev loss")
            entry = {"step": self.step_done, "dev_loss": loss, "samples": self._samples()}
        self.trained.train()
        if loss < self.best:
            self.best = loss
            self.save_trained()
        append_log(self.out, entry)

    def _samples(self) -> list[dict[str, str]]:
        """What the model writes for the first dev tables."""
        sources = [example.source for example in self.dev[: self.config.samples]]
        frame = (self.linearisation, self.config.max_source)
        prompts = [encode_prompt(self.tokenizer, text, *frame) for text in sources]
        offset = 0 if self.prefix is None else self.prefix.position_offset
        # a BART's target begins with its start token, a GPT-2's stands behind the source
        longest = 1 if isinstance(self.model, BART) else max(map(len, prompts), default=0)
        room = min(60, self.model.config.n_positions - offset - longest)
        if not prompts or room < 1:
            return []
        texts = generate(
            self.model, self.tokenizer, prompts, prefix=self.prefix, max_new_tokens=room
        )
        return [{"source": s, "text": t.strip()} for s, t in zip(sources, texts, strict=True)]

    # files ---------------------------------------------------------------------------------------

    def save_trained(self) -> None:
        """What a user ships: prefix.safetensors, adapter.safetensors or the folder model/."""
        if self.tuning:
            save_model(self.model, self.tokenizer, self.kept)
        else:
            self.trained.save(self.kept)

    @property
    def kept(self) -> Path:
        """Where that is."""
        return self.out / KEPT[self.config.method]

    def save_state(self) -> None:
        """What resuming needs, all of it or nothing."""
        state = {
            "settings": self._settings(),
            "step": self.step_done,
            "best": self.best,
            "seconds": self.seconds,
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_state(self.out, state)

    def load_state(self) -> None:
        """Go back to the last saved state of this run folder.

        Raises:
            ValueError: no state, a damaged one, or one of other settings, data or model.
        """
        path, state = state_path(self.out), read_state(self.out, self.device)
        ours, theirs = self._settings(), state["settings"]
        # what older runs could not choose
        theirs = asdict(TrainConfig()) | {"place": "prefix", "bf16": self.bf16} | theirs
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        if changed:
            raise ValueError(f"{path}: the saved run has another {', '.join(changed)}")
        try:
            self.trained.load_state_dict(state["trained"])
        except RuntimeError as error:
            raise ValueError(f"{path}: weights of another model, prefix or adapter") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_done, self.best, self.seconds = (state[k] for k in ("step", "best", "seconds"))

    def _settings(self) -> dict:
        """What must be the same when a run goes on: settings, training rows, base model."""
        digest = hashlib.sha256()
        for row in self.rows:
            ids = [row.prompt_len, *row.ids, *(row.source or ())]
            digest.update(np.array(ids, dtype=np.int64).tobytes())
        settings = asdict(self.config) | {"training data": digest.hexdigest()}
        settings |= {"lr": self.lr, "number of ranks": self.ranks.count, "bf16": self.bf16}
        if self.base:
            settings["base model"] = self.base
        if self.prefix is not None:
            settings |= {
                "position_offset": self.prefix.position_offset,
                "place": self.prefix.place,
            }
        if isinstance(self.prefix, BARTPrefix):
            settings["sites"] = list(self.prefix.sites)
        return settings


@contextmanager
def tells_how_to_go_on(command: str):
    """Within the block, what an interrupted run says ends with the command that continues it."""
    go_on = f"Go on with: {command}"
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(f"{stop}. {go_on}") from None
    except KeyboardInterrupt:  # before the first step, or the second one: the last saved state
        raise Interrupted(f"interrupted. {go_on}") from None


@contextmanager
def deferred_interrupt():
    """Within the block a first Ctrl-C only sets a flag, so that no step is torn; gives its reader.

    A second Ctrl-C interrupts at once. Outside the main thread nothing changes.
    """
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        if seen:
            signal.signal(signal.SIGINT, previous)
            raise KeyboardInterrupt
        seen.append(number)
        print("\nstopping after this step; again: at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
