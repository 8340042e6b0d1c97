"""Tensors in safetensors files [1]: written whole or not at all, read with an error that names the
file. Apart from `files.py`, as this needs PyTorch.
[1] https://github.com/huggingface/safetensors
"""

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minprefix.files import atomic_write


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically.

    Args:
        tensors: on any device, with any strides; no two of the same memory.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes its file 0600
        try:
            save_file(tensors, temporary, metadata)
            with suppress(OSError):  # shares without permissions refuse
                temporary.chmod(mode)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        ValueError: truncated, empty or no safetensors file; names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or no safetensors file ({error})") from error


LARGEST = 65504.0  # of what was learned: the largest fp16. Keys and values of `mini` stay below 20


def check_values(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """ValueError that names a tensor with anything but finite numbers up to `LARGEST` in it."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")
        if (largest := tensor.abs().max().item() if tensor.numel() else 0.0) > LARGEST:
            raise ValueError(
                f"{path}: {name} holds {largest:.3g}; values of more than {LARGEST:.0f}, the "
                "largest of fp16, make attention overflow and are refused"
            )
