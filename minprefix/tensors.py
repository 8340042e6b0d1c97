"""Tensors in safetensors files [1]: written whole or not at all, read with an error that names the
file. It is separate from `files.py` because it needs PyTorch.

Equal contents give equal bytes. A file may have a checksum in its metadata: the sha256 of all
bytes except its own digits. Both its name and its value identify it, so that one damaged byte
cannot make the file look like one without a checksum.
[1] https://github.com/huggingface/safetensors
"""

import json
import re
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minprefix.files import (
    atomic_write,
    brief,
    checksum_matches,
    names_file,
    need_file,
    write_checksum,
)

CHECKSUM = "checksum"  # the name among the metadata
PLACEHOLDER = "sha256:" + 64 * "0"
WRITTEN = re.compile(rb'"checksum":"sha256:([0-9a-f]{64})"')


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None,
    *, checksum: bool = False,
) -> None:  # fmt: skip
    """Write a safetensors file, atomically.

    Args:
        tensors: on any device, with any strides; no two may share memory.
        checksum: add a checksum for `verify_checksum`.
    """
    if checksum:
        metadata = (metadata or {}) | {CHECKSUM: PLACEHOLDER}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # set by the umask; safetensors makes its file 0600
        try:
            save_file(tensors, temporary, metadata)
            with suppress(OSError):  # shares without permissions refuse
                temporary.chmod(mode)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        sort_header(temporary)
        if checksum:
            place = checksum_position(temporary)
            assert place
            write_checksum(temporary, place)


def sort_header(path: Path) -> None:
    """Sort the header of a safetensors file; the library writes the metadata in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert len(text.encode()) <= size  # the library also writes JSON without blanks
        file.seek(8)
        file.write(text.encode().ljust(size))


def checksum_position(path: Path) -> int | None:
    """The position of the checksum's digits; None if the file has no checksum.

    ValueError if there is a checksum but it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    found = WRITTEN.search(header)
    if found is None and (f'"{CHECKSUM}"'.encode() in header or b"sha256:" in header):
        raise ValueError(f"{path}: damaged, its checksum cannot be read")
    return found and 8 + found.start(1)


@names_file
def verify_checksum(path: str | Path) -> bool:
    """Check the checksum. Returns whether there is one; files of older versions have none.

    Raises:
        ValueError: the file has changed since it was written.
    """
    path = Path(path)
    place = checksum_position(path)
    if place is not None and not checksum_matches(path, place):
        raise ValueError(f"{path}: damaged, its contents do not match its checksum")
    return place is not None


@names_file
def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata without the checksum.

    Raises:
        ValueError: the file is truncated, empty or not in the safetensors format.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    need_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {k: v for k, v in (file.metadata() or {}).items() if k != CHECKSUM}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        told = brief(error, str)
        raise ValueError(f"{path}: truncated, or not a safetensors file ({told})") from error


LARGEST = 65504.0  # largest learned value, that of fp16. Keys and values of `mini` are below 20


def check_values(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """ValueError naming a tensor that holds a value beyond `LARGEST` or one that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")
        if (largest := tensor.abs().max().item() if tensor.numel() else 0.0) > LARGEST:
            raise ValueError(
                f"{path}: {name} holds {largest:.3g}; values of more than {LARGEST:.0f}, the "
                "largest of fp16, make attention overflow and are refused"
            )
