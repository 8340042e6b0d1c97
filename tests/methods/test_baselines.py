"""Adapters and fine-tuning of the top layers: their results, trained weights and kept files."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    an_adapter,
    another_model,
    assert_close,
    pairs,
    random_ids,
    small_model,
    tiny_gpt2,
    trainer,
)

from minprefix.data.batches import collate
from minprefix.generation.config import GenerationConfig
from minprefix.generation.fast import KEPT
from minprefix.generation.texts import generate, generate_ids
from minprefix.methods.adapters import Adapter, TunedAdapter, bottleneck_for, count, make_adapter
from minprefix.methods.config import DESIGNS
from minprefix.models.base import ATTACHED, adapter_of
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint, load, save_model
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer


def literal(model: GPT2, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one row (T,): every product of GPT-2 and of its adapters, written out."""
    w, a = dict(model.named_parameters()), dict(adapter.named_parameters())
    C, H = model.config.n_embd, model.config.n_head
    T, D, eps = len(ids), C // H, model.config.layer_norm_epsilon

    def norm(x, weights, name):
        mean = x.mean(-1, keepdim=True)
        std = ((x - mean).pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return (x - mean) / std * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def adapted(x, name):
        block = name.endswith("block")
        if block != (adapter.design == "lin"):  # the other design has no adapter here
            return x
        h = norm(x, a, name + ".ln") if block else x
        h = (h @ a[name + ".down.weight"].T + a[name + ".down.bias"]).clamp(min=0)
        return x + h @ a[name + ".up.weight"].T + a[name + ".up.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for n in range(model.config.n_layer):
        block = f"h.{n}"
        q, k, v = linear(norm(x, w, block + ".ln_1"), block + ".attn.c_attn").split(C, -1)
        heads = []
        for h in range(H):
            at = slice(h * D, (h + 1) * D)
            scores = q[:, at] @ k[:, at].T / math.sqrt(D)
            seen = torch.ones(T, T).tril().bool()
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, at])
        attn = linear(torch.cat(heads, -1), block + ".attn.c_proj")
        x = x + adapted(attn, block + ".attn")
        u = linear(norm(x, w, block + ".ln_2"), block + ".mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + adapted(linear(gelu, block + ".mlp.c_proj"), block + ".mlp")
        x = adapted(x, block + ".block")
    return norm(x, w, "ln_f") @ w["wte.weight"].T


# adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_logits_equal_those_written_out(design):
    model = tiny_gpt2()
    adapter, ids = an_adapter(model, design), random_ids(model, 2, 9)
    plain = model(ids)
    adapter.attach(model)
    logits = model(ids)
    for row in range(2):
        assert_close(logits[row], literal(model, adapter, ids[row]), 1e-12, design)
    assert (logits - plain).abs().max() > 0.1  # without adapters it would be 0
    with pytest.raises(ValueError, match="already has an adapter"):
        an_adapter(model).attach(model)
    adapter.detach(model)
    assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_new_adapter_is_exactly_the_frozen_model(design):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = tiny_gpt2(dtype=dtype)
        ids, adapter = random_ids(model, 2, 9), Adapter.random(model.config, 5, 0, design)
        plain = model(ids)
        with adapter.attached(model):
            assert torch.equal(model(ids), plain)
    name, other = next(iter(adapter.h[0])), Adapter.random(model.config, 5, 1, design)
    # another start, once it has learned
    assert not torch.equal(adapter.h[0][name].down.weight, other.h[0][name].down.weight)


@pytest.mark.parametrize("design", DESIGNS)
def test_detaching_leaves_nothing(design):
    """Names, weights, config, hooks and gradients; also when the block ends by an error."""
    model = tiny_gpt2()
    adapter, config = an_adapter(model, design), model.config
    adapter.linearisation = "paper"
    name, weights = fingerprint(model), {n: w.clone() for n, w in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), adapter.attached(model):  # noqa: PT012
        assert adapter_of(model) is adapter and model.frame == ("paper", None)
        assert fingerprint(model) == name and list(model.state_dict()) == list(weights)
        raise RuntimeError("inside")
    assert model.config is config and model.frame == ("", None) and model not in ATTACHED
    assert [module for module in model.modules() if module._forward_hooks] == []
    assert [n for n, w in model.state_dict().items() if not torch.equal(w, weights[n])] == []
    with pytest.raises(ValueError, match="not attached to this model"):
        adapter.detach(model)


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_what_is_copied_or_saved_is_the_model_without_its_adapter(tokenizer, tmp_path, design):
    model = small_model()
    adapter, ids = an_adapter(model, design), random_ids(model, 2, 9)
    adapter.linearisation, plain = "paper", model(ids)
    adapter.attach(model)
    adapted, twin = model(ids), copy.deepcopy(model)
    save_model(model, tokenizer, tmp_path)
    for other in (twin, load(tmp_path)[0]):
        assert adapter_of(other) is None and other.frame == ("", None)
        assert torch.equal(other(ids), plain) and not torch.equal(adapted, plain)
    adapter.attach(twin)  # once, in addition to the hooks that came with the copy
    assert torch.equal(twin(ids), adapted)
    adapter.detach(model)
    assert torch.equal(twin(ids), adapted) and torch.equal(model(ids), plain)


def test_recorded_steps_do_not_outlive_a_change_of_adapter():
    """CUDA graphs of generation are kept by the model's weights, which an adapter is not among."""
    model = tiny_gpt2()
    adapter = an_adapter(model)
    for change in (adapter.attach, adapter.detach):
        KEPT[model] = "graphs"
        change(model)
        assert model not in KEPT


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_of_a_step_equal_those_written_out(tokenizer, tmp_path, design):
    """Through the trainer, in fp64; every tensor has one."""
    model = small_model(torch.float64)
    adapter = an_adapter(model, design)
    config = TrainConfig(
        method="adapter", steps=3, batch_size=3, clip=1e9, warmup_steps=0, precision="fp32"
    )
    run = Trainer(model, tokenizer, config, pairs(6), [], tmp_path, TunedAdapter(adapter))
    total, targets = 0.0, 0
    for row in [run.rows[i] for i in run.order.batch(0)]:
        log_p = literal(model, adapter, torch.tensor(row.ids[:-1])).log_softmax(-1)
        for place in range(row.prompt_len, len(row.ids)):
            total = total - log_p[place - 1, row.ids[place]]
            targets += 1
    expected = torch.autograd.grad(total / targets, list(adapter.parameters()))
    nats = run.step()["nats"]
    assert_close(nats, total.detach(), 1e-12)
    for (name, weight), exact in zip(adapter.named_parameters(), expected, strict=True):
        # first moment of the first step = (1 - 0.9) gradient
        got = run.optimizer.state[weight]["exp_avg"] / 0.1
        assert exact.abs().max() > 0, name
        assert (got - exact).abs().max() <= 1e-12 * max(1, exact.abs().max()), name


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("design", DESIGNS)
def test_fast_generation_equals_the_plain_loops(design, beams):
    """With ragged prompts, in fp64; and differs from the frozen model."""
    model = tiny_gpt2()
    prompts = [random_ids(model, n, seed=n).tolist() for n in (3, 9, 5, 1)]
    config, eos = GenerationConfig(max_new_tokens=12, num_beams=beams), 96
    frozen = generate_ids(model, prompts, config, eos)
    with an_adapter(model, design).attached(model):
        fast = generate_ids(model, prompts, config, eos)
        assert fast == generate_ids(model, prompts, config, eos, fast=False) != frozen
    assert generate_ids(model, prompts, config, eos) == frozen


def test_a_text_is_framed_as_the_adapter_was_trained(tokenizer):
    model = small_model()
    adapter = an_adapter(model)
    adapter.linearisation = "paper"
    framed = tokenizer.encode("place : dune") + [tokenizer.bos_id]
    with adapter.attached(model):
        texts = generate(model, tokenizer, ["place : dune", framed], max_new_tokens=6)
    assert texts[0] == texts[1] != ""


def test_bf16_keeps_the_adapter_in_fp32(tokenizer, tmp_path):
    """The frozen weights are a bf16 copy; the model given stays as it is, without hooks."""
    model = small_model()
    runs = [
        trainer(tokenizer, tmp_path / name, model=model, method="adapter", precision=name)
        for name in ("bf16", "fp32")
    ]
    nats = [run.step()["nats"].item() for run in runs]
    assert nats[0] == pytest.approx(nats[1], rel=2**-8) and nats[0] != nats[1]  # 8 bits
    assert {w.dtype for w in runs[0].model.parameters()} == {torch.bfloat16}
    for run in runs:
        assert {w.dtype for w in run.trained.parameters()} == {torch.float32}
        assert run.trained.base == fingerprint(model)
    assert model.wte.weight.dtype == torch.float32 and model not in ATTACHED


# what trains, for all methods ------------------------------------------------------------------

METHODS = {
    "lin": ("adapter", {"adapter_design": "lin", "bottleneck": 3}),
    "houlsby": ("adapter", {"adapter_design": "houlsby", "bottleneck": 3}),
    "ft-top2": ("ft-top", {}),
    "ft-top1 + embedding": ("ft-top", {"top_layers": 1, "top_embedding": True}),
    "prefix": ("prefix", {}),
    "finetune": ("finetune", {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_after_three_steps_all_that_trains_has_moved_and_nothing_else(tokenizer, tmp_path, name):
    """Bitwise. Of fine-tuning's position embedding only rows within the batches move."""
    method, options = METHODS[name]
    model = small_model(n_layer=3)
    run = trainer(tokenizer, tmp_path, model=model, method=method, baseline_options=options)
    trained = {f"trained {n}": w for n, w in run.trained.named_parameters()}
    addresses = {weight.data_ptr() for weight in trained.values()}
    frozen = {n: w for n, w in model.named_parameters() if w.data_ptr() not in addresses}
    assert bool(frozen) == (method != "finetune")
    before = {n: w.detach().clone() for n, w in {**frozen, **trained}.items()}
    for _ in range(3):
        run.step()
    assert [n for n, w in frozen.items() if not torch.equal(w, before[n])] == []
    assert [n for n, w in frozen.items() if w.grad is not None or w.requires_grad] == []
    assert [n for n, w in trained.items() if torch.equal(w, before[n])] == []


def test_the_top_layers_have_the_gradients_of_full_fine_tuning(tokenizer, tmp_path):
    """fp64, without dropout; and the backward pass ends below them."""
    moments, ends = {}, []
    for method, options in (("finetune", {}), ("ft-top", {}), ("ft-top", {"top_embedding": True})):
        model = small_model(torch.float64, n_layer=3, resid_pdrop=0.0, embd_pdrop=0.0)
        run = trainer(
            tokenizer, tmp_path, model=model, method=method, clip=1e9, baseline_options=options
        )
        for block in model.h:
            block.register_forward_hook(lambda _, args, x: ends.append(x.requires_grad))
        names = {weight: name for name, weight in model.named_parameters()}
        ends.clear()
        run.step()
        assert ends == [method == "finetune" or "top_embedding" in options, True, True]
        for weight in run.trained.parameters():
            moment = run.optimizer.state[weight]["exp_avg"]
            assert moment.abs().max() > 0
            assert_close(moment, moments.setdefault(names[weight], moment), 1e-12, names[weight])
    assert {"h.1.ln_1.weight", "h.2.mlp.c_proj.bias", "ln_f.bias", "wte.weight"} <= set(moments)


@pytest.mark.parametrize("embedding", [False, True])
def test_dropout_acts_in_what_is_fine_tuned_only(tokenizer, tmp_path, embedding):
    model = small_model(n_layer=3)
    run = trainer(
        tokenizer, tmp_path, model=model, method="ft-top",
        baseline_options={"top_embedding": embedding},
    )  # fmt: skip
    batch, seen = collate(run.rows[:4], tokenizer.eos_id), [[], [], []]
    for block, outputs in zip(model.h, seen, strict=True):
        block.register_forward_hook(lambda _, args, x, kept=outputs: kept.append(x.detach()))

    def same_twice() -> list[bool]:
        for seed in (0, 1):
            torch.manual_seed(seed)
            run.losses(batch, None)
        return [torch.equal(*outputs[-2:]) for outputs in seen]

    assert same_twice() == [not embedding, False, False]
    run.evaluate()  # an evaluation in between, without dropout, changes nothing
    assert same_twice() == [not embedding, False, False]
    adapting = trainer(tokenizer, tmp_path / "a", model=small_model(), method="adapter")
    assert [m for m in adapting.model.modules() if m.training] == []


@pytest.mark.parametrize("name", ["lin", "houlsby", "ft-top2", "ft-top1 + embedding"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(tokenizer, tmp_path, name, precision):
    method, options = METHODS[name]
    settings = {"method": method, "baseline_options": options, "precision": precision, "steps": 6}

    def start() -> Trainer:
        return trainer(tokenizer, tmp_path, model=small_model(n_layer=3), **settings)

    whole, broken = start(), start()
    nats = [whole.step()["nats"].item() for _ in range(6)]
    for _ in range(3):
        broken.step()
    broken.save_state()
    again = start()
    again.load_state()
    assert [again.step()["nats"].item() for _ in range(3)] == nats[3:]
    state = torch.load(tmp_path / "state" / "state.pt")["trained"]
    assert sum(x.numel() for x in state.values()) == count(again.trained)  # nothing frozen
    other = trainer(tokenizer, tmp_path, model=another_model(n_layer=3), **settings)
    with pytest.raises(ValueError, match="differs in base model"):
        other.load_state()


@pytest.mark.parametrize("name", ["lin", "houlsby", "ft-top2"])
def test_each_baseline_learns(tokenizer, tmp_path, name):
    method, options = METHODS[name]
    run = trainer(
        tokenizer, tmp_path, method=method, baseline_options=options, dev=0, steps=30, lr=0.1
    )
    steps = [run.step() for _ in range(30)]
    losses = [step["nats"].item() / step["targets"] for step in steps]  # nats per token
    assert losses[-1] < losses[0] - 0.1  # worst seen here: 0.16, houlsby


def test_top_layers_leave_a_whole_model(tokenizer, tmp_path):
    model = small_model(n_layer=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run = trainer(tokenizer, tmp_path, model=model, method="ft-top", dev=0, steps=3)
    run.run(progress=False)
    kept, _ = load(run.kept)
    assert kept.config.linearisation == "paper" and run.kept == tmp_path / "model"
    moved = {n for n, w in kept.state_dict().items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if n.startswith(("h.1.", "h.2.", "ln_f."))}


# sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("share", [0.001, 0.03, 0.5])
def test_no_other_width_comes_nearer_to_a_share(design, share):
    config = replace(tiny_gpt2().config, n_embd=128, n_layer=4)
    with torch.device("meta"):
        model = GPT2(config)
        sizes = {m: count(Adapter(config, m, design)) for m in range(1, 500)}
    nearest = min(sizes, key=lambda m: abs(sizes[m] - share * count(model)))
    assert bottleneck_for(config, share, design) == nearest
    assert make_adapter(GPT2(config), design, None, share, 0).bottleneck == nearest
