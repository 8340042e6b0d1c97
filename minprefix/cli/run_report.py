"""What the command `train` prints at the start of a run and at its end."""

import shlex
from pathlib import Path

from minprefix.cli.report import say, size_of
from minprefix.methods.adapters import count
from minprefix.methods.by_name import describe
from minprefix.training.advice import data_warnings, nothing_learned, verdict
from minprefix.training.run_folder import state_path
from minprefix.training.trainer import Trainer


def print_start(trainer: Trainer, note: str, resumed: bool) -> None:
    """Print data, length, learning rate, number of trained parameters, and warnings.

    Args:
        note: about the dev data, or "".
        resumed: whether the run continues from a saved state.
    """
    if resumed:
        print_length(trainer)
    if note:
        say(note)
    config, rows = trainer.config, trainer.rows
    trained, total = count(trainer.trained), count(trainer.model)
    targets = [len(row.ids) - row.prompt_len for row in rows]
    say(
        f"data: {len(rows):,} training pairs with {sum(row.length for row in rows):,} tokens (the "
        f"longest pair has {max(row.length for row in rows)}), {len(trainer.dev_rows):,} dev pairs"
    )
    if config.steps is None:
        length = f"for {config.time}, in batches of {config.batch_size} pairs"
    else:
        pairs = config.batch_size * trainer.batches_per_step
        passes = config.steps * pairs / len(rows)
        length = f"{config.steps:,} steps of {pairs} pairs, {passes:.3g} passes over the data"
        if (config.most_steps or 0) > config.steps:
            length += f" (up to {config.most_steps:,} steps while the dev loss falls fast)"
    say(f"run: {length}; peak learning rate {config.lr:g} at step {config.warmup_steps}")
    if trainer.tuned.method in ("ft-top", "adapter"):
        say(describe(trainer.tuned, trainer.model))
    else:
        say(f"to train: {trained:,} parameters, {100 * trained / total:.3g} % as many as in the "
            f"model{kept_of(trainer)}")  # fmt: skip
    for warning in data_warnings(
        trainer.tokenizer, trainer.train, trainer.dev, max(targets), config.max_source,
        trainer.linearisation,
    ):  # fmt: skip
        say(f"warning: {warning}")


def kept_of(trainer: Trainer) -> str:
    """How much of a prefix with an MLP is kept; "" for anything else."""
    if trainer.prefix is None or trainer.prefix.parametrisation != "mlp":
        return ""
    kept = count(trainer.prefix.export())
    share = f"{100 * kept / count(trainer.model):.2g} %"
    return f": an MLP that computes the prefix; only the prefix is kept, {kept:,} numbers ({share})"


def print_length(trainer: Trainer) -> None:
    """Print how far a continued run is, and its learning rate if its length has changed."""
    at, config = trainer.step_done, trainer.config
    if trainer.counted_from == at and not trainer.finished():
        rate = f"{trainer.lr_at(at):.2g}"
        until = config.time or f"step {trainer.steps}"
        say(f"continuing after step {at} until {until}: the learning rate starts at {rate} and "
            "falls linearly to 0")  # fmt: skip
    else:
        say(f"continuing after step {at}")


def print_end(trainer: Trainer, settings: dict, resume_command: str) -> None:
    """Print which weights were kept and why, the files with their sizes, and the next command.

    Args:
        resume_command: the command that resumes the run.
    """
    dev_pairs, warmup = len(trainer.dev_rows), trainer.config.warmup_steps
    said, warnings = verdict(trainer.measured, trainer.stopped, dev_pairs, resume_command)
    if trainer.step_done < warmup:
        warnings.append(f"the run ended after {trainer.step_done} steps, before the learning rate "
                        f"reached its peak after {warmup} steps: make the run longer")  # fmt: skip
    for line in [*said, *(f"warning: {warning}" for warning in warnings)]:
        say(line)
    if nothing_learned(trainer.measured):
        return  # there is no next command for it
    out, state = trainer.out, state_path(trainer.out).parent
    for path, what in (
        (trainer.kept, "the result; with the model, it is all that you need"),
        (out / "loss.png", "the losses"), (out / "log.jsonl", "the same as JSON lines"),
        (state, f"only for --resume; python -m minprefix runs --slim {out} removes it"),
    ):  # fmt: skip
        if path.exists():
            say(f"  {path}  {size_of(path)}: {what}")
    option = {"prefix": "--prefix", "adapter": "--adapter"}.get(trainer.tuned.method, "--model")
    model = "" if option == "--model" or settings["model"] == "mini" else (
        f" --model {settings['model']}"
    )  # fmt: skip
    kept, data = shlex.quote(str(trainer.kept)), shlex.quote(settings["data"])
    say(f"next: python -m minprefix generate{model} {option} {kept} "
        f"{shlex.quote(trainer.train[0].source)}")  # fmt: skip
    if Path(settings["data"]).is_file():
        data = "FILE"
    say(f"      python -m minprefix evaluate{model} {option} {kept} --data {data}")
    if data == "FILE":
        say("Replace FILE with a file of pairs that were not used in training.")
    say("--num-beams 5 makes both commands slower and the texts usually better.")
