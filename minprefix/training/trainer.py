"""Trains a prefix (or, for comparison, a baseline's weights) with AdamW, resumable at any step.

The objective is eq. (2) of Li & Liang 2021 [1], the sum over target tokens of log p(z_i | h_<i). It
is divided by the number of target tokens in the whole effective batch, or summed per sentence as in
the authors' code [2]. Read `Trainer.step`. `config.py` has the settings, `tuned.py` what each
method trains, `loop.py` the loop around the steps and `run_folder.py` the files of a run.

Step s depends only on the settings, the weights before it and (seed, s), which give the order of
batches and the dropout masks. A run that was killed therefore continues from its last saved state
with exactly the losses of an uninterrupted run.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kernels import fuses
from minprefix.data.batches import (
    Batch,
    BatchOrder,
    Encoded,
    check_family,
    collate,
    digest,
    encode_examples,
    encode_prompt,
    origins,
    spread,
)
from minprefix.data.examples import Example
from minprefix.generation.graphs import uses_graphs
from minprefix.generation.texts import generate
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.training.advice import nothing_learned
from minprefix.training.blocks import unwrap_blocks, wrap_blocks
from minprefix.training.config import TrainConfig, duration, settle, steps_so_far
from minprefix.training.graphs import GraphedPasses, PlainPasses, drop_entries, leaves
from minprefix.training.loop import UNBOUNDED, Loop
from minprefix.training.memory import retry_with_fewer_rows
from minprefix.training.precision import cpu_has_bf16, in_bf16, uses_bf16
from minprefix.training.ranks import Ranks
from minprefix.training.state import (
    check_keys,
    check_number,
    checked_optimizer_state,
    checked_weights,
)
from minprefix.training.tuned import Trainable, tuned_from

SHOWN = 300  # characters of a sample text that are shown
EVAL_ROWS = 32  # dev rows in a forward pass
T = TypeVar("T")


def parts(rows: list, most: int) -> list[list]:
    """Split the rows, in their order, into parts of at most `most`."""
    return [rows[i : i + most] for i in range(0, len(rows), most)]


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


class Trainer(Loop):
    """One run: `run()` trains from the current step to the end.

    In bf16 a frozen model is copied with its weights in bf16, and the prefix or adapter stays in
    fp32; fine-tuning keeps the weights in fp32 and computes products in bf16 (autocast).
    Dropout acts only in weights that are fine-tuned. An adapter is attached only during a step.

    Args:
        train: examples; each (source, target) pair is one training row.
        dev: examples by which the best step is chosen; if there are none, the last step is kept.
        out: the run folder.
        tuned: what to train, for the method in config. A prefix is short for
            `TunedPrefix(prefix)`; None means all weights of the model.
        linearisation: frame of the token rows, see `batches.encode_pair`.
    Raises:
        ValueError: a row too long for the model, an empty target, no training data, or `tuned`
            belongs to another method or model.
    """

    def __init__(
        self, model: GPT2 | BART, tokenizer, config: TrainConfig, train: list[Example],
        dev: list[Example], out: str | Path, tuned: Trainable = None,
        linearisation: str = "paper",
    ):  # fmt: skip
        check_family(model.config.family, tokenizer)
        tuned = tuned_from(tuned, model)
        if tuned.method != config.method:
            raise ValueError(f"method {config.method!r} does not train a {type(tuned).__name__}")
        self.tokenizer, self.train, self.dev = tokenizer, train, dev
        self.linearisation = linearisation
        self.tuned, self.prefix = tuned, tuned.prefix
        device = model.wte.weight.device
        if config.precision == "auto" and device.type == "cpu":
            fast = cpu_has_bf16() and model.wte.weight.dtype == torch.float32
            config = replace(config, precision="bf16" if fast else "fp32")
        self.bf16 = uses_bf16(config.precision, device)
        self.model = model = in_bf16(model) if self.bf16 and tuned.frozen else model
        model.requires_grad_(False).eval()
        fused = tuned.frozen and fuses(model.wte.weight)
        if fused:
            model.pad_head()
        # Our fused kernels are used only in CUDA graphs, where launches cost the host nothing;
        # launched one by one they cost it more than PyTorch's.
        self.replayed = self.prefix is not None and model.captures and uses_graphs(device)
        wrap_blocks(
            model, compiled=config.compile, recomputed=config.activation_checkpointing,
            fused=fused and self.replayed,
        )  # fmt: skip
        self.bound = tuned.bind(model, linearisation, config.max_source)
        self.trained = tuned.weights
        self.passes: PlainPasses | GraphedPasses | None = None  # made in the first step
        self.rows = self._encoded(train, config)
        self.dev_rows = spread(self._encoded(dev, config), config.eval_pairs)
        shape, ranks = model.config, Ranks.current()
        lr = tuned.default_lr(shape.family, shape.n_embd, len(self.rows))
        if config.time and ranks.count > 1:
            raise ValueError("time cannot be used with several processes, whose clocks differ")
        config = settle(config, len(self.rows), lr, ranks.count)
        assert config.batch_size and config.eval_every and config.lr
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.advice = f"try a smaller lr than {config.lr}"
        self.order = BatchOrder([row.length for row in self.rows], config.batch_size, config.seed)
        self.batches_per_step = config.accumulation * ranks.count
        self.pass_rows = {"step": config.batch_size, "evaluation": EVAL_ROWS}  # may be halved
        super().__init__(
            config, out, device, steps=config.steps or UNBOUNDED, log_every=config.log_every,
            eval_every=config.eval_every, patience=config.patience, ranks=ranks,
        )  # fmt: skip

    def _encoded(self, examples: list[Example], config: TrainConfig) -> list[Encoded]:
        max_len = self.model.config.n_positions + 1 - self.offset
        frame = (self.linearisation, max_len, config.max_source)
        return encode_examples(self.tokenizer, examples, *frame)

    @property
    def offset(self) -> int:
        """The position of a row's first token."""
        return 0 if self.prefix is None else self.prefix.position_offset

    # one step ------------------------------------------------------------------------------------

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        return self.config.rate(step, self.seconds_so_far(), self.steps)

    def lengthen(self) -> None:
        if self.config.steps is None:
            return
        before, self.steps = self.steps, steps_so_far(self.config, self.measured)
        if self.bar is not None and self.steps > before:
            self.bar.total = self.steps
            self.print_above_bar(
                f"the dev loss still falls fast, so the run is made longer: to step {self.steps:,} "
                f"instead of {before:,} (--most-steps {before} would have prevented this)"
            )

    def share_done(self) -> float:
        limit = self.config.seconds
        return self.seconds_so_far() / limit if limit else super().share_done()

    def progress_text(self) -> str:
        timed = f"step {self.step_done} ({duration(self.seconds_so_far())} of {self.config.time})"
        return timed if self.config.time else super().progress_text()

    def estimate(self, seconds: float) -> str:
        if not self.config.time:
            return super().estimate(seconds)
        return f"{1 / seconds:.3g} steps a second between evaluations, for {self.config.time}"

    def bar_text(self, entry: dict) -> str:
        left = max(0, (self.config.seconds or 0) - self.seconds_so_far())
        return super().bar_text(entry) + (f", {duration(left)} left" if self.config.time else "")

    def losses(self, batch: Batch, prefix) -> torch.Tensor:
        """-log p of each target token of the batch, in nats: (number of target tokens,).

        Fine-tuning in bf16 computes only products in bf16, not weights, softmax or loss; a frozen
        model has its weights in bf16.
        """
        batch, cast = batch.to(self.device), self.bf16 and not self.tuned.frozen
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cast):
            return self.model.token_losses(
                batch.input_ids, batch.labels, batch.at, prefix=prefix, **batch.model_kwargs()
            )

    def step(self) -> dict:
        """One optimizer step over `accumulation` batches on each rank; returns summed measures."""
        config = self.config
        batches = self.batches(self.step_done)
        rows = [self.rows[i] for batch in batches for i in batch]
        targets = sum(len(row.ids) - row.prompt_len for row in rows)
        divisor = targets if config.loss == "token" else len(rows)
        own = batches[self.ranks.rank :: self.ranks.count]
        nats = self.with_auto_batch("step", lambda: self._sums(own, divisor))
        norm, lr = self._update()
        return {
            "nats": self.ranks.sum(nats),
            "targets": targets,
            "norm": norm,
            "lr": lr,
            "tokens": sum(row.length - 1 for row in rows),
        }

    def _sums(self, batches: list[list[int]], divisor: int) -> torch.Tensor:
        """Forward and backward pass of these batches; returns the sum of their losses in nats."""
        config = self.config
        # dropout is a function of seed, step and rank
        number = config.seed * self.steps + self.step_done
        torch.manual_seed(number * self.ranks.count + self.ranks.rank)
        acts: Any = None if self.prefix is None else self.prefix.activations()  # for all batches
        if config.prefix_dropout:
            acts = drop_entries(acts, config.prefix_dropout, seed=number)  # the same on all ranks
        if self.passes is None:
            self.passes = self._passes(acts)
        self.passes.begin(acts, 1 / divisor)
        with self.tuned.attached(self.model):
            for batch in batches:
                for part in parts(batch, self.pass_rows["step"]):
                    self.passes.add(collate([self.rows[i] for i in part], self.tokenizer.eos_id))
        nats, grads = self.passes.end()
        if acts is not None:  # backward from the activations to the trained weights
            torch.autograd.backward(leaves(acts), grads)
        return nats

    def with_auto_batch(self, kind: str, work: Callable[[], T]) -> T:
        """Call `work`. With `auto_batch`, each time memory runs out it starts again with half the
        rows in a pass of this kind, which the state records; nothing else changes. Ranks may differ
        in it, because each sums over its own batches."""
        if not self.config.auto_batch:
            return work()

        def forget() -> None:
            self.passes = None
            self.optimizer.zero_grad(set_to_none=True)
            self.print_above_bar(
                f"Out of memory: continuing with {self.pass_rows[kind]} pairs in a pass ({kind})."
            )

        return retry_with_fewer_rows(work, self.pass_rows, kind, forget)

    def out_of_memory_hint(self) -> str:
        rows, longest = self.pass_rows["step"], max(row.length for row in self.rows)
        P = f" and P = {self.prefix.prefix_len}" if self.prefix is not None else ""
        way = "" if self.config.auto_batch else "give --auto-batch, lower --batch-size, or "
        return (
            f"after step {self.step_done}, with {rows} pairs in a pass, {longest} tokens in the "
            f"longest pair{P}: {way}give --activation-checkpointing"
        )

    def batches(self, step: int) -> list[list[int]]:
        """The rows of all batches of step 0, 1, ..., on all ranks."""
        first = step * self.batches_per_step
        return [self.order.batch(number) for number in range(first, first + self.batches_per_step)]

    def rows_of(self, step: int) -> str:
        return origins([self.rows[i] for batch in self.batches(step) for i in batch])

    def _passes(self, acts: Any) -> PlainPasses | GraphedPasses:
        if not self.replayed:
            return PlainPasses(self.losses)
        return GraphedPasses(self.losses, acts, self.model.config.n_positions - acts.max_offset)

    def _update(self) -> tuple[torch.Tensor, float]:
        """Update the weights; returns the norm of the gradient and the learning rate."""
        for weight in self.trained.parameters():
            self.ranks.sum(weight.grad)  # type: ignore[arg-type]
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.clip)
        lr = self.lr_at(self.step_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.prefix is not None:
            self.prefix.project()
        self.step_done += 1
        return norm, lr

    # evaluation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Log the dev loss (nats per target token) and sample texts; keep the best weights."""
        if not self.dev_rows:
            if self.ranks.first:
                self.keep()
            return
        self.model.eval()
        with self.tuned.attached(self.model):
            nats, tokens = self.ranks.sum(
                self.with_auto_batch("evaluation", self._dev_sums)
            ).tolist()
            loss = self.finite(nats / tokens, "dev loss")
            samples = self._samples() if self.ranks.first else []
        self.trained.train()
        shown = [f"  {name:<9}  {shortened(t)}" for sample in samples for name, t in sample.items()]
        self.log_dev_loss(loss, shown, samples=samples)

    def _dev_sums(self) -> torch.Tensor:
        """Loss (nats) and number of target tokens in this rank's share of the dev rows: (2,)."""
        rows = sorted(self.dev_rows, key=lambda row: row.length)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in parts(rows[self.ranks.rank :: self.ranks.count], self.pass_rows["evaluation"]):
            losses = self.losses(collate(batch, self.tokenizer.eos_id), self.prefix)
            sums += torch.stack([losses.double().sum(), sums.new_tensor(len(losses))])
        return sums

    def begin(self) -> None:
        """Evaluate before the first step."""
        if self.step_done == 0 and self.dev_rows:
            self.evaluate()

    def _samples(self) -> list[dict[str, str]]:
        """Generated texts for the first dev tables, each with a reference."""
        shown = self.dev[: self.config.samples]
        sources = [example.source for example in shown]
        frame = (self.linearisation, self.config.max_source)
        prompts = [encode_prompt(self.tokenizer, text, *frame) for text in sources]
        longest = max(map(len, prompts), default=0)
        room = min(60, self.model.config.room_for_new(longest) - self.offset)
        if not prompts or room < 1:
            return []
        options: Any = {"prefix": self.prefix, "max_new_tokens": room}
        texts = generate(self.model, self.tokenizer, prompts, **options)
        return [
            {"source": example.source, "text": text.strip(), "reference": example.targets[0]}
            for example, text in zip(shown, texts, strict=True)
        ]

    def end(self) -> None:
        self.model.eval()  # as after `load`
        unwrap_blocks(self.model)

    def result(self) -> dict[str, Any]:
        """Steps, the best dev loss and its step, and the seconds of the run with all its parts."""
        return {
            "steps": self.step_done, "best_dev_loss": self.best, "best_step": self.best_step,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip

    def check_result(self) -> None:
        """ValueError if a finished run is useless, because no step was better than the start."""
        if reason := nothing_learned(self.measured):
            raise ValueError(reason)

    extends = ("steps", "epochs", "time", "most_steps", "patience")

    # files ---------------------------------------------------------------------------------------

    @property
    def kept(self) -> Path:
        """The result to use: prefix.safetensors, adapter.safetensors or the folder model/."""
        return self.out / self.tuned.kept

    def keep(self) -> None:
        self.tuned.save(self.kept, self.model, self.tokenizer)

    def state(self) -> dict:
        state = {"trained": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"pass_rows": self.pass_rows}

    def restore(self, state: dict) -> None:
        trained = checked_weights(self.trained, state["trained"])
        optimizer = checked_optimizer_state(self.optimizer, state["optimizer"], state["step"])
        pass_rows = state.get("pass_rows", self.pass_rows)  # older states have none
        check_keys("pass_rows", pass_rows, self.pass_rows)
        for kind, most in self.pass_rows.items():
            check_number(f"pass_rows {kind}", pass_rows[kind], 1, most)
        self.pass_rows = pass_rows
        self.trained.load_state_dict(trained)
        self.optimizer.load_state_dict(optimizer)

    def older_settings(self) -> dict:
        older = {"place": "prefix", "bf16": self.bf16, "dev data": digest(self.dev_rows)}
        return super().older_settings() | older

    def settings(self) -> dict:
        """The settings, the training and dev rows, and the base model."""
        data = {"training data": digest(self.rows), "dev data": digest(self.dev_rows)}
        settings = asdict(self.config) | data
        del settings["precision"]  # "bf16" has the result of it
        del settings["auto_batch"]  # it does not change any step
        return settings | {"number of ranks": self.ranks.count, "bf16": self.bf16} | self.bound
