"""Adapter files, and errors of the baselines, each in one line."""

import pytest
import torch
from conftest import an_adapter, another_model, pairs, random_ids, small_model, tiny_gpt2, trainer
from safetensors.torch import save_file

from minprefix.methods.adapters import FORMAT, Adapter, TunedAdapter, count
from minprefix.methods.config import DESIGNS, BaselineConfig
from minprefix.methods.top_layers import TopLayers, TunedTopLayers
from minprefix.models.base import ATTACHED
from minprefix.models.weights import fingerprint
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors
from minprefix.training.blocks import unwrap_blocks, wrap_blocks
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_round_trip(tmp_path, design):
    model = tiny_gpt2(dtype=torch.float32, layer_norm_epsilon=3e-4)
    adapter, ids = an_adapter(model, design), random_ids(model, 2, 7)
    adapter.linearisation, adapter.max_source = "paper", 9
    adapter.save(tmp_path / "a.safetensors")
    loaded = Adapter.load(tmp_path / "a.safetensors")
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert sum(x.numel() for x in tensors.values()) == count(adapter) == count(loaded)
    assert metadata == {
        "format": FORMAT, "design": design, "bottleneck": "5", "base": fingerprint(model),
        "layer_norm_epsilon": "0.0003", "linearisation": "paper", "max_source": "9",
    }  # fmt: skip
    assert (loaded.linearisation, loaded.max_source) == ("paper", 9)
    assert loaded.base == fingerprint(model)
    assert {weight.requires_grad for weight in loaded.parameters()} == {True}
    with adapter.attached(model):
        logits = model(ids)
    loaded.attach(model)
    assert torch.equal(model(ids), logits)


@torch.no_grad()
def test_an_adapter_for_another_model_is_refused():
    model, other = tiny_gpt2(), tiny_gpt2(seed=5)
    adapter = an_adapter(model)
    with pytest.raises(ValueError) as error:
        adapter.attach(other)
    for name in (fingerprint(model)[:12], fingerprint(other)[:12]):
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3 layers of width 32, the model has 2 of width 32"):
        adapter.attach(tiny_gpt2(n_layer=2))
    assert model not in ATTACHED and other not in ATTACHED


def wrong_files(adapter: Adapter) -> dict:
    tensors = {name: x.detach().clone() for name, x in adapter.state_dict().items()}
    good = {"format": FORMAT, "design": "lin", "bottleneck": "5", "base": "",
            "layer_norm_epsilon": "1e-5"}  # fmt: skip
    less = {name: x for name, x in tensors.items() if name != "h.1.block.up.bias"}
    return {
        "not an adapter file .*'x-1'": (tensors, {**good, "format": "x-1"}),
        "not an adapter file .*None": (tensors, None),
        "unknown design 'x'": (tensors, {**good, "design": "x"}),
        "the tensors do not fit design 'houlsby'": (tensors, {**good, "design": "houlsby"}),
        "bottleneck '6'": (tensors, {**good, "bottleneck": "6"}),
        "layer_norm_epsilon must": (tensors, {**good, "layer_norm_epsilon": "x"}),
        r"h.1.block.up.bias is None, must be \(32,\)": (less, good),
        r"more is \(1,\), must be None": ({**tensors, "more": torch.zeros(1)}, good),
        "the tensors do not fit design 'lin'": ({"wte.weight": torch.zeros(2, 2)}, good),
        "h.0.block.ln.bias .* not finite": (
            {**tensors, "h.0.block.ln.bias": torch.full((32,), torch.nan)},
            good,
        ),
        "linearisation 'x'": (tensors, {**good, "linearisation": "x"}),
    }


@pytest.mark.parametrize("message", wrong_files(Adapter(tiny_gpt2().config, 5)))
def test_wrong_files_are_named(tmp_path, message):
    tensors, metadata = wrong_files(an_adapter(tiny_gpt2()))[message]
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        Adapter.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_layers": 0}, "top_layers must be at least 1, got 0"),
        ({"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
        ({"adapter_design": "x"}, "adapter_design must be one of lin, houlsby, got 'x'"),
        ({"adapter_share": 0.0}, r"adapter_share must lie in \(0, 1\], got 0.0"),
        ({"adapter_share": float("nan")}, "adapter_share .* got nan"),
        ({"adapter_share": 0.1, "bottleneck": 3}, "bottleneck 3 and adapter_share 0.1 both"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**options)


def test_what_does_not_go_together_is_refused(tokenizer, tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match=r"top_layers must lie in \[1, 2\].* got 3"):
        TopLayers(model, 3)
    with pytest.raises(ValueError, match="compile does not work with method adapter"):
        TrainConfig(method="adapter", compile=True)
    adapter, layers = TunedAdapter(an_adapter(model)), TunedTopLayers(TopLayers(model))
    wrong = {
        "'prefix' does not train a TunedModel": ("prefix", None),
        "'adapter' does not train a TunedModel": ("adapter", None),
        "'adapter' does not train a TunedTopLayers": ("adapter", layers),
        "'finetune' does not train a TunedAdapter": ("finetune", adapter),
        "'adapter' does not train a TunedPrefix": ("adapter", Prefix.random(model.config, 2, 0)),
        "belong to another model": ("ft-top", TunedTopLayers(TopLayers(small_model()))),
        "this adapter was made for another": ("adapter", TunedAdapter(an_adapter(another_model()))),
    }
    for message, (method, tuned) in wrong.items():
        config = TrainConfig(method=method, steps=1)
        with pytest.raises(ValueError, match=message):
            Trainer(model, tokenizer, config, pairs(4), [], tmp_path, tuned)
    wrap_blocks(model, compiled=True)
    with pytest.raises(ValueError, match="layers that are not compiled"):
        an_adapter(model).attach(model)
    unwrap_blocks(model)
    an_adapter(model).attach(model)
    with pytest.raises(ValueError, match="detach it first"):
        trainer(tokenizer, tmp_path, model=model)
