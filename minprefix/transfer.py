"""Downloads that end: a server that sends next to nothing, or without an end, is given up."""

import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from minprefix.limits import DOWNLOAD, PIECE, SILENCE


class Watched:
    """A file that a download is written to: how much came, and when last."""

    def __init__(self, file: BinaryIO, what: str):
        self.file, self.what = file, what
        self.last, self.stopped = time.monotonic(), False  # s

    def write(self, data: bytes) -> int:
        if self.stopped:
            raise OSError("the download was given up")
        DOWNLOAD.check(self.file.tell() + len(data), self.what)
        self.last = time.monotonic()
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watched(fetch: Callable[[Any], object], file: BinaryIO, what: str) -> None:
    """Call `fetch` with a file to write to, in pieces of `limits.PIECE` bytes.

    Its thread is left alone if it has to be given up; it writes nothing then.

    Args:
        what: is downloaded, for the error message.
    Raises:
        OSError: no piece came for `limits.SILENCE`.
        ValueError: more came than `limits.DOWNLOAD`.
    """
    target, errors, most = Watched(file, what), [], SILENCE.value

    def run() -> None:
        try:
            fetch(target)
        except BaseException as error:  # for the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(min(1, most))
            if thread.is_alive() and time.monotonic() - target.last > most:
                told = f"less than {PIECE} bytes in {most} s ({SILENCE.variable}=N waits N s)"
                raise OSError(f"{what}: {told}")
    finally:
        target.stopped = True
    if errors:
        raise errors[0]
