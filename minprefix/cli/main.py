"""The command line: python -m minprefix COMMAND. Each command is a file of this folder.

`commands.py` has the options, into which `parse.py` parses the words. A command's file has `run`,
which prints or returns the result. It is imported only when the command runs, so that --help and
usage errors do not need PyTorch.

Exit codes: 0 done; 1 an error, reported in one line (the traceback comes with --debug); 2 wrong
usage (unknown options, impossible values, options that contradict each other); 130 Ctrl-C, 143
SIGTERM, 129 SIGHUP. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import importlib
import inspect
import json
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from minprefix.cli.commands import COMMANDS
from minprefix.cli.options import Common
from minprefix.cli.parse import WrongUsage
from minprefix.cli.streams import one_line, with_streams
from minprefix.files import FileNote

PROG = "python -m minprefix"


def usage() -> str:
    """The text of --help."""
    lines = [f"  {name:10}{inspect.getdoc(cls)}" for name, cls in COMMANDS.items()]
    return "\n".join([
        f"usage: {PROG} [-h] COMMAND [OPTIONS]", "",
        "Prefix-tuning for GPT-2 and BART: train prefixes, generate texts and score them.", "",
        "commands:", *lines, "", f"{PROG} COMMAND --help lists the options of a command.",
    ])  # fmt: skip


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return one_line(where + error.strerror)
    message = one_line(str(error))
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and message:
        return message
    return f"{type(error).__name__}: {message}"


def show_note(otherwise: Callable, message, category, *where) -> None:
    """Show a `FileNote` in one line, and other warnings as Python does."""
    if issubclass(category, FileNote):
        print(f"minprefix: note: {one_line(str(message))}", file=sys.stderr)
    else:
        otherwise(message, category, *where)


@with_streams
def execute(
    cls: type[Common], run: Callable[[Any], dict | None], words: Sequence[str], prog: str
) -> int:
    """Run one command with these words; returns the exit code.

    Args:
        cls: its options; the docstring is its description.
        run: prints the result or returns it.
    """
    options = None
    show = warnings.showwarning
    warnings.showwarning = partial(show_note, show)
    try:
        options = cls.parse(tuple(words), prog, inspect.getdoc(cls) or "")
        result = run(options)
        if result is not None:
            from minprefix.cli.report import format_rows  # not before: it needs PyTorch

            print(json.dumps(result) if options.json else format_rows([result]))
    except KeyboardInterrupt as stop:
        print(f"minprefix: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except BrokenPipeError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise  # a panic in a Rust library is not an Exception
        if options is not None and options.debug:
            raise
        print(f"minprefix: error: {describe(error)}", file=sys.stderr)
        parsed = options is not None or not isinstance(error, ValueError)
        return 1 if parsed and not isinstance(error, WrongUsage) else 2
    finally:
        warnings.showwarning = show
    return 0


@with_streams
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first word; returns the exit code."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        known = f"choose from {', '.join(COMMANDS)}"
        wrong = f"invalid choice: {name!r} ({known})" if name else f"required: COMMAND ({known})"
        for meant in get_close_matches(name, COMMANDS, 1, 0.7):
            wrong += f"; did you mean {meant}?"
        print(f"{PROG}: error: {one_line(wrong)}", file=sys.stderr)
        return 2

    def run(options: Common) -> dict | None:
        return importlib.import_module(f"minprefix.cli.{name}").run(options)

    return execute(COMMANDS[name], run, words, f"{PROG} {name}")
