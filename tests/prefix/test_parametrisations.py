"""Embedding-only: virtual tokens against `transformers`, their initialisation, model and files."""

import copy

import pytest
import torch
from conftest import assert_close, hf_twin, random_ids, tiny_gpt2
from test_prefix import Words, assert_equals_prompt

from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.parametrisations import computed_table, token_activations
from minprefix.prefix.prefix import Prefix

KINDS = ["embedding", "embedding-mlp"]


def virtual_prefix(model: GPT2, kind: str = "embedding", P: int = 4, **options) -> Prefix:
    options = {"mid_dim": 8, "seed": 0, **options}
    prefix = Prefix.random(model.config, P, parametrisation=kind, **options).double()
    prefix.bind(model)
    return prefix


def loss_of(model: GPT2, prefix: Prefix) -> torch.Tensor:
    ids, labels = random_ids(model, 3, 9), random_ids(model, 3, 9, seed=1)
    return model.token_losses(ids, labels, prefix=prefix).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind):
    """Logits and gradients of [virtual embeddings; embeddings of the text], positions 0, 1, ..."""
    model = tiny_gpt2()
    twin, prefix = hf_twin(model), virtual_prefix(model, kind)
    ids, labels = random_ids(model, 3, 9), random_ids(model, 3, 9, seed=1)
    virtual = prefix.virtual
    embd = virtual.virtual_embd if kind == "embedding" else virtual.mlp.rows()
    whole = torch.cat([embd.expand(3, -1, -1), twin.transformer.wte(ids)], dim=1)
    exact = twin(inputs_embeds=whole).logits[:, 4:]
    # another order of summation in fp64; worst seen: 8.3e-16
    assert_close(model(ids, prefix=prefix), exact, 1e-12)
    loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum")
    names, parameters = zip(*prefix.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    got = torch.autograd.grad(loss_of(model, prefix), parameters)
    for name, x, y in zip(names, got, expected, strict=True):
        assert (x != 0).all(), name
        assert_close(x / y.abs().max(), y / y.abs().max(), 1e-10, name)  # worst seen: 2.1e-15


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_words_give_exactly_the_hard_prompt(kind):
    """Step 0 is the prompt: its embeddings, copied or fitted."""
    model, prompt = tiny_gpt2(), "the name and the food of a place"
    assert_equals_prompt(model, Words(), prompt, parametrisation=kind, mid_dim=16)
    prefix = Prefix.from_words(model, Words(), prompt, 10, parametrisation=kind, mid_dim=16)
    ids = (Words().encode(prompt) * 2)[:10]
    exact = model.wte.weight[ids]
    if kind == "embedding":
        assert torch.equal(prefix.virtual.virtual_embd, exact) and prefix.init_residual == 0
    else:  # a solve in fp64; seen: 9.3e-16
        rest = (prefix.virtual.mlp.rows() - exact).abs().max().item()
        assert rest == prefix.init_residual < 1e-12
    few = Prefix.from_words(model, Words(), prompt, 10, parametrisation="embedding-mlp", mid_dim=1)
    assert few.init_residual > 0.01


def test_the_model_is_borrowed():
    """It is no part of the prefix, copies share it, and each can be bound to another."""
    model = tiny_gpt2()
    prefix = virtual_prefix(model)
    assert list(prefix.state_dict()) == ["virtual.virtual_embd"]
    assert [name for name, _ in prefix.named_parameters()] == ["virtual.virtual_embd"]
    assert list(prefix.modules()) == [prefix, prefix.virtual]
    other, table = copy.deepcopy(prefix), prefix.table()
    assert other.virtual.model_reference.model is model and torch.equal(other.table(), table)
    other.bind(tiny_gpt2(seed=1))
    assert not torch.equal(other.table(), table) and torch.equal(prefix.table(), table)
    with pytest.raises(ValueError, match=r"bind\(model\) first"):
        Prefix.random(model.config, 4, seed=0, parametrisation="embedding").table()


def test_no_dropout_and_no_other_mode():
    model = tiny_gpt2()
    prefix = virtual_prefix(model)
    table = prefix.table()
    model.train()
    assert torch.equal(prefix.table(), table) and model.training


@torch.no_grad()
def test_a_model_in_bf16():
    """Parameters and table stay fp32; the model rounds: 8 bits, through three layers."""
    exact, model = tiny_gpt2(), tiny_gpt2(dtype=torch.bfloat16)
    prefix = virtual_prefix(model).float()
    assert {p.dtype for p in prefix.parameters()} == {prefix.table().dtype} == {torch.float32}
    with torch.enable_grad():
        loss_of(model, prefix).backward()
    assert prefix.virtual.virtual_embd.grad.dtype == torch.float32
    table = computed_table(exact, prefix.virtual.virtual_embd.double())
    error = (prefix.table() - table).abs().max() / table.abs().max()
    assert 1e-4 < error < 0.03  # seen: 0.0056


@torch.no_grad()
def test_export_files_and_banks_use_its_table(tmp_path):
    model = tiny_gpt2()
    prefix, plain = virtual_prefix(model), Prefix.random(model.config, 6, seed=5).double()
    ids = random_ids(model, 3, 9)
    exact = model(ids, prefix=prefix)
    exported = prefix.export()
    assert exported.virtual is None and torch.equal(model(ids, prefix=exported), exact)
    bank = PrefixBank([plain, prefix])
    logits = model(ids, prefix=bank, prefix_index=torch.tensor([1, -1, 0]))
    for row, alone in enumerate((prefix, None, plain)):
        assert_close(logits[row], model(ids, prefix=alone)[row], 1e-12)  # worst seen: 6.9e-16
    prefix.save(tmp_path / "a.safetensors")
    loaded = Prefix.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.prefix_table, prefix.table().float())
    assert (loaded.parametrisation, loaded.n_trained) == ("embedding", 4 * 32)


def test_gate_works_with_virtual_tokens():
    """At 0 the frozen model, bit for bit; then both learn."""
    model = tiny_gpt2()
    prefix, ids = virtual_prefix(model, gate=True), random_ids(model, 2, 6)
    assert torch.equal(model(ids, prefix=prefix), model(ids))
    torch.nn.init.constant_(prefix.gate, 0.5)
    loss_of(model, prefix).backward()
    assert [name for name, p in prefix.named_parameters() if (p.grad == 0).any()] == []


def test_make_prefix_binds_virtual_tokens():
    model = tiny_gpt2()
    for init in ("random", "words", "prompt"):
        config = PrefixConfig(parametrisation="embedding", init=init, init_text="some words")
        prefix = make_prefix(model, Words(), config, seed=0)
        assert prefix.table().shape[3] == prefix.prefix_len == (2 if init == "prompt" else 10)
    embd = make_prefix(
        model, Words(), PrefixConfig(parametrisation="embedding", init="random"), seed=0
    ).virtual
    # 320 numbers of N(0, 1): standard error of their std 0.04
    assert abs(embd.virtual_embd.std() - 1) < 0.2


def test_activations_are_without_dropout_whatever_mode_a_part_is_in():
    model = tiny_gpt2().eval()
    expected = token_activations(model, [1, 2, 3])
    model.h[1].train()
    assert torch.equal(token_activations(model, [1, 2, 3]), expected)
    assert model.h[1].drop.training and not model.h[0].drop.training and not model.training
