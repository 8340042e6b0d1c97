"""One prefix: against PEFT, against equation (3) written out, its initialisation, its gradients."""

import copy

import pytest
import torch
from conftest import assert_close, hf_twin, random_ids, tiny_gpt2

from minprefix.models.gpt2 import GPT2
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.parametrisations import token_activations
from minprefix.prefix.prefix import Prefix

TOLERANCE = 1e-12  # of the largest logit, other orders of summation in fp64; worst seen: 1.4e-15


class Words:
    """A tokenizer: one token a word, its length."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def random_prefix(model: GPT2, prefix_len: int = 4, seed: int = 0, **options) -> Prefix:
    options = {"mid_dim": 16, **options}
    prefix = Prefix.random(model.config, prefix_len, seed, **options).double()
    if prefix.gate is not None:
        torch.nn.init.uniform_(prefix.gate, 0.1, 2, torch.Generator().manual_seed(seed))
    return prefix


def peft_twin(twin, table: torch.Tensor):
    """The same prefix in PEFT: row p holds feature ((2 l + kv) H + h) D + d."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=table.shape[3])
    peft = get_peft_model(twin, config).double()  # PEFT keeps its table in fp32
    weight = peft.prompt_encoder["default"].embedding.weight  # (P, L 2 H D)
    L, _, H, P, D = table.shape
    with torch.no_grad():
        for p in range(P):
            for layer in range(L):
                for kv in range(2):
                    for h in range(H):
                        at = ((2 * layer + kv) * H + h) * D
                        weight[p, at : at + D] = table[layer, kv, h, p]
    return peft, weight


def assert_equals_peft(model: GPT2, twin, prefix_len: int) -> None:
    prefix = random_prefix(model, prefix_len)
    assert prefix.position_offset == prefix_len
    peft, weight = peft_twin(twin, prefix.prefix_table)
    ids, lengths = random_ids(model, 3, 9), torch.tensor([9, 4, 1])
    real = torch.arange(9) < lengths[:, None]  # (B, T)
    labels = random_ids(model, 3, 9, seed=1)
    logits, exact = model(ids, prefix=prefix, kv_lens=lengths), peft(ids, real.long()).logits
    assert_close(logits[real], exact[real], TOLERANCE)

    model.token_losses(
        ids, labels.where(real, -100), prefix=prefix, kv_lens=lengths
    ).sum().backward()
    torch.nn.functional.cross_entropy(exact[real], labels[real], reduction="sum").backward()
    ours = prefix.prefix_table.grad.permute(3, 0, 1, 2, 4).flatten(1)  # (P, L 2 H D)
    scale = weight.grad.abs().max()
    # fp64 through all layers and back, of the largest entry; the promise is 1e-10; seen: 1.1e-14
    assert_close(ours / scale, weight.grad / scale, 1e-12)


@pytest.mark.parametrize("prefix_len", [1, 5])
def test_equals_peft(prefix_len):
    model = tiny_gpt2()
    assert_equals_peft(model, hf_twin(model), prefix_len)


def test_mini_equals_peft():
    from transformers import GPT2LMHeadModel

    from minprefix.models.weights import find, load

    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    twin = GPT2LMHeadModel.from_pretrained(find("mini"), **options).eval()
    assert_equals_peft(load("mini", dtype=torch.float64)[0], twin, 10)


def literal_logits(
    model: GPT2, ids: list[int], table, offset: int, gate=None, start: int = 0
) -> torch.Tensor:
    """Equation (3), token by token and head by head: (T, V).

    h_i holds one key and one value per layer and head; for i in P_idx they come from the table, for
    tokens from the model. Token `start` is the first one after P_idx; it and later tokens stand
    `offset` positions further on. Softmax terms of P_idx weigh `gate` (L, H) times their value.
    """
    L, _, H, P, D = table.shape
    end = start + P  # of P_idx
    keys = [[[] for _ in range(H)] for _ in range(L)]
    values = [[[] for _ in range(H)] for _ in range(L)]
    logits = []
    for t, token in enumerate(ids):
        x = model.wte.weight[token] + model.wpe.weight[t + offset * (t >= start)]  # (C,)
        for n, block in enumerate(model.h):
            q, k, v = block.attn.c_attn(block.ln_1(x)).view(3, H, D)
            heads = []
            for h in range(H):
                if t == start:
                    keys[n][h].extend(table[n, 0, h])
                    values[n][h].extend(table[n, 1, h])
                keys[n][h].append(k[h])
                values[n][h].append(v[h])
                scores = torch.stack([q[h] @ key / D**0.5 for key in keys[n][h]])
                weights = (scores - scores.max()).exp()
                if gate is not None:
                    seen = gate[n, h] * weights[start:end]
                    weights = torch.cat([weights[:start], seen, weights[end:]])
                heads.append(weights / weights.sum() @ torch.stack(values[n][h]))
            x = x + block.attn.c_proj(torch.cat(heads))
            x = x + block.mlp(block.ln_2(x))
        logits.append(model.wte.weight @ model.ln_f(x))
    return torch.stack(logits)


@pytest.mark.parametrize("offset", [0, 3, 20])
@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
@pytest.mark.parametrize("gate", [False, True])
@torch.no_grad()
def test_equals_equation_3(gate, parametrisation, offset):
    model = tiny_gpt2()
    options = {"parametrisation": parametrisation, "gate": gate, "position_offset": offset}
    prefix = random_prefix(model, 3, **options)
    ids = random_ids(model, 2, 6)
    logits = model(ids, prefix=prefix)
    for row in range(2):
        exact = literal_logits(model, ids[row].tolist(), prefix.table(), offset, prefix.gate)
        assert_close(logits[row], exact, TOLERANCE)


@torch.no_grad()
def assert_equals_prompt(model: GPT2, tokenizer, prompt: str, **options) -> None:
    words = tokenizer.encode(prompt)
    prefix = Prefix.from_prompt(model, tokenizer, prompt, **options)
    P = len(words)
    assert (prefix.prefix_len, prefix.position_offset) == (P, P)
    ids = random_ids(model, 2, 7)
    whole = torch.cat([torch.tensor([words, words]), ids], dim=1)
    # the promise is 1e-10; another order of summation in fp64; worst seen: 3.7e-15
    assert_close(model(ids, prefix=prefix), model(whole)[:, P:], 1e-12)


def test_from_prompt_equals_the_prompt():
    assert_equals_prompt(tiny_gpt2(), Words(), "the name and the food of a place in words")
    assert_equals_prompt(tiny_gpt2(), Words(), "one")
    mlp = {"parametrisation": "mlp", "mid_dim": 16}
    assert_equals_prompt(tiny_gpt2(), Words(), "the name and the food", **mlp)


@torch.no_grad()
def test_from_words_repeats_or_cuts_the_words():
    model, words = tiny_gpt2(), "a word or more"
    ids = Words().encode(words)
    for prefix_len, expected in ((None, ids), (2, ids[:2]), (10, ids + ids + ids[:2])):
        prefix = Prefix.from_words(model, Words(), words, prefix_len)
        assert torch.equal(prefix.table(), token_activations(model, expected))
        assert prefix.prefix_len == prefix.position_offset == len(expected)
        prefix.check_base(model)


def test_token_activations_are_the_models_own():
    """Keys and values of token i at position i, read from the layers by hooks.

    Without dropout even if the model is in train mode, and the mode is kept.
    """
    model, ids, seen = tiny_gpt2().train(), [5, 7, 11], []
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda *a: seen.append(a[2].detach()))
    table = token_activations(model, ids)
    assert model.training and not table.requires_grad
    for layer, qkv in enumerate(list(seen)):  # (1, P, 3 C)
        k, v = qkv.view(3, 3, 4, 8)[:, 1:].permute(1, 2, 0, 3)  # each (H, P, D)
        assert torch.equal(table[layer, 0], k) and torch.equal(table[layer, 1], v)
    assert torch.equal(token_activations(model.eval(), ids), table)
    assert token_activations(tiny_gpt2(dtype=torch.bfloat16), ids).dtype == torch.float32


@pytest.mark.parametrize(
    "prefix_len, mid_dim, exact", [(4, 16, True), (8, 8, True), (12, 2, False)]
)
@torch.no_grad()
def test_mlp_from_words_reports_its_residual(prefix_len, mid_dim, exact):
    model, words = tiny_gpt2(), "a word or more than that in one text of twelve !"
    options = {"parametrisation": "mlp", "mid_dim": mid_dim}
    prefix = Prefix.from_words(model, Words(), words, prefix_len, **options)
    target = Prefix.from_words(model, Words(), words, prefix_len).table()
    residual = (prefix.table() - target).abs().max().item()
    assert prefix.init_residual == residual
    # a solve in fp64, for values of order 1; worst seen: 4.2e-15, times its condition number
    assert residual < 1e-12 if exact else residual > 0.1


@torch.no_grad()
def test_mlp_fit_is_least_squares():
    """Past P = mid_dim no other last layer is nearer: the residual is orthogonal to its inputs."""
    model = tiny_gpt2()
    prefix = random_prefix(model, 12, parametrisation="mlp", mid_dim=3)
    target = random_prefix(model, 12, seed=1).table()
    prefix.mlp.fit_last_layer(target)
    rest = (target - prefix.table()).permute(3, 0, 1, 2, 4).flatten(1)  # (P, 2 L C)
    inputs = torch.cat([prefix.mlp.hidden(), torch.ones(12, 1).double()], 1)  # (P, mid_dim + 1)
    assert rest.abs().max() > 0.1
    assert_close(inputs.T @ rest, torch.zeros(4, rest.shape[1]).double(), 1e-12)


@torch.no_grad()
def test_export_of_an_mlp_is_bit_for_bit():
    model = tiny_gpt2()
    for gate in (False, True):
        prefix = random_prefix(model, parametrisation="mlp", gate=gate, position_offset=6)
        prefix.base = "name"
        exported = prefix.export()
        assert exported.mlp is None and exported.position_offset == 6 and exported.base == "name"
        ids = random_ids(model, 2, 6)
        assert torch.equal(model(ids, prefix=exported), model(ids, prefix=prefix))
        exported.prefix_table.zero_()  # a copy
        assert prefix.export().prefix_table.any()


@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
@pytest.mark.parametrize("gate", [False, True])
def test_every_entry_has_a_gradient(gate, parametrisation):
    model = tiny_gpt2()
    prefix = random_prefix(model, parametrisation=parametrisation, gate=gate)
    ids, labels = random_ids(model, 3, 6), random_ids(model, 3, 6, seed=1)
    model.token_losses(ids, labels, prefix=prefix).mean().backward()
    names = {name for name, _ in prefix.named_parameters()}
    assert ("prefix_table" in names) == (parametrisation == "table") and ("gate" in names) == gate
    for name, parameter in prefix.named_parameters():
        assert (parameter.grad != 0).all() and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
def test_copies_and_state_dict(parametrisation):
    model = tiny_gpt2()
    prefix = random_prefix(model, parametrisation=parametrisation, gate=True)
    ids = random_ids(model, 2, 6)
    exact = model(ids, prefix=prefix)
    assert torch.equal(model(ids, prefix=copy.deepcopy(prefix)), exact)
    other = random_prefix(model, seed=1, parametrisation=parametrisation, gate=True)
    assert not torch.equal(model(ids, prefix=other), exact)
    other.load_state_dict(prefix.state_dict())
    assert torch.equal(model(ids, prefix=other), exact)
    for dtype in (torch.float32, torch.bfloat16):
        small = copy.deepcopy(prefix).to(dtype)
        assert {p.dtype for p in small.parameters()} == {small.table().dtype} == {dtype}
        assert small.to("cpu").double().table().dtype == torch.float64


def test_dropout_does_not_act_on_a_prefix():
    """Train mode of the prefix changes nothing; the model's own mode is the caller's."""
    model = tiny_gpt2()
    for parametrisation in ("table", "mlp"):
        prefix = random_prefix(model, parametrisation=parametrisation)
        assert torch.equal(prefix.train().table(), prefix.eval().table())


def test_random_start():
    """N(0, 1) for a table and the MLP's embedding; U(-1, 1) / sqrt(fan_in) for layers."""
    config = tiny_gpt2().config
    table = Prefix.random(config, 20, seed=0).prefix_table
    # 3,840 numbers: standard errors of mean and std are 0.016 and 0.011
    assert abs(table.mean()) < 0.06 and abs(table.std() - 1) < 0.05
    assert torch.equal(Prefix.random(config, 20, seed=0).prefix_table, table)
    assert not torch.equal(Prefix.random(config, 20, seed=1).prefix_table, table)
    mlp = Prefix.random(config, 40, seed=0, parametrisation="mlp", mid_dim=64).mlp
    assert abs(mlp.prefix_embd.std() - 1) < 0.1  # 1,280 numbers: standard error 0.02
    for linear, fan_in in ((mlp.linear_in, 32), (mlp.linear_out, 64)):
        for parameter in (linear.weight, linear.bias):
            assert 0.9 < parameter.abs().max() * fan_in**0.5 <= 1


def test_make_prefix_follows_its_config():
    model = tiny_gpt2()
    prefix = make_prefix(model, Words(), PrefixConfig(init="random"), seed=0)
    assert (prefix.prefix_len, prefix.mlp.linear_in.out_features) == (10, 512)
    prefix.check_base(model)
    config = PrefixConfig(init="words", init_text="some words", prefix_len=3, mid_dim=8)
    prefix = make_prefix(model, Words(), config, seed=0)
    exact = Prefix.from_words(
        model, Words(), "some words", 3, parametrisation="mlp", mid_dim=8
    ).table()
    assert torch.equal(prefix.table(), exact)
    config = PrefixConfig(init="prompt", init_text="some words", parametrisation="table")
    prefix = make_prefix(model, Words(), config, seed=0)
    assert (prefix.prefix_len, prefix.position_offset) == (2, 2)
    config = PrefixConfig(gate=True, init="random", parametrisation="table", prefix_len=3)
    prefix = make_prefix(model, Words(), config, seed=0)
    assert prefix.position_offset == 0 and not prefix.gate.any()
