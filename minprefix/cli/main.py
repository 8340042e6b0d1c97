"""The command line: python -m minprefix COMMAND. Each command is a file of this folder.

`commands.py` has the options that the words are parsed into (`parse.py`); a command's file has
`run`, which prints or returns the result. It is imported when the command runs, so that --help and
usage errors need no PyTorch.

Exit codes: 0 done; 1 an error, reported in one line (the traceback comes with --debug); 2 wrong
usage; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP. Results go to stdout, as one JSON object with --json;
progress goes to stderr.
"""

import importlib
import inspect
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from minprefix.cli.commands import COMMANDS
from minprefix.cli.options import Common
from minprefix.files import FileNote

PROG = "python -m minprefix"


def usage() -> str:
    """What --help prints."""
    lines = [f"  {name:10}{inspect.getdoc(cls)}" for name, cls in COMMANDS.items()]
    return "\n".join([
        f"usage: {PROG} [-h] COMMAND [OPTIONS]", "",
        "Prefix-tuning for GPT-2 and BART: tune, write, measure.", "",
        "commands:", *lines, "", f"{PROG} COMMAND --help lists the options of a command.",
    ])  # fmt: skip


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and message:
        return message
    return f"{type(error).__name__}: {message}"


@contextmanager
def quiet_pipes() -> Iterator[None]:
    """Within the block, a pipe whose reader has stopped, as head does, ends the process quietly.

    What is printed to a stream that was closed from the start goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python writes what they still hold at its end
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(0) from None


def show_note(otherwise: Callable, message, category, *where) -> None:
    """Show a note about a file in one line, and other warnings as Python does."""
    if issubclass(category, FileNote):
        print(f"minprefix: note: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *where)


@quiet_pipes()
def execute(
    cls: type[Common], run: Callable[[Any], dict | None], words: Sequence[str], prog: str
) -> int:
    """Run one command with these words; the exit code.

    Args:
        cls: its options, with what it does as docstring.
        run: prints the result or returns it.
    """
    options = None
    show = warnings.showwarning
    warnings.showwarning = partial(show_note, show)
    try:
        options = cls.parse(tuple(words), prog, inspect.getdoc(cls) or "")
        result = run(options)
    except KeyboardInterrupt as stop:
        print(f"minprefix: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        if options is not None and options.debug:
            raise
        print(f"minprefix: error: {describe(error)}", file=sys.stderr)
        return 1
    finally:
        warnings.showwarning = show
    if result is not None:
        from minprefix.cli.report import format_rows  # not before: it needs PyTorch

        print(json.dumps(result) if options.json else format_rows([result]))
    return 0


@quiet_pipes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; the exit code."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        known = f"choose from {', '.join(COMMANDS)}"
        wrong = f"invalid choice: {name!r} ({known})" if name else f"required: COMMAND ({known})"
        print(f"{PROG}: error: {wrong}", file=sys.stderr)
        return 2

    def run(options: Common) -> dict | None:
        return importlib.import_module(f"minprefix.cli.{name}").run(options)

    return execute(COMMANDS[name], run, words, f"{PROG} {name}")
