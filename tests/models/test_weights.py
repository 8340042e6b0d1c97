"""Checkpoints in all their forms against transformers, and the error for each kind of fault."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2
from safetensors.torch import save_file
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import ASSETS, find, load, read_config, save_model

TINY = dict(vocab_size=8192, n_positions=32, n_embd=16, n_layer=2, n_head=2)
LAYOUTS = ("safetensors", "safetensors shards", "bin", "old bin", "bin shards")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], layout: str) -> None:
    """Write the weights of a checkpoint in one of the forms that the hub has."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    ending = "bin" if "bin" in layout else "safetensors"
    stem = "pytorch_model" if ending == "bin" else "model"
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if "shards" in layout else [names]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        shard = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        path = folder / f"{stem}{shard}.{ending}"
        weight_map |= dict.fromkeys(part, path.name)
        content = {name: tensors[name] for name in part}
        if ending == "bin":
            torch.save(content, path, _use_new_zipfile_serialization=layout != "old bin")
        else:
            save_file(content, path, {"format": "pt"})
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def official_names(model: GPT2) -> dict[str, torch.Tensor]:
    """The tensors of old checkpoints: with a prefix, with mask buffers and the tied head."""
    tensors = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors | {"lm_head.weight": model.wte.weight.detach()}


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def logits(model, dtype=torch.float64) -> torch.Tensor:
    ids = torch.arange(48).view(2, 24) * 37 % 8192
    with torch.no_grad():
        out = model.to(dtype)(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same_logits(actual, expected):
    # 1e-12 of the largest logit; the worst seen is 4e-15 relative, with mini
    bound = 1e-12 * max(1, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= bound


@pytest.fixture
def model() -> GPT2:
    return tiny_gpt2(seed=1, bos_token_id=8191, eos_token_id=8191, **TINY)


@pytest.fixture
def folder(tmp_path, model, tokenizer) -> Path:
    """A complete checkpoint, in fp64."""
    save_model(model, tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def error_of(folder: Path, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert str(folder) in message
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefixed", [False, True])
def test_every_layout_gives_the_same_logits(folder, model, layout, prefixed):
    (folder / "model.safetensors").unlink()
    tensors = official_names(model) if prefixed else model.state_dict()
    write_weights(folder, tensors, layout)
    loaded, tokenizer = load(folder, dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.eos_id == loaded.config.eos_token_id
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
def test_what_transformers_saves_gives_its_logits(folder, shard_size):
    torch.manual_seed(0)
    config = TheirConfig(
        **TINY, n_inner=40, layer_norm_epsilon=1e-3, initializer_range=0.3, bos_token_id=8191,
        eos_token_id=8191,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "200KB")
    ours, _ = load(folder, dtype=torch.float64)
    assert ours.config.n_inner == 40 and ours.config.layer_norm_epsilon == 1e-3
    assert_same_logits(logits(ours), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_saved_gives_transformers_the_same_logits(tmp_path, model, tokenizer, dtype):
    model = model.to(dtype)
    save_model(model, tokenizer, tmp_path / "new" / "folder")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float64)
    assert_same_logits(logits(model), logits(theirs.eval()))
    assert load(tmp_path / "new" / "folder")[0].config == model.config
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "config.json", "merges.txt", "model.safetensors", "vocab.json"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parameters_have_the_dtype_asked_for(folder, dtype):
    loaded, _ = load(str(folder), dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_config_takes_defaults_for_what_is_missing(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_ctx": 7, "n_layer": 3}')
    assert read_config(folder) == GPT2Config(n_layer=3)
    set_config(folder, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)
    assert read_config(folder) == GPT2Config(n_layer=3, reorder_and_upcast_attn=True)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "t5"),
        ("model_type", ...),
        ("activation_function", "mish"),
        ("add_cross_attention", True),
        ("scale_attn_by_inverse_layer_idx", "yes"),
        ("eos_token_id", "last"),
        ("eos_token_id", [1, None]),
        ("num_beams", 0),
        ("suppress_tokens", 3),
        ("n_layer", "2"),
        ("n_layer", 0),
        ("n_head", 3),
        ("n_embd", None),
        ("n_inner", -1),
        ("n_positions", True),
        ("layer_norm_epsilon", "small"),
    ],
)
def test_unsupported_configs_are_refused(folder, key, value):
    set_config(folder, **{key: value})
    message = error_of(folder)
    assert key in message and str(folder / "config.json") in message
    assert repr(None if value is ... else value).strip("'") in message


def test_tensors_that_do_not_fit_are_listed(folder, model):
    tensors = model.state_dict()
    del tensors["h.1.ln_2.bias"]
    tensors["wpe.weight"] = torch.zeros(31, 16)
    tensors["ln_f.bias"] = torch.zeros(16, dtype=torch.int8)
    tensors |= {f"extra.{n}": torch.zeros(1) for n in range(9)}
    save_file(tensors, folder / "model.safetensors")
    assert error_of(folder).endswith(
        "the weights do not fit config.json: 1 missing (h.1.ln_2.bias); 9 left over (extra.0, "
        "extra.1, extra.2, extra.3, extra.4, ...); 1 of another shape (wpe.weight (31, 16) for "
        "(32, 16)); 1 not floating-point (ln_f.bias)"
    )


def test_a_deeper_model_than_the_config_is_refused(folder):
    set_config(folder, n_layer=1)
    assert "12 left over (h.1." in error_of(folder)


def test_a_name_with_and_without_prefix_is_refused(folder, model):
    tensors = {**model.state_dict(), "transformer.ln_f.bias": torch.zeros(16)}
    save_file(tensors, folder / "model.safetensors")
    assert "ln_f.bias occurs twice" in error_of(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, model, layout, keep):
    (folder / "model.safetensors").unlink()
    write_weights(folder, model.state_dict(), layout)
    path = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert str(path) in error_of(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_refused_and_not_run(folder, tmp_path, zipped):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    bomb = {"wte.weight": Bomb(tmp_path / "exploded")}
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    assert f"{path}: damaged, or holds something other than tensors" in error_of(folder)
    path.write_bytes(pickle.dumps(bomb, protocol=2))
    assert str(path) in error_of(folder)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(path.read_bytes())  # the bomb does work
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)]])
def test_a_bin_file_of_other_things_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "other than tensors by name" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert name in error_of(folder, FileNotFoundError)


def test_a_missing_shard_is_named(folder, model):
    (folder / "model.safetensors").unlink()
    write_weights(folder, model.state_dict(), "safetensors shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in error_of(folder, FileNotFoundError)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}', "["]
)
def test_a_bad_index_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_of(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tokenizer):
    tensors = tiny_gpt2(**{**TINY, "vocab_size": 100}).state_dict()
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, vocab_size=100, bos_token_id=99, eos_token_id=99)
    assert "vocab.json has 8191 tokens, the model 100" in error_of(folder)


def test_names_that_are_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./none", tmp_path / "none", str(tmp_path / "none"), "~/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            find(name)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file; expected the folder of a checkpoint"):
        find("file")
    with pytest.raises(ValueError, match="'no name!': neither a folder nor the name"):
        find("no name!")


def test_a_folder_goes_before_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "gpt2")
    assert find("gpt2") == Path("gpt2")
    assert load("gpt2")[0].config.n_embd == 16
    assert find("mini") == ASSETS / "mini"


def test_bad_dtypes_and_devices_are_refused(folder):
    with pytest.raises(ValueError, match="dtype torch.int8 is not one of"):
        load(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device nowhere cannot be used") as caught:
        load(folder, device="nowhere")
    assert "\n" not in str(caught.value)


def test_a_failed_save_changes_nothing(folder, model, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("minprefix.tensors.save_file", full_disk)
    with pytest.raises(OSError, match="model.safetensors: cannot be written .No space left"):
        save_model(tiny_gpt2(seed=2, **TINY), tokenizer, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError):
        save_model(model, tokenizer, folder.parent / "new")
    assert os.listdir(folder.parent / "new") == []
