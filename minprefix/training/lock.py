"""A lock that gives a run folder to one process: two processes could leave the settings of one run
with the weights of the other.

The operating system locks the file `.lock` and releases it however the process ends, so a killed
process leaves no lock. The file names the process that holds it, for the error message.
"""

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from minprefix.files import FileNote, remove_temporary_files

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

HELD: set[tuple[int, Path]] = set()  # (thread, folder); a thread may lock a folder repeatedly


class FolderInUse(ValueError):
    """Another process works in the run folder."""


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within the block, no other process can use the folder, which is created if necessary.

    Temporary files of killed processes are removed. On a file system without locks, and in a
    read-only folder, nothing is locked.

    Args:
        wait: wait until the other process is done.
    Raises:
        FolderInUse: another process holds the lock; names it, its machine and the time.
        ValueError: the folder holds a symbolic link that leads out of it.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    held = threading.get_ident(), place
    if held in HELD:
        yield
        return
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.resolve().is_relative_to(place):
            raise ValueError(f"{entry} is a symbolic link out of the run folder: remove it")
    try:
        number = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    with os.fdopen(number, "r+", encoding="utf-8") as file:
        try:
            free = locked(file.fileno(), wait)
        except OSError:
            warnings.warn(
                f"{folder} cannot be locked: start only one process", FileNote, stacklevel=3
            )
            free = True
        if not free:
            raise FolderInUse(
                f"{folder} is in use{holder(file)}: wait for it, or choose another folder"
            )
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):
            file.truncate()
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
            file.flush()
            inner = (entry for entry in place.iterdir() if entry.is_dir())  # no links, see above
            for part in (place, *inner):
                remove_temporary_files(part)
        HELD.add(held)
        try:
            yield
        finally:
            HELD.discard(held)
            with suppress(OSError):
                file.truncate(0)  # the folder is free again


def locked(number: int, wait: bool) -> bool:
    """Lock an open file, given its descriptor; returns whether it was free.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def holder(file: TextIO) -> str:
    """The holder named in the lock file; "" if that cannot be read (Windows)."""
    for _ in range(10):
        try:
            file.seek(0)
            who = json.load(file)
            return f" by process {who['pid']:d} on {who['host'][:64]} since {who['since'][:25]}"
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(0.05)  # the holder may not have written its name yet
    return ""
