"""The head's cross entropy: its plain form against PyTorch's, its kernel against fp64.

The kernel runs in Triton's interpreter (`make test-kernels`) or on a GPU. Elementwise arithmetic in
bf16 is right in the interpreter, except for stores, which truncate instead of rounding.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, INTERPRETED, assert_close, assert_within_rounding

from kernels import cross_entropy_
from kernels.reference import cross_entropy_plain_

RUNS = INTERPRETED or torch.cuda.is_available()
needs_kernel = pytest.mark.skipif(not RUNS, reason="`make test-kernels` or a GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 63, 64, 65, 1000, 50257]  # V: one, around the padding, within a tile, of GPT-2


def inputs(V: int, dtype=torch.float64, n: int = 3, columns: int | None = None, factor=3.0):
    """logits (n, V'), labels (n,) with the first and the last column, bias (V',); NaN past V."""
    generator = torch.Generator().manual_seed(V)
    columns = columns or -(-V // 64) * 64
    logits = factor * torch.randn(n, columns, generator=generator, dtype=torch.float64)
    bias = torch.randn(columns, generator=generator, dtype=torch.float64)
    logits[:, V:] = bias[V:] = float("nan")
    labels = torch.randint(V, (n,), generator=generator)
    labels[0], labels[-1] = 0, V - 1
    return logits.to(dtype), labels, bias.to(dtype)


def check(logits, labels, bias, V: int) -> None:
    """Losses within the budget of rounding, each entry of the gradient within its own rounding."""
    dtype, eps = logits.dtype, torch.finfo(torch.float32).eps
    wide, low = logits.double(), logits.clone()
    wide_bias = None if bias is None else bias.double()
    exact = cross_entropy_plain_(wide, labels, wide_bias, V, True)
    low_losses = cross_entropy_plain_(low, labels, bias, V, True)
    actual = logits.clone().to(DEVICE)
    on_device = None if bias is None else bias.to(DEVICE)
    losses = cross_entropy_(actual, labels.to(DEVICE), on_device, V).cpu()
    scores = logits[:, :V].double() + (0 if bias is None else bias[:V].double())
    assert losses.dtype == torch.float32
    assert_within_rounding(losses, low_losses, exact, 1.0, scores.abs().max().item(), "losses")
    # fp32 inside: exp(s - m) moves by eps |s - m|; then it is rounded to dtype
    p = scores.softmax(-1)
    spread = (scores.max(-1, keepdim=True).values - scores).clamp(max=100)
    rounding = torch.finfo(dtype).eps * wide[:, :V].abs() + torch.finfo(dtype).smallest_normal
    budget = rounding + 4 * eps * (2 + spread) * p
    if dtype != torch.float32 and bias is not None:  # the rounded sum of plain PyTorch has its own
        budget = budget + 4 * eps * scores.abs().max() * p
    error = (actual.cpu()[:, :V].double() - wide[:, :V]).abs()
    assert (error <= budget).all(), f"gradient: {(error / budget).max():.2f} of the budget"
    assert (actual[:, V:] == 0).all()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_within_rounding(V, with_bias, dtype):
    logits, labels, bias = inputs(V, dtype)
    check(logits, labels, bias if with_bias else None, V)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e4, 0.0])
def test_extreme_scores(factor, dtype):
    """Of order 1e4, within fp16's range: one column has all of the probability; and all equal."""
    logits, labels, _ = inputs(1000, dtype, n=4, factor=factor)
    labels[1] = logits[1, :1000].argmax()  # a loss of about 0 with scores of 1e4
    check(logits, labels, None, 1000)


@needs_kernel
def test_rows_may_lie_apart_and_have_an_odd_vocabulary():
    """No padding: V columns of a wider matrix, whose other columns stay as they are."""
    logits, labels, _ = inputs(101, torch.float32, columns=128)
    logits[:, 101:] = 7.0
    wide = logits.clone().to(DEVICE)
    losses = cross_entropy_(wide[:, :101], labels.to(DEVICE))
    exact = cross_entropy_plain_(logits.double()[:, :101], labels, None, 101, False)
    assert_close(losses.cpu(), exact.float(), 1e-6)  # fp32; worst seen 0
    assert (wide[:, 101:] == 7.0).all()


@needs_kernel
def test_without_a_gradient_logits_are_only_read():
    logits, labels, bias = (x.to(DEVICE) for x in inputs(1000, torch.float32))
    before = logits.clone()
    losses = cross_entropy_(logits, labels, bias, 1000, gradient=False)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert torch.equal(losses, cross_entropy_(logits, labels, bias, 1000))


@needs_kernel
def test_no_rows_and_the_switch(monkeypatch):
    logits, labels, _ = inputs(65, torch.float32)
    assert cross_entropy_(logits[:0].to(DEVICE), labels[:0].to(DEVICE), None, 65).shape == (0,)
    from kernels import cross_entropy

    monkeypatch.setenv("MINPREFIX_FUSED", "0")
    monkeypatch.setattr(cross_entropy, "launch", None)  # would fail
    cross_entropy_(logits.to(DEVICE), labels.to(DEVICE), None, 65)


@pytest.mark.parametrize("V", SIZES[:-1])
def test_plain_form_is_cross_entropy(V):
    """Also in place, and with columns past V that hold anything."""
    logits, labels, bias = inputs(V)
    leaf = logits[:, :V].clone().requires_grad_()
    exact = F.cross_entropy(leaf + bias[:V], labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    losses = cross_entropy_plain_(logits, labels, bias, V, True)
    assert_close(losses, exact, 1e-14)  # fp64, sums in another order; worst seen 4e-16
    assert_close(logits[:, :V], gradient, 1e-14)
    assert (logits[:, V:] == 0).all()


def test_bad_input_is_one_line():
    logits, labels, bias = inputs(65)
    for arguments, named in (
        ((logits, labels, None, 129), "vocabulary of 129"),
        ((logits, labels[:2], None, 65), "labels (2,)"),
        ((logits[0], labels, None, 65), "(128,)"),
        ((logits, labels, bias[:65], 65), "bias (65,)"),
    ):
        with pytest.raises(ValueError) as error:
            cross_entropy_(*arguments)
        assert named in str(error.value)
