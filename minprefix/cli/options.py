"""Command-line options from config dataclasses, so that help cannot drift from the code.

`add_fields` makes one option per field: name, type and default are the field's, the help text is
the comment beside it. `from_args` makes the dataclass again from what was parsed.
"""

import argparse
import dataclasses
import inspect
import re
import typing


class OneLineParser(argparse.ArgumentParser):
    """Tells of wrong usage in one line, without the list of all options; options in full only."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def field_help(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass: {name: comment}."""
    found = re.findall(r"^    (\w+):[^#\n]*?#\s*(.+)$", inspect.getsource(cls), re.MULTILINE)
    return dict(found)


def add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    """One option per field of the dataclass."""
    texts, types = field_help(cls), typing.get_type_hints(cls)
    group = parser.add_argument_group(cls.__name__)
    for field in dataclasses.fields(cls):
        flag, kind = "--" + field.name.replace("_", "-"), types[field.name]
        text = texts[field.name].replace("%", "%%") + " (default: %(default)s)"
        if kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=field.default, help=text)
        elif kind == tuple[str, ...]:
            group.add_argument(
                flag, action="append", metavar="TEXT",
                help=texts[field.name].replace("%", "%%") + " (give it once for each)",
            )  # fmt: skip
        else:
            plain = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))
            group.add_argument(flag, type=plain, default=field.default, help=text)


def from_args(cls: type, args: argparse.Namespace):
    """The dataclass that the options describe."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
    given = {name: value for name, value in values.items() if value is not None}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
