"""Prefix files: one small safetensors file is all that is needed to use a prefix.

A prefix file holds `prefix_table` (L, 2, H, P, D) in fp32 and an optional `gate` (L, H). Its
metadata are the format, the position offset, the place, the frame of the text, the fingerprint of
the base model, how it was trained and a checksum. It contains neither the MLP, which is dropped
after training (section 4.3 of Li & Liang 2021), nor virtual tokens, but the table computed from
them. The file for a BART has a table for each site, `encoder.prefix_table` and so on, or the
embeddings of virtual tokens, `virtual_embd` (P, C), whose activations depend on the source.
"""

from pathlib import Path

import torch

from minprefix.checks import check_choice
from minprefix.data.examples import LINEARISATIONS
from minprefix.files import brief, names_file, warn_no_checksum
from minprefix.models.config import SITES
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.card import PREFIX_FILE
from minprefix.prefix.config import PLACES
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import check_values, load_tensors, save_tensors, verify_checksum

FORMATS = {Prefix.family: "minprefix-prefix-1", BARTPrefix.family: "minprefix-bart-prefix-1"}


def save_prefix(path: str | Path, prefix: Prefix | BARTPrefix) -> None:
    """Write the prefix file, atomically. OSError if it cannot be written."""
    prefix = prefix.export()
    tensors = prefix.tensors()
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in tensors.items()}
    metadata = {
        "format": FORMATS[prefix.family],
        "position_offset": str(prefix.position_offset),
        "place": prefix.place,
        "base": prefix.base,
        **frame_metadata(prefix),
        "parametrisation": prefix.parametrisation,
        "trained_parameters": str(prefix.n_trained),
    }
    if getattr(prefix, "source_offset", None) is not None:
        metadata["source_offset"] = str(prefix.source_offset)
    save_tensors(path, tensors, metadata, checksum=True)


@names_file
def load_prefix(path: str | Path) -> Prefix | BARTPrefix:
    """Read a prefix file, for GPT-2 or BART.

    Raises:
        ValueError: the file is not a prefix file, is damaged, or has impossible shapes or values.
        OSError: it cannot be read.
    """
    if Path(path, PREFIX_FILE).is_file():
        raise ValueError(f"{path}: a folder; give its file, {Path(path, PREFIX_FILE)}")
    tensors, metadata = load_tensors(path)
    if metadata.get("format") not in FORMATS.values():
        raise ValueError(f"{path}: not a prefix file (format {brief(metadata.get('format'))})")
    has_checksum = verify_checksum(path)
    check_values(path, tensors)
    offset = metadata.get("position_offset", "")
    if not offset.isdecimal():
        raise ValueError(f"{path}: position_offset must be a number >= 0, got {brief(offset)}")
    place, n_trained = metadata.get("place", "prefix"), metadata.get("trained_parameters", "0")
    check_choice(f"{path}: place", place, PLACES)
    if not n_trained.isdecimal():
        raise ValueError(
            f"{path}: trained_parameters must be a number >= 0, got {brief(n_trained)}"
        )
    tensors = {name: x.float() for name, x in tensors.items()}
    if metadata["format"] == FORMATS[Prefix.family]:
        table, gate = table_and_gate(path, tensors)
        prefix = Prefix.from_table(table, int(offset), gate, place)
    else:
        prefix = bart_prefix_of(path, tensors, int(offset))
        if (source := metadata.get("source_offset")) is not None:
            if not source.isdecimal():
                raise ValueError(
                    f"{path}: source_offset must be a number >= 0, got {brief(source)}"
                )
            prefix.source_offset = int(source)
    prefix.parametrisation = metadata.get("parametrisation", "")
    prefix.n_trained = int(n_trained)
    prefix.base = metadata.get("base", "")
    prefix.linearisation, prefix.max_source = read_frame(path, metadata)
    if not has_checksum:
        warn_no_checksum(Path(path))
    return prefix


def table_and_gate(
    path: str | Path, tensors: dict[str, torch.Tensor], site: str = ""
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The table and gate whose names begin with `site`; ValueError for impossible shapes or
    values."""
    table, gate = tensors.get(f"{site}prefix_table"), tensors.get(f"{site}gate")
    if table is None or table.dim() != 5 or table.shape[1] != 2 or 0 in table.shape:
        found = None if table is None else tuple(table.shape)
        name = f"{site}prefix_table"
        raise ValueError(f"{path}: {name} must be (L, 2, H, P, D) with P > 0, got {found}")
    if gate is not None and gate.shape != (table.shape[0], table.shape[2]):
        raise ValueError(f"{path}: {site}gate must be (L, H), got {tuple(gate.shape)}")
    if gate is not None and gate.min() < 0:
        raise ValueError(f"{path}: {site}gate must be >= 0, got {gate.min().item()}")
    return table, gate


def bart_prefix_of(
    path: str | Path, tensors: dict[str, torch.Tensor], position_offset: int
) -> BARTPrefix:
    """The prefix of these tensors; ValueError if they do not fit together."""
    virtual = tensors.get("virtual_embd")
    if virtual is not None:
        if len(tensors) > 1 or virtual.dim() != 2 or 0 in virtual.shape:
            raise ValueError(f"{path}: expected virtual_embd (P, C) alone, found {[*tensors]}")
        return BARTPrefix.from_tables({}, position_offset, virtual=virtual)
    names = {name.split(".")[0] for name in tensors}
    if not names or not names <= set(SITES):
        raise ValueError(f"{path}: it has no tables of {', '.join(SITES)}: {[*tensors]}")
    parts = {s: table_and_gate(path, tensors, f"{s}.") for s in SITES if s in names}
    shapes = {s: tuple(table.shape) for s, (table, _) in parts.items()}
    if len({shape[1:] for shape in shapes.values()}) > 1:
        raise ValueError(f"{path}: tables of one prefix must have the same H, P, D, got {shapes}")
    layers = {shape[0] for site, shape in shapes.items() if site != "encoder"}
    gates = {site: gate for site, (_, gate) in parts.items() if gate is not None}
    if len(layers) > 1 or len(gates) not in (0, len(parts)):
        raise ValueError(f"{path}: tables and gates do not fit one model: {shapes}, {[*gates]}")
    tables = {site: table for site, (table, _) in parts.items()}
    return BARTPrefix.from_tables(tables, position_offset, gates)


def frame_metadata(learned) -> dict[str, str]:
    """The frame in which a prefix or adapter was trained, for `read_frame`."""
    cut = {} if learned.max_source is None else {"max_source": str(learned.max_source)}
    return {"linearisation": learned.linearisation} | cut


def read_frame(path: str | Path, metadata: dict[str, str]) -> tuple[str, int | None]:
    """Linearisation ("" = none) and max_source (None = nothing is cut); ValueError for others."""
    linearisation, cut = metadata.get("linearisation", ""), metadata.get("max_source")
    if linearisation not in ("", *LINEARISATIONS):
        raise ValueError(f"{path}: unknown linearisation {brief(linearisation)}")
    if cut is not None and (not cut.isdecimal() or int(cut) < 1):
        raise ValueError(f"{path}: max_source must be a number >= 1, got {brief(cut)}")
    return linearisation, None if cut is None else int(cut)
