"""GPT-2's official checkpoints: what they may say, and their tensors.

Modules have the checkpoint's names, so there is no map, only what `clean` drops. `weights.py` uses
this file and `weights_bart.py` through the same functions.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import Tokenizer

CONFIG, MODEL, THEIR_MODEL = GPT2Config, GPT2, "GPT2LMHeadModel"

# what config.json may say of parts that a model has here in one form only; the first is the default
ONLY = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the same function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}

# what a fingerprint says of the architecture
ARCHITECTURE = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
)  # fmt: skip


def in_our_names(raw: dict, path: Path) -> dict:
    """config.json at `path` by the fields of GPT2Config: as it is."""
    return raw


def in_their_names(values: dict) -> dict:
    """The fields of GPT2Config as config.json has them: as they are."""
    return values


def read_tokenizer(folder: Path, config: GPT2Config) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many tokens the model must know."""
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, tokenizer.vocab_size


def clean(raw: dict[str, Tensor], config: GPT2Config, folder: Path) -> dict[str, Tensor]:
    """The tensors without `transformer.`, the buffers of the causal mask and a copy of the head.

    Raises:
        ValueError: a tensor is there under two names, or the head is no copy of the embedding.
    """
    tensors = {}
    for key, tensor in raw.items():
        name = key.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue
        if name in tensors:
            raise ValueError(f"{folder}: {name} is there twice, once as transformer.{name}")
        tensors[name] = tensor
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise ValueError(
            f"{folder}: lm_head.weight differs from wte.weight; only a tied head works"
        )
    return tensors


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of a checkpoint: the same."""
    return state


def from_checkpoint(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Our tensors of these names, of a checkpoint's: the same."""
    return tensors


def file_name(name: str) -> str:
    """What a tensor of a checkpoint is called in the official files: the same."""
    return name
