"""The command line: python -m minprefix COMMAND. Each command is a file of this folder.

A command's file has `Options`, a dataclass that the words are parsed into (`parse.py`), and `run`,
which prints or returns the result. It is imported when the command is asked for, so that --help
needs no PyTorch.

Exit codes: 0 done; 1 an error, reported in one line (the traceback comes with --debug); 2 wrong
usage; 130 Ctrl-C. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

PROG = "python -m minprefix"
COMMANDS = {
    "train": "Tune a prefix, or a baseline of the paper.",
    "runs": "Compare runs of train; make them smaller, or delete them.",
    "search": "Search the discrete prompt that lowers the loss most; the model is frozen.",
    "generate": "Write texts; the text of a single prompt is streamed.",
    "evaluate": "Write texts for a data set and score them.",
    "score": "Compute the official scores of a file of texts, without a model.",
    "export": "Write a run's latest prefix, without its MLP.",
    "convert": "Convert a prefix from PEFT, the paper's code or adapter-hub, or to PEFT.",
    "pretrain": "Train a GPT-2 from scratch on a folder of text, tokenizer included.",
    "download": "Fetch an official model into the hub's cache.",
    "data": "Fetch an official data set, or check a copy of it.",
    "info": "Count the parameters of a model, of each method on it, of a prefix or an adapter.",
    "demo": "Tune a prefix on the embedded data, write texts and measure them.",
}


def usage() -> str:
    """What --help prints."""
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
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


def execute(command: Any, words: Sequence[str], prog: str, description: str) -> int:
    """Run one command, which has `Options` and `run`, with these words; the exit code."""
    from minprefix.cli.report import format_rows
    from minprefix.training.loop import Interrupted

    options = None
    try:
        options = command.Options.parse(tuple(words), prog, description)
        result = command.run(options)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"minprefix: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has stopped, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options is not None and options.debug:
            raise
        print(f"minprefix: error: {describe(error)}", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result) if options.json else format_rows([result]))
    return 0


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
    command = importlib.import_module(f"minprefix.cli.{name}")
    return execute(command, words, f"{PROG} {name}", COMMANDS[name])
