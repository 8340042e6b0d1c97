"""Files: written whole or not at all, read with an error that names the file.

Read `atomic_write`, on which everything that minprefix saves rests (`tensors.py` too). A write goes
to a temporary name in the same folder, is flushed to the disk and then renamed: after a full disk,
a Ctrl-C or a power cut the earlier file is still there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, with the suffix of `path`; rename it to `path` at the end.

    Raises:
        OSError: nothing could be written (full disk, folder missing or read-only); names `path`.
            Whatever error ends the block, the temporary file is gone and an earlier `path` intact.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{uuid4().hex}.tmp{target.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)  # the new name too must survive a power cut
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as they are; errors as `decode_text`."""
    return decode_text(Path(path).read_bytes(), path)


def decode_text(data: bytes, path: str | Path) -> str:
    """The text of UTF-8 bytes that come from the file `path`.

    Raises:
        ValueError: invalid UTF-8; names the file and the line.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{data[error.start]:02x}"
        raise ValueError(f"{path}:{line}: invalid UTF-8 ({bad})") from error


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
