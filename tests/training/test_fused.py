"""Fused blocks and a padded head do not change losses, gradients and tokens, in fp64.

In fp64 the fused forms use PyTorch's own functions, so this tests only how they are connected;
`tests/kernels/test_layer_norm.py` runs them with the kernels.
"""

import copy

import pytest
import torch
from conftest import (
    an_adapter,
    assert_close,
    byte_model,
    byte_tokenizer,
    random_ids,
    tiny_bart,
    tiny_gpt2,
)
from test_fast_training import FORMS

from minprefix import generate, load
from minprefix.models.base import PADDED
from minprefix.models.losses import IGNORE
from minprefix.models.weights import fingerprint, save_model
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.training import blocks
from minprefix.training.blocks import wrap_blocks


def gpt2_result(model, form: str) -> list[torch.Tensor]:
    """Losses of ragged rows, with labels at some places, and the gradients of what is trained."""
    ids, labels = random_ids(model, 3, 12), random_ids(model, 3, 12, seed=1)
    labels[0, 7:], labels[1, :5], labels[2, 3] = IGNORE, IGNORE, IGNORE
    options, lens = {}, torch.tensor([7, 12, 12])
    if form == "bank":
        prefixes = [Prefix.random(model.config, n, n).to(model.wte.weight) for n in (3, 5)]
        prefix = PrefixBank(prefixes)
        options = {"prefix_index": torch.tensor([1, -1, 0])}
        leaves = [x for one in prefixes for x in one.parameters()]
    else:
        prefix = Prefix.random(model.config, 3, 0, **FORMS[form]).to(model.wte.weight)
        prefix.bind(model)
        leaves = list(prefix.parameters())
        if form == "infix":
            options = {"starts": torch.tensor([2, 6, 4])}
        if form == "gate":
            with torch.no_grad():
                prefix.gate += 0.5
    losses = model.token_losses(ids, labels, prefix=prefix, kv_lens=lens, **options)
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=form == "bank")
    return [losses.detach(), *(x for x in grads if x is not None)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "bank"])
def test_gpt2_on_and_off(form, recomputed, monkeypatch):
    plain = gpt2_result(tiny_gpt2().requires_grad_(False), form)
    model = tiny_gpt2().requires_grad_(False)
    model.pad_head()
    wrap_blocks(model, fused=True, recomputed=recomputed)
    for x, y in zip(gpt2_result(model, form), plain, strict=True):
        assert_close(x, y, 1e-14)  # fp64: another order of sums; worst seen 3e-16


def test_bart_on_and_off():
    """Its head has a bias; its norms come after the sums."""

    def result(model):
        prefix = BARTPrefix.random(model.config, 3, 0).to(model.wte.weight)
        ids, source = random_ids(model, 2, 8), random_ids(model, 2, 11, seed=1)
        labels = random_ids(model, 2, 8, seed=2)
        labels[0, 5:] = IGNORE
        options = {"source_ids": source, "source_lens": torch.tensor([11, 6]), "prefix": prefix}
        losses = model.token_losses(ids, labels, **options)
        logits = model(source, ids)
        grads = torch.autograd.grad(losses.sum(), list(prefix.parameters()))
        return [losses.detach(), logits.detach(), *grads]

    plain = result(tiny_bart().requires_grad_(False))
    model = tiny_bart().requires_grad_(False)
    model.pad_head()
    assert len(model.head_weights()[0]) == len(model.head_weights()[1]) == 128
    wrap_blocks(model, fused=True)
    for x, y in zip(result(model), plain, strict=True):
        assert_close(x, y, 1e-14)


@pytest.mark.parametrize("design", ["lin", "houlsby"])
def test_an_adapter_in_fused_blocks(design):
    """Its hooks are on blocks and their parts, which are called as before."""
    model = tiny_gpt2().requires_grad_(False)
    adapter, ids = an_adapter(model, design), random_ids(model, 2, 9)
    with adapter.attached(model):
        plain = model(ids)
        wrap_blocks(model, fused=True)
        assert_close(model(ids), plain, 1e-14)


def test_dropout_takes_the_plain_block(monkeypatch):
    model = tiny_gpt2().requires_grad_(False)
    wrap_blocks(model, fused=True)
    monkeypatch.setattr(blocks, "fused_form", None)  # it would fail
    model.train()(random_ids(model, 2, 5))


def test_a_padded_head_is_the_same_head(tmp_path):
    """In memory once; files, fingerprint, shapes and names are those without it."""
    model, tokenizer = byte_model().float(), byte_tokenizer()
    print_before, before = fingerprint(model), model.wte.weight.clone()
    save_model(model, tokenizer, tmp_path / "before")
    model.pad_head()
    weight, bias = model.head_weights()
    assert weight.shape == (320, 16) and bias is None and (weight[257:] == 0).all()
    assert weight.data_ptr() == model.wte.weight.data_ptr()
    assert torch.equal(model.wte.weight, before) and model.wte.weight.shape == (257, 16)
    assert model.head(torch.randn(2, 3, 16)).shape == (2, 3, 257)
    save_model(model, tokenizer, tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1] and fingerprint(model) == print_before
    again, _ = load(tmp_path / "after")
    assert torch.equal(again.wte.weight, before)
    model.pad_head()
    assert model.head_weights()[0] is weight  # once


def test_a_padding_that_is_no_longer_the_models_is_not_used():
    model = byte_model()
    model.pad_head()
    other, hidden = copy.deepcopy(model), torch.randn(4, 16).double()
    assert other not in PADDED and len(other.head_weights()[0]) == 257
    with torch.no_grad():
        other.wte.weight *= 2
    assert_close(other.head(hidden), 2 * model.head(hidden), 1e-14)
    model.to(torch.float32).to(torch.float64)  # other memory, nearly the same values
    assert len(model.head_weights()[0]) == 257 and model not in PADDED


def test_a_head_that_is_trained_gets_its_gradient():
    model, ids = byte_model().requires_grad_(), torch.arange(6)[None]
    exact = torch.autograd.grad(model(ids).sum(), model.wte.weight)[0]
    model.pad_head()
    assert_close(torch.autograd.grad(model(ids).sum(), model.wte.weight)[0], exact, 1e-14)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_the_same(beams, monkeypatch):
    model, tokenizer = byte_model(), byte_tokenizer()
    prefix = Prefix.random(model.config, 3, 0).double()
    prompts = ["name : The Eagle", "food", "area : riverside | name"]
    options = {"prefix": prefix, "num_beams": beams, "max_new_tokens": 12}
    plain = generate(model, tokenizer, prompts, **options)
    monkeypatch.setattr("minprefix.generation.fast.fuses", lambda x: True)
    wrap_blocks(model, fused=True)
    assert generate(model, tokenizer, prompts, **options) == plain
    assert model in PADDED


def test_a_model_that_has_generated_can_be_trained_with(monkeypatch):
    """Generation pads the head in inference mode, whose tensors no backward pass may read."""
    model, ids = byte_model(), torch.arange(6)[None]
    monkeypatch.setattr("minprefix.generation.fast.fuses", lambda x: True)
    generate(model, byte_tokenizer(), ["food"], max_new_tokens=2)
    prefix = Prefix.random(model.config, 3, 0).double()
    model.token_losses(ids, ids, prefix=prefix).sum().backward()
    assert model in PADDED and not model.wte.weight.is_inference()
