"""PEFT's prefix-tuning folders [1]: read, and written so that PEFT computes the same.

adapter_config.json says the sizes, adapter_model.safetensors (or .bin) holds one tensor,
prompt_embeddings (P, 2 L C): rows as in `foreign.py`. Token t stands at P + t, always. Read
`read_peft`, then `write_peft`.
[1] https://github.com/huggingface/peft/tree/main/src/peft/tuners/prefix_tuning
"""

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from minprefix.files import atomic_write, read_json
from minprefix.prefix.files import frame_metadata, read_frame
from minprefix.prefix.foreign import (
    check_only,
    read_tensors,
    rows_of_table,
    size,
    some,
    table_of_rows,
)
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import save_tensors

# what adapter_config.json may say; another value means something that a Prefix is not
ONLY = {
    "peft_type": ("PREFIX_TUNING",),
    "task_type": ("CAUSAL_LM",),
    "num_transformer_submodules": (1, None),
    "modules_to_save": (None, []),
}
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there


def read_peft(folder: str | Path) -> Prefix:
    """The prefix of a PEFT folder; one that was trained with prefix_projection too.

    PEFT saves the MLP's output, never the MLP. Token t stands at P + t in its forward pass, and at
    P + (real tokens before it) in `generate` of version 0.21: the same, unless the left is padded.

    Raises:
        ValueError: another PEFT method or task, damaged files, tensors that do not fit the config.
        OSError: a file is missing or cannot be read.
    """
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    check_only(path, raw, ONLY)
    L, H, C = (size(path, raw, key) for key in ("num_layers", "num_attention_heads", "token_dim"))
    P = size(path, raw, "num_virtual_tokens")
    if C % H:
        raise ValueError(f"{path}: token_dim {C} is no multiple of num_attention_heads {H}")
    found = [p for name in WEIGHTS if (p := path.with_name(name)).exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: {' (or '.join(WEIGHTS)}) is missing")
    path = found[0]
    tensors, metadata = read_tensors(path)
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise ValueError(
            f"{path}: prompt_embeddings is missing, there is {some(tensors) or 'nothing'}"
        )
    if rows.shape != (P, 2 * L * C):
        raise ValueError(
            f"{path}: prompt_embeddings is {tuple(rows.shape)}, but adapter_config.json says "
            f"({P}, 2 x {L} layers x {C}) = ({P}, {2 * L * C})"
        )
    prefix = Prefix.from_table(table_of_rows(rows, L, H), position_offset=P)
    # PEFT does not write these, `write_peft` does
    prefix.base = metadata.get("base", "")
    prefix.linearisation, prefix.max_source = read_frame(path, metadata)
    return prefix


def write_peft(folder: str | Path, prefix: Any, base_model: str | None = None) -> None:
    """Write a folder that PEFT loads for GPT-2, fp32, all of it or nothing.

    Args:
        base_model: its name or folder, which PEFT's `AutoPeftModelForCausalLM` needs; None = not
            said, enough for `PeftModel.from_pretrained(model, folder)`.
    Raises:
        ValueError: PEFT cannot compute what this prefix means.
        OSError: it cannot be written.
    """
    if not isinstance(prefix, Prefix):
        raise ValueError(
            "a BART's prefix cannot become PEFT's, which has none for the encoder and none for "
            "cross attention"
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
        "encoder_hidden_size": H * D,
        "inference_mode": True,
        "num_attention_heads": H,
        "num_layers": L,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": P,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": "CAUSAL_LM",
        "token_dim": H * D,
    }  # no keys of newer versions: older ones refuse what they do not know
    metadata = {"format": "pt", "base": prefix.base} | frame_metadata(prefix)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:  # the config comes last, as in `weights.save_model`
            file = stack.enter_context(atomic_write(folder / "adapter_config.json"))
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_tensors(folder / WEIGHTS[0], {"prompt_embeddings": rows}, metadata)
    except OSError:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise
