"""A run folder on disk: the log that grows with the run, and the state that resuming needs.

    log.jsonl           one line per logging interval and per evaluation
    state/state.pt      trained weights, optimiser, step: what resuming needs
    prefix.safetensors  the best prefix on the dev set so far (or what the method keeps instead)
    scores.jsonl        what `evaluate` measured of it, if it was asked

`loop.Loop` writes it. A run can be killed at any moment: the state is replaced in one step, and
what the log holds of steps after it is cut when the run goes on.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minprefix.files import atomic_write, write_text

COMMON = ("settings", "step", "best", "seconds")  # keys of every state
TRAINED = ("trained", "optimizer")  # and of one with weights


def state_path(folder: Path) -> Path:
    return folder / "state" / "state.pt"


def write_state(folder: Path, state: dict) -> None:
    """Replace the state, all of it or nothing. OSError if it cannot be written."""
    state_path(folder).parent.mkdir(parents=True, exist_ok=True)
    # through an open file: a full disk is then an OSError, not an "iostream error"
    with atomic_write(state_path(folder)) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def remove_state(folder: Path) -> None:
    """Remove what only resuming needs."""
    state_path(folder).unlink(missing_ok=True)
    with suppress(OSError):  # it is not empty
        state_path(folder).parent.rmdir()


def read_state(
    folder: Path, device: torch.device | str = "cpu", keys: Sequence[str] = TRAINED
) -> dict:
    """What `write_state` wrote.

    Args:
        keys: what it must hold beside `COMMON`.
    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = state_path(folder)
    if not path.is_file():
        raise ValueError(f"{path}: no saved state in this run folder")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling a damaged file raises almost anything
        raise ValueError(f"{path}: damaged, or no training state") from error
    return checked_state(path, state, keys)


def checked_state(path: Path, state: Any, keys: Sequence[str]) -> dict:
    """The state; ValueError if it lacks one of the keys."""
    missing = sorted({*COMMON, *keys} - set(state if isinstance(state, dict) else ()))
    if missing:
        raise ValueError(f"{path}: no training state, it lacks {', '.join(missing)}")
    return state


def append_log(folder: Path, entry: dict) -> None:
    """One more line of log.jsonl."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(entry, ensure_ascii=False) + "\n")


def append_scores(folder: Path, entry: dict) -> None:
    """One more line of scores.jsonl, if the folder is a run's and can be written to."""
    if (folder / "config.json").is_file() and (folder / "log.jsonl").is_file():
        with suppress(OSError), open(folder / "scores.jsonl", "a", encoding="utf-8") as scores:
            scores.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The entries of log.jsonl, without a line that a kill has cut; none if there is no log."""
    log, entries = folder / name, []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def cut_log(folder: Path, step: int) -> None:
    """Drop the entries of steps after `step`: they will be run again."""
    kept = [entry for entry in read_log(folder) if entry["step"] <= step]
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
    write_text(folder / "log.jsonl", "".join(lines))
