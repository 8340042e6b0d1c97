"""The gate, many prefixes in one batch, and the errors of prefixes."""

import pytest
import torch
from conftest import assert_close, random_ids, tiny_bart, tiny_gpt2
from test_prefix import Words, random_prefix

from minprefix.models.activations import LayerPrefix, Visible, gated_attention
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.parametrisations import token_activations
from minprefix.prefix.prefix import Prefix

TOLERANCE = 1e-12  # of the largest logit, other orders of summation in fp64; worst seen: 8.0e-16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_gated_start_is_the_frozen_model(dtype):
    """Bit for bit, padded or not, whatever the table holds."""
    model = tiny_gpt2(dtype=dtype)
    prefix = Prefix.random(model.config, 4, seed=0, gate=True).to(dtype)
    prefix.prefix_table *= 30
    ids = random_ids(model, 3, 9)
    for kv_lens in (None, torch.tensor([9, 1, 5])):
        frozen = model(ids, kv_lens=kv_lens)
        assert torch.equal(model(ids, prefix=prefix, kv_lens=kv_lens), frozen)


def test_gated_start_learns_the_gate_then_the_table():
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, 4, seed=0, gate=True).double()
    ids, labels = random_ids(model, 3, 9), random_ids(model, 3, 9, seed=1)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.01, weight_decay=0.0)
    model.token_losses(ids, labels, prefix=prefix).mean().backward()
    assert (prefix.gate.grad != 0).all() and not prefix.prefix_table.grad.any()
    wanted = prefix.gate.grad < 0  # (L, H): where a larger gate lowers the loss
    optimizer.step()
    assert (prefix.gate < 0).any()
    prefix.project()
    assert torch.equal(prefix.gate > 0, wanted) and (prefix.gate >= 0).all()
    optimizer.zero_grad()
    model.token_losses(ids, labels, prefix=prefix).mean().backward()
    grad = prefix.prefix_table.grad.permute(0, 2, 1, 3, 4)  # (L, H, 2, P, D)
    assert wanted.any() and (grad[wanted] != 0).all() and not grad[~wanted].any()


def test_gate_of_one_is_the_ungated_prefix():
    model = tiny_gpt2()
    plain = random_prefix(model)
    gated = Prefix.from_table(plain.table(), plain.position_offset, torch.ones(3, 4))
    ids, lengths, labels = random_ids(model, 3, 9), torch.tensor([9, 1, 5]), random_ids(model, 3, 9)
    real = torch.arange(9) < lengths[:, None]
    logits, exact = (model(ids, prefix=p, kv_lens=lengths)[real] for p in (gated, plain))
    assert_close(logits, exact, TOLERANCE)
    for prefix in (plain, gated):
        model.token_losses(ids, labels, prefix=prefix).mean().backward()
    # another order of summation in fp64; worst seen: 2.3e-17
    assert_close(gated.prefix_table.grad, plain.prefix_table.grad, 1e-14)


def literal_gated(q, k, v, prefix_k, prefix_v, gate, row_lens, kv_lens):
    """Softmax over [prefix; sequence] whose prefix terms weigh `gate` (B, H), query by query."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        P, S = row_lens[b], kv_lens[b]
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                n = min(S, i + 1)
                keys = torch.cat([prefix_k[b, h, :P], k[b, h, :n]])
                values = torch.cat([prefix_v[b, h, :P], v[b, h, :n]])
                s = keys @ q[b, h, i] * q.shape[-1] ** -0.5
                weights = torch.cat([gate[b, h].expand(P), torch.ones(n).to(q)])
                s = s - s[weights > 0].max()
                w = weights * s.exp().where(weights > 0, 0)
                out[b, h, i] = w / w.sum() @ values
    return out


@pytest.mark.parametrize("size", [1, 30, 1e4])  # of the scores: moderate, one-sided, extreme
@pytest.mark.parametrize("rows", ["one prefix", "bank, ragged"])
def test_gated_attention_equals_a_literal_softmax(rows, size):
    B, H, T, P, D, N = 3, 2, 5, 4, 8, 3
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = size * randn(B, H, T, D), randn(B, H, T, D), randn(B, H, T, D)
    kv_lens, options = torch.tensor([5, 1, 3]), {}
    if rows == "one prefix":
        prefix_k, prefix_v, gate = randn(H, P, D), randn(H, P, D), torch.tensor([0.0, 2.5])
        row, row_lens = None, [P] * B
        literal = [x.expand(B, *x.shape) for x in (prefix_k, prefix_v, gate)]
    else:
        prefix_k, prefix_v = randn(N, H, P, D), randn(N, H, P, D)
        gate, row = torch.tensor([[1.0, 0.3], [0.0, 7.0], [1e-6, 1e6]]), torch.tensor([2, -1, 1])
        options = {"prefix_index": row, "prefix_lens": torch.tensor([4, 2, 3])}
        literal, row_lens = [x[row] for x in (prefix_k, prefix_v, gate)], [3, 0, 2]
    tensors = [x.double().requires_grad_() for x in (q, k, v, prefix_k, prefix_v, gate)]
    visible = Visible(kv_lens=kv_lens, **options)
    o = gated_attention(*tensors[:3], LayerPrefix(*tensors[3:]), visible)
    exact = literal_gated(q, k, v, *(x.double() for x in literal), row_lens, kv_lens.tolist())
    # a score of 30 is off by 30 eps = 7e-15; past that, few terms count; worst seen: 1.1e-15
    assert_close(o, exact, 1e-13)
    for x in torch.autograd.grad(o, tensors, randn(B, H, T, D)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [0.0, 1e-30, 1.0, 1e30])
def test_gate_with_extreme_scores_is_finite(gate, dtype):
    """Either side may outweigh the other by exp(1e4)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 5, 8)] * 3 + [(2, 4, 8)] * 2
    tensors = [100 * torch.randn(x, generator=generator).to(dtype) for x in shapes]
    tensors = [x.requires_grad_() for x in (*tensors, torch.full((2,), gate))]
    o = gated_attention(*tensors[:3], LayerPrefix(*tensors[3:]), Visible())
    assert o.isfinite().all()
    for x in torch.autograd.grad(o.float().sum(), tensors):
        assert x.isfinite().all()


def bank_of(model, gates: bool) -> PrefixBank:
    """Different lengths, offsets and parametrisations; with and without a gate."""
    return PrefixBank(
        [
            random_prefix(model, 5, seed=0, gate=gates),
            random_prefix(model, 2, seed=1, position_offset=0),
            random_prefix(model, 3, seed=2, parametrisation="mlp", gate=gates, position_offset=9),
            random_prefix(model, 1, seed=3),
        ]
    )


@pytest.mark.parametrize("gates", [False, True])
def test_bank_rows_equal_each_alone(gates):
    model = tiny_gpt2()
    bank, index = bank_of(model, gates), torch.tensor([2, -1, 0, 1, 0, 3, 2])
    ids, lengths = random_ids(model, 7, 8), torch.tensor([8, 5, 1, 8, 7, 3, 2])
    labels = random_ids(model, 7, 8, seed=1).where(torch.arange(8) < lengths[:, None], -100)
    kwargs = {"prefix": bank, "prefix_index": index, "kv_lens": lengths}
    logits = model(ids, **kwargs)
    losses = model.token_losses(ids, labels, **kwargs)
    parameters = [x for prefix in bank.prefixes for x in prefix.parameters()]
    grads = torch.autograd.grad(losses.sum(), parameters)

    alone = 0
    for row, n in enumerate(index.tolist()):
        prefix, length = bank.prefixes[n] if n >= 0 else None, lengths[row]
        one, its_labels = ids[row : row + 1, :length], labels[row : row + 1, :length]
        assert_close(logits[row, :length], model(one, prefix=prefix)[0], TOLERANCE, f"row {row}")
        alone = alone + model.token_losses(one, its_labels, prefix=prefix).sum()
    for grad, exact in zip(grads, torch.autograd.grad(alone, parameters), strict=True):
        assert (grad != 0).all()
        # sums over rows in another order, in fp64; worst seen: 1.3e-15
        assert_close(grad, exact, 1e-13)


@torch.no_grad()
def test_bank_without_an_index_goes_row_by_row():
    model = tiny_gpt2()
    bank, ids = bank_of(model, True), random_ids(tiny_gpt2(), 4, 6)
    by_index = model(ids, prefix=bank, prefix_index=torch.arange(4))
    assert torch.equal(model(ids, prefix=bank), by_index)
    frozen = model(ids, prefix=bank, prefix_index=torch.full((4,), -1))
    assert_close(frozen, model(ids), TOLERANCE)


def test_bank_errors():
    model = tiny_gpt2()
    bank, ids = bank_of(model, False), random_ids(tiny_gpt2(), 3, 6)
    with pytest.raises(ValueError, match="at least one prefix"):
        PrefixBank([])
    with pytest.raises(ValueError, match="a list of prefixes, got one prefix"):
        PrefixBank(bank.prefixes[0])
    with pytest.raises(ValueError, match=r"prefix_index must be a tensor, got \[0, 1, 0\]"):
        model(ids, prefix=bank, prefix_index=[0, 1, 0])
    for index in ([0, 4, 0], [0, -2, 0]):
        with pytest.raises(ValueError, match=r"\[-1, 3\], got \[0, .*\]"):
            model(ids, prefix=bank, prefix_index=torch.tensor(index))
    with pytest.raises(ValueError, match=r"3 rows, the prefix index has shape \(2,\)"):
        model(ids, prefix=bank, prefix_index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"3 rows, the prefix index has shape \(4,\)"):
        model(ids, prefix=bank)
    for prefix in (None, bank.prefixes[0], bank.prefixes[0].activations()):
        with pytest.raises(ValueError, match="prefix_index needs a PrefixBank"):
            model(ids, prefix=prefix, prefix_index=torch.tensor([0, 0, 0]))
    wider = random_prefix(tiny_gpt2(n_layer=2))
    with pytest.raises(ValueError, match=r"fit one model.*\(3, 2, 4, 5, 8\), \(2, 2, 4, 4, 8\)"):
        PrefixBank([bank.prefixes[0], wider]).activations()
    with pytest.raises(ValueError, match="offset 9 . 56 tokens > 64 positions"):
        model(random_ids(model, 4, 56), prefix=bank)


def test_prefix_errors():
    model = tiny_gpt2(n_positions=16)
    config = model.config
    for make in (
        lambda: Prefix.random(config, 0, seed=0),
        lambda: Prefix.random(config, -1, seed=0, parametrisation="mlp"),
        lambda: Prefix.from_words(model, Words(), "some words", prefix_len=0),
    ):
        with pytest.raises(ValueError, match="prefix_len must be at least 1, got"):
            make()
    with pytest.raises(ValueError, match="parametrisation must be one of table, mlp.*'lora'"):
        Prefix.random(config, 3, seed=0, parametrisation="lora")
    for offset in (-1, 16):
        with pytest.raises(ValueError, match=rf"position_offset {offset} .* \[0, 16\)"):
            Prefix.random(config, 3, seed=0, position_offset=offset)
    with pytest.raises(ValueError, match=r"position_offset 16 \(prefix length 16\)"):
        Prefix.random(config, 16, seed=0)
    for wrong in (model, BARTConfig()):
        with pytest.raises(ValueError, match="needs the GPT2Config of its model, got a "):
            Prefix.random(wrong, 3, seed=0)
    for table in (torch.zeros(2, 3), torch.zeros(3, 2, 4, 5, 8, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"has the shape \(L, 2, H, P, D\) .* got \("):
            Prefix.from_table(table, 5)
    with pytest.raises(ValueError, match=r"the gate must be \(3, 4\), got \(2, 2\)"):
        Prefix.from_table(torch.zeros(3, 2, 4, 5, 8), 5, gate=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"the words must be a text, got \['some', 'words'\]"):
        Prefix.from_words(model, Words(), ["some", "words"])
    for make in (Prefix.from_words, Prefix.from_prompt):
        with pytest.raises(ValueError, match="Prefix is for GPT-2 only, and the model is a BART"):
            make(tiny_bart(), Words(), "some words")
    for empty in (Prefix.from_words, Prefix.from_prompt):
        with pytest.raises(ValueError, match="the text has no words to start"):
            empty(model, Words(), " ")
    with pytest.raises(ValueError, match="offset 0 . 17 tokens > 16 positions"):
        Prefix.from_words(model, Words(), "word", prefix_len=17)
    with pytest.raises(ValueError, match="prefix_len from the text, got prefix_len 3"):
        PrefixConfig(init="prompt", prefix_len=3)


@pytest.mark.parametrize("changes", [{"n_layer": 2}, {"n_head": 8}, {"n_embd": 64, "n_head": 4}])
def test_prefix_of_another_shape(changes):
    """Both shapes are in the message; so also where the sizes would broadcast."""
    model = tiny_gpt2()
    other = GPT2Config(**{**model.config.__dict__, **changes})
    prefix = Prefix.random(other, 5, seed=0).double()
    found, want = str(tuple(prefix.table().shape)), "L = 3, H = 4, D = 8"
    with pytest.raises(ValueError) as error:
        model(random_ids(model, 1, 4), prefix=prefix)
    assert found in str(error.value) and want in str(error.value)


def test_fp64_prefix_needs_an_fp64_model():
    model = tiny_gpt2(dtype=torch.float32)
    with pytest.raises(ValueError, match="float64.*float32"):
        model(random_ids(model, 1, 4), prefix=random_prefix(model))
    prefix = Prefix.random(model.config, 4, seed=0)  # fp32 serves every model
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype)(random_ids(model, 1, 4), prefix=prefix).dtype == dtype


def test_gated_prefix_from_a_prompt_keeps_the_models_positions():
    model = tiny_gpt2()
    config = PrefixConfig(init="prompt", init_text="a b c", parametrisation="table", gate=True)
    prefix = make_prefix(model, Words(), config, seed=0)
    assert prefix.position_offset == 0
    assert torch.equal(prefix.prefix_table, token_activations(model, [1, 1, 1]))
