"""Residual add with layer norm: the kernels against PyTorch in fp64, alone and within a model.

They run here in Triton's interpreter (`make test-kernels`) or on a GPU.
"""

import pytest
import torch
from conftest import (
    DEVICE,
    INTERPRETED,
    assert_within_rounding,
    needs_kernels,
    random_ids,
    tiny_bart,
    tiny_gpt2,
)

from kernels import add_norm
from kernels.reference import add_norm_plain
from minprefix.generation import fast
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.models.losses import IGNORE
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.blocks import wrap_blocks

needs_kernels()

from kernels import layer_norm  # noqa: E402  (imports Triton)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
NAMES = ("s", "n", "dx", "dy")


def inputs(C: int, dtype, shape=(3, 5), seed: int = 0) -> list[torch.Tensor]:
    """x, y, gain, shift, ds, dn."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*shape, C)] * 2 + [(C,)] * 2 + [(*shape, C)] * 2
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def run(form, x, y, gain, shift, ds, dn) -> list[torch.Tensor]:
    """s, n, dx and, with y, dy; ds None: nothing reads s."""
    leaves = [a.detach().clone().requires_grad_() for a in (x, y) if a is not None]
    s, n = form(leaves[0], None if y is None else leaves[1], gain, shift, EPS)
    outputs, grads = ((n,), (dn,)) if ds is None else ((s, n), (ds, dn))
    return [s, n, *torch.autograd.grad(outputs, leaves, grads)]


def check(arguments: list) -> None:
    def given(change):
        return [None if a is None else change(a) for a in arguments]

    actual = run(add_norm, *given(lambda a: a.to(DEVICE)))
    exact = run(add_norm_plain, *given(torch.Tensor.double))
    low = run(add_norm_plain, *arguments)
    for name, a, b, c in zip(NAMES, actual, low, exact, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        # rows are of order 1, and so is rstd: a rounding each of s, xhat and the sum
        assert_within_rounding(a.cpu(), b, c, c.abs().max().item(), 0.0, name)


WIDTHS = (2, 100, 128, 768, 1280)  # tiny, odd for a tile, whole tiles, cut
MISSING = [(C, missing) for C in (100, 1280) for missing in ("y", "ds", "y ds")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C, missing", [*((C, "") for C in WIDTHS), *MISSING])
@pytest.mark.usefixtures("poisoned")
def test_within_rounding(C, missing, dtype):
    x, y, gain, shift, ds, dn = inputs(C, dtype)
    y, ds = (None if name in missing.split() else a for name, a in (("y", y), ("ds", ds)))
    check([x, y, gain, shift, ds, dn])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_far_from_zero(dtype):
    """The variance is that of differences to the mean: no cancellation of squares."""
    x, y, gain, shift, ds, dn = inputs(256, dtype)
    check([x + 100, y, gain, shift, ds, dn])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_normalised_is_what_is_stored(dtype):
    """The backward pass reads s, so n is that of the rounded s: bit for bit."""
    x, y, gain, shift, *_ = (a.to(DEVICE) for a in inputs(256, dtype))
    s, n = add_norm(x, y, gain, shift, EPS)
    assert torch.equal(n, add_norm(s, None, gain, shift, EPS)[1])


def test_views_and_no_rows():
    x, y, gain, shift, ds, dn = inputs(64, torch.float32, (4, 6))
    check([x.transpose(0, 1), y.transpose(0, 1), gain, shift, ds.transpose(0, 1),
           dn[0, 0].expand(6, 4, 64)])  # fmt: skip
    s, n = add_norm(x[:0].to(DEVICE), y[:0].to(DEVICE), gain.to(DEVICE), shift.to(DEVICE), EPS)
    assert s.shape == n.shape == (0, 6, 64)


def test_who_takes_pytorch(monkeypatch):
    """A trained gain, fp64, the switch: and the gradients are there."""
    x, y, gain, shift, _, dn = (a.to(DEVICE) for a in inputs(64, torch.float32))
    monkeypatch.setattr(layer_norm, "launch", None)  # would fail
    trained = gain.clone().requires_grad_()
    _, n = add_norm(x, y, trained, shift, EPS)
    assert torch.autograd.grad(n, trained, dn)[0].abs().sum() > 0
    add_norm(*(a.double() for a in (x, y, gain, shift)), EPS)
    monkeypatch.setenv("MINPREFIX_FUSED", "0")
    add_norm(x, y, gain, shift, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        add_norm(x, y[:1], gain, shift, EPS)


@pytest.mark.skipif(not INTERPRETED, reason="counts on a CPU")
def test_one_tensor_serves_both_gradients():
    x, y, gain, shift, ds, dn = inputs(64, torch.float32)
    leaves = x.requires_grad_(), y.requires_grad_()
    s, n = add_norm(*leaves, gain, shift, EPS)
    dx, dy = torch.autograd.grad((s, n), leaves, (ds, dn))
    assert dx.data_ptr() == dy.data_ptr()


# whole models -----------------------------------------------------------------------------------


def gpt2_losses(model) -> tuple[torch.Tensor, Prefix]:
    """Ragged rows with a label here and there."""
    prefix = Prefix.random(model.config, 2, 0).to(model.wte.weight)
    ids, labels = random_ids(model, 2, 9), random_ids(model, 2, 9, seed=1)
    labels[0, 5:], labels[1, :3] = IGNORE, IGNORE
    return model.token_losses(ids.to(DEVICE), labels.to(DEVICE), prefix=prefix), prefix


def bart_losses(model) -> tuple[torch.Tensor, BARTPrefix]:
    prefix = BARTPrefix.random(model.config, 2, 0).to(model.wte.weight)
    ids, source = (random_ids(model, 2, n, seed=n).to(DEVICE) for n in (5, 7))
    lens = torch.tensor([7, 4], device=DEVICE)
    return model.token_losses(
        ids, ids, source_ids=source, source_lens=lens, prefix=prefix
    ), prefix  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("losses_of", [gpt2_losses, bart_losses])
def test_a_model_through_the_kernels(losses_of, monkeypatch):
    """fp32: losses and the prefix's gradients as near to fp64 as plain PyTorch in fp32."""
    found, launched, launch = {}, [], layer_norm.launch

    def noted(kernel, *arguments, **options):
        launched.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(layer_norm, "launch", noted)
    for form in ("exact", "low", "actual"):
        monkeypatch.setenv("MINPREFIX_FUSED", str(int(form == "actual")))
        model = tiny_gpt2(n_layer=2) if losses_of is gpt2_losses else tiny_bart()
        model = model.to(torch.float32).requires_grad_(False).to(DEVICE)  # the same roundings
        model = model.double() if form == "exact" else model
        if form == "actual":
            model.pad_head()
            assert len(model.head_weights()[0]) == 128 > model.config.vocab_size
        wrap_blocks(model, fused=form == "actual")
        losses, prefix = losses_of(model)
        grads = torch.autograd.grad(losses.sum(), list(prefix.parameters()))
        found[form] = [x.detach().cpu() for x in (losses, *grads)]
    assert len(set(launched)) == 2  # forward and backward
    for n, (actual, low, exact) in enumerate(
        zip(found["actual"], found["low"], found["exact"], strict=True)
    ):
        # 16: about the largest score of the attention and of the head of these models
        assert_within_rounding(actual, low, exact, exact.abs().max().item(), 16.0, f"result {n}")


def test_a_bart_writes_the_same_texts(monkeypatch):
    """In the steps that a graph repeats, its three sums and norms in a layer are our kernel."""
    if DEVICE == "cpu":  # what a graph would replay runs as it is
        monkeypatch.setattr(fast, "uses_graphs", lambda device: True)
        monkeypatch.setattr(fast, "capture", lambda run, device, pool: run)
    launched, launch = [], layer_norm.launch
    monkeypatch.setattr(
        layer_norm, "launch", lambda *a, **options: launched.append(a[0]) or launch(*a, **options)
    )
    model = tiny_bart().to(DEVICE, torch.float32).requires_grad_(False)
    config, sources = GenerationConfig(max_new_tokens=5), [[5, 6, 7], [8, 9]]
    texts = generate_ids(model, sources, config, 96)
    assert launched and len(launched) % (3 * model.config.n_layer) == 0
    launched.clear()
    monkeypatch.setenv("MINPREFIX_FUSED", "0")
    assert generate_ids(model, sources, config, 96) == texts and not launched
