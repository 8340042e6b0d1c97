"""GPT-2's official checkpoints: supported settings, and their tensors.

Our modules have the names of the checkpoint, so nothing is renamed; `clean` only drops tensors and
transposes those of nanoGPT [1]. `weights.py` uses this file and `weights_bart.py` through the same
functions.
[1] https://github.com/karpathy/nanoGPT
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import Tokenizer

CONFIG, MODEL, THEIR_MODEL = GPT2Config, GPT2, "GPT2LMHeadModel"

# supported values in config.json of parts that our model has in one form; the first is the default
ONLY = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False,),
}
SILENT = {"bos_token_id": CONFIG.bos_token_id, "eos_token_id": CONFIG.eos_token_id}

# the fields of the architecture in a fingerprint
ARCHITECTURE = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
)  # fmt: skip
RELATIVES = (
    "activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)  # fmt: skip
# the matrices that nanoGPT stores as in `nn.Linear`, (out, in)
TURNED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


def in_our_names(raw: dict, path: Path) -> dict:
    """The values of config.json at `path`, with one name for each activation function."""
    same = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
    name = raw.get("activation_function", CONFIG.activation_function)
    return raw | {"activation_function": same.get(name, name)}


def in_their_names(values: dict) -> dict:
    """The fields of GPT2Config under the names of config.json: unchanged."""
    return values


def nanogpt_values(path: Path, unpickle: Callable[[Path], Any]) -> tuple[dict, dict]:
    """The sizes in nanoGPT's file, under the names of GPT2Config, and the tokens that begin and end
    a text; its GELU is the exact one."""
    raw = unpickle(path)
    sizes = raw.get("model_args") if isinstance(raw, dict) else None
    names = {"block_size": "n_positions", "dropout": "resid_pdrop"}
    names |= {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    if not isinstance(sizes, dict) or not names.keys() <= sizes.keys():
        raise ValueError(
            f"{path}: no model_args with {', '.join(names)}, so this is not a nanoGPT checkpoint"
        )
    values = {ours: sizes[theirs] for theirs, ours in names.items()}
    last = min(CONFIG.eos_token_id, values["vocab_size"] - 1)
    return values | {"activation_function": "gelu"}, {"bos_token_id": last, "eos_token_id": last}


def read_tokenizer(folder: Path, config: GPT2Config) -> Tokenizer:
    """The tokenizer; if its files do not name the tokens that begin and end a text, the model
    does."""
    ids = (config.bos_token_id, next(iter(config.eos_ids), None), None)
    return Tokenizer.from_folder(folder, ids=ids)


def clean(
    raw: dict[str, Tensor], config: GPT2Config, folder: Path
) -> tuple[dict[str, Tensor], GPT2Config]:
    """The tensors without the prefix `transformer.`, without buffers of the causal mask and without
    a copy of the head; and the config, which is untied if the head differs, as in transformers.

    Raises:
        ValueError: a tensor occurs under two names.
    """
    tensors = {}
    for key, tensor in raw.items():
        name = key.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue
        if name in tensors:
            raise ValueError(f"{folder}: {name} occurs twice, once as transformer.{name}")
        tensors[name] = tensor
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if torch.equal(head, tensors.get("wte.weight", head)):
            del tensors["lm_head.weight"]
        else:
            config = replace(config, tie_word_embeddings=False)
    transpose_nanogpt(tensors, config)
    return tensors, config


def transpose_nanogpt(tensors: dict[str, Tensor], config: GPT2Config) -> None:
    """Transpose the matrices of a nanoGPT, which is recognised by the shape of c_attn; missing
    biases become 0."""
    shape = (3 * config.n_embd, config.n_embd)
    if tuple(getattr(tensors.get("h.0.attn.c_attn.weight"), "shape", ())) != shape:
        return
    for name in [name for name in tensors if TURNED.fullmatch(name)]:
        tensors[name] = tensors[name].T
    if not any(name.endswith(".bias") for name in tensors):
        wide = {"c_attn": 3 * config.n_embd, "c_fc": config.n_inner or 4 * config.n_embd}
        for name in [name for name in tensors if not name.startswith(("wte", "wpe", "lm_head"))]:
            *_, part, _ = name.split(".")
            tensors[name.replace("weight", "bias")] = torch.zeros(wide.get(part, config.n_embd))


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of a checkpoint: unchanged."""
    return state


def from_checkpoint(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Our tensors with these names, from those of a checkpoint: unchanged."""
    return tensors


def file_name(name: str) -> str:
    """The name of a tensor in the official files: unchanged."""
    return name
