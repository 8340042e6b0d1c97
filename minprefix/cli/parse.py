"""From the words of a command line to a dataclass of options; tyro [1] does the work.

Each field of the dataclass is an option: its type and default are the field's, its help is the
comment beside it. Wrong usage is reported in one line, with exit code 2; abbreviated options are
not accepted. A ValueError of a dataclass's own checks is raised as it is.
[1] https://brentyi.github.io/tyro
"""

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as errors  # private: the one way to an error's parts; tyro is pinned

Options = TypeVar("Options")


def parse(
    cls: type[Options], words: Sequence[str], prog: str, description: str,
    default: Options | None = None,
) -> Options:  # fmt: skip
    """The options that the words name; `default` has the values of those that are not given.

    Raises:
        SystemExit: wrong usage (2), or --help (0).
        ValueError: values that a dataclass refuses.
    """
    given: Any = {} if default is None else {"default": default}
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    with errors.on_parse_error(report):
        return tyro.cli(cls, prog=prog, description=description, args=words, config=config, **given)


def parse_known(cls: type[Options], words: Sequence[str], prog: str) -> Options:
    """The options of `cls` among words that also name others."""
    with errors.on_parse_error(report):
        options, _ = tyro.cli(cls, prog=prog, args=words, return_unknown_args=True, add_help=False)
        return options


def report(event: errors.ParseErrorEvent) -> NoReturn:
    """Report a usage error in one line, where tyro would draw a box."""
    if isinstance(event, errors.InstantiationFailure) and event.argument is None:
        raise ValueError(event.message)
    print(f"{event.prog}: error: {explain(event)} (--help lists the options)", file=sys.stderr)
    raise SystemExit(2)


def name(argument: Any) -> str:
    """An option, or a positional argument as --help shows it."""
    return argument.lowered.metavar if argument.is_positional() else argument.display_name()


def explain(event: errors.ParseErrorEvent) -> str:
    """What is wrong with the words that were typed."""
    match event:
        case errors.UnrecognizedArgs():
            return f"unrecognized arguments: {' '.join(event.tokens)}"
        case errors.MissingArgs():
            return f"required: {', '.join(name(found.arg) for found in event.missing_arguments)}"
        case errors.InvalidChoice():
            known = ", ".join(choice for choice in event.choices if choice != "None")
            return f"{name(event.argument)}: invalid choice: {event.value!r} (choose from {known})"
        case errors.BadValue():
            return f"{name(event.argument)}: a value is missing"
        case errors.InstantiationFailure():
            reason = event.message.splitlines()[-1].rpartition(">: ")[2]  # what Python says of it
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
