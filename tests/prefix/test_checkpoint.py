"""Prefix files: they are read as they were written, and invalid ones are rejected in one line."""

import copy

import pytest
import torch
from conftest import random_ids, tiny_gpt2
from safetensors import safe_open
from safetensors.torch import save_file

from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint, same_model
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.files import FORMATS, load_prefix, save_prefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.precision import in_bf16

FORMAT = FORMATS["GPT-2"]


def a_prefix(model: GPT2, **options) -> Prefix:
    prefix = Prefix.random(model.config, 4, seed=0, mid_dim=16, **options)
    if prefix.gate is not None:
        torch.nn.init.uniform_(prefix.gate, 0.1, 2, torch.Generator().manual_seed(0))
    prefix.bind(model)
    return prefix


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
@torch.no_grad()
def test_round_trip(tmp_path, parametrisation, gate):
    model = tiny_gpt2(dtype=torch.float32)
    prefix = a_prefix(model, parametrisation=parametrisation, gate=gate, position_offset=7)
    prefix.linearisation, prefix.max_source = "paper", 9
    prefix.save(tmp_path / "a.safetensors")
    loaded = Prefix.load(tmp_path / "a.safetensors")
    assert (loaded.linearisation, loaded.max_source) == ("paper", 9)
    assert loaded.mlp is None and torch.equal(loaded.prefix_table, prefix.table())
    assert loaded.prefix_len == 4 and loaded.position_offset == 7
    assert loaded.base == prefix.base == fingerprint(model)
    assert (loaded.gate is not None) == gate
    if gate:
        assert torch.equal(loaded.gate, prefix.gate)
    ids = random_ids(model, 2, 5)
    assert torch.equal(model(ids, prefix=loaded), model(ids, prefix=prefix))
    loaded.check_base(model)
    assert {parameter.requires_grad for parameter in loaded.parameters()} == {True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_file_holds_an_fp32_table_and_nothing_else(tmp_path, dtype):
    """Also from an MLP; the memory order of its table is not that of the file."""
    model = tiny_gpt2()
    prefix = a_prefix(model, parametrisation="mlp").to(dtype)
    save_prefix(tmp_path / "a.safetensors", prefix)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["prefix_table"]
        assert torch.equal(file.get_tensor("prefix_table"), prefix.table().detach().float())
        metadata = file.metadata()
    assert metadata.pop("base") == fingerprint(model)
    assert metadata.pop("checksum").startswith("sha256:")
    expected = {"format": FORMAT, "position_offset": "4", "linearisation": "", "place": "prefix"}
    trained = sum(parameter.numel() for parameter in prefix.parameters())
    assert metadata == expected | {"parametrisation": "mlp", "trained_parameters": str(trained)}
    assert prefix.mlp.prefix_embd.dtype == dtype  # saving leaves the prefix as it was


def test_fingerprint_is_that_of_the_content():
    """The same for copies in fp32 and bf16; another for other weights, each of them."""
    model = tiny_gpt2(dtype=torch.bfloat16).float()
    name = fingerprint(model)
    assert len(name) == 64 and fingerprint(tiny_gpt2(dtype=torch.bfloat16)) == name
    assert fingerprint(model.double()) == name and fingerprint(model.train()) == name
    names = {name}
    for weight in model.parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.1)
        names.add(fingerprint(model))
        with torch.no_grad():
            weight.copy_(before)
    assert len(names) == 1 + len(list(model.parameters())) and fingerprint(model) == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prefix_belongs_to_copies_of_its_model_in_any_dtype(dtype):
    """Weights that a copy rounds: both are rounded the same way. Another model stays another."""
    model = tiny_gpt2(dtype=torch.float32)
    prefix = a_prefix(model)
    other = tiny_gpt2(seed=5)
    other_prefix = a_prefix(other)
    short = copy.deepcopy(model).to(dtype)
    prefix.check_base(short)
    assert same_model(fingerprint(short), fingerprint(model))
    a_prefix(short).check_base(model)
    for one, wrong in ((prefix, other.to(dtype)), (other_prefix, short), (other_prefix, model)):
        with pytest.raises(ValueError, match="another model"):
            one.check_base(wrong)
    # a file of an older version: 64 digits of the bf16 roundings
    prefix.base = fingerprint(model)[:32] + "0" * 32
    prefix.check_base(model)
    prefix.check_base(copy.deepcopy(model).to(torch.bfloat16))


def test_a_loaded_model_keeps_its_name_in_every_dtype_until_it_changes(tmp_path):
    """Of a checkpoint in fp32: what bf16 and fp16 lose of each other, `load` remembers."""
    from minprefix.models.weights import load, save_model

    model = tiny_gpt2(dtype=torch.float32, vocab_size=8192)
    save_model(model, load("mini")[1], tmp_path)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    loaded = [load(tmp_path, dtype=dtype)[0] for dtype in dtypes]
    assert {fingerprint(x) for x in loaded} == {fingerprint(model)}
    old = a_prefix(model)
    old.base = fingerprint(model)[:32] + "0" * 32
    old.check_base(loaded[2])
    assert fingerprint(loaded[0].half()) == fingerprint(model)
    assert fingerprint(in_bf16(model)) == fingerprint(model)
    with torch.no_grad():
        loaded[2].h[0].mlp.c_fc.weight += 0.1
    assert not same_model(fingerprint(loaded[2]), fingerprint(model))
    with pytest.raises(ValueError, match="another model"):
        old.check_base(loaded[2])


def test_fingerprint_sees_the_architecture():
    """Also where all weights have equal shapes."""
    names = {
        fingerprint(tiny_gpt2(**changes))
        for changes in ({}, {"n_head": 2}, {"layer_norm_epsilon": 1e-6})
    }
    assert len(names) == 3
    assert fingerprint(tiny_gpt2(n_inner=128)) == fingerprint(tiny_gpt2())  # 128 = 4 C, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_of_saved_models(tmp_path, dtype):
    """A safetensors and a .bin file, loaded in any dtype, are the same model."""
    from minprefix.models.weights import find, load, save_model

    _, tokenizer = load("mini", dtype=torch.bfloat16)
    model = tiny_gpt2(dtype=dtype, vocab_size=tokenizer.vocab_size)
    save_model(model, tokenizer, tmp_path)
    assert fingerprint(load(tmp_path)[0]) == fingerprint(model)
    assert fingerprint(load(tmp_path, dtype=torch.bfloat16)[0]) == fingerprint(model)
    weights = {f"transformer.{name}": weight for name, weight in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        weights | {"lm_head.weight": model.wte.weight.detach()}, tmp_path / "pytorch_model.bin"
    )
    assert fingerprint(load(find(tmp_path))[0]) == fingerprint(model)


def test_prefix_for_another_model(tmp_path):
    model, other = tiny_gpt2(seed=0), tiny_gpt2(seed=5)
    prefix = a_prefix(model)
    prefix.save(tmp_path / "a.safetensors")
    loaded = Prefix.load(tmp_path / "a.safetensors")
    for one in (loaded, PrefixBank([loaded])):
        one.check_base(model)
        with pytest.raises(ValueError) as error:
            one.check_base(other)
        assert "another model" in str(error.value) and "\n" not in str(error.value)
        assert fingerprint(model)[:12] in str(error.value)
        assert fingerprint(other)[:12] in str(error.value)
    Prefix.random(model.config, 4, seed=0).check_base(other)  # names no model: fits by its shape


TABLE = torch.zeros(3, 2, 4, 5, 8)
GOOD = {"format": FORMAT, "position_offset": "5", "base": ""}
WRONG_FILES = {
    "another format": (
        {"prefix_table": TABLE},
        {**GOOD, "format": "x-1"},
        "not a prefix file.*x-1",
    ),
    "a model's weights": ({"wte.weight": torch.zeros(97, 32)}, None, "not a prefix file"),
    "no table": ({"gate": torch.zeros(3, 4)}, GOOD, "prefix_table must be .* got None"),
    "four dimensions": ({"prefix_table": TABLE[0]}, GOOD, r"got \(2, 4, 5, 8\)"),
    "three of a kind": ({"prefix_table": TABLE.transpose(0, 1)}, GOOD, r"got \(2, 3, 4, 5, 8\)"),
    "P = 0": ({"prefix_table": TABLE[:, :, :, :0]}, GOOD, r"P > 0, got \(3, 2, 4, 0, 8\)"),
    "integers": ({"prefix_table": TABLE.int()}, GOOD, "prefix_table .* not finite numbers"),
    "nan": ({"prefix_table": TABLE / 0}, GOOD, "prefix_table .* not finite numbers"),
    "gate's shape": (
        {"prefix_table": TABLE, "gate": torch.zeros(4, 3)},
        GOOD,
        r"gate must be \(L, H\), got \(4, 3\)",
    ),
    "gate below 0": (
        {"prefix_table": TABLE, "gate": torch.full((3, 4), -1.0)},
        GOOD,
        "gate must be >= 0, got -1",
    ),
    "gate of nan": (
        {"prefix_table": TABLE, "gate": torch.full((3, 4), torch.nan)},
        GOOD,
        "gate .* not finite numbers",
    ),
    "another place": (
        {"prefix_table": TABLE},
        {**GOOD, "place": "suffix"},
        "place must be one of prefix, infix, got 'suffix'",
    ),
    "a number in words": (
        {"prefix_table": TABLE},
        {**GOOD, "trained_parameters": "many"},
        "trained_parameters must be .* 'many'",
    ),
    "no offset": ({"prefix_table": TABLE}, {"format": FORMAT}, "position_offset must be .* ''"),
    "linearisation": ({"prefix_table": TABLE}, {**GOOD, "linearisation": "x"}, "linearisation 'x'"),
    "offset below 0": ({"prefix_table": TABLE}, {**GOOD, "position_offset": "-1"}, "got '-1'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named(tmp_path, name):
    tensors, metadata, message = WRONG_FILES[name]
    path = tmp_path / "wrong.safetensors"
    save_file({k: x.contiguous() for k, x in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_prefix(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "damaged.safetensors"
    a_prefix(tiny_gpt2()).save(path)
    whole = path.read_bytes()
    for data in (
        b"",
        b"text\n",
        whole[:-1],
        whole[:7],
        whole[: len(whole) // 2],
        b"\xff" + whole[1:],
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_prefix(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), data[:9]
    with pytest.raises(OSError, match="nowhere.safetensors"):
        load_prefix(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: a folder; expected a file"):
        load_prefix(tmp_path)
    (tmp_path / "prefix.safetensors").touch()  # a run folder
    with pytest.raises(ValueError, match="a folder; give its file, .*/prefix.safetensors"):
        load_prefix(tmp_path)
