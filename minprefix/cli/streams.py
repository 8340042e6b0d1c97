"""Standard output and error of a command, in whatever state the shell has left them.

A stream may be closed from the start, a pipe whose reader has stopped, a full disk, or a terminal
that supports only ASCII. Messages that cannot be written are lost, so that training continues; a
result that cannot be written is an error at the end. Read `with_streams`.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

LONGEST = 400  # characters of a message; most have fewer than 200


def one_line(text: str) -> str:
    """A message without line ends and control characters. A long one is cut in the middle, because
    its start names the file and its end says what to do."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 100]} ... {text[-95:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Messages:
    """A stream that drops what it cannot write, so that no message can stop the program."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a ValueError comes from a closed stream
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def reopen_closed() -> None:
    """Connect streams that the shell has closed to the null device. Otherwise the next file that is
    opened would get the number of standard output or error."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)


def discard_buffer(stream: Any) -> None:
    """Discard what the stream still holds, which Python would write at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush_output() -> Exception | None:
    """Flush standard output; returns the error, if any. A pipe whose reader has stopped is not an
    error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        discard_buffer(sys.stdout)
        return None if isinstance(error, BrokenPipeError) else error
    return None


def with_streams(run: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command, which returns its exit code.

    If the reader of a pipe stops, as head does, the command ends quietly with exit code 0.
    """

    @wraps(run)
    def guarded(*args, **kwargs) -> int:
        reopen_closed()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # the terminal may lack a character
        before, sys.stderr, code, failed = sys.stderr, Messages(sys.stderr), 0, None
        try:
            code = run(*args, **kwargs)
        except BrokenPipeError:
            discard_buffer(sys.stdout)
        finally:
            failed = flush_output()
            sys.stderr = before
            try:
                before.flush()
            except (OSError, ValueError):  # Python would end with exit code 120
                discard_buffer(before)
        if failed and not code:
            message = f"minprefix: error: standard output: {one_line(str(failed))}"
            print(message, file=Messages(sys.stderr))
            return 1
        return code

    return guarded
