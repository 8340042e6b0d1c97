"""Official GPT-2 and BART checkpoints: from a folder or the hub to a model, and back to a folder.

Read `load`, the public entry: `find` says which folder a name means, `read_config` and
`read_weights` take it apart, and every tensor is compared with the model by name and shape before
one is used. `save_model` writes a folder that `transformers` [1] loads. A checkpoint is
config.json, model.safetensors (or pytorch_model.bin; either may be in shards), vocab.json and
merges.txt.

GPT-2's modules have the checkpoint's names, so there is no map, only what `_rename` drops: the
prefix `transformer.`, the buffers of the causal mask, and the head if it is a copy of the
embedding. The map of BART's names is in `weights_bart.py`.
[1] https://github.com/huggingface/transformers
"""

import hashlib
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from minprefix.files import atomic_write, load_tensors, read_json, save_tensors
from minprefix.models import hub, weights_bart
from minprefix.models.bart import BART, BARTConfig
from minprefix.models.gpt2 import GPT2, GPT2Config
from minprefix.models.tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parents[1] / "assets"

EMBEDDED = ("mini", "mini-bart")

# names with their numbers of parameters, the tied head counted once
MODELS = {
    "mini": 17_538_816,
    "mini-bart": 14_462_720,
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "facebook/bart-base": 139_420_416,
    "facebook/bart-large": 406_291_456,
    "facebook/bart-large-cnn": 406_290_432,
}

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

ZERO = ("no_repeat_ngram_size",)  # numbers of a config that may be 0
LISTED = 5  # names of tensors, at most, per kind of error


def find(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: embedded, a folder of this name, or one fetched from the hub.

    Raises:
        FileNotFoundError: it looks like a path, but there is no such folder.
        OSError, ValueError: as `fetch`.
    """
    if name_or_path in EMBEDDED:
        return ASSETS / name_or_path
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: a file; expected a checkpoint's folder or a model's name")
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.startswith((".", "~")) or path.is_absolute():
        raise FileNotFoundError(f"{name_or_path}: no such folder")
    return fetch(text)


def fetch(name: str, *, progress: bool = True) -> Path:
    """The folder, in the cache, of a model of the hub; downloads what is missing, with resume.

    Args:
        name: the model's id on the hub, such as gpt2 or facebook/bart-large.
        progress: show a bar per file, on a terminal.
    Raises:
        OSError: the hub or the disk failed; says what to do.
        ValueError: no such model, or neither a GPT-2 nor a BART, or a damaged file.
    """
    return hub.download(name, check=read_config, progress=progress)


def read_config(folder: Path) -> GPT2Config | BARTConfig:
    """config.json, with the family's defaults for what it does not say.

    Raises:
        ValueError: another kind of model, a part that ours lacks, a value of the wrong type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, so {folder} is no (complete) checkpoint")
    raw = read_json(path)
    if raw.get("model_type") == "bart":
        check_only(path, raw, weights_bart.ONLY)
        beside = folder / "generation_config.json"
        generation = read_json(beside) if beside.is_file() else None
        values = weights_bart.in_our_names(raw, generation, path)
        return make_config(BARTConfig, values, path)
    if raw.get("model_type") != "gpt2":
        kind = raw.get("model_type")
        raise ValueError(f"{path}: model_type is {kind!r}; supported: 'gpt2' or 'bart'")
    check_only(path, raw, ONLY)
    return make_config(GPT2Config, raw, path)


def check_only(path: Path, raw: dict, only: dict[str, tuple]) -> None:
    """ValueError if config.json asks for a part that we have in another form."""
    for key, allowed in only.items():
        value = raw.get(key, allowed[0])
        if value not in allowed or type(value) is not type(allowed[0]):  # since 1 == True
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: {key} is {value!r}; supported: {supported}")


def make_config(kind: type, raw: dict, path: Path):
    """A config dataclass of the values by its fields; ValueError for one of the wrong type."""
    values = {}
    for field in fields(kind):
        value = values[field.name] = raw.get(field.name, field.default)
        types = int | float if field.type is float else field.type
        least = 0 if field.type is float or field.name.endswith("_id") or field.name in ZERO else 1
        fits = isinstance(value, types) and (field.type is bool) == isinstance(value, bool)
        if not fits or (
            isinstance(value, int | float) and field.type is not bool and value < least
        ):
            raise ValueError(f"{path}: {field.name} is {value!r}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU, under the names and in the dtypes of its files.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a file is truncated or holds anything but tensors; names it.
    """
    paths = hub.weight_paths(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: no weights ({', '.join(hub.WEIGHT_FILES)})")
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, though the index beside it names it")
        tensors |= load_tensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; code in it is refused, not run."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises almost anything
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        raise ValueError(f"{path}: damaged, or holds something other than tensors") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise ValueError(f"{path}: holds something other than tensors by name")
    return tensors


def _rename(raw: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors under the model's names, without what a checkpoint may have beside them."""
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


def _check_fit(tensors: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    """Compare names and shapes with the model's; one error lists all that is wrong."""
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
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {device} cannot be used: {reason}") from error


def read_tokenizer(folder: Path, config: GPT2Config | BARTConfig) -> Tokenizer:
    """The tokenizer of a checkpoint; ValueError if its ids are not those of the model."""
    if isinstance(config, GPT2Config):
        tokenizer = Tokenizer.from_folder(folder)
        size = tokenizer.vocab_size
    else:
        tokenizer = Tokenizer.from_folder(folder, "bart")
        size = tokenizer.text_ids  # bart-large-cnn lacks the last token, <mask>
        ours = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.eos_id)
        names = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
        for name, token_id in zip(names, ours, strict=True):
            if getattr(config, name) != token_id:
                raise ValueError(
                    f"{folder}: {name} is {getattr(config, name)}; supported: {token_id}, the id "
                    "in vocab.json"
                )
    if size > config.vocab_size:
        sizes = f"{size} tokens, the model {config.vocab_size}"
        raise ValueError(f"{folder}: vocab.json has {sizes}")
    return tokenizer


def load(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[GPT2 | BART, Tokenizer]:
    """A pretrained model, in eval mode, and its tokenizer.

    Args:
        name_or_path: a name in `MODELS`, any other GPT-2 or BART of the hub, or a checkpoint's
            folder. Which of the two it is, config.json says.
        dtype: of the parameters, whatever the file has; mini is stored in bf16.
        device: such as cpu or cuda.
    Raises:
        OSError: nothing of this name, or it cannot be read or downloaded.
        ValueError: what is there is damaged, unsupported, or does not fit together.
    """
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not one of float64, float32, float16, bfloat16")
    check_device(device)
    folder = find(name_or_path)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config)
    tensors = read_weights(folder)
    with torch.device("meta"):  # shapes without memory
        model = GPT2(config) if isinstance(config, GPT2Config) else BART(config)
    if isinstance(model, GPT2):
        tensors = _rename(tensors, folder)
        _check_fit(tensors, model.state_dict(), folder)
    else:
        tensors = weights_bart.clean(tensors, config.vocab_size, folder)
        _check_fit(tensors, weights_bart.to_checkpoint(model.state_dict()), folder)
        tensors = weights_bart.from_checkpoint(tensors, list(model.state_dict()))
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval(), tokenizer


def save_model(model: GPT2 | BART, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a folder that `load` and `transformers` read: the model in its dtype, the tokenizer.

    All files are written before the first is renamed, and config.json comes last: a full disk
    changes nothing, and a new folder without config.json is one that was not finished.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values, state = asdict(model.config), model.state_dict()
    only, architecture = ONLY, "GPT2LMHeadModel"
    if isinstance(model, BART):
        only, architecture = weights_bart.ONLY, "BartForConditionalGeneration"
        values = weights_bart.in_their_names(values)
        state = weights_bart.to_checkpoint(state)
        # as in the official files
        state = {n if n == "final_logits_bias" else f"model.{n}": x for n, x in state.items()}
    config = {
        **{key: allowed[0] for key, allowed in only.items()},
        "architectures": [architecture],
        **values,
        "tie_word_embeddings": True,
        "torch_dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    texts = {"config.json": json.dumps(config, indent=1) + "\n", **tokenizer.files()}
    with ExitStack() as stack:  # ends, and so renames, in reverse order
        for name, text in texts.items():
            stack.enter_context(atomic_write(folder / name)).write_bytes(text.encode())
        save_tensors(folder / "model.safetensors", state, {"format": "pt"})


@torch.no_grad()
def fingerprint(model: GPT2 | BART) -> str:
    """64 hexadecimal digits that name a model by content.

    sha256 over the fields that shape it and 64 fixed elements of each tensor, rounded to bf16: an
    fp32 and a bf16 copy, a .bin and a safetensors file of the same weights have the same one.
    """
    names = weights_bart.ARCHITECTURE if isinstance(model, BART) else ARCHITECTURE
    fields = {name: getattr(model.config, name) for name in names}
    fields["n_inner"] = fields["n_inner"] or 4 * model.config.n_embd
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        at = torch.arange(64, device=weight.device) * weight.numel() // 64
        some = weight.flatten()[at].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


def need_gpt2(model: GPT2 | BART, what: str) -> None:
    """ValueError for a BART; `what` is for GPT-2 alone."""
    if not isinstance(model, GPT2):
        raise ValueError(f"{what}: for GPT-2 only, this model is a {type(model).__name__}")


def check_base(base: str, model: GPT2 | BART, what: str) -> None:
    """ValueError if `what` names a base model, by its fingerprint, and it is not `model`."""
    if base and base != fingerprint(model):
        raise ValueError(
            f"this {what} was made for another model: it names base {base[:12]}, "
            f"the loaded model is {fingerprint(model)[:12]}"
        )
