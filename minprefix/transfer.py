"""Downloads that always end: a server that sends too slowly or too much is abandoned."""

import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from minprefix.limits import DOWNLOAD, PIECE, SILENCE


class LimitedFile:
    """The file that a download is written to, with the number of bytes and the time of the last."""

    def __init__(self, file: BinaryIO, what: str):
        self.file, self.what = file, what
        self.last, self.stopped = time.monotonic(), False  # s

    def write(self, data: bytes) -> int:
        if self.stopped:
            raise OSError("the download was abandoned")
        DOWNLOAD.check(self.file.tell() + len(data), self.what)
        self.last = time.monotonic()
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def download_within_limits(fetch: Callable[[Any], object], file: BinaryIO, what: str) -> None:
    """Call `fetch` in a thread, with a file to which it writes pieces of `limits.PIECE` bytes.

    If the download is abandoned, the thread continues but can no longer write.

    Args:
        what: the name of the download in error messages.
    Raises:
        OSError: no piece arrived within `limits.SILENCE` seconds.
        ValueError: more than `limits.DOWNLOAD` bytes arrived.
    """
    target, errors, most = LimitedFile(file, what), [], SILENCE.value

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
                slow = f"less than {PIECE} bytes in {most} s ({SILENCE.variable}=N waits N s)"
                raise OSError(f"{what}: {slow}")
    finally:
        target.stopped = True
    if errors:
        raise errors[0]
