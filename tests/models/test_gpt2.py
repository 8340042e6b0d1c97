"""GPT-2 against `transformers` in fp64; cache, activation checkpointing, causality, loss."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, hf_twin, random_ids, tiny_gpt2

from minprefix.models.cache import KVCache
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.losses import IGNORE
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.prefix import Prefix
from minprefix.training.blocks import wrap_blocks

TOLERANCE = 1e-12  # of the largest logit: other orders of summation in fp64; worst seen: 3.8e-15
CONFIGS = [
    {},
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 11, "bos_token_id": 0},
    {"n_inner": 40, "layer_norm_epsilon": 1e-3},
    {"n_head": 3, "n_embd": 36, "layer_norm_epsilon": 1e-12},
    {"n_head": 7, "n_embd": 35, "n_layer": 2, "n_positions": 17, "n_inner": 1},
]


def random_labels(model: GPT2, *shape: int, seed: int = 1) -> torch.Tensor:
    """Labels at about half of the positions, -100 elsewhere."""
    labels = random_ids(model, *shape, seed=seed)
    return labels.where(random_ids(model, *shape, seed=seed + 1) % 2 == 0, IGNORE)


@pytest.mark.parametrize("changes", CONFIGS)
def test_logits_equal_transformers(changes):
    model = tiny_gpt2(**changes)
    ids = random_ids(model, 3, 17)
    with torch.no_grad():
        assert_close(model(ids), hf_twin(model)(ids).logits, TOLERANCE)


def test_padded_batch_equals_transformers():
    model = tiny_gpt2()
    ids, lengths = random_ids(model, 3, 12), torch.tensor([12, 1, 7])
    real = torch.arange(12) < lengths[:, None]  # (B, T)
    with torch.no_grad():
        logits = model(ids, kv_lens=lengths)
        positions = torch.arange(12).expand(3, -1)
        exact = hf_twin(model)(ids, attention_mask=real.long(), position_ids=positions).logits
        assert_close(logits[real], exact[real], TOLERANCE)
        for row, length in enumerate(lengths):  # and each row alone
            assert_close(logits[row, :length], model(ids[row : row + 1, :length])[0], TOLERANCE)


@pytest.mark.parametrize("changes", CONFIGS[:3])
def test_weight_gradients_equal_transformers(changes):
    model = tiny_gpt2(**changes)
    twin, ids, labels = hf_twin(model), random_ids(model, 3, 9), random_labels(model, 3, 9)
    model.token_losses(ids, labels).mean().backward()
    F.cross_entropy(twin(ids).logits.flatten(0, 1), labels.flatten()).backward()
    exact = {k.removeprefix("transformer."): w.grad for k, w in twin.named_parameters()}
    for name, weight in model.named_parameters():
        # fp64 through all layers and back, relative to the largest entry; worst seen: 1.7e-15
        scale = exact[name].abs().max()
        assert scale > 0, name
        assert_close(weight.grad / scale, exact[name] / scale, 1e-12, name)


def test_token_losses_equal_cross_entropy_of_all_logits():
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, 4, seed=0).double()
    ids, labels = random_ids(model, 3, 9), random_labels(model, 3, 9)
    kwargs = {"prefix": prefix, "kv_lens": torch.tensor([9, 5, 2])}
    losses = model.token_losses(ids, labels, **kwargs)
    log_p = model(ids, **kwargs).log_softmax(-1)
    exact = [
        -log_p[b, t, labels[b, t]] for b in range(3) for t in range(9) if labels[b, t] != IGNORE
    ]
    assert 3 < len(exact) < 24
    assert_close(losses, torch.stack(exact), 1e-14)  # one log-sum-exp in fp64; worst seen: 0
    assert model.token_losses(ids, torch.full_like(ids, IGNORE), **kwargs).shape == (0,)


def test_token_losses_of_bf16_are_fp32():
    model = tiny_gpt2(dtype=torch.bfloat16)
    ids, labels = random_ids(model, 2, 5), random_ids(model, 2, 5, seed=1)
    assert model.token_losses(ids, labels).dtype == torch.float32


def cached_logits(model, ids, cuts, lengths, **kwargs):
    """Logits of each row's tokens, (B, T, V), read in steps: `lengths` (B,) first, then by cuts."""
    B, T = ids.shape
    cache = KVCache(model.config, B, T + max(cuts), like=model.wte.weight)
    out = torch.zeros(B, T + max(cuts), model.config.vocab_size, dtype=torch.float64)
    at, rows = torch.zeros(B, dtype=torch.long), torch.arange(B)[:, None]
    padded = F.pad(ids, (0, max(cuts)))
    for step in (int(lengths.max()), *cuts):
        where = at[:, None] + torch.arange(step)  # (B, step)
        new = lengths if not at.any() else None
        out[rows, where] = model(padded[rows, where], cache=cache, kv_lens=new, **kwargs)
        at = at + (step if new is None else new)
        assert torch.equal(cache.lengths, at)
    return out, at


@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 1, 3]])  # equal, ragged
@pytest.mark.parametrize("kind", ["none", "prefix", "gate", "bank"])
@torch.no_grad()
def test_cache_steps_equal_full_forward(kind, lengths):
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, 4, seed=0).double()
    gated = Prefix.random(model.config, 2, seed=1, gate=True, position_offset=5).double()
    gated.gate.fill_(0.5)
    index = torch.tensor([1, -1, 0])
    kwargs = {
        "none": {},
        "prefix": {"prefix": prefix},
        "gate": {"prefix": gated},
        "bank": {"prefix": PrefixBank([prefix, gated]), "prefix_index": index},
    }[kind]
    ids = random_ids(model, 3, 12)
    logits, at = cached_logits(model, ids, [1, 1, 3, 1], torch.tensor(lengths), **kwargs)
    assert at.tolist() == [n + 6 for n in lengths]
    exact = model(ids, **kwargs)
    for row, n in enumerate(at):
        assert_close(logits[row, :n], exact[row, :n], TOLERANCE)


@torch.no_grad()
def test_cache_select_keeps_rows():
    model, rows = tiny_gpt2(), torch.tensor([2, 0, 2, 1])
    ids, lengths, new = random_ids(model, 3, 6), torch.tensor([6, 2, 4]), random_ids(model, 4, 1)
    cache = KVCache(model.config, 3, 7, like=model.wte.weight)
    model(ids, cache=cache, kv_lens=lengths)
    cache.select(rows)
    logits = model(new, cache=cache)
    for row, old in enumerate(rows):
        alone = torch.cat([ids[old, : lengths[old]], new[row]])[None]
        assert_close(logits[row, 0], model(alone)[0, -1], TOLERANCE)


@pytest.mark.parametrize("training", [False, True])  # with dropout, the same one twice
@pytest.mark.parametrize("parametrisation", [None, "table", "mlp"])
def test_activation_checkpointing_changes_nothing(parametrisation, training):
    model = tiny_gpt2().train(training)
    ids, labels = random_ids(model, 3, 9), random_labels(model, 3, 9)
    prefix = None
    if parametrisation:
        options = {"parametrisation": parametrisation, "mid_dim": 16}
        prefix = Prefix.random(model.config, 4, seed=0, **options).double()
    calls, results = [], []
    model.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    parameters = [*model.parameters(), *(prefix.parameters() if prefix else [])]
    for recomputed in (False, True):
        wrap_blocks(model, recomputed=recomputed)
        torch.manual_seed(0)
        losses = model.token_losses(ids, labels, prefix=prefix, kv_lens=torch.tensor([9, 6, 3]))
        results.append([losses, *torch.autograd.grad(losses.sum(), parameters)])
    assert len(calls) == 3  # once, then twice: the backward pass computes the block again
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)  # the same operations in the same order


@pytest.mark.parametrize("prefix_len", [0, 4])
@torch.no_grad()
def test_causality(prefix_len):
    """A changed token t changes no output before t, and outputs at t and after it."""
    model = tiny_gpt2()
    prefix = Prefix.random(model.config, prefix_len, seed=0).double() if prefix_len else None
    ids = random_ids(model, 1, 8)
    before = model(ids, prefix=prefix)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
        moved = (model(changed, prefix=prefix) - before).abs().amax(-1)[0]  # (T,)
        assert (moved[:t] == 0).all() and (moved[t:] > 1e-6).all(), f"t = {t}: {moved}"


@torch.no_grad()
def test_padding_is_never_read():
    model, lengths = tiny_gpt2(), torch.tensor([8, 3])
    ids = random_ids(model, 2, 8)
    changed = ids.where(torch.arange(8) < lengths[:, None], 0)
    for prefix in (None, Prefix.random(model.config, 4, seed=0).double()):
        a, b = (model(x, prefix=prefix, kv_lens=lengths) for x in (ids, changed))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, :3], b[1, :3])


@torch.no_grad()
def test_too_long_names_the_numbers():
    model = tiny_gpt2(n_positions=16)
    prefix = Prefix.random(model.config, 5, seed=0).double()
    assert model(random_ids(model, 1, 16)).shape == (1, 16, 97)
    assert model(random_ids(model, 1, 11), prefix=prefix).shape == (1, 11, 97)
    with pytest.raises(ValueError, match="offset 0 . 17 tokens > 16 positions"):
        model(random_ids(model, 1, 17))
    with pytest.raises(ValueError, match="offset 5 . 12 tokens > 16 positions"):
        model(random_ids(model, 1, 12), prefix=prefix)
    cache = KVCache(model.config, 1, 20, like=model.wte.weight)
    model(random_ids(model, 1, 10), prefix=prefix, cache=cache)
    with pytest.raises(ValueError, match="offset 5 . 12 tokens > 16 positions"):
        model(random_ids(model, 1, 2), prefix=prefix, cache=cache)


@torch.no_grad()
def test_dropout_acts_in_train_mode_only():
    """Dropout on embeddings and on the outputs of layers; none inside attention, whatever
    attn_pdrop is."""
    for name in ("embd_pdrop", "resid_pdrop"):
        rates = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, name: 0.5}
        model = tiny_gpt2(**rates)
        ids = random_ids(model, 1, 8)
        quiet = model(ids)
        assert torch.equal(model(ids), quiet)
        model.train()
        assert not torch.equal(model(ids), model(ids)), name
        assert torch.equal(model.eval()(ids), quiet)
    model = tiny_gpt2(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.9)
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_random_start_is_gpt2s():
    """N(0, 0.02), 0.02 / sqrt(2 L) where a layer adds to the residual stream; the seed decides."""
    model = GPT2(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    model.init_weights(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.01 if name.endswith("c_proj.weight") else 0.02
            # 4,096 numbers or more: the relative error of std is below 1 / sqrt(8,192) = 1.1 %
            assert abs(weight.std().item() / std - 1) < 0.05, name
        else:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
    again = GPT2(model.config).init_weights(0).state_dict()
    assert [n for n, w in model.state_dict().items() if not torch.equal(again[n], w)] == []
    other = GPT2(model.config).init_weights(1)
    assert not torch.equal(other.wte.weight, model.wte.weight)


@pytest.mark.parametrize(
    "ids, found",
    [
        ([[1, 2]], "list"),
        (torch.tensor([1, 2]), r"\(2,\) of torch.int64"),
        (torch.tensor([[1.0, 2.0]]), r"\(1, 2\) of torch.float32"),
        (torch.tensor([[1, 2]], dtype=torch.int16), r"\(1, 2\) of torch.int16"),
    ],
)
def test_ids_of_another_form_are_named(ids, found):
    with pytest.raises(ValueError, match=f"the ids must be a tensor of shape .B, T. .*{found}"):
        tiny_gpt2()(ids)
    with pytest.raises(ValueError, match="an index or a length must be a tensor, got a list"):
        tiny_gpt2()(torch.tensor([[1, 2]]), kv_lens=[2])
