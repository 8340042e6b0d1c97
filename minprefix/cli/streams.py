"""Standard output and error of a command, in any state that the shell may have left them in.

A stream may be closed from the start, a pipe whose reader has stopped, a full disk, or a terminal
that knows no character but ASCII's. Messages that cannot be written are lost, and a training goes
on; a result that cannot be written is an error at the end. Read `with_streams`.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

LONGEST = 400  # characters of a message; most have less than 200


def one_line(text: str) -> str:
    """A message without line ends and control characters, and without the middle of a long one:
    it begins with the file and ends with what to do."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 100]} ... {text[-95:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Messages:
    """A stream that loses what it cannot write, so that nothing stops for a message."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # the latter of a closed stream
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_closed() -> None:
    """Open what the shell has closed, to go nowhere: the first file to be opened would else be
    taken for standard output or error."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)


def forget(stream: Any) -> None:
    """What the stream still holds, and Python would write at its end, goes nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush_output() -> Exception | None:
    """Write what standard output still holds; the error, if it is one. A pipe whose reader has
    stopped is none."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        forget(sys.stdout)
        return None if isinstance(error, BrokenPipeError) else error
    return None


def with_streams(run: Callable[..., int]) -> Callable[..., int]:
    """Around a command, which returns its exit code.

    A pipe whose reader has stopped, as head does, ends it quietly with exit code 0.
    """

    @wraps(run)
    def guarded(*args, **kwargs) -> int:
        open_closed()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may have no character for it
        before, sys.stderr, code, failed = sys.stderr, Messages(sys.stderr), 0, None
        try:
            code = run(*args, **kwargs)
        except BrokenPipeError:
            forget(sys.stdout)
        finally:
            failed = flush_output()
            sys.stderr = before
            try:
                before.flush()
            except (OSError, ValueError):  # Python would end with exit code 120
                forget(before)
        if failed and not code:
            message = f"minprefix: error: standard output: {one_line(str(failed))}"
            print(message, file=Messages(sys.stderr))
            return 1
        return code

    return guarded
