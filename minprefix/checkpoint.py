"""Prefix and adapter files: one small safetensors file is all that is needed to use either.

A prefix file holds `prefix_table` (L, 2, H, P, D) in fp32, an optional `gate` (L, H), and as
metadata the format, the position offset, the place, the frame of the text, the fingerprint of the
base model and how it was trained. The MLP is not in it (section 4.3 of Li & Liang 2021: it is
dropped after training), nor are virtual tokens: what the model computes of them is.

An adapter file holds the weights of `baselines.Adapter` in fp32 under their names, and as metadata
the format, design, width and epsilon of its layer norms, the frame of the text and the base model.
"""

from pathlib import Path

import torch

from minprefix.baselines import SITES, Adapter
from minprefix.examples import LINEARISATIONS
from minprefix.files import load_tensors, save_tensors
from minprefix.gpt2 import GPT2Config
from minprefix.options import check_choice
from minprefix.prefix import PLACES, Prefix

FORMAT = "minprefix-prefix-1"
ADAPTER_FORMAT = "minprefix-adapter-1"


def save_prefix(path: str | Path, prefix: Prefix) -> None:
    """Write the prefix file, all of it or nothing. OSError if it cannot be written."""
    prefix = prefix.export()
    tensors = {"prefix_table": prefix.prefix_table.detach().float().cpu().contiguous()}
    if prefix.gate is not None:
        tensors["gate"] = prefix.gate.detach().float().cpu()
    metadata = {
        "format": FORMAT,
        "position_offset": str(prefix.position_offset),
        "place": prefix.place,
        "base": prefix.base,
        "linearisation": prefix.linearisation,
        "parametrisation": prefix.parametrisation,
        "trained_parameters": str(prefix.n_trained),
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
    check_finite(path, tensors)
    if gate is not None and gate.min() < 0:
        raise ValueError(f"{path}: gate must be >= 0, got {gate.min().item()}")
    offset = metadata.get("position_offset", "")
    if not offset.isdecimal():
        raise ValueError(f"{path}: position_offset must be a number >= 0, got {offset!r}")
    place, n_trained = metadata.get("place", "prefix"), metadata.get("trained_parameters", "0")
    check_choice(f"{path}: place", place, PLACES)
    if not n_trained.isdecimal():
        raise ValueError(f"{path}: trained_parameters must be a number >= 0, got {n_trained!r}")
    gate = None if gate is None else gate.float()
    prefix = Prefix.from_table(table.float(), int(offset), gate, place)
    prefix.parametrisation = metadata.get("parametrisation", "")
    prefix.n_trained = int(n_trained)
    prefix.base = metadata.get("base", "")
    prefix.linearisation = read_linearisation(path, metadata)
    return prefix


def check_finite(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError that names a tensor with anything but finite numbers in it."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")


def read_linearisation(path: str | Path, metadata: dict[str, str]) -> str:
    """What the metadata say; ValueError if we do not know it."""
    linearisation = metadata.get("linearisation", "")
    if linearisation not in ("", *LINEARISATIONS):
        raise ValueError(f"{path}: unknown linearisation {linearisation!r}")
    return linearisation


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write the adapter file, all of it or nothing. OSError if it cannot be written."""
    tensors = {name: tensor.float() for name, tensor in adapter.state_dict().items()}
    metadata = {
        "format": ADAPTER_FORMAT,
        "design": adapter.design,
        "bottleneck": str(adapter.bottleneck),
        "layer_norm_epsilon": repr(adapter.layer_norm_epsilon),
        "base": adapter.base,
        "linearisation": adapter.linearisation,
    }
    save_tensors(path, tensors, metadata)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises:
        ValueError: not such a file, damaged, or tensors that are not those of an adapter.
        OSError: it cannot be read.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{path}: not an adapter file (format {metadata.get('format')!r})")
    design, width = metadata.get("design"), metadata.get("bottleneck", "")
    if design not in SITES:
        raise ValueError(f"{path}: unknown design {design!r}")
    down, up = (tensors.get(f"h.0.{SITES[design][0]}.{w}.bias") for w in ("down", "up"))
    if down is None or up is None or width != str(down.numel()) or 0 in (down.numel(), up.numel()):
        raise ValueError(f"{path}: no tensors of design {design!r} and bottleneck {width!r}")
    try:
        eps = float(metadata.get("layer_norm_epsilon", ""))
    except ValueError as error:
        raise ValueError(f"{path}: layer_norm_epsilon must be a number") from error
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    config = GPT2Config(n_layer=n_layer, n_head=1, n_embd=up.numel(), layer_norm_epsilon=eps)
    with torch.device("meta"):
        adapter = Adapter(config, down.numel(), design)
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted | found):
        if found.get(name) != wanted.get(name):
            shapes = f"is {found.get(name)}, must be {wanted.get(name)}"
            raise ValueError(f"{path}: {name} {shapes} in {n_layer} layers of design {design}")
    check_finite(path, tensors)
    adapter.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
    adapter.base = metadata.get("base", "")
    adapter.linearisation = read_linearisation(path, metadata)
    return adapter
