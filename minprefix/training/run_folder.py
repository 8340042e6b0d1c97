"""The files of a run folder: a log, and the state that is needed to resume.

    log.jsonl           one line per logging interval and per evaluation
    state/state.pt      trained weights, optimizer, step: what resuming needs
    state/before.pt     the state that was saved before it, used if state.pt is damaged
    prefix.safetensors  the best prefix on the dev set so far (or the result of another method)
    scores.jsonl        the results of `evaluate`, if it has run

`loop.Loop` writes them. A run can be killed at any moment: the state is replaced atomically, and
log entries of later steps are removed when the run continues. A state is a zip archive of
`torch.save`; its checksum is the comment at the end of the archive. `state.py` checks a state
before any of it is loaded.
"""

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minprefix.files import (
    FileNote,
    atomic_write,
    checksum_matches,
    flush,
    names_file,
    rename,
    warn_no_checksum,
    write_checksum,
    write_text,
)
from minprefix.models.tensor_files import unpickle

COMMON = ("settings", "step", "best", "seconds")  # keys of every state
TRAINED = ("trained", "optimizer")  # further keys of a state with weights
MARK = b"sha256:"  # then 64 digits
LENGTH = (len(MARK) + 64).to_bytes(2, "little")  # of the comment, as written in a zip archive


def state_path(folder: Path) -> Path:
    return folder / "state" / "state.pt"


def earlier_path(folder: Path) -> Path:
    return folder / "state" / "before.pt"


def has_state(folder: Path) -> bool:
    """Whether there is a saved state, which may be damaged."""
    return state_path(folder).exists() or earlier_path(folder).exists()


def write_state(folder: Path, state: dict) -> None:
    """Replace the state atomically; the old one is kept as `before.pt`.

    OSError if it cannot be written.
    """
    path = state_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        # through an open file, so that a full disk is an OSError, not an "iostream error"
        with temporary.open("w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)  # the length of the archive's comment, 0 so far
            file.write(LENGTH + MARK + 64 * b"0")
        write_checksum(temporary, temporary.stat().st_size - 64)
        flush(temporary)
        if path.exists():
            rename(path, earlier_path(folder))


def repair_state(folder: Path) -> None:
    """Replace a damaged state by the previous one. Otherwise the next save would keep the damaged
    one as `before.pt`."""
    path, earlier = state_path(folder), earlier_path(folder)
    if path.exists() and earlier.exists():
        try:
            verify_state_checksum(path)
        except ValueError:
            rename(earlier, path)


def remove_state(folder: Path) -> None:
    """Remove the files that only resuming needs, and note that in the log."""
    if has_state(folder):
        last = max((entry["step"] for entry in read_log(folder)), default=0)
        append_log(folder, {"step": last, "state": "removed"})
    for path in (state_path(folder), earlier_path(folder)):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not empty
        state_path(folder).parent.rmdir()


def has_lost_state(folder: Path, eval_every: int) -> bool:
    """Whether the run's saved state is gone, so that it would start again at step 0.

    Args:
        eval_every: the step of the first saved state; a run that was killed earlier may start
            again.
    """
    log = read_log(folder)
    gone = any("state" in entry or entry["step"] > eval_every for entry in log)
    return gone and not has_state(folder)


def read_state(
    folder: Path, device: torch.device | str = "cpu", keys: Sequence[str] = TRAINED
) -> dict:
    """The last saved state; if it is damaged, the one before it, with a `FileNote`.

    Args:
        keys: the keys that it must have in addition to `COMMON`.
    Raises:
        ValueError: there is no state, or no undamaged one.
    """
    path, earlier = state_path(folder), earlier_path(folder)
    found = [place for place in (path, earlier) if place.is_file()]
    if not found:
        raise ValueError(f"{path}: no saved state in this run folder")
    try:
        return read_state_file(found[0], device, keys)
    except ValueError as error:
        if not found[1:]:
            raise
        try:
            state = read_state_file(earlier, device, keys)
        except ValueError:
            raise error from None
        note = f"{error}; using the state that was saved before it, at step {state['step']}"
        warnings.warn(note, FileNote, stacklevel=2)
        return state


@names_file
def read_state_file(path: Path, device: torch.device | str, keys: Sequence[str]) -> dict:
    """The contents of the file; ValueError if it is damaged."""
    has_checksum = verify_state_checksum(path)
    state = unpickle(path, device)
    checked_state(path, state, keys)
    if not has_checksum:
        warn_no_checksum(path)
    return state


def verify_state_checksum(path: Path) -> bool:
    """Whether the state has a checksum; ValueError if it does not match the contents."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 - len(MARK) - 22))
        end = file.read()  # the last record of an archive has 22 bytes and the comment
    if end[-22:-18] == b"PK\5\6" and end[-2:] == b"\0\0":
        return False
    if end[-64 - len(MARK) : -64] != MARK or not checksum_matches(path, path.stat().st_size - 64):
        raise ValueError(f"{path}: damaged, or not a training state")
    return True


def checked_state(path: Path, state: Any, keys: Sequence[str]) -> dict:
    """The state; ValueError if it lacks one of the keys."""
    missing = sorted({*COMMON, *keys} - set(state if isinstance(state, dict) else ()))
    if missing:
        raise ValueError(f"{path}: not a training state, it lacks {', '.join(missing)}")
    return state


def append_log(folder: Path, entry: dict) -> None:
    """Append a line to log.jsonl; OSError naming it if it cannot be written."""
    path = folder / "log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def append_scores(folder: Path, entry: dict) -> None:
    """Append a line to scores.jsonl if the folder is a run folder and writable."""
    path = folder / "scores.jsonl"
    run = (folder / "config.json").is_file() and (folder / "log.jsonl").is_file()
    if run and not path.is_symlink():
        with suppress(OSError), open(path, "a", encoding="utf-8") as scores:
            scores.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The entries of log.jsonl, without incomplete or damaged lines; [] without a log."""
    log, entries = folder / name, []
    for line in log.read_bytes().split(b"\n") if log.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and (name != "log.jsonl" or is_entry(entry)):
            entries.append(entry)
    return entries


def is_entry(entry: dict) -> bool:
    """Whether this is a valid entry of log.jsonl: a step, and numbers where figures need them."""
    numbers = [entry[name] for name in ("loss", "dev_loss", "seconds") if name in entry]
    return type(entry.get("step")) is int and all(type(x) in (int, float) for x in numbers)


def truncate_log(folder: Path, step: int) -> None:
    """Drop the entries of steps after `step`, which will run again."""
    kept = [entry for entry in read_log(folder) if entry["step"] <= step]
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
    # half of a surrogate pair is written as an escape, as in JSON
    text = "".join(lines).encode(errors="backslashreplace")
    write_text(folder / "log.jsonl", text.decode())
