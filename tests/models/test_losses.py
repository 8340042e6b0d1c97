"""The loss of a frozen head, computed in parts, against PyTorch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode

from minprefix.models.losses import IGNORE, frozen_head_loss

N, C, V = 23, 16, 101


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, weight, labels, torch.randn(N, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, 23, 1024])
def test_equals_cross_entropy(chunk):
    hidden, weight, labels, upstream = inputs()
    exact = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
    losses = frozen_head_loss(hidden, weight, labels, chunk)
    # sums of 101 fp64 numbers in another order; worst seen 1.8e-15
    assert_close(losses, exact, 1e-14, "losses")
    grads = (torch.autograd.grad(x, hidden, upstream)[0] for x in (losses, exact))
    assert_close(*grads, 1e-14, "dhidden")


def test_large_scores_stay_finite():
    hidden, weight, labels, _ = inputs(torch.float32)
    losses = frozen_head_loss(1e4 * hidden, weight, labels)
    exact = F.cross_entropy(F.linear(1e4 * hidden, weight), labels, reduction="none")
    assert losses.isfinite().all()
    # fp32 with scores of 1e5: eps 1e5 = 1.2e-2 absolute, relative to the largest loss 1e-7
    assert_close(losses, exact, 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast):
    """fp32 losses; products in bf16, as PyTorch's own would be."""
    hidden, weight, labels, upstream = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = frozen_head_loss(hidden, weight, labels, 7)
        exact = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    assert losses.dtype == torch.float32
    assert_close(losses, exact, 1e-6)  # the same bf16 logits; sums in fp32
    mine, theirs = (torch.autograd.grad(x, hidden, upstream.float())[0] for x in (losses, exact))
    assert mine.dtype == hidden.dtype
    assert_close(mine, theirs, 2**-6)  # two roundings to bf16 of numbers of order 4; seen 6e-3


def test_all_logits_never_exist():
    hidden, weight, labels, upstream = inputs()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result,) if isinstance(x, torch.Tensor))
            return result

    with Sizes():
        frozen_head_loss(hidden, weight, labels, 4).backward(upstream)
    assert max(sizes) <= max(4 * V, V * C) < N * V


def test_nothing_is_made_for_a_gradient_that_nobody_wants():
    hidden, weight, labels, _ = inputs()
    with torch.no_grad():
        assert frozen_head_loss(hidden, weight, labels).grad_fn is None
    assert not frozen_head_loss(hidden.detach(), weight, labels).requires_grad
    assert frozen_head_loss(hidden[:0], weight, labels[:0]).shape == (0,)


def test_a_frozen_and_a_trained_head_give_the_same():
    """`GPT2.token_losses` takes one or the other; values and the gradient below the head agree."""
    model = tiny_gpt2()
    ids = torch.arange(12).view(2, 6)
    labels = (ids + 1).masked_fill(ids % 3 == 0, IGNORE)
    bias = model.ln_f.bias
    losses = model.token_losses(ids, labels)
    (exact,) = torch.autograd.grad(losses.sum(), bias)
    model.wte.weight.requires_grad_(False)
    frozen = model.token_losses(ids, labels)
    assert_close(frozen, losses, 1e-14)
    assert_close(torch.autograd.grad(frozen.sum(), bias)[0], exact, 1e-14)
