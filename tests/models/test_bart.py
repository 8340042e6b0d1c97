"""BART against `transformers` in fp64; prefixes against equation (3) written out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, hf_bart_twin, random_ids, tiny_bart, tiny_gpt2

from minprefix.models.activations import BARTActivations
from minprefix.models.cache import KVCache
from minprefix.models.config import SITES
from minprefix.models.losses import IGNORE
from minprefix.models.weights_bart import to_checkpoint
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.blocks import wrap_blocks

# of the largest number: other orders of summation in fp64; worst seen: 7e-16
TOLERANCE = 1e-12
CONFIGS = [
    {},
    {"n_encoder_layer": 1, "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 11},
    {"n_encoder_layer": 3, "n_layer": 1, "n_head": 3, "n_embd": 36, "n_inner": 5},
    {"scale_embedding": True, "n_head": 7, "n_embd": 35, "n_positions": 18},
]
LENGTHS = torch.tensor([17, 1, 9])  # source tokens of each row


def inputs(model, S: int = 17, T: int = 11):
    """Sources (3, S) and what the decoder reads (3, T)."""
    return random_ids(model, 3, S), random_ids(model, 3, T, seed=1)


def source_mask(S: int = 17):
    return (torch.arange(S) < LENGTHS[:, None]).long()


@pytest.mark.parametrize("changes", CONFIGS)
def test_states_and_logits_equal_transformers(changes):
    model = tiny_bart(**changes)
    twin, (source, target) = hf_bart_twin(model), inputs(model)
    with torch.no_grad():
        assert_close(model.encode(source).states, twin.model.encoder(source)[0], TOLERANCE)
        exact = twin(input_ids=source, decoder_input_ids=target).logits
        assert_close(model(source, target), exact, TOLERANCE)


@pytest.mark.parametrize("changes", CONFIGS[:2])
def test_padded_batch_equals_transformers_and_single_rows(changes):
    model = tiny_bart(**changes)
    twin, (source, target) = hf_bart_twin(model), inputs(model)
    lengths = torch.tensor([5, 11, 2])  # of the targets
    real = torch.arange(11) < lengths[:, None]  # (B, T)
    with torch.no_grad():
        exact = twin(
            input_ids=source, attention_mask=source_mask(), decoder_input_ids=target
        ).logits
        logits = model(source, target, source_lens=LENGTHS, kv_lens=lengths)
        assert_close(logits[real], exact[real], TOLERANCE)
        for row, (S, T) in enumerate(zip(LENGTHS, lengths, strict=True)):
            alone = model(source[row : row + 1, :S], target[row : row + 1, :T])
            assert_close(logits[row, :T], alone[0], TOLERANCE)


def test_weight_gradients_equal_transformers():
    model = tiny_bart()
    twin, (source, target) = hf_bart_twin(model), inputs(model)
    for ids in (source, target):
        ids[ids == 1] = 3  # their padding's embedding gets no gradient
    labels = random_ids(model, 3, 11, seed=2).where(torch.arange(11) % 3 > 0, IGNORE)
    model.token_losses(target, labels, source_ids=source).mean().backward()
    logits = twin(input_ids=source, decoder_input_ids=target).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    exact = {n.removeprefix("model."): w.grad for n, w in twin.named_parameters()}
    ours = to_checkpoint({name: w.grad for name, w in model.named_parameters()})
    assert len(ours) == len(exact)
    for name, grad in ours.items():
        scale = exact[name].abs().max()
        if "k_proj.bias" in name:  # 0: it moves all scores of a query alike
            scale = torch.tensor(1.0)
        # relative to the largest entry; worst seen: 1e-15
        assert_close(grad / scale, exact[name] / scale, 1e-12, name)


def test_frozen_head_with_its_bias_gives_the_same_losses():
    model = tiny_bart()
    source, target = inputs(model)
    labels = random_ids(model, 3, 11, seed=2)
    kwargs = {"source_ids": source, "prefix": a_prefix(model)}
    losses = model.token_losses(target, labels, **kwargs)
    frozen = model.requires_grad_(False).token_losses(target, labels, **kwargs)
    log_p = model(source, target, prefix=kwargs["prefix"]).log_softmax(-1)
    exact = -log_p.gather(-1, labels[..., None]).flatten()
    for one in (losses, frozen):
        assert_close(one, exact, 1e-14)  # one log-sum-exp in fp64; worst seen: 2e-16


# prefixes --------------------------------------------------------------------------------------


def a_prefix(model, prefix_len: int = 3, seed: int = 0, **options) -> BARTPrefix:
    return BARTPrefix.random(model.config, prefix_len, seed, **options).to(model.wte.weight)


def literal_attention(module, x, keys_of, table_l, mask):
    """softmax over [prefix; keys] by concatenation: x (B, T, C), table_l (2, H, P, D) or None,
    mask (B, T, S), 1 = visible. `module` is an attention of `transformers`."""
    (B, T, C), H = x.shape, module.num_heads

    def heads(y):
        return y.view(B, -1, H, C // H).transpose(1, 2)  # (B, H, ., D)

    q, k, v = heads(module.q_proj(x)), heads(module.k_proj(keys_of)), heads(module.v_proj(keys_of))
    if table_l is not None:
        P = table_l.shape[2]
        k = torch.cat([table_l[0].expand(B, -1, -1, -1), k], dim=2)
        v = torch.cat([table_l[1].expand(B, -1, -1, -1), v], dim=2)
        mask = torch.cat([torch.ones(B, T, P, dtype=mask.dtype), mask], dim=2)
    s = (q * (C // H) ** -0.5) @ k.mT
    s = s.masked_fill(mask[:, None] == 0, float("-inf"))
    return module.out_proj((s.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


def literal_logits(twin, source, target, mask, tables, offset=0):
    """Equation (3) in an encoder-decoder, on the modules of `transformers`."""
    (B, S), T, config = source.shape, target.shape[1], twin.config
    scale = config.d_model**0.5 if config.scale_embedding else 1.0

    def embedded(stack, ids):
        x = scale * twin.model.shared.weight[ids]
        x = x + stack.embed_positions.weight[2 + offset + torch.arange(ids.shape[1])]
        return stack.layernorm_embedding(x)

    def mlp(layer, x):
        y = layer.fc2(F.gelu(layer.fc1(x)))
        return layer.final_layer_norm(x + y)

    def at(site, layer):
        return tables[site][layer] if site in tables else None

    encoder, decoder = twin.model.encoder, twin.model.decoder
    x = embedded(encoder, source)
    seen = mask[:, None].expand(B, S, S)
    for number, layer in enumerate(encoder.layers):
        o = literal_attention(layer.self_attn, x, x, at("encoder", number), seen)
        x = mlp(layer, layer.self_attn_layer_norm(x + o))
    y, seen = embedded(decoder, target), mask[:, None].expand(B, T, S)
    causal = torch.tril(torch.ones(T, T, dtype=torch.long)).expand(B, T, T)
    for number, layer in enumerate(decoder.layers):
        o = literal_attention(layer.self_attn, y, y, at("decoder", number), causal)
        y = layer.self_attn_layer_norm(y + o)
        o = literal_attention(layer.encoder_attn, y, x, at("cross", number), seen)
        y = mlp(layer, layer.encoder_attn_layer_norm(y + o))
    return twin.lm_head(y) + twin.final_logits_bias


def test_the_literal_formula_without_a_prefix_is_transformers():
    model = tiny_bart()
    twin, (source, target) = hf_bart_twin(model), inputs(model)
    with torch.no_grad():
        exact = twin(input_ids=source, attention_mask=source_mask(), decoder_input_ids=target)
        ours = literal_logits(twin, source, target, source_mask(), {})
        assert_close(ours, exact.logits, TOLERANCE)


@pytest.mark.parametrize("changes", [CONFIGS[0], CONFIGS[3]])
@pytest.mark.parametrize(
    "sites, offset", [(SITES, 0), (SITES, 3), (("encoder",), 0), (("decoder",), 0), (("cross",), 0)]
)
def test_prefix_is_equation_3_and_every_entry_learns(changes, sites, offset):
    model = tiny_bart(**changes).requires_grad_(False)
    twin, (source, target) = hf_bart_twin(model).requires_grad_(False), inputs(model, T=9)
    mask = source_mask()
    if model.config.n_positions < 20:  # the offset needs room
        source, mask = source[:, :15], mask[:, :15]
    lengths = mask.sum(1)
    prefix = a_prefix(model, 3, sites=sites, position_offset=offset)
    tables = {site: t.detach().clone().requires_grad_() for site, t in prefix.tables().items()}
    weight = torch.randn(3, 9, model.config.vocab_size, dtype=torch.float64)  # a random gradient

    logits = model(source, target, source_lens=lengths, prefix=prefix)
    exact = literal_logits(twin, source, target, mask, tables, offset)
    assert_close(logits, exact, TOLERANCE)
    (logits * weight).sum().backward()
    (exact * weight).sum().backward()
    assert tuple(prefix.sites) == sites
    for site, part in prefix.sites.items():
        grad, true = part.prefix_table.grad, tables[site].grad
        scale = true.abs().max()
        # relative to the largest entry; worst seen: 2e-15
        assert_close(grad / scale, true / scale, 1e-10, site)
        assert (grad != 0).all(), site  # PEFT leaves half of its table dead


def test_gate_0_is_the_frozen_model_and_gate_1_plain():
    model = tiny_bart()
    source, target = inputs(model)
    prefix, lens = a_prefix(model, gate=True), {"source_lens": LENGTHS}
    with torch.no_grad():
        frozen = model(source, target, **lens)
        assert_close(model(source, target, prefix=prefix, **lens), frozen, 1e-14)
        for gate in prefix.gates().values():
            gate.fill_(1.0)
        plain = BARTPrefix.from_tables(prefix.tables())
        gated = model(source, target, prefix=prefix, **lens)
        assert_close(gated, model(source, target, prefix=plain, **lens), TOLERANCE)
        assert (gated - frozen).abs().max() > 0.1


def test_virtual_tokens_are_tokens_before_the_source():
    """Embedding-only with the embeddings of real tokens is the source with these tokens."""
    model = tiny_bart(scale_embedding=True)
    source, target = inputs(model)
    words = random_ids(model, 4, seed=5)
    virtual = model.wte.weight[words].detach()
    prefix = BARTPrefix.from_tables({}, position_offset=4, virtual=virtual)
    with torch.no_grad():
        longer = torch.cat([words.expand(3, -1), source], dim=1)
        exact = model(longer, target, source_lens=LENGTHS + 4)
        logits = model(source, target, source_lens=LENGTHS, prefix=prefix)
        assert_close(logits, exact, TOLERANCE)
    model(source, target, source_lens=LENGTHS, prefix=prefix).pow(2).sum().backward()
    assert (prefix.virtual.virtual_embd.grad != 0).all()


def test_cached_steps_equal_one_pass():
    model = tiny_bart()
    source, target = inputs(model)
    prefix = a_prefix(model)
    with torch.no_grad():
        exact = model(source, target, source_lens=LENGTHS, prefix=prefix)
        encoded = model.with_keys(model.encode(source, LENGTHS, prefix=prefix))
        cache, steps = KVCache(model.config, 3, 11, like=model.wte.weight), []
        for ids in target.split([4, 1, 1, 5], dim=1):
            hidden = model.hidden_states(ids, source=encoded, prefix=prefix, cache=cache)
            steps.append(model.head(hidden))
        assert_close(torch.cat(steps, dim=1), exact, TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing_changes_no_gradient(training):
    model = tiny_bart().requires_grad_(False).train(training)
    source, target = inputs(model)
    labels, grads = random_ids(model, 3, 11, seed=2), []
    for recomputed in (False, True):
        wrap_blocks(model, recomputed=recomputed)
        torch.manual_seed(0)  # dropout
        prefix = a_prefix(model, parametrisation="mlp", mid_dim=7)
        model.token_losses(target, labels, source_ids=source, prefix=prefix).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in prefix.parameters()]))
    assert torch.equal(*grads)


def test_later_targets_and_padding_are_not_seen():
    model, prefix = tiny_bart(), None
    source, target = inputs(model)
    with torch.no_grad():
        before = model(source, target, source_lens=LENGTHS, prefix=prefix)
        source[1, 5], target[:, 7] = 3, 4  # padding of row 1; a later token
        after = model(source, target, source_lens=LENGTHS, prefix=prefix)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_wrong_prefixes_are_named():
    model = tiny_bart()
    source, target = inputs(model)

    def error(prefix, **options) -> str:
        with pytest.raises(ValueError) as caught:
            model(source, target, prefix=prefix, **options)
        return str(caught.value)

    gpt2 = tiny_gpt2()
    assert "BARTPrefix, got Prefix" in error(Prefix.random(gpt2.config, 2, 0).double())
    deep = a_prefix(tiny_bart(n_encoder_layer=5))
    assert "(5, 2, 4, 3, 8)" in error(deep) and "L = 2" in error(deep)
    far = a_prefix(model, position_offset=40)
    assert "40 + 17 tokens > 48" in error(far)
    assert "bank" in error(None, prefix_index=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="needs a Prefix, got BARTActivations"):
        gpt2(source % 97, prefix=BARTActivations())
