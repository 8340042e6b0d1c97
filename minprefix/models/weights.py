"""Official GPT-2 and BART checkpoints: from a folder or the hub to a model, and back to a folder.

Read `load`, the public entry: `find` finds the folder for a name, `read_config` and `read_weights`
read it, and the names and shapes of all tensors are compared with the model before any is used.
`save_model` writes a folder that `transformers` [1] loads. A checkpoint consists of config.json,
model.safetensors (or pytorch_model.bin; either may be in shards), tokenizer.json or vocab.json and
merges.txt, and optionally generation_config.json. Names may have the prefixes of DataParallel and
torch.compile; a folder of nanoGPT [2] has its sizes in ckpt.pt.

The differences between the two families are in `weights_gpt2.py` and `weights_bart.py`, which have
the same functions.
[1] https://github.com/huggingface/transformers   [2] https://github.com/karpathy/nanoGPT
"""

import hashlib
import json
import logging
import math
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.files import atomic_write, brief, names_file, read_json, reading
from minprefix.models import hub, weights_bart, weights_gpt2
from minprefix.models.bart import BART
from minprefix.models.base import FUNCTIONS, LanguageModel
from minprefix.models.config import EMBEDDED, BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.settings import (
    NAMES,
    GenerationSettings,
    read_settings,
    warn_not_followed,
)
from minprefix.models.tensor_files import read_weights, unpickle, unwrapped
from minprefix.models.tokenizer import Tokenizer
from minprefix.tensors import save_tensors

ASSETS = Path(__file__).resolve().parents[1] / "assets"

FAMILIES = {family.CONFIG.family: family for family in (weights_gpt2, weights_bart)}

log = logging.getLogger(__name__)
LISTED = 5  # most names of tensors in a message, for each kind of error


def find(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: embedded, a folder of this name, or one downloaded from the hub.

    Raises:
        FileNotFoundError: it looks like a path, but there is no such folder.
        OSError, ValueError: see `fetch`.
    """
    if name_or_path in EMBEDDED:
        return ASSETS / name_or_path
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path}: a file; expected the folder of a checkpoint or the name of a model"
        )
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.startswith((".", "~")) or path.is_absolute():
        raise FileNotFoundError(f"{name_or_path}: no such folder")
    return fetch(text)


def fetch(name: str) -> Path:
    """The folder in the cache of a model on the hub; downloads what is missing, with resume.

    Args:
        name: the model's id on the hub, such as gpt2 or facebook/bart-large.
    Raises:
        OSError: the hub or the disk failed; says what to do.
        ValueError: no such model, or neither a GPT-2 nor a BART, or a damaged file.
    """
    return hub.download(name, check=read_config)


@names_file
def read_config(folder: Path) -> GPT2Config | BARTConfig:
    """config.json, with the family's defaults for missing keys.

    Raises:
        ValueError: another kind of model, an unsupported part, a value of the wrong type.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / hub.NANOGPT).is_file():
            raw, ends = weights_gpt2.nanogpt_values(folder / hub.NANOGPT, unpickle)
            return make_config(GPT2Config, raw, folder / hub.NANOGPT, ends)
        raise FileNotFoundError(f"{path}: missing, so {folder} is not a complete checkpoint")
    raw = read_json(path)
    for family in FAMILIES.values():
        if raw.get("model_type") in family.ONLY["model_type"]:
            check_only(path, raw, family.ONLY | {"activation_function": activations(family)})
            settings = dict.fromkeys(family.SILENT)  # missing keys mean None
            settings |= read_settings(folder, family.CONFIG.family, family.SILENT)
            return make_config(family.CONFIG, family.in_our_names(raw, path), path, settings)
    kind = brief(raw.get("model_type"))
    raise ValueError(f"{path}: model_type is {kind}; supported: 'gpt2' or 'bart'")


def activations(family) -> tuple[str, ...]:
    """The supported names of the function inside the MLPs in config.json; the default first."""
    usual = family.CONFIG.activation_function
    return (usual, *(name for name in FUNCTIONS if name != usual))


def check_only(path: Path, raw: dict, only: dict[str, tuple]) -> None:
    """ValueError if config.json has a value that is not supported."""
    for key, allowed in only.items():
        value = raw.get(key, allowed[0])
        if value not in allowed or type(value) is not type(allowed[0]):  # since 1 == True
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: {key} is {brief(value)}; supported: {supported}")


def make_config(kind: type, raw: dict, path: Path, settings: dict):
    """A config dataclass from the values; ValueError for a value of the wrong type."""
    values = dict(settings)
    for field in fields(kind):
        if field.name in NAMES:
            continue
        value = values[field.name] = raw.get(field.name, field.default)
        types: Any = int | float if field.type is float else field.type
        least = 0 if field.type is float or field.name.endswith("_id") else 1
        fits = isinstance(value, types) and (field.type is bool) == isinstance(value, bool)
        if not fits or (
            isinstance(value, int | float)
            and field.type is not bool
            and not least <= value < math.inf  # also catches NaN
        ):
            raise ValueError(f"{path}: {field.name} is {brief(value)}")
    try:
        config = kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, ids in config.named_ids():
        if ids and not 0 <= max(ids, key=abs) < config.vocab_size:
            told = f"the model has the tokens 0 to {config.vocab_size - 1}"
            raise ValueError(f"{path}: {name} is {brief(getattr(config, name))}, but {told}")
    return config


def _check_sizes(tensors: dict[str, Tensor], config: Any, folder: Path) -> None:
    """ValueError if config.json has far larger sizes than the weights, before a model is built."""
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name in ("n_layer", "n_encoder_layer", "vocab_size", "n_positions", "n_embd", "n_inner"):
        most = len(tensors) if name.endswith("_layer") else widest
        if (value := getattr(config, name, None) or 0) > most:
            have = f"{most} tensors" if name.endswith("_layer") else f"no side longer than {most}"
            told = f"{name} is {value}, the weights have {have}"
            raise ValueError(f"{folder}: the weights do not fit config.json: {told}")


def _check_fit(tensors: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    """Compare names and shapes with the model's; one error lists all differences."""
    both = [name for name in wanted if name in tensors]
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "left over": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
            for name in both
            if tensors[name].shape != wanted[name].shape
        ],
        "not floating-point": [n for n in both if not tensors[n].is_floating_point()],
    }
    texts = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > LISTED else ""
            texts.append(f"{len(names)} {kind} ({', '.join(names[:LISTED])}{more})")
    if texts:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(texts)}")


def check_device(device: str) -> None:
    """ValueError if tensors cannot be made on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: builds without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {device} cannot be used: {reason}") from error


def read_tokenizer(folder: Path, config: GPT2Config | BARTConfig) -> Tokenizer:
    """The tokenizer of a checkpoint; ValueError if its ids are not those of the model."""
    tokenizer = FAMILIES[config.family].read_tokenizer(folder, config)
    if tokenizer.text_ids > config.vocab_size:
        sizes = f"{tokenizer.text_ids} tokens, the model {config.vocab_size}"
        raise ValueError(f"{folder}: vocab.json has {sizes}")
    for name in ("bos_id", "eos_id"):
        if (token_id := getattr(tokenizer, name)) >= config.vocab_size:
            told = f"the model has {config.vocab_size} tokens"
            raise ValueError(f"{folder}: {name} of the tokenizer is {token_id}, but {told}")
    if lost := tokenizer.fit(config.vocab_size):
        told = f"{len(lost)} tokens of the tokenizer are beyond the model's {config.vocab_size}"
        some = ", ".join(map(repr, lost[:LISTED])) + (", ..." if len(lost) > LISTED else "")
        log.warning("%s: %s, and are read as plain text: %s", folder, told, some)
    return tokenizer


def shapes_of(config: GPT2Config | BARTConfig) -> GPT2 | BART:
    """A model of this config without memory, on the device "meta"."""
    with torch.device("meta"):
        return FAMILIES[config.family].MODEL(config)


def load(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[GPT2 | BART, Tokenizer]:
    """A pretrained model, in eval mode, and its tokenizer.

    Args:
        name_or_path: a name in `MODELS`, any other GPT-2 or BART of the hub, or a checkpoint's
            folder. config.json says which of the two it is.
        dtype: of the parameters, whatever the dtype in the file; mini is stored in bf16.
        device: such as cpu or cuda.
    Raises:
        OSError: nothing has this name, or it cannot be read or downloaded.
        ValueError: the files are damaged, unsupported, or do not fit together.
    """
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not one of float64, float32, float16, bfloat16")
    check_device(device)
    folder = find(name_or_path)
    config = read_config(folder)
    family = FAMILIES[config.family]
    with reading(folder):
        tensors = unwrapped(read_weights(folder), folder)
        _check_sizes(tensors, config, folder)
        tokenizer = read_tokenizer(folder, config)
        tensors, config = family.clean(tensors, config, folder)
        model = shapes_of(config)
        _check_fit(tensors, family.to_checkpoint(model.state_dict()), folder)
        tensors = family.from_checkpoint(tensors, list(model.state_dict()))
    model.origin = digests(config, {name: tensors[name] for name in model.state_dict()})
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    warn_not_followed(folder, config.family)
    return model.eval(), tokenizer


def save_model(model: GPT2 | BART, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a folder that `load` and `transformers` read: the model in its dtype, the tokenizer.

    All files are written before the first is renamed, and config.json is renamed last. A full disk
    therefore changes nothing, and a new folder without config.json is incomplete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[model.config.family]
    state = family.to_checkpoint(model.state_dict())
    state = {family.file_name(name): x for name, x in state.items()}
    settings = {name: getattr(model.config, name) for name in NAMES}
    config = {
        **{key: allowed[0] for key, allowed in family.ONLY.items()},
        "architectures": [family.THEIR_MODEL],
        **family.in_their_names(model.config.of_model()),
        "torch_dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    texts = {"config.json": json.dumps(config, indent=1) + "\n", **tokenizer.files()}
    said = {name: x for name, x in settings.items() if x != getattr(GenerationSettings, name)}
    ids = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
    if said.keys() - ids:  # otherwise config.json has all of it
        said = {name: getattr(model.config, name, None) for name in ids} | said
        texts["generation_config.json"] = json.dumps(said, indent=1) + "\n"
    with ExitStack() as stack:  # closes, and therefore renames, in reverse order
        for name, text in texts.items():
            stack.enter_context(atomic_write(folder / name)).write_bytes(text.encode())
        save_tensors(folder / "model.safetensors", state, {"format": "pt"}, checksum=True)


HALF = 32  # digits of a fingerprint for each of the two roundings


@torch.no_grad()
def digests(config: GPT2Config | BARTConfig, state: dict[str, Tensor]) -> str:
    """The fingerprint of these tensors: 32 digits from their bf16 rounding, 32 from fp16's."""
    family = FAMILIES[config.family]
    fields = {name: getattr(config, name) for name in family.ARCHITECTURE}
    fields["n_inner"] = fields["n_inner"] or 4 * config.n_embd
    for name in family.RELATIVES:  # only non-default values, as older fingerprints omit them
        if (value := getattr(config, name)) != getattr(type(config), name):
            fields[name] = value
    begin = json.dumps(fields, sort_keys=True).encode()
    both = {dtype: hashlib.sha256(begin) for dtype in (torch.bfloat16, torch.float16)}
    for name, weight in state.items():
        at = torch.arange(64, device=weight.device) * weight.numel() // 64
        some = weight.flatten()[at]
        for dtype, digest in both.items():
            rounded = some.to(dtype).view(torch.int16).cpu()
            digest.update(name.encode() + rounded.numpy().tobytes())
    return "".join(digest.hexdigest()[:HALF] for digest in both.values())


def fingerprint(model: GPT2 | BART) -> str:
    """64 hexadecimal digits that identify a model by its contents; compare with `same_model`.

    It is a sha256 over the fields that determine its shape and 64 fixed elements of each tensor.
    Copies in fp32 and bf16 agree in the half for bf16 rounding, copies in fp32 and fp16 in the
    other half. A model that was only converted to a shorter dtype keeps the fingerprint of its
    file.
    """
    own, origin = digests(model.config, model.state_dict()), getattr(model, "origin", "")
    return origin if origin and same_model(origin, own) else own


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may belong to copies of one model; older ones are only for bf16."""
    return bool(one) and (one[:HALF] == other[:HALF] or one[HALF:] == other[HALF:] != "")


def need_gpt2(model: LanguageModel, what: str) -> None:
    """ValueError for a BART; `what` is only for GPT-2."""
    if not isinstance(model, GPT2):
        raise ValueError(f"{what} is for GPT-2 only, and the model is a {type(model).__name__}")


def check_base(base: str, model: GPT2 | BART, what: str) -> None:
    """ValueError if the fingerprint `base` of `what` is not that of `model`; "" passes."""
    if base and not same_model(base, own := fingerprint(model)):
        raise ValueError(
            f"this {what} was made for another model: its base is {base[:12]}, "
            f"the loaded model is {own[:12]}"
        )
