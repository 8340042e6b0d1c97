"""Damage: bytes that are flipped, cut or repeated, JSON with impossible values, odd words."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch

from minprefix.tensors import load_tensors, save_tensors
from minprefix.training.run_folder import write_state

ODD: list[Any] = [
    None, True, -1, 0, 3, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", " ", "x",
    "x" * 5000, "\x1b[31m\n", "é", "\ud800", [], {}, [[]], [1e9], {"a": 1}, [["a", "b"]],
    "<|endoftext|>",
]  # fmt: skip
NUMBERS = [b"0", b"-1", b"1000000000", b"9" * 30, b"1e400", b"NaN", b"null", b"[]", b"0.5"]
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"[",
    b"||",
    b" ",
    b"\xe2\x80",
    b"\x1b[2J",
    b"=",
]
ODD_WORDS = ["", " ", "-1", "0", "7", "nan", "-inf", "1.5", "x", "é", "\x1b[31m", "x" * 300, ".",
             "..", "/", "/dev/null", "none", "--", "-", "--json", "--nope", "True"]  # fmt: skip


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Flip one bit."""
    changed, at = bytearray(data), rng.randrange(len(data))
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            return data
        # the beginning of a file is the most important part
        at = rng.randrange(min(len(data), 200) if rng.random() < 0.3 else len(data))
        end = min(len(data), at + rng.choice((1, 2, 8, 100)))
        kind = rng.randrange(7)
        if kind == 0:
            data = flipped(data, rng)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] * rng.choice((2, 50)) + data[end:]
        elif kind == 4:
            data = data[:at] + rng.randbytes(end - at) + data[end:]
        elif kind == 5:
            data = data[:at] + rng.choice(PIECES) * rng.choice((1, 1, 1000)) + data[at:]
        else:
            data = with_number(data, at, rng)
    return data


def with_number(data: bytes, at: int, rng: random.Random) -> bytes:
    """Replace the next number, written in digits, by another one."""
    digits = b"0123456789."
    while at < len(data) and data[at] not in digits:
        at += 1
    end = at
    while end < len(data) and data[end] in digits:
        end += 1
    return data[:at] + rng.choice(NUMBERS) + data[end:]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = []
    for key in keys if isinstance(value, dict | list) else ():
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def other_json(data: bytes, rng: random.Random) -> bytes:
    """Change values in JSON, or in a line of JSON lines."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        value = json.loads(data)
        lines, number = [data], 0
    except ValueError:
        value = json.loads(lines[number])
    for _ in range(rng.choice((1, 1, 2))):
        if not (found := places(value)):
            value = copy.deepcopy(rng.choice(ODD))
            break
        container, key = rng.choice(found)
        kind = rng.random()
        if kind < 0.15:
            del container[key]
        elif kind < 0.25 and isinstance(container, dict):
            container[rng.choice(("", "x" * 300, "id", "\x1b"))] = copy.deepcopy(rng.choice(ODD))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Mutate the contents of a file."""
    if data[:1] in (b"{", b"[") and rng.random() < 0.6:
        try:
            return other_json(data, rng)
        except ValueError:  # a last, empty line
            pass
    return damaged(data, rng)


def other_state(path: Path, rng: random.Random) -> None:
    """Change values in a saved state, and update its checksum."""
    whole = torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 3))):
        container, key = rng.choice(places(whole))
        container[key] = other_tensor(rng) if rng.random() < 0.5 else copy.deepcopy(rng.choice(ODD))
    write_state(path.parent.parent, whole)
    path.with_name("before.pt").unlink(missing_ok=True)


def other_tensors(path: Path, rng: random.Random) -> None:
    """Change tensors or metadata of a safetensors file, and update its checksum."""
    tensors, metadata = load_tensors(path)
    for _ in range(rng.choice((1, 1, 3))):
        if metadata and rng.random() < 0.5:
            value = str(rng.choice(ODD)).encode(errors="replace").decode()
            metadata[rng.choice([*metadata, "x"])] = value
        elif rng.random() < 0.2:
            tensors.pop(rng.choice([*tensors, "x"]), None)
        else:
            tensors[rng.choice([*tensors, "x"])] = other_tensor(rng)
    save_tensors(path, tensors, metadata, checksum=True)


def other_tensor(rng: random.Random) -> torch.Tensor:
    """A tensor with an odd shape, dtype or value."""
    shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(6))]
    kinds = (torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
    value = rng.choice((0, 1, -1, 3e38, float("nan"), 1e6))
    kind = rng.choice(kinds)
    return torch.full(shape, value, dtype=torch.float64).to(kind)


def other_words(words: list[str], rng: random.Random) -> list[str]:
    """A command line with a word added, removed or replaced."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(1, len(words) + 1), rng.random()
        if kind < 0.2 and at < len(words):
            del words[at]
        elif kind < 0.4:
            words.insert(at, rng.choice(ODD_WORDS))
        elif at < len(words):
            words[at] = rng.choice(ODD_WORDS)
    return words
