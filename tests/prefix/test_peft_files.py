"""PEFT's folders: we read what PEFT wrote, PEFT loads what we wrote; equal logits and tokens."""

import json
import warnings

import pytest
import torch
from conftest import (
    assert_close,
    files_up_to,
    hf_bart_twin,
    hf_twin,
    random_ids,
    tiny_bart,
    tiny_gpt2,
)
from safetensors.torch import load_file, save_file
from test_generation import EOS, hf_generate

from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.peft import read_peft, write_peft
from minprefix.prefix.prefix import Prefix

TOLERANCE = 1e-12  # of the largest logit, other orders of summation in fp64; worst seen: 1.1e-15
P = 5


def peft_loaded(model: GPT2, folder):
    """transformers' GPT-2 with our weights in fp64, and PEFT's prefix from the folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_twin(model), folder).eval()


def peft_saved(model: GPT2, folder, safe=True, **options):
    """A folder with a random prefix that PEFT itself made and saved."""
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(3)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    with warnings.catch_warnings(action="ignore"):  # the twin has no folder of its own
        get_peft_model(hf_twin(model), config).save_pretrained(folder, safe_serialization=safe)
    return folder


@torch.no_grad()
def assert_same_function(model: GPT2, prefix: Prefix, peft) -> None:
    """Logits of rows padded on the right, greedy tokens of a batch that PEFT pads on the left."""
    lengths = torch.tensor([9, 4, 1])
    ids, real = random_ids(model, 3, 9), torch.arange(9) < lengths[:, None]  # (B, T)
    logits, exact = model(ids, prefix=prefix, kv_lens=lengths), peft(ids, real.long()).logits
    assert_close(logits[real], exact[real], TOLERANCE)
    assert (exact - model(ids)).abs().max() > 0.1  # a prefix that changes something
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    options = {"max_new_tokens": 20, "num_beams": 1}
    ours = generate_ids(model, prompts, GenerationConfig(**options), EOS, prefix=prefix)
    assert ours == hf_generate(peft, prompts, EOS, **options)
    assert ours != generate_ids(model, prompts, GenerationConfig(**options), EOS)


@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
def test_peft_loads_what_we_write(tmp_path, parametrisation):
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, P, seed=1, parametrisation=parametrisation)
    write_peft(tmp_path / "a", prefix)
    assert_same_function(model, prefix.export(), peft_loaded(model, tmp_path / "a"))


@pytest.mark.parametrize("safe", [True, False])  # adapter_model.safetensors, adapter_model.bin
@pytest.mark.parametrize("projection", [False, True])
def test_we_read_what_peft_writes(tmp_path, projection, safe):
    """Also an MLP, of which PEFT saves the output."""
    model = tiny_gpt2()
    options = {"prefix_projection": projection, "encoder_hidden_size": 16}
    folder = peft_saved(model, tmp_path / "a", safe, **options)
    assert (folder / "adapter_model.bin").exists() != safe
    prefix = read_peft(folder)
    assert prefix.position_offset == P and prefix.base == ""
    assert_same_function(model, prefix, peft_loaded(model, folder))


def test_folders_of_old_versions(tmp_path):
    """Without the keys that PEFT added later."""
    folder = peft_saved(tiny_gpt2(), tmp_path)
    table = read_peft(folder).prefix_table
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    for key in ("init_weights", "peft_version", "auto_mapping", "revision", "modules_to_save"):
        del raw[key]
    path.write_text(json.dumps(raw))
    assert torch.equal(read_peft(folder).prefix_table, table)


def test_round_trips_are_exact(tmp_path):
    """PEFT's rows come back bit for bit, and so does a prefix with the data about its base."""
    folder = peft_saved(tiny_gpt2(), tmp_path / "a")
    write_peft(tmp_path / "b", read_peft(folder))
    theirs, ours = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert list(theirs) == list(ours) == ["prompt_embeddings"]
    assert torch.equal(theirs["prompt_embeddings"], ours["prompt_embeddings"])
    assert ours["prompt_embeddings"].shape == (P, 3 * 2 * 32)

    prefix = Prefix.random(tiny_gpt2().config, P, seed=1)
    prefix.bind(tiny_gpt2())
    prefix.linearisation = "paper"
    write_peft(tmp_path / "c", prefix, "some/model")
    again = read_peft(tmp_path / "c")
    assert torch.equal(again.prefix_table, prefix.prefix_table)
    assert (again.base, again.linearisation) == (prefix.base, "paper") and len(again.base) == 64
    raw = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("frozen", [0, 1, P])
def test_cartridges_are_read(tmp_path, frozen):
    """The same table, of which PEFT trains all but the first positions."""
    from peft import CartridgeConfig, get_peft_model

    model = tiny_gpt2()
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=frozen)
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(hf_twin(model), config).save_pretrained(tmp_path)
    assert_same_function(model, read_peft(tmp_path), peft_loaded(model, tmp_path))


def test_cartridges_are_written(tmp_path):
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, P, seed=1)
    write_peft(tmp_path / "a", prefix, kind="CARTRIDGE")
    peft = peft_loaded(model, tmp_path / "a")
    assert peft.peft_config["default"].num_frozen_tokens == 1
    assert_same_function(model, prefix, peft)
    assert torch.equal(read_peft(tmp_path / "a").prefix_table, prefix.prefix_table)


@pytest.mark.parametrize("n_layer", [2, 3])
def test_prefixes_of_bart_are_read(tmp_path, n_layer):
    """PEFT's SEQ_2_SEQ_LM: the decoder alone has a prefix, of rows in an order of its own; its
    text begins at P, the source at 0."""
    from peft import PrefixTuningConfig, get_peft_model

    model = tiny_bart(n_encoder_layer=n_layer, n_layer=n_layer)
    torch.manual_seed(3)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    with warnings.catch_warnings(action="ignore"):
        peft = get_peft_model(hf_bart_twin(model), config).double().eval()
        peft.save_pretrained(tmp_path)
    prefix = read_peft(tmp_path)
    prefix.save(tmp_path / "own.safetensors")
    for one in (prefix, BARTPrefix.load(tmp_path / "own.safetensors"), prefix.export()):
        assert [*one.sites] == ["decoder"] and (one.position_offset, one.source_offset) == (P, 0)
        source, target = random_ids(model, 2, 9), random_ids(model, 2, 6, seed=1)
        with torch.no_grad():
            real = torch.ones_like(source)
            exact = peft(source, attention_mask=real, decoder_input_ids=target).logits
            assert_close(model(source, target, prefix=one), exact, TOLERANCE)
            assert (exact - model(source, target)).abs().max() > 0.1
    with pytest.raises(ValueError, match="a BART's prefix cannot become PEFT's"):
        write_peft(tmp_path / "b", prefix)


def test_what_peft_cannot_compute_is_refused(tmp_path):
    config = tiny_gpt2().config
    for options, message in (
        ({"gate": True, "position_offset": P}, "no gate.*--no-gate"),
        ({"place": "infix"}, "no infix.*--place prefix"),
        ({"position_offset": 0}, f"position P = {P}, with this prefix at 0.*--position-offset {P}"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            write_peft(tmp_path / "a", Prefix.random(config, P, seed=0, **options))
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


ROWS = torch.randn(P, 192, generator=torch.Generator().manual_seed(0))
WRONG_CONFIGS = {
    "another method": ({"peft_type": "LORA"}, "peft_type is 'LORA'; supported: 'PREFIX_TUNING'"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "one submodule": ({"task_type": "SEQ_2_SEQ_LM"}, "num_transformer_submodules is 1"),
    "two submodules": ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'."),
    "no size": ({"num_layers": None}, "num_layers must be a number >= 1, got None"),
    "a text as size": ({"token_dim": "32"}, "token_dim must be a number >= 1, got '32'"),
    "P = 0": ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a number >= 1, got 0"),
    "heads": ({"num_attention_heads": 5}, "token_dim 32 is not a multiple of num_attention_heads"),
    "P": ({"num_virtual_tokens": 6}, r"is \(5, 192\), but .* says \(6, .* = \(6, 192\)"),
    "L": ({"num_layers": 4}, r"is \(5, 192\), but .* \(5, 2 x 4 layers x 32\) = \(5, 256\)"),
}
WRONG_TENSORS = {
    "no such tensor": ({"a": ROWS, "b": ROWS + 1}, "prompt_embeddings is missing; found a, b"),
    "no tensor": ({}, "prompt_embeddings is missing; found nothing"),
    "a flat one": ({"prompt_embeddings": ROWS.flatten()}, r"prompt_embeddings is \(960,\)"),
    "nan": ({"prompt_embeddings": ROWS / 0 * 0}, "prompt_embeddings .* not finite numbers"),
    "integers": ({"prompt_embeddings": ROWS.int()}, "prompt_embeddings .* not finite numbers"),
}


@pytest.fixture
def folder(tmp_path):
    """A good one, to damage."""
    write_peft(tmp_path / "good", Prefix.random(tiny_gpt2().config, P, seed=1))
    return tmp_path / "good"


def refused(folder, message: str, kind=ValueError) -> None:
    with pytest.raises(kind, match=message) as error:
        read_peft(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_configs_are_named(folder, name):
    changes, message = WRONG_CONFIGS[name]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, message)


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_named(folder, name):
    tensors, message = WRONG_TENSORS[name]
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, message)


def test_damaged_folders_are_named(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for data in (b"", b"text\n", whole[:-1], whole[: len(whole) // 2]):
        weights.write_bytes(data)
        refused(folder, "truncated, or not a safetensors file")
    weights.unlink()
    refused(folder, "adapter_model.safetensors .or adapter_model.bin. is missing", OSError)
    (folder / "adapter_model.bin").write_bytes(b"text\n")
    refused(folder, "adapter_model.bin: damaged")
    config.write_text("{")
    refused(folder, "adapter_config.json:1: not valid JSON")
    config.unlink()
    refused(folder, "adapter_config.json", OSError)


def test_an_unknown_linearisation_is_named(folder):
    save_file(
        {"prompt_embeddings": ROWS}, folder / "adapter_model.safetensors", {"linearisation": "x"}
    )
    refused(folder, "unknown linearisation 'x'")


def test_another_base_model_is_named(tmp_path):
    """Grouped-query attention: PEFT's num_attention_heads are the heads of keys and values."""
    prefix = Prefix.random(GPT2Config(n_layer=3, n_head=2, n_embd=16), P, seed=0)
    write_peft(tmp_path, prefix)
    prefix = read_peft(tmp_path)
    with pytest.raises(
        ValueError, match="3 layers with 2 heads of 8 .* has 3 with 4 of 8.*grouped"
    ):
        prefix.check_fit(tiny_gpt2().config)
    prefix_config = GPT2Config(n_layer=3, n_head=2, n_embd=16, n_positions=5)
    with pytest.raises(ValueError, match="position_offset 5 leaves no room in the 5 positions"):
        prefix.check_fit(prefix_config)


def test_a_failed_write_leaves_the_earlier_folder(folder):
    earlier = {path: path.read_bytes() for path in folder.iterdir()}
    later = Prefix.random(tiny_gpt2().config, 40, seed=1)
    for target in (folder, folder.parent / "new"):
        with files_up_to(8192), pytest.raises(OSError, match="adapter_model.safetensors"):
            write_peft(target, later)
    assert {path: path.read_bytes() for path in folder.iterdir()} == earlier
    assert [path.name for path in folder.parent.iterdir()] == ["good"]
