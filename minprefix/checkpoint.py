"""Prefix files: one small safetensors file is all that is needed to use a prefix.

It holds `prefix_table` (L, 2, H, P, D) in fp32, an optional `gate` (L, H), and as metadata the
format, the position offset, the frame of the text and the fingerprint of the base model. The MLP is
not in it (section 4.3 of Li & Liang 2021: it is dropped after training).
"""

from pathlib import Path

import torch

from minprefix.examples import LINEARISATIONS
from minprefix.files import load_tensors, save_tensors
from minprefix.prefix import Prefix

FORMAT = "minprefix-prefix-1"


def save_prefix(path: str | Path, prefix: Prefix) -> None:
    """Write the prefix file, all of it or nothing. OSError if it cannot be written."""
    prefix = prefix.export()
    tensors = {"prefix_table": prefix.prefix_table.detach().float().cpu().contiguous()}
    if prefix.gate is not None:
        tensors["gate"] = prefix.gate.detach().float().cpu()
    metadata = {
        "format": FORMAT,
        "position_offset": str(prefix.position_offset),
        "base": prefix.base,
        "linearisation": prefix.linearisation,
    }
    save_tensors(path, tensors, metadata)


def load_prefix(path: str | Path) -> Prefix:
    """Read a prefix file.

    Raises:
        ValueError: not such a file, damaged, or tensors of impossible shapes.
        OSError: it cannot be read.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a prefix file (format {metadata.get('format')!r})")
    table, gate = tensors.get("prefix_table"), tensors.get("gate")
    if table is None or table.dim() != 5 or table.shape[1] != 2 or 0 in table.shape:
        found = None if table is None else tuple(table.shape)
        raise ValueError(f"{path}: prefix_table must be (L, 2, H, P, D) with P > 0, got {found}")
    if gate is not None and gate.shape != (table.shape[0], table.shape[2]):
        raise ValueError(f"{path}: gate must be (L, H), got {tuple(gate.shape)}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")
    if gate is not None and gate.min() < 0:
        raise ValueError(f"{path}: gate must be >= 0, got {gate.min().item()}")
    offset = metadata.get("position_offset", "")
    if not offset.isdecimal():
        raise ValueError(f"{path}: position_offset must be a number >= 0, got {offset!r}")
    prefix = Prefix.from_table(table.float(), int(offset), None if gate is None else gate.float())
    prefix.base = metadata.get("base", "")
    prefix.linearisation = metadata.get("linearisation", "")
    if prefix.linearisation not in ("", *LINEARISATIONS):
        raise ValueError(f"{path}: unknown linearisation {prefix.linearisation!r}")
    return prefix
