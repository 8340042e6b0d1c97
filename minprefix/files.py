"""Files: written whole or not at all, read with an error that names the file.

Read `atomic_write`, on which everything that minprefix saves rests (`tensors.py` too). A write goes
to a temporary name in the same folder, is flushed to the disk and then renamed: after a full disk,
a Ctrl-C or a power cut the earlier file is still there. Shares, FUSE mounts and Windows refuse some
of these calls. If the file is complete without the refused call (flushing a folder, setting
permissions), that is not an error.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import select
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

from minprefix.limits import LINE, SILENCE, TEXT, Limit

LACKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # the call is unsupported
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # s, while a virus scanner or a share holds a file open
DAY = 24 * 3600  # s
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp(\.\w+)?")  # the names that `atomic_write` writes to


class FileNote(UserWarning):
    """A warning about a file that is used nevertheless."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, with the suffix of `path`; rename it to `path` at the end.

    Raises:
        OSError: nothing could be written (full disk, folder missing or read-only); names `path`.
            After any error in the block, the temporary file is gone and an earlier `path` intact.
    """
    path = Path(path)
    target = target_of(path)
    with suppress(OSError):
        remove_temporary_files(target.parent, DAY)
    temporary = target.with_name(f".{uuid4().hex}.tmp{target.suffix}")
    try:
        yield temporary
        flush(temporary)
        rename(temporary, target)
        flush_folder(target.parent)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """`os.replace`, but wait if another program has `target` open (on Windows or a share).

    On a file system that cannot rename (some FUSE mounts) the file is copied; a crash may then
    leave a part of it.
    """
    for wait in (*WAITS, None):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if error.errno in LACKS:
                shutil.copyfile(source, target)
                with suppress(OSError):
                    source.unlink()
                return
            held = error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY) and source.exists()
            if wait is None or not held:
                raise
            time.sleep(wait)


def target_of(path: Path) -> Path:
    """The file that a write to `path` replaces.

    A symbolic link to a target in the same folder stays a link, and its target is replaced. Any
    other link is replaced itself.
    """
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    return target if target.is_relative_to(folder) else folder / path.name


def remove_temporary_files(folder: Path, idle: float = 0) -> None:
    """Remove the temporary files that a killed process left in `folder`.

    Args:
        idle: remove only files that have not changed for this many seconds; 0 is for a folder in
            which no other process writes.
    """
    for path in folder.glob(".*.tmp*"):
        old = not idle or path.stat().st_mtime < time.time() - idle
        if old and TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the file is on the disk, if the file system supports that."""
    # Windows only flushes files that are open for writing
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKS:
            raise
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Flush the folder, so that a new name in it survives a power cut.

    The file is already complete under its name, so it is not an error if the system refuses.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_around(path: Path, start: int) -> str:
    """The sha256 of a file except the 64 bytes at `start`, which hold the digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(min(2**20, start - file.tell())):
            digest.update(piece)
        file.seek(start + 64)
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_checksum(path: Path, start: int) -> None:
    """Write the digits of `sha256_around` at `start`."""
    digits = sha256_around(path, start).encode()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(digits)


def checksum_matches(path: Path, start: int) -> bool:
    """Whether the digits at `start` are those of `sha256_around`."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(64) == sha256_around(path, start).encode()


def warn_no_checksum(path: Path) -> None:
    """Warn that damage to a file cannot be detected."""
    note = "it has no checksum (an older version wrote it), so damage cannot be detected"
    warnings.warn(f"{path}: {note}", FileNote, stacklevel=4)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


# reading -----------------------------------------------------------------------------------------


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any error about the contents of `path` in the block into a ValueError that names it.

    Examples are a KeyError from unexpected JSON, an error of zlib, a panic in Rust, and too deep
    nesting. An OSError of a file that cannot be opened, and a ValueError that already names the
    file, are kept.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | OSError) and str(path) in str(error):
            raise
        if isinstance(error, FileNotFoundError) or getattr(error, "filename", None) is not None:
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{path}: cannot be read ({error.strerror})") from error
        # a panic in a Rust library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ValueError):
            raise ValueError(f"{path}: {brief(error, str, 120)}") from error
        told = brief(f"{type(error).__name__}: {error}", str)
        raise ValueError(f"{path}: damaged, or of another kind ({told})") from error


Reader = TypeVar("Reader", bound=Callable)


def names_file(function: Reader) -> Reader:
    """`reading` around a function whose first argument is a path."""

    @wraps(function)
    def read(path, *args, **kwargs):
        with reading(path):
            return function(path, *args, **kwargs)

    return cast(Reader, read)


def brief(value: object, form: Callable[[Any], str] = repr, most: int = 80) -> str:
    """A value shortened for a message: the beginning of its `repr`, or of `form(value)`."""
    value = value[: most + 1] if isinstance(value, str | bytes | list | tuple) else value
    text = form(value)
    return text if len(text) <= most else f"{text[:most]}..."


def need_file(path: str | Path) -> None:
    """FileNotFoundError if `path` does not exist, ValueError if it is not a regular file."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{path}: {found}; expected a file")


def open_bytes(path: str | Path) -> BinaryIO:
    """Open a file, or a pipe, for reading.

    Raises:
        ValueError: a device, or a pipe without a writer.
        OSError: it cannot be opened.
    """
    # without NONBLOCK, opening a pipe without a writer would wait forever
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    if stat.S_ISFIFO(mode) and select.select([number], [], [], SILENCE.value)[0]:
        os.set_blocking(number, True)
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISFIFO(mode):
        SILENCE.check(SILENCE.value + 1, path)
    raise ValueError(f"{path}: a device; expected a file or a pipe")


def read_bytes(path: str | Path, limit: Limit = TEXT) -> bytes:
    """The contents of a file or pipe; ValueError if they exceed `limit`."""
    with open_bytes(path) as file:
        limit.check(os.fstat(file.fileno()).st_size, path)
        data = file.read(limit.value + 1)
    limit.check(len(data), path)
    return data


def read_lines(path: str | Path, limit: Limit) -> Iterator[str]:
    """Iterate over the lines of a UTF-8 file or pipe, with their ends; drops a byte order mark.

    Raises:
        ValueError: invalid UTF-8, a line longer than `LINE`, or a total of more than `limit`.
    """
    with open_bytes(path) as file:
        yield from lines_of(file, path, limit)


def lines_of(file: BinaryIO, where: str | Path, limit: Limit) -> Iterator[str]:
    """`read_lines` for an open file; messages call it `where`."""
    total = 0
    for number in itertools.count(1):
        line = file.readline(LINE.value + 1)
        if not line:
            return
        total += len(line)
        LINE.check(len(line), f"{where}:{number}")
        limit.check(total, where)
        text = decode_text(line, where, number)
        yield text.removeprefix("\ufeff") if number == 1 else text


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, its line ends unchanged; see `read_bytes` and `decode_text` for
    errors."""
    return decode_text(read_bytes(path), path)


def decode_text(data: bytes, path: str | Path, first: int = 1) -> str:
    """Decode UTF-8 bytes from the file `path`, which begin at its line `first`.

    Raises:
        ValueError: invalid UTF-8; names the file and the line.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first
        bad = f"byte 0x{data[error.start]:02x}"
        raise ValueError(f"{path}:{line}: invalid UTF-8 ({bad}): save it as UTF-8") from error


@names_file
def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: not JSON (names the file and the line), or JSON but not an object.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
