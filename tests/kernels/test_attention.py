"""The kernels of attention.py and backward.py against the definition: o, lse and all gradients.

They run here in Triton's interpreter (`make test-kernels`) or on a GPU, through the public
operator. New tensors are filled with NaN, so that elements which a kernel does not write are found.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import (
    DEVICE,
    INTERPRETED,
    KERNEL_DTYPES,
    assert_close,
    assert_within_rounding,
    needs_kernels,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reference import NAMES, Case, drawn_case, magnitudes, make_case, merged, named_case, run

from kernels import prefix_attention, prefix_attention_eager, prefix_attention_qkv

needs_kernels()

from kernels import launch, plan  # noqa: E402  (imports Triton)
from kernels.inputs import Inputs  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # log2(0) = -inf is meant: a query that sees nothing
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


def results(case: Case) -> dict[str, torch.Tensor]:
    """What the kernels give, on the CPU."""
    return {name: x.cpu() for name, x in run(prefix_attention, case.on(DEVICE)).items()}


def check(case: Case, dtype=torch.float32, low=None) -> dict[str, torch.Tensor]:
    """All seven within rounding of the definition in fp64 on the same rounded inputs."""
    case = case.to(torch.float32).to(dtype)
    wide = case.to(torch.float64)
    exact, actual = run(prefix_attention_eager, wide), results(case)
    low = run(prefix_attention_eager, case) if low is None else low(case)
    sizes, max_score = magnitudes(wide)
    for name in NAMES:
        assert actual[name].dtype == (dtype if name != "lse" else torch.float32), name
        assert actual[name].shape == exact[name].shape, name
        assert torch.equal(actual[name].isneginf(), exact[name].isneginf()), f"{name}: -inf"
        if actual[name].numel():
            three = (x[name].nan_to_num(nan=torch.nan, neginf=0) for x in (actual, low, exact))
            assert_within_rounding(*three, sizes[name], max_score, name)
    return actual


ONE_TILE = {"T": 30, "S": 30}  # of queries and of keys: the short backward kernel
TILES = {"T": 65, "S": 70, "H": 1}  # several of each: dq, dk and dv apart
CASES = [  # rows, sequence, prefix_len, further options: each line another way through the kernels
    ("one prefix", ONE_TILE, 0, {}),
    ("one prefix", ONE_TILE, 1, {"causal": False}),
    ("one prefix", ONE_TILE, 16, {"D": 64}),
    ("one prefix", ONE_TILE, 33, {"kv_lens": [30, 0, 7]}),
    ("one prefix", ONE_TILE, 200, {}),
    ("one prefix, cut", ONE_TILE, 33, {"T": 12, "D": 80}),
    ("bank, one a row", ONE_TILE, 5, {"q_offset": [0, -9, 17]}),
    ("bank, one a row, ragged", ONE_TILE, 16, {"S": 9}),
    ("bank, index, ragged", ONE_TILE, 16, {"kv_lens": [30, 0, 7], "q_offset": [0, 0, -3]}),
    ("bank and index", ONE_TILE, 70, {"causal": False, "D": 32}),
    ("bank, index, lengths 0", ONE_TILE, 5, {"T": 30, "S": 1}),
    ("bank of one", ONE_TILE, 5, {"scale": 0.0}),
    ("one prefix", TILES, 0, {"T": 130, "S": 130, "B": 1}),
    ("one prefix", TILES, 1, {"T": 63, "S": 130, "B": 2}),
    ("one prefix", TILES, 16, {"T": 64, "S": 64}),
    ("one prefix", TILES, 33, {"causal": False}),
    ("one prefix", TILES, 200, {"T": 33, "S": 65, "D": 128, "B": 2}),
    ("one prefix, cut", TILES, 70, {"kv_lens": [70, 1, 0]}),
    ("bank, one a row", TILES, 16, {"scale": -0.5}),
    ("bank, one a row, ragged", TILES, 33, {"q_offset": [5, 0, -40]}),
    ("bank, index, ragged", TILES, 5, {"kv_lens": [70, 64, 0], "q_offset": [5, 90, 3]}),
    ("bank, index, ragged", TILES, 130, {}),
    ("bank and index", TILES, 1, {"T": 130, "S": 8, "H": 2}),
    ("bank, index, lengths 0", TILES, 33, {"causal": False, "kv_lens": [0, 0, 0]}),
]


def names(case) -> str:
    rows, sequence, prefix_len, options = case
    return f"{rows}-{'one tile' if sequence is ONE_TILE else 'tiles'}-P={prefix_len}-{options}"


def in_a_dtype() -> Iterator[tuple]:
    """Each case in each dtype on a GPU, in one of them in the interpreter, which is slow."""
    for number, case in enumerate(CASES):
        for dtype in [KERNEL_DTYPES[number % 2]] if INTERPRETED else KERNEL_DTYPES:
            yield pytest.param(case, dtype, id=f"{names(case)}-{dtype}")


@pytest.mark.parametrize("case, dtype", [*in_a_dtype()])
def test_within_rounding(case, dtype):
    rows, sequence, prefix_len, options = case
    sizes = {"D": 16, **sequence, **options}
    check(named_case(rows, "square", prefix_len, **sizes), dtype)


@pytest.mark.parametrize("start", [28, 60])
def test_every_place_of_the_diagonal(start):
    """The first query of a tile one before, at and after the ends of the tiles of keys."""
    offsets = list(range(start, start + 8))
    case = make_case(B=8, H=1, T=33, S=102, D=16, P=1, q_offset=offsets)
    check(replace(case, options=case.options | {"kv_lens": torch.tensor(offsets) + 33}))
    check(case)


@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.data())
def test_within_rounding_at_random_shapes(data):
    P = data.draw(st.sampled_from([0, 1, 9, 33]))
    check(drawn_case(data, B=(1, 3), H=(1, 2), T=(1, 70), S=(0, 70), D=(16, 16), P=(P, P)))


OTHER_TILES = [(16, 64, 4, 1), (64, 16, 4, 1)]  # for the interpreter, whose table has few


def every_tile() -> list[tuple[str, int, int, launch.Tile]]:
    """(kernel, bytes of an element, D, tile): tuning may pick any of them."""
    if INTERPRETED:
        names = ("fwd", "bwd_short", "bwd_dq", "bwd_dkdv", "bwd_dprefix", "reduce", "reduce_bank")
        return [(name, 4, 16, launch.Tile(*tile)) for name in names for tile in OTHER_TILES]
    rows = launch.TILES[launch.target_of(torch.device("cuda"))].items()
    return [(name, n, d, tile) for (name, n, d), tiles in rows for tile in tiles]


@pytest.mark.parametrize("name, size, D, tile", every_tile(), ids=str)
def test_every_tile(name, size, D, tile, monkeypatch):
    rows = dict(launch.TILES[launch.target_of(torch.device(DEVICE))])
    rows[name, size, max(32, D)] = [tile]
    monkeypatch.setitem(launch.TILES, launch.target_of(torch.device(DEVICE)), rows)
    short = name == "bwd_short"
    if name.startswith("bwd"):  # one of the two ways to the gradients
        monkeypatch.setattr(plan, "plans_of", lambda *_: [tile if short else None])
    T = {"fwd": 70 if INTERPRETED else 300, "bwd_short": tile.block_m - 3, "decode": 3}
    T, P = T.get(name, 70), 70 if name == "bwd_dprefix" else 9
    dtype = torch.float32 if size == 4 else torch.bfloat16
    for options in ({}, {"kv_lens": [T - 2, 1]}):
        check(make_case(B=2, H=1, T=T, S=T, P=P, D=D, **options), dtype)
    if short:  # and several tiles of it
        case = make_case(B=2, H=1, T=2 * tile.block_m - 3, S=2 * tile.block_m - 3, P=P, D=D)
        check(case, dtype)
    if name == "reduce_bank":
        check(make_case(B=3, H=1, T=T, S=T, P=P, D=D, N=4, prefix_index=[2, 0, 2]), dtype)


SEVERAL = [  # T and S, tile of the short kernel: (2, 2), (3, 3), (2, 4) and (4, 2) tiles in a row
    (31, (16, 16)), (47, (16, 16)), (60, (32, 16)), (64, (16, 32)),
]  # fmt: skip


@pytest.mark.parametrize("T, blocks", SEVERAL)
@pytest.mark.parametrize(
    "rows, prefix_len, options",
    [
        ("one prefix", 5, {"kv_lens": [31, 0, 17]}),
        ("one prefix", 0, {}),
        ("bank, index, ragged", 9, {}),
        ("bank, one a row", 16, {"kv_lens": [3, 31, 20]}),
    ],
)
def test_several_tiles_of_the_short_kernel(T, blocks, rows, prefix_len, options, monkeypatch):
    """Unrolled, those above the diagonal left out: a row's gradients in one program."""
    tile = launch.Tile(*blocks, 4, 1)
    monkeypatch.setattr(plan, "plans_of", lambda *_: [tile])
    check(named_case(rows, "square", prefix_len, T=T, S=T, D=16, H=1, **options))


def test_plans(monkeypatch):
    """One tile that holds the row, or several where query i is at place i; else two kernels."""
    with launch.recorded("sm_90"):

        def plans(T, P=10, S=None, aligned=True):
            q, k = (torch.empty(1, 1, n, 64, dtype=torch.bfloat16) for n in (T, S or T))
            return [None if x is None else x[:2] for x in plan.plans_of(q, k, P, aligned)]

        assert plans(64) == [(64, 64), (64, 64)]
        assert plans(128) == [(128, 128), (64, 64), (64, 64), (128, 64)]
        assert plans(256) == [None, (64, 64), (64, 64), (128, 64), (128, 128)]
        assert plans(257)[0] is None and plans(1000) == [None]
        assert plans(128, aligned=False) == plans(100, S=128, aligned=False) == [(128, 128)]
        assert plans(256, aligned=False) == plans(64, P=65) == [None]


REPEATS = [[0, 1, 2], [2, 2, 0], [-1, 3, -1], [1, 1, 1], [-1, -1, -1]]


@pytest.mark.parametrize("index", REPEATS, ids=str)
@pytest.mark.parametrize("T, prefix_len", [(30, 5), (30, 40), (70, 5)])
def test_gradient_of_a_bank_with_and_without_repeats(index, T, prefix_len):
    """A prefix that one row uses gets its gradient from that row's program, one that no row uses
    gets zeros, and the others a sum of parts."""
    case = make_case(B=3, H=2, T=T, S=T, D=16, P=prefix_len, N=4, prefix_index=index)
    found = check(case)
    for n in set(range(4)) - set(index):
        assert torch.equal(found["dprefix_k"][n], torch.zeros(2, prefix_len, 16))


def flash(case: Case) -> dict[str, torch.Tensor]:
    """One prefix, in plain fp32, as the kernels do it: p from lse, and delta from o."""
    q, k, v, prefix_k, prefix_v = (x.float() for x in case.tensors)
    B, P, scale = q.shape[0], prefix_k.shape[1], q.shape[-1] ** -0.5
    o, lse = prefix_attention_eager(*case.tensors, **case.options, return_lse=True)
    keys, values = (
        torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in ((prefix_k, k), (prefix_v, v))
    )
    seen = torch.ones(q.shape[2], keys.shape[2]).tril(keys.shape[2] - q.shape[2]).bool()
    p = (scale * (q @ keys.mT) - lse[..., None]).exp().masked_fill(~seen, 0.0)
    delta = (case.do.float() * o.float()).sum(-1) - case.dlse
    ds = p * (case.do.float() @ values.mT - delta[..., None])
    dkeys, dvalues = scale * ds.mT @ q, p.mT @ case.do.float()
    grads = (scale * ds @ keys, dkeys[:, :, P:], dvalues[:, :, P:])
    grads += (dkeys[:, :, :P].sum(0), dvalues[:, :, :P].sum(0))
    return dict(zip(NAMES, (o, lse, *(x.to(o.dtype) for x in grads)), strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("sequence", [ONE_TILE, {"T": 65, "S": 65}])
def test_extreme_scores(sequence, dtype):
    """Scores of +-1e4. Recomputing exp(s - lse) costs eps |s|: plain fp32 done so is the measure
    (PyTorch's softmax, which keeps p, is a hundred times closer in dk)."""
    case = make_case(B=2, D=16, P=5, **sequence)
    q, k, v, prefix_k, prefix_v = case.tensors
    top = (q @ torch.cat([prefix_k.expand(2, -1, -1, -1), k], 2).mT).abs().max() / 4
    q, k, prefix_k = (x * (1e4 / top) ** 0.5 for x in (q, k, prefix_k))
    case = replace(case, tensors=(q, k, v, prefix_k, prefix_v))
    assert magnitudes(case)[1] == pytest.approx(1e4, rel=0.5)
    check(case, dtype, low=flash)


@pytest.mark.parametrize("sequence, prefix_len", [(ONE_TILE, 5), (TILES, 40)])
def test_only_the_gradients_that_are_needed(sequence, prefix_len):
    """Any of the five inputs alone, and the prefix alone, as in the first layer."""
    case = named_case("bank, index, ragged", "square", prefix_len, **sequence, D=16)
    case = case.to(torch.float32).on(DEVICE)
    every = run(prefix_attention, case)
    for wanted in ([0], [1], [2], [3], [4], [3, 4], [0, 1, 2]):
        tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.tensors)]
        o, lse = prefix_attention(*tensors, **case.options, return_lse=True)
        grads = torch.autograd.grad((o, lse), [tensors[i] for i in wanted], (case.do, case.dlse))
        for i, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, every[NAMES[2 + i]]), NAMES[2 + i]


def test_o_alone_and_lse_alone():
    case = make_case(T=20, S=20, D=16).to(torch.float32).on(DEVICE)
    tensors = [x.requires_grad_() for x in case.tensors]
    o, lse = prefix_attention(*tensors, return_lse=True)
    both = torch.autograd.grad((o, lse), tensors, (case.do, case.dlse), retain_graph=True)
    of_o = torch.autograd.grad(o, tensors, case.do, retain_graph=True)
    of_lse = torch.autograd.grad(lse, tensors, case.dlse, retain_graph=True)
    of_sum = torch.autograd.grad(o.sum(), tensors)  # do without memory of its own
    ones = torch.autograd.grad(prefix_attention(*tensors), tensors, torch.ones_like(o))
    for name, whole, a, b, c, d in zip(NAMES[2:], both, of_o, of_lse, of_sum, ones, strict=True):
        # three sums of up to 60 fp32 numbers of order 1; worst seen 1.2e-6
        assert_close(a + b, whole, 1e-5, name)
        assert torch.equal(c, d), name


@pytest.mark.parametrize("sequence", [ONE_TILE, TILES])
def test_fp32_prefix(sequence):
    """Cast for the products; its gradient is fp32, and summed over the rows in fp32."""
    case = make_case(B=4, D=16, P=5, **sequence).to(torch.float16)
    fp32 = replace(case, tensors=(*case.tensors[:3], *(x.float() for x in case.tensors[3:])))
    rows = tuple(x.expand(4, -1, -1, -1) for x in fp32.tensors[3:])  # a bank, one a row: not summed
    summed, each = results(fp32), results(replace(fp32, tensors=(*fp32.tensors[:3], *rows)))
    assert torch.equal(summed["o"], results(case)["o"])
    for name in ("dprefix_k", "dprefix_v"):
        assert summed[name].dtype == torch.float32
        # a sum of 4 in fp32; one rounding to fp16 would be 5e-4
        assert_close(summed[name], each[name].sum(0), 1e-6, name)


@pytest.mark.parametrize("sequence", [ONE_TILE, {"T": 65, "S": 65}])
@pytest.mark.parametrize("options", [{}, {"kv_lens": [9, 30, 0]}])
def test_fused_qkv(sequence, options):
    """The same results from one qkv, whose gradient is one tensor; o merges its heads by a view."""
    case = make_case(D=16, P=5, **sequence, **options).to(torch.float32).on(DEVICE)
    exact = run(prefix_attention, case)
    qkv = torch.stack(case.tensors[:3], dim=2).permute(0, 3, 2, 1, 4).contiguous().requires_grad_()
    prefix = [x.detach().requires_grad_() for x in case.tensors[3:]]
    o, lse = prefix_attention_qkv(qkv, *prefix, **case.options, return_lse=True)
    assert torch.equal(o, exact["o"]) and torch.equal(lse, exact["lse"])
    assert o.transpose(1, 2).is_contiguous()
    dqkv, *dprefix = torch.autograd.grad((o, lse), (qkv, *prefix), (case.do, case.dlse))
    assert dqkv.is_contiguous()
    parts = (*dqkv.permute(2, 0, 3, 1, 4), *dprefix)
    for name, part in zip(NAMES[2:], parts, strict=True):
        assert torch.equal(part, exact[name]), name
    only_prefix = prefix_attention_qkv(qkv.detach(), *prefix, **case.options, return_lse=True)
    again = torch.autograd.grad(only_prefix, prefix, (case.do, case.dlse))
    assert [torch.equal(x, y) for x, y in zip(again, dprefix, strict=True)] == [True, True]


def test_strided_inputs():
    """Views with any strides, and a last dimension that is not contiguous (copied)."""
    case = named_case("bank and index", "square", 5, T=20, S=20, D=16).to(torch.float32).on(DEVICE)
    exact = run(prefix_attention, case)
    spread = [
        torch.stack([x, x * torch.nan], -2).flatten(-2)[..., : x.shape[-1]] for x in case.tensors
    ]
    turned = [x.mT.contiguous().mT for x in case.tensors]
    apart = [*case.tensors[:4], case.tensors[4].transpose(1, 2).contiguous().transpose(1, 2)]
    do = case.do.transpose(2, 3).contiguous().transpose(2, 3)
    for tensors in (spread, turned, apart):
        got = run(prefix_attention, replace(case, tensors=tuple(tensors), do=do))
        assert [name for name in NAMES if not torch.equal(got[name], exact[name])] == []


@pytest.mark.parametrize("sequence", [ONE_TILE, TILES])
def test_saved_o_may_come_back_in_another_layout(sequence):
    """As from the hook that offloads activations: it keeps values, not strides."""
    case = make_case(D=16, P=5, **sequence).to(torch.float32).on(DEVICE)
    exact = run(prefix_attention, case)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        got = run(prefix_attention, case)
    assert [name for name in NAMES if not torch.equal(got[name], exact[name])] == []


def test_o_may_be_changed_in_place():
    case = make_case(T=20, S=20, D=16).to(torch.float32).on(DEVICE)
    tensors = [x.requires_grad_() for x in case.tensors]
    o = prefix_attention(*tensors)
    assert torch.equal(o.detach().clone() * 2, o.clone().mul_(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.mul_(2).sum().backward()  # o is needed: autograd sees the change


def test_keys_that_no_query_sees_are_not_read():
    """The unused end of a cache may hold anything, even NaN, wherever it begins."""
    for T in (3, 20, 40):
        case = make_case(B=2, T=T, S=T + 37, D=16, P=5, q_offset=[0, 0]).to(torch.float32)
        exact = results(case)
        q, k, v, *prefix = (x.clone() for x in case.tensors)
        k[:, :, T:], v[:, :, T:] = torch.nan, torch.nan
        got = results(replace(case, tensors=(q, k, v, *prefix)))
        for name in NAMES:
            assert torch.equal(got[name], exact[name]), (T, name)


@pytest.mark.skipif(INTERPRETED, reason="one program after the other: nothing could differ")
@pytest.mark.parametrize("T", [128, 500])
@pytest.mark.parametrize("prefix_len", [10, 100])
def test_repeats_bit_for_bit(T, prefix_len):
    case = make_case(B=16, H=12, T=T, S=T, D=64, P=prefix_len).to(torch.bfloat16)
    first = results(case)
    for _ in range(19):
        again = results(case)
        assert [name for name in NAMES if not torch.equal(again[name], first[name])] == []


def test_the_order_of_the_sum_over_rows_is_fixed():
    """dprefix is the fp32 sum of the rows' parts in the order of the rows, whatever they are."""
    case = make_case(B=5, T=20, S=20, D=16, P=5).to(torch.float32).on(DEVICE)
    rows = [
        run(prefix_attention, Case((*(x[b : b + 1] for x in case.tensors[:3]), *case.tensors[3:]),
                                   case.do[b : b + 1], case.dlse[b : b + 1]))
        for b in range(5)
    ]  # fmt: skip
    whole = run(prefix_attention, case)
    for name in ("dprefix_k", "dprefix_v"):
        parts = torch.stack([row[name] for row in rows])
        # Triton adds 32 parts at a time, here all five; another order than PyTorch's: a few eps
        assert_close(whole[name], parts.sum(0), 4e-7, name)


def test_merging_two_calls_by_their_lse():
    case = make_case(T=20, S=30, D=16, P=3, causal=False).to(torch.float32).on(DEVICE)
    actual, exact = run(merged, case), run(prefix_attention, case)
    for name in NAMES:
        # a few roundings of fp32 numbers of order 1 to 10; worst seen 1e-6
        assert_close(actual[name], exact[name], 1e-5, name)


@pytest.mark.parametrize(
    "sizes", [{"T": 0}, {"S": 0}, {"P": 0, "S": 0}, {"B": 0}, {"T": 0, "P": 0}]
)
def test_nothing_to_attend(sizes):
    check(make_case(**{"B": 2, "T": 11, "S": 4, "P": 2, "D": 16, **sizes}))


def test_blind_queries_stop_any_gradient():
    """o = 0, lse = -inf; even a NaN in dlse does not get past a query that sees nothing."""
    case = make_case(B=2, T=20, S=20, P=3, D=16, kv_lens=[0, 20], prefix_lens=[0])
    case.dlse[0] = torch.nan
    got = results(case.to(torch.float32))
    assert (got["o"][0] == 0).all() and got["lse"][0].isneginf().all()
    for name in ("dq", "dk", "dv"):
        assert (got[name][0] == 0).all() and (got[name][1] != 0).any(), name
    assert (got["dprefix_k"] == 0).all() and (got["dprefix_v"] == 0).all()


@pytest.mark.parametrize("dtype, D", [(torch.float64, 16), (torch.float32, 24)])
def test_what_the_kernels_lack_goes_to_the_reference(dtype, D, monkeypatch):
    monkeypatch.setattr(launch, "launch", None)
    case = make_case(T=20, S=20, D=D).to(dtype).on(DEVICE)
    got, exact = run(prefix_attention, case), run(prefix_attention_eager, case)
    assert_close(got["dq"], exact["dq"], 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sequence, short", [(ONE_TILE, True), (TILES, False)])
@pytest.mark.parametrize("prefix_len", [0, 5, 40])
def test_workspace(sequence, short, prefix_len, monkeypatch):
    """The backward pass allocates the bytes given in the header."""
    case = make_case(**{"B": 3, "H": 2, "D": 16, "P": prefix_len, **sequence})
    case = case.to(torch.float32).on(DEVICE)
    o, lse = prefix_attention(*case.tensors, return_lse=True)
    outputs = [torch.empty_like(x) for x in case.tensors]
    sizes = []

    def counting(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            sizes.append(x.numel() * x.element_size())
            return x

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", counting(torch.Tensor.new_empty))
        patch.setattr(torch, "empty_like", counting(torch.empty_like))
        to = plan.Gradients(*outputs)
        plan.backward(Inputs(*case.tensors), o, lse, case.do, case.dlse, to)
    assert sum(sizes) == plan.workspace_bytes(*case.tensors[:2], case.tensors[3])
    one_program = plan.plans_of(*case.tensors[:2], prefix_len, True)[0] is not None
    assert one_program == (short and prefix_len <= 16) or not INTERPRETED  # by its table
    if one_program:  # as in the header: no delta, one part per row
        assert sum(sizes) == 8 * 3 * 2 * prefix_len * 16
