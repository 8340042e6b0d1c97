"""Parses the words of a command line into a dataclass of options, with tyro [1].

Each field of the dataclass is an option: its type and default are the field's, its help is the
comment next to it. Wrong usage is reported in one line, with exit code 2; abbreviated options are
not accepted. A ValueError from a dataclass's own checks is raised unchanged.
[1] https://brentyi.github.io/tyro
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as errors  # private, but the only way to an error's parts; tyro is pinned

from minprefix.cli.streams import one_line

Options = TypeVar("Options")


class WrongUsage(ValueError):
    """Options that contradict each other or that a command cannot do without."""


# options of transformers' TrainingArguments, GenerationConfig and example scripts, of PEFT's
# PrefixTuningConfig and of the paper's code, by the names of ours
ELSEWHERE = {
    "--lr": "learning-rate",
    "--epochs": "num-train-epochs num-epochs",
    "--steps": "max-steps max-train-steps num-train-steps",
    "--batch-size": "per-device-train-batch-size per-device-eval-batch-size train-batch-size",
    "--accumulation": "gradient-accumulation-steps",
    "--warmup-steps": "warmup-ratio num-warmup-steps",
    "--clip": "max-grad-norm",
    "--eval-every": "eval-steps save-steps eval-strategy evaluation-strategy",
    "--log-every": "logging-steps",
    "--activation-checkpointing": "gradient-checkpointing",
    "--compile": "torch-compile",
    "--precision bf16": "bf16 fp16",
    "--prefix-dropout": "dropout",
    "--out": "output-dir output outdir save-dir",
    "--resume": "resume-from-checkpoint",
    "--model": "model-name-or-path model-name base-model",
    "--data": "dataset-name dataset train-file train-data",
    "--dev": "validation-file eval-file dev-file",
    "--max-source": "max-source-length max-seq-length",
    "--max-new-tokens": "max-length max-target-length",
    "--min-new-tokens": "min-length",
    "--num-beams": "beams beam-size",
    "--no-repeat-ngram-size": "repetition-penalty",
    "--bad-words": "bad-words-ids",
    "--prefix-len": "num-virtual-tokens preseqlen prefix-length",
    "--mid-dim": "encoder-hidden-size",
    "--parametrisation mlp": "prefix-projection",
    "--method": "tuning-mode peft-type",
}


def parse(
    cls: type[Options], words: Sequence[str], prog: str, description: str,
    default: Options | None = None,
) -> Options:  # fmt: skip
    """Parse the words; `default` has the values of options that are not given.

    Raises:
        SystemExit: wrong usage (2), or --help (0).
        ValueError: from the checks of a dataclass.
    """
    given: Any = {} if default is None else {"default": default}
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    with errors.on_parse_error(partial(report, known=tuple(options_of(cls)))):
        return tyro.cli(cls, prog=prog, description=description, args=words, config=config, **given)


def parse_known(cls: type[Options], words: Sequence[str], prog: str) -> Options:
    """The options of `cls` among words that also name others."""
    with errors.on_parse_error(report):
        options, _ = tyro.cli(cls, prog=prog, args=words, return_unknown_args=True, add_help=False)
        return options


def report(event: errors.ParseErrorEvent, known: Sequence[str] = ()) -> NoReturn:
    """Report a usage error in one line instead of tyro's box; `known` are the options."""
    if isinstance(event, errors.InstantiationFailure) and event.argument is None:
        raise ValueError(event.message)
    unknown = {errors.UnrecognizedArgs: "tokens", errors.MissingArgs: "unrecognized_tokens"}
    meant = [
        closest_option(word, known) for word in getattr(event, unknown.get(type(event), ""), ())
    ]
    advice = " or ".join(dict.fromkeys(filter(None, meant)))
    wrong = explain(event) + (f"; did you mean {advice}?" if advice else "")
    wrong = one_line(wrong)
    print(f"{event.prog}: error: {wrong} (--help lists the options)", file=sys.stderr)
    raise SystemExit(2)


def options_of(cls: Any) -> Iterator[str]:
    """The options of a dataclass, as they are typed."""
    for field in fields(cls):
        if is_dataclass(field.default):
            yield from options_of(field.default)
        else:
            yield "--" + field.name.replace("_", "-")


def closest_option(word: str, known: Sequence[str]) -> str:
    """The `known` option that a word on the command line probably means; "" = none."""
    word = word.partition("=")[0].replace("_", "-")
    if not word.startswith("--"):
        return ""
    for option, names in ELSEWHERE.items():
        if word[2:] in names.split() and option.split()[0] in known:
            return option
    return next(iter(get_close_matches(word, known, 1, 0.75)), "")


def name(argument: Any) -> str:
    """An option, or a positional argument as --help shows it."""
    return argument.lowered.metavar if argument.is_positional() else argument.display_name()


def explain(event: errors.ParseErrorEvent) -> str:
    """What is wrong with the words that were typed."""
    match event:
        case errors.UnrecognizedArgs():
            options = [token for token in event.tokens if token.startswith("--")]
            return f"unrecognized arguments: {' '.join(options or event.tokens)}"
        case errors.MissingArgs():
            return f"required: {', '.join(name(found.arg) for found in event.missing_arguments)}"
        case errors.InvalidChoice():
            known = ", ".join(choice for choice in event.choices if choice != "None")
            return f"{name(event.argument)}: invalid choice: {event.value!r} (choose from {known})"
        case errors.BadValue():
            return f"{name(event.argument)}: a value is missing"
        case errors.InstantiationFailure():
            reason = event.message.splitlines()[-1].rpartition(">: ")[2]  # Python's own message
            return f"{name(event.argument)}: {reason}"
    return type(event).__name__


def changed(options: Any, default: Any) -> list[str]:
    """The options, as they are typed, whose values differ from the default's."""
    found = []
    for field in fields(options):
        value, usual = getattr(options, field.name), getattr(default, field.name)
        if is_dataclass(value):
            found += changed(value, usual)
        elif value != usual:
            found.append("--" + field.name.replace("_", "-"))
    return found
