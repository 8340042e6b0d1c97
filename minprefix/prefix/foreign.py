"""Prefixes of other systems: PEFT's folders, the authors' state dicts, adapter-hub's folders.

All three hold the same rows (P, 2 L C), one per prefix position, with flat feature
((2 l + kv) H + h) D + d, where kv = 0 is the key; `table_of_rows` converts them to P_theta. They
differ in the position of token t of the text, which is part of the meaning of a prefix:

| system | files, of GPT-2 | token t at |
|---|---|---|
| PEFT [1], see `peft.py` | adapter_config.json, adapter_model.safetensors | P + t |
| the authors' code [2] | config.json, pytorch_model.bin | P + t; BART's: t |
| adapter-hub [3] | adapter_config.json, adapter.safetensors or pytorch_adapter.bin | t |

An MLP is replaced by the table that it computes (section 4.3 of Li & Liang 2021). Read
`read_authors`, then `read_adapters`. From pickles only tensors are read; code in them is rejected,
not run.

[1] https://github.com/huggingface/peft/tree/main/src/peft/tuners/prefix_tuning
[2] https://github.com/XiangLi1999/PrefixTuning/blob/cleaned/gpt2/train_control.py
[3] https://github.com/adapter-hub/adapters/blob/main/src/adapters/methods/prefix_tuning.py
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minprefix.files import brief, names_file, read_json
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.tensor_files import read_pickle
from minprefix.models.weights import LISTED, read_config
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.parametrisations import computed_table
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import check_values, load_tensors

# supported values in adapter-hub's config; a Prefix cannot express others
ADAPTERS_ONLY = {"use_gating": (False, None), "leave_out": ([], None)}

MLP_KEYS = {
    "wte.weight",
    *(f"control_trans.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
}
DEEP_KEYS = MLP_KEYS | {"control_trans.4.weight", "control_trans.4.bias"}
INFIX_KEYS = MLP_KEYS | {"wte2.weight"}
DIRECT_KEYS, EMBEDDING_KEYS = {"control_trans"}, {"wte.weight"}
# the authors' BART has an MLP for each attention: embeddings and linear layers, by our sites
BART_PARTS = {
    "encoder": ("wte_enc", "control_trans_enc"),
    "decoder": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
}


@dataclass(frozen=True)
class AuthorsTokens:
    """A prefix whose keys and values only the frozen model can compute, from `embeddings`.

    Embedding-only: at positions 0 .. P-1, before the text (`run_virtual_tokens`). Infix: after the
    S tokens of the source, at S .. S+P-1; `infix_table` is then added to their keys and values.
    """

    embeddings: Tensor  # (P, C)
    infix_table: Tensor | None = None  # (L, 2, H, P, D)


def table_of_rows(rows: Tensor, n_layer: int, n_head: int) -> Tensor:
    """(P, 2 L C) -> P_theta, (L, 2, H, P, D)."""
    return rows.reshape(rows.shape[0], n_layer, 2, n_head, -1).permute(1, 2, 3, 0, 4)


def rows_of_table(table: Tensor) -> Tensor:
    """P_theta (L, 2, H, P, D) -> (P, 2 L C)."""
    return table.permute(3, 0, 1, 2, 4).flatten(1)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, in fp32 or wider, and the metadata; pickles have none.

    Raises:
        ValueError: damaged, a pickle of anything but tensors, or `check_values`.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = load_tensors(path)
    else:
        tensors, metadata = read_pickle(path), {}
    check_values(path, tensors)
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    return tensors, metadata


def check_only(path: Path, raw: dict, only: dict[str, tuple]) -> None:
    """ValueError if a setting of a config file has a value that is not supported."""
    for key, allowed in only.items():
        if raw.get(key) not in allowed:
            choices = " or ".join(repr(value) for value in allowed if value is not None)
            raise ValueError(f"{path}: {key} is {brief(raw.get(key))}; supported: {choices}")


def first_existing(folder: Path, *names: str) -> Path:
    """The first of these files that the folder has."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: {' (or '.join(names)}) is missing")
    return found[0]


def required_size(path: Path, raw: dict, key: str) -> int:
    """A size that a config file must give."""
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key} must be a number >= 1, got {brief(value)}")
    return value


def listed(names) -> str:
    """The first of these names."""
    names = sorted(names)
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def mlp_rows(
    path: Path, tensors: dict[str, Tensor], wte: str = "wte", control: str = "control_trans"
) -> Tensor:
    """The output (P, n) of an MLP on the embeddings, with the names that both systems use.

    The MLP is linear-tanh-linear, or has one more tanh and linear layer; n is its output width.
    """
    x = tensors[f"{wte}.weight"]  # (P, C)
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{path}: {wte}.weight must be (P, C) with P > 0, got {tuple(x.shape)}")
    for i in (0, 2, 4):
        if f"{control}.{i}.weight" not in tensors:
            break
        weight, bias = (tensors[f"{control}.{i}.{kind}"] for kind in ("weight", "bias"))
        if weight.dim() != 2 or weight.shape[1] != x.shape[1] or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{path}: {control}.{i} must be (n, {x.shape[1]}) with a bias (n,), got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        x = F.linear(torch.tanh(x) if i else x, weight, bias)
    return x


def table_for(path: Path, rows: Tensor, config: GPT2Config) -> Tensor:
    """P_theta from rows (P, 2 L C), or from a flat (P 2 L C,); ValueError if they do not fit the
    model."""
    L, H, C = config.n_layer, config.n_head, config.n_embd
    if rows.dim() == 1 and rows.numel() and rows.numel() % (2 * L * C) == 0:
        rows = rows.reshape(-1, 2 * L * C)
    if rows.dim() != 2 or rows.shape[1] != 2 * L * C:
        raise ValueError(
            f"{path}: a table of {tuple(rows.shape)} is not (P, 2 L C) of the model, which has "
            f"L = {L}, C = {C}: it was made for another model"
        )
    return table_of_rows(rows, L, H)


def table_of_word(path: Path, past: Tensor) -> Tensor:
    """P_theta from the model's cache of a word, (2 L, 1, H, P, D): key and value of each layer."""
    if past.shape[0] % 2 or past.shape[1] != 1 or 0 in past.shape:
        raise ValueError(
            f"{path}: control_trans must be (2 L, 1, H, P, D), got {tuple(past.shape)}"
        )
    return past.reshape(-1, 2, *past.shape[2:])


def config_in_same_folder(path: Path, config):
    """The config from config.json in the same folder, which must fit `config`; or `config`."""
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        return config
    saved = read_config(path.parent)
    here, there = ((c.n_layer, c.n_head, c.n_embd) for c in (saved, config or saved))
    if here != there:
        raise ValueError(
            f"{config_path}: layers, heads, width are {here}, those of the model {there}"
        )
    return saved


@torch.no_grad()
@names_file
def read_authors(path: str | Path, config: Any = None) -> Prefix | AuthorsTokens | BARTPrefix:
    """Read a prefix saved by the authors' code; its keys determine the kind.

    Args:
        path: the folder that was saved, or a file with the state dict.
        config: of the base model; None = config.json next to the state dict.
    Returns:
        A Prefix (from an MLP of two or three layers; or direct, random or from a word), with the
        text at P + t; for a BART see `read_authors_bart`. For embedding-only and infix, the virtual
        tokens, which need the model.
    Raises:
        ValueError: another kind of state dict, damage, or shapes that do not fit.
        OSError: it cannot be read.
    """
    path = Path(path)
    path = path / "pytorch_model.bin" if path.is_dir() else path
    tensors, _ = read_tensors(path)
    keys = set(tensors)
    if any(key.startswith(("wte_enc.", "control_trans_enc.", "control_trans2.")) for key in keys):
        return read_authors_bart(path, tensors, config)
    if keys not in (EMBEDDING_KEYS, DIRECT_KEYS, MLP_KEYS, DEEP_KEYS, INFIX_KEYS):
        told = f"no prefix of the authors' code, the keys are {listed(keys) or 'none'}"
        raise ValueError(f"{path}: {told}")
    if keys == DIRECT_KEYS:
        rows = tensors["control_trans"]
        if rows.dim() == 5:
            return Prefix.from_table(table_of_word(path, rows), position_offset=rows.shape[3])
    else:
        rows = mlp_rows(path, tensors)
        C = tensors["wte.weight"].shape[1]
        if keys == EMBEDDING_KEYS or (keys == MLP_KEYS and rows.shape[1] == C):
            return AuthorsTokens(rows)
    config = config_in_same_folder(path, config)
    if config is None:
        raise ValueError(
            f"{path}: does not contain the number of heads: needs config.json in the same folder, "
            "or the base model (--model)"
        )
    table = table_for(path, rows, config)
    if keys != INFIX_KEYS:
        return Prefix.from_table(table, position_offset=table.shape[3])
    embeddings, want = tensors["wte2.weight"], (table.shape[3], config.n_embd)
    if embeddings.shape != want:
        raise ValueError(f"{path}: wte2.weight must be {want}, got {tuple(embeddings.shape)}")
    return AuthorsTokens(embeddings, table)


def read_authors_bart(
    path: Path, tensors: dict[str, Tensor], config: BARTConfig | None
) -> BARTPrefix:
    """A BART prefix saved by the authors' code: an MLP for each attention, text at t.

    Their encoder has as many layers as their decoder, and all three have the same P.
    """
    wanted = {
        key.replace("wte.", f"{wte}.").replace("control_trans.", f"{control}."): site
        for site, (wte, control) in BART_PARTS.items()
        for key in MLP_KEYS
    }
    sites = {wanted.get(key) for key in tensors}
    odd = [key for key in tensors if key not in wanted]
    lost = [key for key, site in wanted.items() if site in sites and key not in tensors]
    if odd or lost:
        told = f"left over {listed(odd) or 'none'}, missing {listed(lost) or 'none'}"
        raise ValueError(f"{path}: not the keys of the authors' BART prefix: {told}")
    config = config_in_same_folder(path, config)
    if config is None or config.family != BARTPrefix.family:
        what = "nothing" if config is None else f"a {config.family}"
        raise ValueError(
            f"{path}: a prefix of a BART, but config.json in its folder, or --model, names {what}"
        )
    rows = {s: mlp_rows(path, tensors, *BART_PARTS[s]) for s in BART_PARTS if s in sites}
    if len({len(x) for x in rows.values()}) > 1:
        raise ValueError(f"{path}: attentions have prefixes of {[len(x) for x in rows.values()]}")
    tables = {site: table_for(path, x, config.at(site)) for site, x in rows.items()}
    return BARTPrefix.from_tables(tables)


def run_virtual_tokens(model: Any, tokens: AuthorsTokens) -> Prefix:
    """The table of embedding-only: the model's keys and values of the tokens at 0 .. P-1."""
    P, C = tokens.embeddings.shape
    if tokens.infix_table is not None:
        raise ValueError(
            "the keys and values of the authors' infix depend on the text before it: it has no "
            "table, so it cannot become a prefix file (an infix trained here has one)"
        )
    if model.config.n_embd != C:
        raise ValueError(f"virtual tokens of width {C} for a model of width {model.config.n_embd}")
    if model.config.n_positions <= P:
        raise ValueError(f"{P} virtual tokens > {model.config.n_positions} positions of the model")
    with torch.no_grad():
        table = computed_table(model, tokens.embeddings.to(model.wte.weight))
    prefix = Prefix.from_table(table, position_offset=P)
    prefix.parametrisation = "embedding"
    prefix.bind(model)
    return prefix


@torch.no_grad()
@names_file
def read_adapters(folder: str | Path, config: GPT2Config | None) -> Prefix:
    """The prefix in an adapter-hub folder for GPT-2, with the meaning of its eager attention.

    With its default attention (SDPA, version 1.3.0) that library hides most of the sequence from a
    causal model; the table is the same. A trained head (pytorch_model_head.bin) is not read.

    Args:
        config: of the base model, because the folder does not contain the number of heads.
    """
    path = Path(folder) / "adapter_config.json"
    whole = read_json(path)
    raw = whole.get("config")
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: config must be an object, got {brief(raw)}")
    check_only(path, whole, {"model_type": ("gpt2", None)})
    check_only(path, raw, {"architecture": ("prefix_tuning",), **ADAPTERS_ONLY})
    P = required_size(path, raw, "prefix_length")
    if config is None:
        raise ValueError(
            f"{path}: does not contain the number of heads: name the base model (--model)"
        )
    file = first_existing(path.parent, "adapter.safetensors", "pytorch_adapter.bin")
    tensors = without_copies(file, read_tensors(file)[0])
    if set(tensors) == DIRECT_KEYS:
        rows = tensors["control_trans"]  # (P 2 L C,)
    elif set(tensors) == MLP_KEYS:
        check_only(path, raw, {"non_linearity": ("tanh",)})
        rows = mlp_rows(file, tensors)
    else:
        raise ValueError(f"{file}: expected a flat prefix or an MLP, found {listed(tensors)}")
    table = table_for(file, rows, config)
    if table.shape[3] != P:
        raise ValueError(
            f"{file}: a prefix of {table.shape[3]} positions, but prefix_length is {P}"
        )
    return Prefix.from_table(table, position_offset=0)


def without_copies(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter-hub prefix, which its file repeats for every layer."""
    found, places = {}, set()
    for key, tensor in tensors.items():
        parts = re.search(r"prefix_tunings\.([^.]+)\.([^.]+)\.(.+)$", key)
        if not parts:
            raise ValueError(f"{path}: {key} is not part of a prefix without gates")
        name, place, part = parts.groups()
        if place != "self_prefix":
            raise ValueError(f"{path}: {key} is of {place}; GPT-2 has self_prefix only")
        places.add(name)
        if not torch.equal(found.setdefault(part, tensor), tensor):
            raise ValueError(f"{path}: {part} differs between layers, though all share one")
    if len(places) != 1:
        raise ValueError(f"{path}: holds {len(places)} prefixes ({listed(places)}), expected one")
    return found
