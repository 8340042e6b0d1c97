"""BART's official checkpoints: their names for the parts of `bart.py`, and supported settings.

`weights.py` reads and writes files; this file maps their names to those of the model. Read
`LAYERS`, the names of a layer's parts, then `clean`, `to_checkpoint`, `from_checkpoint`. A tensor
of ours that corresponds to several of theirs stacks their rows: q, k and v are one product here.
`weights.py` uses this file and `weights_gpt2.py` through the same functions.
"""

from pathlib import Path

import torch
from torch import Tensor

from minprefix.files import read_json
from minprefix.models.bart import BART
from minprefix.models.config import BARTConfig
from minprefix.models.settings import file_of
from minprefix.models.tokenizer import Tokenizer

CONFIG, MODEL, THEIR_MODEL = BARTConfig, BART, "BartForConditionalGeneration"

# names in config.json that differ from the fields of BARTConfig; the first is written, and all must
# agree
FIELDS = {
    "n_positions": ("max_position_embeddings",),
    "n_embd": ("d_model",),
    "n_encoder_layer": ("encoder_layers",),
    "n_layer": ("decoder_layers",),
    "n_head": ("encoder_attention_heads", "decoder_attention_heads"),
    "n_inner": ("encoder_ffn_dim", "decoder_ffn_dim"),
}

# supported values in config.json of parts that `bart.py` has in one form; the first is the default
ONLY = {
    "model_type": ("bart",),
    "is_encoder_decoder": (True,),
    "normalize_before": (False,),
    "normalize_embedding": (True,),
    "add_final_layer_norm": (False,),
    "static_position_embeddings": (False,),
    "add_bias_logits": (False,),
    "extra_pos_embeddings": (2,),
    "tie_word_embeddings": (True,),
}

SILENT = {
    name: getattr(CONFIG, name) for name in ("bos_token_id", "eos_token_id", "forced_eos_token_id")
}

# the fields of the architecture in a fingerprint
ARCHITECTURE = (
    "vocab_size", "n_positions", "n_embd", "n_encoder_layer", "n_layer", "n_head", "n_inner",
    "scale_embedding",
)  # fmt: skip
RELATIVES = ("activation_function",)

TOP = {"wte": "shared", "head_bias": "final_logits_bias"}
STACK = {"wpe": "embed_positions", "ln_embd": "layernorm_embedding"}
SELF = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.out_proj",),
    "ln_1": ("self_attn_layer_norm",),
    "mlp.c_fc": ("fc1",),
    "mlp.c_proj": ("fc2",),
}
LAYERS = {
    "encoder": SELF | {"ln_2": ("final_layer_norm",)},
    "decoder": SELF | {
        "cross.c_q": ("encoder_attn.q_proj",),
        "cross.c_kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "cross.c_proj": ("encoder_attn.out_proj",),
        "ln_2": ("encoder_attn_layer_norm",),
        "ln_3": ("final_layer_norm",),
    },
}  # fmt: skip

# copies of the embedding, and further entries of old files
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
IGNORED = ("encoder.version", "decoder.version")


def in_our_names(raw: dict, path: Path) -> dict:
    """The values of config.json at `path`, under the names of BARTConfig; the decoder's start token
    may come from generation_config.json.

    Raises:
        ValueError: encoder and decoder differ in a value that is one field here.
    """
    values = dict(raw)
    for field, names in FIELDS.items():
        given = [raw.get(name, getattr(BARTConfig, field)) for name in names]
        if len(set(map(repr, given))) > 1:
            told = ", ".join(f"{n} {v!r}" for n, v in zip(names, given, strict=True))
            raise ValueError(f"{path}: {told}: only equal values are supported")
        values[field] = given[0]
    generation = read_json(file_of(path.parent))
    starts = [generation.get(name) for name in ("decoder_start_token_id", "bos_token_id")]
    values["decoder_start_token_id"] = next(
        (start for start in [*starts, raw.get("decoder_start_token_id")] if start is not None),
        BARTConfig.decoder_start_token_id,
    )
    return values


def in_their_names(values: dict) -> dict:
    """The fields of BARTConfig under the names of config.json."""
    theirs = {}
    for name, value in values.items():
        theirs |= dict.fromkeys(FIELDS.get(name, (name,)), value)
    return theirs


def read_tokenizer(folder: Path, config: BARTConfig) -> Tokenizer:
    """The tokenizer, with the model's start token for targets."""
    ids = (config.bos_token_id, next(iter(config.eos_ids), None), config.pad_token_id)
    tokenizer = Tokenizer.from_folder(folder, "bart", ids)
    tokenizer.start_id = config.decoder_start_token_id
    return tokenizer


def their_names(name: str) -> list[str]:
    """The tensors of the checkpoint that are stacked in one of our tensors."""
    if name == "head_bias":
        return [TOP[name]]
    part, kind = name.rsplit(".", 1)  # kind: weight or bias
    if part in TOP:
        return [f"{TOP[part]}.{kind}"]
    stack, part = part.split(".", 1)
    if part in STACK:
        return [f"{stack}.{STACK[part]}.{kind}"]
    _, layer, part = part.split(".", 2)
    return [f"{stack}.layers.{layer}.{theirs}.{kind}" for theirs in LAYERS[stack][part]]


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, split and named as in a checkpoint."""
    tensors = {}
    for name, tensor in state.items():
        names = their_names(name)
        tensor = tensor[None] if name == "head_bias" else tensor  # theirs: (1, V)
        tensors |= zip(names, tensor.chunk(len(names)), strict=True)
    return tensors


def from_checkpoint(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Our tensors with these names, from those of a checkpoint."""
    state = {name: torch.cat([tensors[part] for part in their_names(name)]) for name in names}
    return state | {"head_bias": state["head_bias"][0]}


def file_name(name: str) -> str:
    """The name of a tensor in the official files."""
    return name if name == "final_logits_bias" else f"model.{name}"


def clean(
    raw: dict[str, Tensor], config: BARTConfig, folder: Path
) -> tuple[dict[str, Tensor], BARTConfig]:
    """The tensors of a file without the prefix `model.` and without copies; and the config.

    Raises:
        ValueError: a tensor occurs under two names, or a copy of the embedding differs from it.
    """
    tensors = {}
    for key, tensor in raw.items():
        name = key.removeprefix("model.")
        if name in IGNORED:
            continue
        if name in tensors:
            raise ValueError(f"{folder}: {name} occurs twice, once as model.{name}")
        tensors[name] = tensor
    for name in TIED:
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault("shared.weight", copy)):
            raise ValueError(
                f"{folder}: {name} differs from shared.weight; only tied weights are supported"
            )
    tensors.setdefault(
        "final_logits_bias", torch.zeros(1, config.vocab_size)
    )  # missing in older files
    return tensors, config
