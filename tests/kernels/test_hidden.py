"""Columns that no query of a row sees have no effect, even if they hold NaN, inf or 3e38.

Every column past a row's length and every prefix that no row of the batch uses is overwritten, and
all results must be the same bit for bit. With TRITON_INTERPRET=1 (`make test-kernels`) or on a GPU
this tests the kernels, otherwise the plain PyTorch of `kernels/reference.py`.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import DEVICE, INTERPRETED
from test_reference import Case, named_case, run, visible_matrix

from kernels import prefix_attention, prefix_attention_eager, prefix_attention_lean, reference
from kernels.merge import merge_gated

# log2(0) = -inf is meant
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
HOSTILE = [float("nan"), float("inf"), float("-inf"), 3e38]
KERNELS = INTERPRETED or torch.cuda.is_available()
CASES = {
    "lengths": ("one prefix", "padded", 5),
    "cut": ("one prefix, cut", "cache", 5),
    "ragged": ("bank, one a row, ragged", "padded", 20),
    "none": ("bank and index", "square", 3),
    "none, ragged": ("bank, index, ragged", "cache", 5),
    "one query": ("bank, index, ragged", "cache, one query", 20),
    "many keys": ("bank, index, ragged", "long", 70),
}
LONG = {"T": 70, "S": 70, "kv_lens": [70, 0, 33]}  # more than one tile of queries and of keys


def hostile(case: Case, value: float) -> Case:
    """`case` with `value` in every column that no query of its row sees, and in prefixes that no
    row uses."""
    q, k, v, prefix_k, prefix_v = case.tensors
    P, seen = prefix_k.shape[-2], visible_matrix(case).any(1)  # (B, P + S)
    k, v = (x.masked_fill(~seen[:, None, P:, None], value) for x in (k, v))
    index = case.options.get("prefix_index", torch.arange(len(q)))
    bank = prefix_k.dim() == 4
    used = torch.zeros(prefix_k.shape[0] if bank else 1, P, dtype=torch.bool)
    for b, n in enumerate(index.tolist() if bank else [0] * len(q)):
        if n >= 0:
            used[n] |= seen[b, :P]
    unused = ~used[:, None, :, None] if bank else ~used[..., None]
    prefix_k, prefix_v = (x.masked_fill(unused, value) for x in (prefix_k, prefix_v))
    poisoned = replace(case, tensors=(q, k, v, prefix_k, prefix_v))
    assert any((x == value).any() or x.isnan().any() for x in poisoned.tensors)
    return poisoned


def assert_untouched(attention, case: Case, values: list[float] = HOSTILE) -> None:
    """o, lse and all gradients with a value in what is hidden, bit for bit as without it."""
    clean = run(attention, case)
    for value in values:
        got = run(attention, hostile(case, value))
        for name, x in clean.items():
            assert torch.equal(got[name], x), f"{name} with {value} in what is hidden"


def case_of(name: str, **options) -> Case:
    rows, sequence, prefix_len = CASES[name]
    if sequence == "long":
        return named_case(rows, "padded", prefix_len, **LONG, **options)
    return named_case(rows, sequence, prefix_len, **options)


def no_gradients(attention, *tensors, **options):
    """o and lse, of which autograd gives no gradient: as while decoding."""
    with torch.no_grad():
        o, lse = attention(*tensors, **options)
    return o.requires_grad_(), lse.requires_grad_()


@pytest.mark.slow
@pytest.mark.skipif(KERNELS, reason="the kernels are tested instead")
@pytest.mark.parametrize("name", CASES)
def test_reference_reads_nothing_hidden(name, monkeypatch):
    for causal in (True, False):
        case = case_of(name, causal=causal)
        assert_untouched(prefix_attention_eager, case)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert_untouched(prefix_attention_lean, case.to(dtype))
            assert_untouched(partial(no_gradients, prefix_attention_lean), case.to(dtype))
    monkeypatch.setattr(reference, "MANY_KEYS", 0)
    monkeypatch.setattr(reference, "FEW_QUERIES", 100)
    case = case_of(name)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert_untouched(partial(no_gradients, prefix_attention_lean), case.to(dtype))


@pytest.mark.skipif(not KERNELS, reason="needs TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("name", CASES)
def test_kernels_read_nothing_hidden(name, monkeypatch):
    values = [float("nan"), 3e38]

    def kernels(*tensors, **options):
        o, lse = prefix_attention(
            *(x.to(DEVICE) for x in tensors),
            **{k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in options.items()},
        )
        return o.cpu(), lse.cpu()

    case = case_of(name, D=16).to(torch.float32)
    assert_untouched(kernels, case, values)
    if case.tensors[0].shape[2] <= 8:  # few queries: several splits, merged
        from kernels import cut

        monkeypatch.setattr(cut, "programs_wanted", lambda q: 16)
        monkeypatch.setattr(cut, "SPLIT_BYTES", -1)
        assert_untouched(kernels, case, values)
        monkeypatch.setattr(cut, "STACK_BYTES", -(2**40))  # a shared prefix is stacked
        assert_untouched(kernels, case, values)


@pytest.mark.parametrize("value", HOSTILE)
def test_merging_takes_nothing_of_what_is_not_seen(value):
    generator = torch.Generator().manual_seed(0)
    o, lse = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 3, 4, generator=generator)
    seen = torch.arange(4).expand(2, 1, 4) > 1
    bad_o, bad_lse = (
        x.clone().masked_fill(~hidden, value).requires_grad_()
        for x, hidden in ((o, seen[..., None]), (lse, seen))
    )
    gate = torch.ones(2, 3, 1, requires_grad=True)
    merged = merge_gated((o, lse), (bad_o, bad_lse), gate, seen)
    assert torch.equal(merged, merge_gated((o, lse), (o, lse), gate, seen))
    for x in torch.autograd.grad(merged.sum(), (bad_o, bad_lse, gate)):
        assert x.isfinite().all()
