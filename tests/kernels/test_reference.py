"""Attention in plain PyTorch: the definition against a loop, the lean path against it."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import assert_close, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import prefix_attention, prefix_attention_eager, prefix_attention_lean, reference

NAMES = ("o", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


@dataclass(frozen=True)
class Case:
    """One call: five tensors and the gradients do, dlse of its results, all rounded to `dtype`."""

    tensors: tuple  # q, k, v (B, H, T or S, D), prefix_k, prefix_v ([N,] H, P, D)
    do: torch.Tensor  # (B, H, T, D)
    dlse: torch.Tensor  # (B, H, T)
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype; dlse in that of lse."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = tuple(x.to(dtype) for x in self.tensors)
        return replace(self, tensors=tensors, do=self.do.to(dtype), dlse=self.dlse.to(wide))

    def on(self, device: str) -> "Case":
        options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in self.options.items()}
        tensors = tuple(x.to(device) for x in self.tensors)
        return Case(tensors, self.do.to(device), self.dlse.to(device), options)


def make_case(B=3, H=2, T=7, S=7, D=8, P=5, N=None, seed=0, **options) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    prefix = (H, P, D) if N is None else (N, H, P, D)
    shapes = ((B, H, T, D), (B, H, S, D), (B, H, S, D), prefix, prefix)
    tensors = tuple(randn(*shape) for shape in shapes)
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    return Case(tensors, randn(B, H, T, D), randn(B, H, T), options)


def run(attention, case: Case) -> dict[str, torch.Tensor]:
    """o, lse and all five gradients."""
    tensors = [x.detach().requires_grad_() for x in case.tensors]
    o, lse = attention(*tensors, **case.options, return_lse=True)
    grads = torch.autograd.grad((o, lse), tensors, (case.do, case.dlse), materialize_grads=True)
    return dict(zip(NAMES, (o.detach(), lse.detach(), *grads), strict=True))


def visible_matrix(case: Case) -> torch.Tensor:
    """1 where the query sees the column, else 0: (B, T, P + S), entry by entry."""
    q, k, _, prefix_k, _ = case.tensors
    (B, _, T, _), S, P = q.shape, k.shape[2], prefix_k.shape[-2]
    lists = {k: v.tolist() for k, v in case.options.items() if isinstance(v, torch.Tensor)}
    matrix = torch.zeros(B, T, P + S, dtype=torch.float64)
    for b in range(B):
        n = lists["prefix_index"][b] if "prefix_index" in lists else b
        lens = lists.get("prefix_lens", [P])
        prefix_len = 0 if n == -1 else lens[n] if len(lens) > 1 else lens[0]
        kv_len = lists["kv_lens"][b] if "kv_lens" in lists else S
        q_offset = lists["q_offset"][b] if "q_offset" in lists else S - T
        for i in range(T):
            for p in range(P):
                matrix[b, i, p] = p < prefix_len
            for j in range(S):
                causal = case.options.get("causal", True)
                matrix[b, i, P + j] = j < kv_len and (not causal or j <= q_offset + i)
    return matrix


def loop_attention(case: Case, q, k, v, prefix_k, prefix_v):
    """softmax written as exp / sum, row by row and head by head; fp64 and moderate scores only."""
    matrix, scale = visible_matrix(case), case.options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = [], []
    for b in range(q.shape[0]):
        if prefix_k.dim() == 3:
            pk, pv = prefix_k, prefix_v  # (H, P, D)
        else:
            index = case.options.get("prefix_index")
            n = int(index[b]) if index is not None else min(b, prefix_k.shape[0] - 1)
            pk, pv = prefix_k[n], prefix_v[n]  # n = -1: any, its columns are 0 in the matrix
        for h in range(q.shape[1]):
            w = matrix[b] * (scale * q[b, h] @ torch.cat([pk[h], k[b, h]]).T).exp()  # (T, P + S)
            total = w.sum(1, keepdim=True)
            blind = total == 0
            o.append(w @ torch.cat([pv[h], v[b, h]]) / total.masked_fill(blind, 1))
            lse.append(total.masked_fill(blind, 1).log().masked_fill(blind, float("-inf"))[:, 0])
    return torch.stack(o).view_as(q), torch.stack(lse).view(q.shape[:3])


def assert_equal_results(actual: dict, exact: dict, tolerance: float) -> None:
    """All seven, relative to the largest entry of each; -inf at the same places."""
    for name in NAMES:
        a, e = actual[name], exact[name]
        assert torch.equal(a.isneginf(), e.isneginf()), f"{name}: -inf elsewhere"
        assert a.isfinite().logical_or(e.isneginf()).all(), f"{name}: not finite"
        assert_close(a.nan_to_num(neginf=0), e.nan_to_num(neginf=0), tolerance, name)


ROWS = {  # how the rows of a batch of 3 find their prefix
    "one prefix": {},
    "one prefix, cut": {"prefix_lens": "1"},
    "bank of one": {"N": 1},
    "bank, one a row": {"N": 3},
    "bank, one a row, ragged": {"N": 3, "prefix_lens": "N"},
    "bank, one length": {"N": 3, "prefix_lens": "1"},
    "bank and index": {"N": 4, "prefix_index": [3, -1, 0]},
    "bank, index, ragged": {"N": 4, "prefix_index": [2, -1, 2], "prefix_lens": "N"},
    "bank, index, lengths 0": {"N": 4, "prefix_index": [1, 3, 1], "prefix_lens": "N"},
}
SEQUENCES = {  # what of the sequence they see
    "square": {"T": 7, "S": 7},
    "more keys": {"T": 3, "S": 11},
    "more queries": {"T": 5, "S": 3},  # the first two come before any key
    "one query": {"T": 1, "S": 9},
    "padded": {"T": 7, "S": 7, "kv_lens": [7, 0, 4]},
    "cache": {"T": 2, "S": 9, "kv_lens": [9, 2, 5], "q_offset": [7, 0, 3]},
    "cache, one query": {"T": 1, "S": 9, "q_offset": [8, 1, 4]},
    "before the keys": {"T": 3, "S": 4, "q_offset": [-2, 0, -9]},
}


def named_case(rows: str, sequence: str, prefix_len: int, **options) -> Case:
    options = {**ROWS[rows], **SEQUENCES[sequence], **options}
    P = prefix_len
    lens = {"1": [P // 2], "N": [P, 0, (P + 1) // 2, min(P, 1)][: options.get("N", 1)]}
    if "prefix_lens" in options:
        options["prefix_lens"] = lens[options["prefix_lens"]]
    return make_case(P=P, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("rows", ROWS)
def test_definition_equals_loop(rows, sequence, causal):
    for prefix_len in (0, 5):
        case = named_case(rows, sequence, prefix_len, causal=causal)
        exact = run(lambda *x, c=case, **_: loop_attention(c, *x), case)
        # another order of summation in fp64; worst seen: 1.6e-15
        assert_equal_results(run(prefix_attention_eager, case), exact, 1e-14)


@pytest.mark.parametrize("prefix_len", [0, 1, 5, 16, 33])  # none, one, odd, a block, past a block
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("rows", ROWS)
def test_lean_equals_definition(rows, sequence, prefix_len):
    for causal in (True, False):
        case = named_case(rows, sequence, prefix_len, causal=causal)
        # another order of summation in fp64; worst seen: 1.7e-15
        actual, exact = run(prefix_attention_lean, case), run(prefix_attention_eager, case)
        assert_equal_results(actual, exact, 1e-14)


def magnitudes(case: Case) -> tuple[dict[str, float], float]:
    """Largest entry of the seven fp64 formulas with absolute values; largest |score|."""
    q, k, v, prefix_k, prefix_v = case.tensors
    B, P, scale = q.shape[0], prefix_k.shape[-2], case.options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bank_k, bank_v = (x if x.dim() == 4 else x[None] for x in (prefix_k, prefix_v))
    each = torch.arange(B).clamp(max=bank_k.shape[0] - 1)
    index = case.options.get("prefix_index", each).clamp(min=0)
    keys = torch.cat([bank_k[index], k], 2).abs()  # (B, H, P + S, D)
    values = torch.cat([bank_v[index], v], 2).abs()
    seen = visible_matrix(case)[:, None]  # (B, 1, T, P + S)
    s = scale * (q @ torch.cat([bank_k[index], k], 2).mT)
    p = s.masked_fill(seen == 0, -1e300).softmax(-1) * seen
    dp = case.do.abs() @ values.mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True) + case.dlse.abs()[..., None])
    scale = abs(scale)
    dkeys, dvalues = scale * ds.mT @ q.abs(), p.mT @ case.do.abs()  # (B, H, P + S, D)
    dpk, dpv = (torch.zeros_like(bank_k).index_add(0, index, x[:, :, :P]) for x in (dkeys, dvalues))
    results = (p @ values, torch.ones(1), scale * ds @ keys, dkeys, dvalues, dpk, dpv)
    sizes = {n: x.max().item() if x.numel() else 0.0 for n, x in zip(NAMES, results, strict=True)}
    return sizes, (s * seen).abs().max().item() if s.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seq_len", [1, 16, 63])  # decode, a block, odd and across blocks
@pytest.mark.parametrize("prefix_len", [0, 1, 5, 16, 33])
@pytest.mark.parametrize("rows", ["one prefix", "bank, index, ragged"])
def test_lean_within_rounding(rows, prefix_len, seq_len, dtype):
    sizes = {"T": seq_len, "S": 63, "D": 64, "kv_lens": [63, 9, 40], "seed": prefix_len}
    case = named_case(rows, "square", prefix_len, **sizes).to(dtype)
    wide = case.to(torch.float64)  # the same rounded inputs
    exact, low = run(prefix_attention_eager, wide), run(prefix_attention_eager, case)
    sizes, max_score = magnitudes(wide)
    for name, actual in run(prefix_attention_lean, case).items():
        assert actual.dtype == (low[name].dtype if name != "lse" else torch.float32), name
        assert torch.equal(actual.isneginf(), exact[name].isneginf()), f"{name}: -inf elsewhere"
        if actual.numel():
            results = (x.nan_to_num(neginf=0) for x in (actual, low[name], exact[name]))
            assert_within_rounding(*results, sizes[name], max_score, name)


def test_no_result_without_return_lse_differs():
    case = named_case("bank, index, ragged", "cache", 5)
    for attention in (prefix_attention, prefix_attention_eager, prefix_attention_lean):
        o, _ = attention(*case.tensors, **case.options, return_lse=True)
        assert torch.equal(attention(*case.tensors, **case.options), o)


def drawn_case(data, **ranges: tuple[int, int]) -> Case:
    """Sizes (first and last), ways to name prefixes and keys, causality and scale at random."""
    sizes = {name: data.draw(st.integers(*ends), label=name) for name, ends in ranges.items()}
    B, S, P = (sizes[name] for name in "BSP")
    options = {"N": data.draw(st.sampled_from([None, 1, B, 4]))}
    N = options["N"] or 1
    rows = {"prefix_lens": (N, 0, P), "kv_lens": (B, 0, S), "q_offset": (B, -9, S + 9)}
    given = [name for name in rows if data.draw(st.booleans())]
    if N not in (1, B) or (options["N"] and data.draw(st.booleans())):
        given.append("prefix_index")
        rows["prefix_index"] = (B, -1, N - 1)
    for name in given:
        n, low, high = rows[name]
        options[name] = data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
    options["causal"] = data.draw(st.booleans())
    options["scale"] = data.draw(st.sampled_from([None, 0.7, -0.1]))
    return make_case(**sizes, **options, seed=data.draw(st.integers(0, 99)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_lean_equals_definition_at_random_shapes(data):
    """Also no queries and no keys at all."""
    D = data.draw(st.sampled_from([1, 4, 6]))
    case = drawn_case(data, B=(1, 4), H=(1, 3), T=(0, 9), S=(0, 9), D=(D, D), P=(0, 9))
    exact = run(prefix_attention_eager, case)
    assert_equal_results(run(prefix_attention, case), exact, 1e-14)  # as above


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -0.5])
@pytest.mark.parametrize("attention", [prefix_attention_eager, prefix_attention_lean])
def test_scale(attention, scale):
    """0.0 and negative ones are values like any other."""
    for sequence in ("square", "padded"):
        for prefix_len in (0, 5):
            case = named_case("one prefix", sequence, prefix_len, scale=scale)
            exact = run(lambda *x, c=case, **_: loop_attention(c, *x), case)
            assert_equal_results(run(attention, case), exact, 1e-14)  # as above


@pytest.mark.parametrize("attention", [prefix_attention_eager, prefix_attention_lean])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # the lean path has two ways
def test_blind_queries_give_zero(attention, dtype):
    """o = 0, lse = -inf, and gradients that are zero and finite, whatever do and dlse are."""
    case = make_case(B=2, T=4, S=4, P=3, kv_lens=[0, 4], prefix_lens=[0], q_offset=[0, -2])
    results = run(attention, case.to(dtype))
    assert (results["o"][0] == 0).all() and results["lse"][0].isneginf().all()
    assert (results["o"][1, :, :2] == 0).all() and results["lse"][1, :, :2].isneginf().all()
    assert results["lse"][1, :, 2:].isfinite().all()
    for name in ("dq", "dk", "dv"):
        assert (results[name][0] == 0).all() and results[name].isfinite().all()
    assert (results["dq"][1, :, :2] == 0).all() and (results["dq"][1, :, 2:] != 0).all()
    assert (results["dprefix_k"] == 0).all() and (results["dprefix_v"] == 0).all()


def test_views_of_a_fused_qkv():
    """Strided q, k, v give what contiguous copies give, and one gradient for the whole of qkv."""
    case = make_case(B=2, H=3, T=6, S=6, D=4, P=3)
    prefix, B, T, H, D = case.tensors[3:], 2, 6, 3, 4
    qkv = torch.stack(case.tensors[:3], dim=2).permute(0, 3, 2, 1, 4).contiguous()
    qkv.requires_grad_()  # (B, T, 3, H, D)
    assert qkv.shape == (B, T, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert q.data_ptr() == qkv.data_ptr() and not q.is_contiguous()
    o = prefix_attention(q, k, v, *prefix)
    exact = run(prefix_attention, replace(case, dlse=torch.zeros(B, H, T)))
    assert_close(o, exact["o"], 1e-14)
    dqkv = torch.autograd.grad(o, qkv, case.do)[0].permute(2, 0, 3, 1, 4)
    for part, name in zip(dqkv, ("dq", "dk", "dv"), strict=True):
        assert_close(part, exact[name], 1e-14, name)


@pytest.mark.parametrize("attention", [prefix_attention_eager, prefix_attention_lean])
@pytest.mark.parametrize("options", [{}, {"kv_lens": [2, 6, 0]}, {"P": 0}])
def test_memory_order_of_o(attention, options):
    """(B, T, H, D), so that merging the heads is a view."""
    case = make_case(T=6, S=6, **options)
    o = attention(*case.tensors, **case.options)
    assert o.transpose(1, 2).is_contiguous() and o.transpose(1, 2).view(3, 6, 16).shape[2] == 16


@pytest.mark.parametrize("attention", [prefix_attention_eager, prefix_attention_lean])
def test_fp32_prefix_with_bf16_queries(attention):
    """Cast for the products; its gradient is fp32, and summed over the rows in fp32."""
    case = make_case(B=8, P=5).to(torch.bfloat16)
    fp32 = replace(case, tensors=(*case.tensors[:3], *(x.float() for x in case.tensors[3:])))
    rows = (x.expand(8, -1, -1, -1) for x in case.tensors[3:])  # a bank, one a row: not summed
    each = run(attention, replace(case, tensors=(*case.tensors[:3], *rows)))
    summed = run(attention, fp32)
    assert summed["o"].dtype == torch.bfloat16 and torch.equal(summed["o"], each["o"])
    for name in ("dprefix_k", "dprefix_v"):
        assert summed[name].dtype == torch.float32
        # a sum of 8 in fp32: a few eps = 1.2e-7; summed in bf16 it would be off by 4e-3
        assert_close(summed[name], each[name].float().sum(0), 1e-6, name)


def merged(q, k, v, prefix_k, prefix_v, **_):
    """[prefix; 5 keys] and [the other keys], merged by their lse."""
    none, options = prefix_k[:, :0], {"causal": False, "return_lse": True}
    o1, lse1 = prefix_attention(q, k[:, :, :5], v[:, :, :5], prefix_k, prefix_v, **options)
    o2, lse2 = prefix_attention(q, k[:, :, 5:], v[:, :, 5:], none, none, **options)
    lse = torch.logaddexp(lse1, lse2)
    return (lse1 - lse).exp()[..., None] * o1 + (lse2 - lse).exp()[..., None] * o2, lse


def test_merging_two_calls_by_their_lse():
    """It gives the whole: values, lse and gradients."""
    case = make_case(T=4, S=9, P=3, causal=False)
    # a few more roundings in fp64 than one call has; worst seen: 4.5e-16
    assert_equal_results(run(merged, case), run(prefix_attention_eager, case), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{"T": 0}, {"S": 0}, {"P": 0, "S": 0}, {"T": 0, "P": 0, "S": 0}])
def test_nothing_to_attend(sizes, dtype):
    """No queries, no sequence or no keys at all are no special case."""
    case = make_case(**{"T": 3, "S": 4, "P": 2, **sizes}).to(dtype)
    actual, exact = run(prefix_attention_lean, case), run(prefix_attention_eager, case)
    # products of a few numbers of order 1; worst seen: 3.5 eps
    assert_equal_results(actual, exact, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("prefix_len", [0, 1, 5])
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("rows", ROWS)
def test_scores_side_by_side_equal_definition(rows, sequence, prefix_len, monkeypatch):
    """What decoding takes on a CPU for many keys, here for few."""
    monkeypatch.setattr(reference, "MANY_KEYS", 0)
    for causal in (True, False):
        case = named_case(rows, sequence, prefix_len, causal=causal)
        exact = prefix_attention_eager(*case.tensors, **case.options, return_lse=True)
        o, lse = prefix_attention_lean(*case.tensors, **case.options, return_lse=True)
        assert torch.equal(prefix_attention_lean(*case.tensors, **case.options), o)
        assert torch.equal(lse.isneginf(), exact[1].isneginf())
        # another order of summation in fp64; worst seen: 1.1e-15
        assert_close(o, exact[0], 1e-14, "o")
        assert_close(lse.nan_to_num(neginf=0), exact[1].nan_to_num(neginf=0), 1e-14, "lse")
        assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["one prefix", "bank, index, ragged"])
def test_scores_side_by_side_within_rounding(rows, dtype, monkeypatch):
    monkeypatch.setattr(reference, "MANY_KEYS", 0)
    sizes = {"T": 1, "S": 63, "D": 64, "q_offset": [62, 8, 39]}
    case = named_case(rows, "square", 33, **sizes).to(dtype)
    wide = case.to(torch.float64)
    results = [
        attention(*c.tensors, **c.options, return_lse=True)
        for attention, c in ((prefix_attention_lean, case), (prefix_attention_eager, case),
                             (prefix_attention_eager, wide))
    ]  # fmt: skip
    sizes, max_score = magnitudes(wide)
    for name, *x in zip(("o", "lse"), *results, strict=True):
        assert_within_rounding(*x, sizes[name], max_score, name)


def test_scores_side_by_side_copy_no_keys(monkeypatch):
    """Of many keys nothing as large as they are is made; gradients take the other path."""
    case = make_case(B=16, H=4, T=1, S=96, D=64, P=10).to(torch.float32)
    keys = case.tensors[1].numel()
    assert keys >= reference.MANY_KEYS
    cats, cat = [], torch.cat

    def noted(tensors, *args, **options):
        out = cat(tensors, *args, **options)
        cats.append(out.numel())
        return out

    monkeypatch.setattr(torch, "cat", noted)
    prefix_attention_lean(*case.tensors)
    assert cats == [16 * 4 * 1 * 106]  # scores alone
    cats.clear()
    q = case.tensors[0].requires_grad_()
    prefix_attention_lean(q, *case.tensors[1:])
    assert max(cats) > keys
