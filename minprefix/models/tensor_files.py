"""Reads the tensors of a checkpoint, in all forms that the hub and training programs write.

Read `read_weights`, then `unwrapped`. From pickles only tensors are read; code in them is rejected.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.files import brief, need_file, reading
from minprefix.limits import check_unpacked
from minprefix.models import hub
from minprefix.tensors import load_tensors, verify_checksum

# prefixes of names from wrappers of a model, and keys under which programs store its tensors
WRAPPERS = ("module.", "_orig_mod.", "model.transformer.")
INSIDE = ("model", "state_dict", "model_state_dict")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU, under the names and in the dtypes of its files.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a file is truncated or holds anything but tensors; names it.
    """
    paths = hub.weight_paths(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: no weights ({', '.join(hub.WEIGHT_FILES)})")
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, but the index in the same folder lists it")
        if path.suffix == ".safetensors":
            tensors |= load_tensors(path)[0]
            verify_checksum(path)  # models that were fine-tuned here have a checksum
        else:
            tensors |= read_pickle(path)
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file written by torch.save, which may be `INSIDE` the larger object of a
    training program."""
    tensors = unpickle(path)
    if isinstance(tensors, dict):
        parts = [tensors[name] for name in INSIDE if isinstance(tensors.get(name), dict)]
        tensors = parts[0] if parts else tensors
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise ValueError(f"{path}: holds something other than tensors by name")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{path}: {brief(name)} is not a dense tensor of numbers")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {brief(name)} is larger than its data in the file")
    check_unpacked(path, sum(tensor.nbytes for tensor in tensors.values()))
    return tensors


def unpickle(path: Path, device: torch.device | str = "cpu") -> Any:
    """The contents of a file of torch.save; code in it is rejected, not run."""
    with reading(path):
        need_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # unpickling a damaged file can raise anything
            # PyTorch's own message explains how to run the code in the file
            raise ValueError(f"{path}: damaged, or holds something other than tensors") from error


def unwrapped(raw: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors without the prefixes that DataParallel and torch.compile add to all names;
    ValueError for a tensor that occurs under two names."""
    tensors = {}
    for key, tensor in raw.items():
        name = key
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
            name = name.removeprefix(wrapper)
        if name in tensors:
            raise ValueError(f"{folder}: {name} occurs twice, once as {key}")
        tensors[name] = tensor
    return tensors
