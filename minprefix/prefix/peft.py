"""Reads PEFT's folders of prefix-tuning [1] and CARTRIDGE [2], and writes them so that PEFT
computes the same.

adapter_config.json has the sizes, and adapter_model.safetensors (or .bin) one tensor,
prompt_embeddings (P, 2 L C), whose rows are as in `foreign.py`. Token t is always at P + t. A
CARTRIDGE is the same table, of which PEFT trains all but the first positions. For a BART
(SEQ_2_SEQ_LM) the table is that of the decoder's self-attention; see `decoder_table`. Read
`read_peft`, then `write_peft`.
[1] https://github.com/huggingface/peft/tree/main/src/peft/tuners/prefix_tuning
[2] https://github.com/huggingface/peft/tree/main/src/peft/tuners/cartridge
"""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.files import atomic_write, names_file, read_json
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.files import frame_metadata, read_frame
from minprefix.prefix.foreign import (
    check_only,
    first_existing,
    listed,
    read_tensors,
    required_size,
    rows_of_table,
    table_of_rows,
)
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import save_tensors

# supported values in adapter_config.json; a Prefix cannot express others
ONLY = {
    "peft_type": ("PREFIX_TUNING", "CARTRIDGE"),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM"),
    "modules_to_save": (None, []),
}
SUBMODULES = {"CAUSAL_LM": (1, None), "SEQ_2_SEQ_LM": (2, None)}
KINDS = {"peft": "PREFIX_TUNING", "cartridge": "CARTRIDGE"}  # the kinds that can be written
# the keys of only one kind, for width C
OWN: dict[str, Callable[[int], dict]] = {
    "PREFIX_TUNING": lambda width: {"encoder_hidden_size": width, "prefix_projection": False},
    "CARTRIDGE": lambda width: {"num_frozen_tokens": 1},
}
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that exists is read


def decoder_table(rows: Tensor, n_layer: int, n_head: int) -> Tensor:
    """P_theta of a BART's decoder, (L, 2, H, P, D), from rows (P, 2 L C).

    PEFT 0.21 repeats the rows' 2 L keys and values twice, and gives layer l four of them, beginning
    at 4 l. The decoder reads key 4 l and value 4 l + 1, both modulo 2 L; the other two, meant for
    cross attention, are ignored.
    """
    every = rows.reshape(rows.shape[0], 2 * n_layer, n_head, -1).permute(1, 2, 0, 3)
    first = 4 * torch.arange(n_layer) % (2 * n_layer)
    return torch.stack([every[first], every[first + 1]], dim=1)


@names_file
def read_peft(folder: str | Path) -> Any:
    """The prefix in a PEFT folder, a `Prefix` or a `BARTPrefix`, also with prefix_projection.

    PEFT saves the MLP's output, never the MLP. Token t is at P + t in its forward pass, and at P +
    (number of real tokens before it) in `generate` of version 0.21, which differs only with left
    padding.

    Raises:
        ValueError: another PEFT method or task, damaged files, tensors that do not fit the config.
        OSError: a file is missing or cannot be read.
    """
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    check_only(path, raw, ONLY)
    check_only(path, raw, {"num_transformer_submodules": SUBMODULES[raw["task_type"]]})
    L, H, C = (
        required_size(path, raw, key) for key in ("num_layers", "num_attention_heads", "token_dim")
    )
    P = required_size(path, raw, "num_virtual_tokens")
    if C % H:
        raise ValueError(f"{path}: token_dim {C} is not a multiple of num_attention_heads {H}")
    path = first_existing(path.parent, *WEIGHTS)
    tensors, metadata = read_tensors(path)
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise ValueError(
            f"{path}: prompt_embeddings is missing; found {listed(tensors) or 'nothing'}"
        )
    if rows.shape != (P, 2 * L * C):
        raise ValueError(
            f"{path}: prompt_embeddings is {tuple(rows.shape)}, but adapter_config.json says "
            f"({P}, 2 x {L} layers x {C}) = ({P}, {2 * L * C})"
        )
    prefix: Any
    if raw["task_type"] == "SEQ_2_SEQ_LM":
        prefix = BARTPrefix.from_tables({"decoder": decoder_table(rows, L, H)}, position_offset=P)
        prefix.source_offset = 0
    else:
        prefix = Prefix.from_table(table_of_rows(rows, L, H), position_offset=P)
    # written by `write_peft`, not by PEFT
    prefix.base = metadata.get("base", "")
    prefix.linearisation, prefix.max_source = read_frame(path, metadata)
    return prefix


def write_peft(
    folder: str | Path, prefix: Any, base_model: str | None = None, kind: str = "PREFIX_TUNING"
) -> None:
    """Write a folder that PEFT can load for GPT-2, in fp32, atomically.

    Args:
        base_model: its name or folder, which PEFT's `AutoPeftModelForCausalLM` needs; None is
            enough for `PeftModel.from_pretrained(model, folder)`.
        kind: "PREFIX_TUNING" or "CARTRIDGE", whose first position PEFT does not train.
    Raises:
        ValueError: PEFT cannot compute the same with this prefix.
        OSError: it cannot be written.
    """
    if not isinstance(prefix, Prefix):
        raise ValueError(
            "a BART's prefix cannot become PEFT's: PEFT has none for the encoder and cross "
            "attention, and in its decoder half of the layers share the rows of the others"
        )
    P, folder = prefix.prefix_len, Path(folder)
    if prefix.place != "prefix":
        raise ValueError(
            "PEFT has no infix: all tokens see its prefix, which stands before the source: train "
            "one with --place prefix"
        )
    if prefix.gate is not None:
        raise ValueError(
            "PEFT has no gate on the prefix's softmax terms, so a prefix with a gate cannot become "
            "one of PEFT's: train one without (--no-gate)"
        )
    if prefix.position_offset != P:
        raise ValueError(
            f"with PEFT the text starts at position P = {P}, with this prefix at "
            f"{prefix.position_offset}, so PEFT would compute something else: train one with "
            f"--position-offset {P}"
        )
    rows = rows_of_table(prefix.table().detach()).float()
    L, _, H, _, D = prefix.table().shape
    config = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_attention_heads": H,
        "num_layers": L,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": P,
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "token_dim": H * D,
    } | OWN[kind](H * D)  # no keys of newer versions, because older ones reject unknown keys
    metadata = {"format": "pt", "base": prefix.base} | frame_metadata(prefix)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:  # the config is renamed last, as in `weights.save_model`
            file = stack.enter_context(atomic_write(folder / "adapter_config.json"))
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_tensors(folder / WEIGHTS[0], {"prompt_embeddings": rows}, metadata)
    except OSError:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise
