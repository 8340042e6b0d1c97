"""The loop shared by everything that runs in steps: `Trainer`, `Pretrainer` and `PromptSearch`.

A `Loop` counts steps, shows its progress, writes log lines, evaluates and saves its state at
intervals, and finishes the current step when Ctrl-C is pressed or the process receives SIGTERM, or
SIGHUP because its terminal was closed. A subclass defines the step.
Read `Loop.run`, then `Loop.load_state`, the only way to resume: a run that was killed continues
from its last saved state, if its settings are the same. `run_folder.py` lists the folder's files.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from tqdm import tqdm

from minprefix.models.weights import same_model
from minprefix.training.config import duration
from minprefix.training.interrupts import Interrupted, deferred_interrupt
from minprefix.training.lock import alone_in
from minprefix.training.memory import keep_freed_memory, reports_out_of_memory
from minprefix.training.ranks import Ranks
from minprefix.training.run_folder import (
    append_log,
    has_state,
    read_state,
    repair_state,
    state_path,
    truncate_log,
    write_state,
)
from minprefix.training.state import check_progress

UNBOUNDED = 10**9  # steps of a run with a time limit


class Loop:
    """Steps, log, evaluations and state of one run; `run()` continues to the end of the run.

    A subclass defines `step`, `evaluate`, `keep`, `settings`, `state`, `restore` and `result`; it
    may change the other methods.

    Args:
        config: the settings of the run, a dataclass in which every field has a default.
        steps: the last step, if `finished` does not end the run earlier.
        log_every, eval_every: steps between log lines, and between evaluations, after which the
            state is saved.
        patience: the run ends after this many evaluations in a row without a lower dev loss, but
            not in its first half, nor in the first half of an extension; 0 = never.

    Attributes:
        step_done, saved_step: how many steps are done, now and in the last saved state.
        measured: (step, dev loss) of each evaluation, in nats per target token.
        stopped: whether the run ended early because the dev loss had stopped falling.
        seconds: wall time of the run up to the last saved state, without pauses.
    """

    advice = "try other settings"  # in the error when a loss is not finite
    state_keys: tuple[str, ...] = ("trained", "optimizer")  # what `state` returns
    extends: tuple[str, ...] = ()  # settings that may change when a run is continued
    saves_each_step = False
    first_steps = 5  # before the duration of the run is estimated

    def __init__(
        self, config, out: str | Path, device: torch.device, *, steps: int, log_every: int,
        eval_every: int, patience: int = 0, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.config, self.out, self.device, self.steps = config, Path(out), device, steps
        self.log_every, self.eval_every, self.patience = log_every, eval_every, patience
        self.ranks = ranks or Ranks()
        self.step_done, self.saved_step, self.seconds, self.measured = 0, 0, 0.0, []
        self.entry: dict | None = None  # the last line of the log that is about steps
        self.stopped, self.counted_from = False, 0  # patience counts evaluations after this step
        self.bar: tqdm | None = None  # while it runs
        self.watch: Callable[[dict], None] | None = None  # is called with each log line
        # while it runs: when it would have started if it had not been interrupted
        self.started: float | None = None
        if device.type == "cpu":
            keep_freed_memory()

    # what a subclass defines ----------------------------------------------------------------------

    def step(self) -> dict:
        """Make one step and count it; returns what `summary` needs."""
        raise NotImplementedError

    def evaluate(self) -> None:
        """Measure the dev loss, log it, and keep the best weights so far (see `log_dev_loss`)."""
        raise NotImplementedError

    @property
    def kept(self) -> Path:
        """The result in the run folder: a file, or a folder with a model."""
        raise NotImplementedError

    def keep(self) -> None:
        """Write the file or folder `kept`."""
        raise NotImplementedError

    def can_keep(self) -> bool:
        """Whether `keep` can write the best weights, also after `load_state`."""
        return self.best_step in (None, self.step_done)

    def settings(self) -> dict:
        """What must be unchanged when a run is continued."""
        raise NotImplementedError

    def state(self) -> dict:
        """What resuming needs besides the attributes of `Loop`; has the keys `state_keys`."""
        raise NotImplementedError

    def restore(self, state: dict) -> None:
        """The opposite of `state`. ValueError, without any change, if it does not fit."""
        raise NotImplementedError

    def result(self) -> dict:
        """The results of the run."""
        raise NotImplementedError

    def begin(self) -> None:
        """Work before the first step; also called after resuming."""

    def end(self) -> None:
        """Work after the last step."""

    def lengthen(self) -> None:
        """Called when `measured` has changed; may make the run longer."""

    def rows_of(self, step: int) -> str:
        """The rows that step 0, 1, ... reads, as file:line; "" if unknown."""
        return ""

    def has_begun(self) -> bool:
        """Whether something has been computed or loaded."""
        return self.step_done > 0

    def share_done(self) -> float:
        """The share of the run that is done; 1 or more at the end."""
        return self.step_done / self.steps

    def finished(self) -> bool:
        return self.stopped or self.share_done() >= 1

    def bar_text(self, entry: dict) -> str:
        """The text of the progress bar for a log line."""
        best = f", best dev {self.best:.3f} (step {self.best_step})" if self.measured else ""
        return f"loss {entry['loss']:.3f}{best}, {entry['tokens_per_s']} tok/s"

    @property
    def best(self) -> float:
        """The lowest dev loss so far; infinity before the first evaluation."""
        return min((loss for _, loss in self.measured), default=math.inf)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest dev loss, whose weights are kept."""
        return min(self.measured, key=lambda pair: pair[1])[0] if self.measured else None

    def progress_text(self) -> str:
        """How far the run is, such as "step 10 of 100"."""
        return f"step {self.step_done} of {self.steps}"

    def print_above_bar(self, text: str) -> None:
        """Print lines above the progress bar; without a bar, print nothing."""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(self.bar_text(self.entry) if self.entry else "", refresh=False)
            self.bar.write(text, file=sys.stderr)

    def summary(self, window: list[dict], seconds: float) -> dict:
        """The log line for the steps in `window`, here their means; waits for the GPU."""
        self.check_finite(window)
        targets, last = sum(step["targets"] for step in window), window[-1]
        loss = float(sum(step["nats"] for step in window)) / targets
        return {
            "step": self.step_done,
            "loss": loss,  # nats per target token
            "grad_norm": float(last["norm"]),
            **{name: last[name] for name in ("lr", "lr_share") if name in last},
            "seconds": round(self.seconds_so_far(), 2),
            "tokens_per_s": round(sum(step["tokens"] for step in window) / seconds),
        }

    # the loop -------------------------------------------------------------------------------------

    def run(self, progress: bool = True) -> dict:
        """Continue to the last step and return `result`. `progress` draws a bar on stderr.

        Raises:
            Interrupted: a signal came; the current step was finished and the state saved.
            OutOfMemory: names what to lower; the last saved state remains.
            FloatingPointError: a loss is no longer finite; the last saved state remains.
            ValueError: the folder holds a run and `load_state` was not called; another process
                works in it (`FolderInUse`); or a continued run finds its kept result missing.
        """
        self.check_no_overwrite()
        self.ranks.barrier()
        with alone_in(self.out) if self.ranks.first else nullcontext():
            if self.ranks.first:
                self.check_no_overwrite()  # another process may have been there before the lock
                repair_state(self.out)
                self.check_kept()
                # a run killed before its first saved state leaves the evaluation before step 1
                truncate_log(self.out, self.step_done if self.has_begun() else -1)
            self._run(progress)
            self.ranks.barrier()
            self.end()
        return self.result()

    def check_no_overwrite(self) -> None:
        """ValueError if the folder holds a run that would be overwritten."""
        if not self.has_begun() and self.has_state():
            raise ValueError(f"{self.out} already holds a run: load_state() continues it")

    def check_kept(self) -> None:
        """Write the kept result again if it is gone; ValueError if the run cannot do so."""
        kept = self.kept / "model.safetensors" if self.kept.is_dir() else self.kept
        if self.step_done == 0 or kept.is_file():
            return
        if not self.can_keep():
            raise ValueError(
                f"{kept} is gone, and the run cannot write it again: it was from step "
                f"{self.best_step}, but the saved state is from step {self.step_done}; train again"
            )
        self.keep()

    def _run(self, progress: bool) -> None:
        """`run`, once the folder is locked."""
        self.started = time.perf_counter() - self.seconds
        # in a log file each update of the bar is a line, so write only one every 30 s
        every = 0.1 if sys.stderr.isatty() else 30  # s
        self.bar = tqdm(
            total=None if self.steps == UNBOUNDED else self.steps, initial=self.step_done,
            unit="step", mininterval=every, miniters=1,
            disable=not (progress and self.ranks.first),
        )  # fmt: skip
        try:
            stops = deferred_interrupt(lambda: self.saved_step)
            with self.bar, stops as interrupted, reports_out_of_memory(self.out_of_memory_hint):
                self.begin()
                self.bar.unpause()  # its times are those of the steps
                self._run_steps(self.bar, interrupted)
        finally:
            self.started = self.bar = None

    def _run_steps(self, bar: tqdm, interrupted: Callable[[], int]) -> None:
        window, clock = [], time.perf_counter()
        times: list[float] = []  # seconds of the first steps
        finished = self.finished()  # asked once a step: with a time limit the answer may change
        if not finished and interrupted() and self.has_begun() and self.ranks.count == 1:
            self.stop(interrupted())
        while not finished:
            began = time.perf_counter()
            window.append(self.step())
            bar.update()
            if len(times) < self.first_steps:
                times.append(time.perf_counter() - began)
                if len(times) == self.first_steps:
                    self.print_above_bar(self.estimate(median(times)))
            finished = self.finished()
            evaluate = finished or self.step_done % self.eval_every == 0
            log = evaluate or self.step_done % self.log_every == 0
            # all ranks must stop at the same step, so they exchange the flag whenever they log
            number = interrupted()
            stop = (log or self.ranks.count == 1) and self.ranks.any(number > 0, self.device)
            save = evaluate or stop or self.saves_each_step
            if log or stop:
                self.entry = self.summary(window, time.perf_counter() - clock)
                bar.set_postfix_str(self.bar_text(self.entry), refresh=False)
                self.log(self.entry)
                window, clock = [], time.perf_counter()
            if evaluate:
                self.evaluate()
                self.stopped = self.ranks.any(self.out_of_patience(), self.device)
                finished = self.finished()
            if save and self.ranks.first:
                self.save_state()
                clock = time.perf_counter()
            if stop and not finished:
                if self.ranks.first and not self.measured:
                    self.keep()
                self.stop(number or signal.SIGINT)

    def stop(self, number: int) -> NoReturn:
        """End the run after the signal `number`; its state is saved."""
        raise Interrupted(f"stopped after {self.progress_text()}; state saved", number)

    def out_of_memory_hint(self) -> str:
        """The end of the message "out of memory": when it happened, and what to do."""
        return f"after step {self.step_done}: use a smaller model, or another device"

    def estimate(self, seconds: float) -> str:
        """How long the rest of the run will take, given the seconds of one step."""
        left = seconds * (self.steps - self.step_done)
        return f"about {duration(left)} to step {self.steps}, not counting evaluations"

    def seconds_so_far(self) -> float:
        """Wall time of the run, without pauses between its parts."""
        return self.seconds if self.started is None else time.perf_counter() - self.started

    def log(self, entry: dict) -> None:
        """Append a line to the log, on the first rank only."""
        if self.ranks.first:
            append_log(self.out, entry)
            if self.watch:
                self.watch(entry)

    def log_dev_loss(self, loss: float, shown: Sequence[str] = (), **more) -> None:
        """Log a dev loss, in nats per target token, and `more`; keep the weights if it is the best.

        `shown` are lines that are printed below it.
        """
        better = loss < self.best
        self.measured.append((self.step_done, loss))
        if better and self.ranks.first:
            self.keep()
        seconds = round(self.seconds_so_far(), 2)
        self.log({"step": self.step_done, "dev_loss": loss, **more, "seconds": seconds})
        so_far = "the best so far" if better else f"best {self.best:.3f} at step {self.best_step}"
        at = "0 (before training)" if self.step_done == 0 else self.step_done
        line = f"step {at}: dev loss {loss:.3f}, {so_far}"
        self.print_above_bar("\n".join([line, *shown]))
        self.lengthen()

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations did not lower the dev loss."""
        before = self.counted_from / self.steps  # share that was done when the length changed
        if not self.patience or not self.measured or self.share_done() < (1 + before) / 2:
            return False
        since = max(self.best_step or 0, self.counted_from)
        return sum(step > since for step, _ in self.measured) >= self.patience

    def check_finite(self, window: list[dict]) -> None:
        """FloatingPointError naming the first step, and its rows, with a loss or gradient that is
        not finite."""
        for number, step in enumerate(window, self.step_done - len(window)):
            for name, key in (("loss", "nats"), ("norm of the gradient", "norm")):
                if not math.isfinite(value := float(step[key])):
                    rows = f" (rows {places})" if (places := self.rows_of(number)) else ""
                    raise FloatingPointError(
                        f"the {name} is {value} in step {number + 1}{rows}: {self.advice}"
                    )

    def finite(self, value: float, name: str) -> float:
        """The value; FloatingPointError if it is not finite."""
        if not math.isfinite(value):
            after = f"after step {self.step_done}"
            raise FloatingPointError(f"the {name} is {value} {after}: {self.advice}")
        return value

    # state ----------------------------------------------------------------------------------------

    def has_state(self) -> bool:
        """Whether the folder holds a run that can be continued."""
        return has_state(self.out)

    def save_state(self) -> None:
        """Write what resuming needs, atomically."""
        self.seconds = self.seconds_so_far()
        progress: dict = {"step": self.step_done, "best": self.best, "seconds": self.seconds}
        progress |= {"measured": self.measured, "counted_from": self.counted_from}
        write_state(self.out, {"settings": self.settings()} | progress | self.state())
        self.saved_step = self.step_done

    def read_state(self) -> dict:
        return read_state(self.out, self.device, self.state_keys)

    def older_settings(self) -> dict:
        """Settings that the state of an older version may lack."""
        return asdict(type(self.config)())

    def load_state(self) -> None:
        """Load the last saved state of this run folder.

        If the length has changed (`extends`), the learning rate follows the schedule of the new
        length from the next step on, and patience counts evaluations from there.

        Raises:
            ValueError: no state, a damaged one, or one with other settings, data or model.
        """
        state, path = self.read_state(), state_path(self.out)
        try:
            check_progress(state, UNBOUNDED)
        except ValueError as error:
            raise ValueError(f"{path}: damaged, {error}") from error
        ours, theirs = self.settings(), self.older_settings() | state["settings"]
        base = "base model"  # an older version may have described it in other words
        if same_model(str(theirs.get(base) or ""), ours.get(base) or ""):
            theirs[base] = ours[base]
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        if refused := [name for name in changed if name not in self.extends]:
            raise ValueError(f"{path}: the saved run differs in {', '.join(refused)}")
        try:
            self.restore(state)
        except ValueError as error:
            other = "of another model, prefix or adapter, or damaged"
            raise ValueError(f"{path}: {error}; it is {other}") from error
        self.step_done = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        older = [(self.step_done, state["best"])] if math.isfinite(state["best"]) else []
        self.measured = [(step, loss) for step, loss in state.get("measured", older)]
        self.lengthen()
        self.counted_from = self.step_done if changed else state.get("counted_from", 0)
        self.stopped = self.out_of_patience()

    def resume(self) -> bool:
        """Call `load_state` if the folder holds a run; returns whether it does."""
        found = self.has_state()
        if found:
            self.load_state()
        return found
