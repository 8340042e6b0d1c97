"""Few queries over [prefix; KV cache]: `kernels.decode` against the definition.

The kernels run in Triton's interpreter (`make test-kernels`) or on a GPU. Every result and every
workspace is first filled with NaN, so that elements which are not written are found.
"""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, INTERPRETED, KERNEL_DTYPES, assert_within_rounding, needs_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reference import ROWS, SEQUENCES, Case, drawn_case, make_case, named_case

from kernels.inputs import Inputs
from kernels.reference import prefix_attention_eager, prefix_rows

needs_kernels()

from kernels import cut as cut_rules  # noqa: E402  (imports Triton)
from kernels import decode, launch  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # log2(0) = -inf is meant: a query that sees nothing
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


@pytest.fixture
def cut(monkeypatch):
    """cut(programs, stack): programs wanted on the GPU; whether the prefix is stacked."""

    def set_to(programs: int = 16, stack: bool = False) -> None:
        monkeypatch.setattr(cut_rules, "programs_wanted", lambda q: programs)
        monkeypatch.setattr(cut_rules, "SPLIT_BYTES", -1)
        monkeypatch.setattr(cut_rules, "STACK_BYTES", -(2**40) if stack else 2**60)

    return set_to


def attend(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    case = case.on(DEVICE)
    o, lse = decode.decode(Inputs(*case.tensors, **case.options))
    assert o.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    return o.cpu(), lse.cpu()


def eager(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return prefix_attention_eager(*case.tensors, **case.options, return_lse=True)


def check(case: Case, dtype=torch.float32, fp32_prefix=False) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse within rounding of the definition in fp64 on the same rounded inputs."""
    given_prefix = case.to(torch.float32).tensors[3:]
    case = case.to(torch.float32).to(dtype)
    called, wide = case, case.to(torch.float64)
    q, k, v, prefix_k, prefix_v = wide.tensors
    if fp32_prefix:
        called = replace(case, tensors=(*case.tensors[:3], *given_prefix))
    exact, low, actual = eager(wide), eager(case), attend(called)
    sums, _ = eager(replace(wide, tensors=(q, k, v.abs(), prefix_k, prefix_v.abs())))
    keys = torch.cat([prefix_rows(prefix_k, case.options.get("prefix_index"), q), k], 2)
    scale = case.options.get("scale")
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ keys.mT
    max_score = s.abs().max().item() if s.numel() else 0.0
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert torch.equal(actual[1].isneginf(), exact[1].isneginf()), "lse: -inf elsewhere"
    for i, name in enumerate(("o", "lse")):
        results = (x[i].nan_to_num(neginf=0, nan=torch.nan) for x in (actual, low, exact))
        magnitude = sums.abs().max().item() if name == "o" and sums.numel() else 1.0
        if q.numel():
            assert_within_rounding(*results, magnitude, max_score, name)
    return actual


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_definition(rows, sequence, cut):
    """Every way to name the prefix and the keys; a tile of keys per program, or all in one."""
    for prefix_len, programs, causal in ((5, 1, False), (33, 99, True)):
        cut(programs)
        check(named_case(rows, sequence, prefix_len, H=1, D=16, causal=causal))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("seq_len", [1, 2, 5, 8])
@pytest.mark.parametrize("prefix_len", [0, 1, 16, 33, 200])  # none, one, a tile, past it, long
def test_sizes(prefix_len, seq_len, dtype, cut):
    for rows, cached, programs in (("one prefix", 63, 1), ("bank, index, ragged", 130, 18)):
        cut(programs)
        lens = {"kv_lens": [cached, 9, cached - 20], "q_offset": [cached - seq_len, 4, 11]}
        sizes = {"T": seq_len, "S": cached, "H": 1, "D": 32, "seed": prefix_len}
        check(named_case(rows, "square", prefix_len, **sizes, **lens), dtype)


@pytest.mark.parametrize("fp32_prefix", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_head_dims(head_dim, dtype, fp32_prefix, cut):
    """A prefix in fp32 is rounded inside the kernel."""
    for stack in (False, True):
        cut(programs=6, stack=stack)
        check(make_case(B=2, H=2, T=3, S=40, P=37, D=head_dim), dtype, fp32_prefix)


@pytest.mark.parametrize("lens", [None, [33], [1], [0]])
@pytest.mark.parametrize("B, N, seq_len", [(1, None, 3), (3, 1, 1), (4, None, 8), (17, None, 1)])
def test_stacked_prefix(B, N, seq_len, lens, cut):
    """Queries of one row, of a part of a stack, of several; a split that sees no column."""
    for prefix_len in (33, 70):
        cut(programs=3 * B, stack=True)
        options = {} if lens is None else {"prefix_lens": lens}
        kv_lens = [(5 * b) % 20 for b in range(B)]
        case = make_case(
            B=B, H=2, T=seq_len, S=19, P=prefix_len, D=16, N=N, kv_lens=kv_lens, **options
        )
        plan = plan_of(case)
        assert plan.prefix_splits == {33: 1, 70: 2}[prefix_len] or not INTERPRETED
        check(case)


def plan_of(case: Case) -> "cut_rules.Cut":
    q, k, _, prefix_k, _ = (x.to(DEVICE).float() for x in case.tensors)
    call = q, k, prefix_k, case.options.get("prefix_index")
    return cut_rules.cut_for(*call, next(cut_rules.plans_for(*call)))


def test_a_stack_for_shared_prefixes_only(monkeypatch):
    """And only where it saves many reads; with an index, rows may differ."""
    monkeypatch.setattr(cut_rules, "STACK_BYTES", 1)
    assert plan_of(make_case(B=99, P=40)).prefix_splits
    assert plan_of(make_case(B=99, P=40, N=1)).prefix_splits
    assert not plan_of(make_case(B=99, P=40, N=99)).prefix_splits
    assert not plan_of(make_case(B=99, P=40, N=1, prefix_index=[0] * 99)).prefix_splits
    assert not plan_of(make_case(B=1, P=40)).prefix_splits  # nothing to share
    assert not plan_of(make_case(B=99, P=0)).prefix_splits
    monkeypatch.undo()
    assert not plan_of(make_case(B=99, P=40)).prefix_splits


def test_tiles_of_many_short_rows():
    """32 rows with 192 keys take smaller tiles on an H200, 8 rows or 512 keys do not."""

    def first(B: int, S: int) -> tuple:
        q, k, prefix = (
            torch.empty(n, 16, m, 64, dtype=torch.bfloat16, device="meta")
            for n, m in ((B, 1), (B, S), (1, 10))
        )
        return next(cut_rules.plans_for(q, k, prefix[0], None)).tile

    with launch.recorded("sm_90"):
        assert first(32, 192) == first(25, 256) == (32, 32, 4, 4)
        assert first(8, 192) == first(24, 192) == first(32, 257) == (32, 64, 4, 3)


@pytest.mark.parametrize("programs", [1, 8, 25, 40, 500])
def test_splits(programs, cut):
    """Any number of splits, also with more than one step of the merge; results repeat exactly."""
    cut(programs)
    case = make_case(B=2, H=2, T=2, S=240, P=20, D=16, kv_lens=[240, 77], q_offset=[238, 230])
    tiles = 17 if INTERPRETED else 9  # of 16 or 32 keys; 1 more than a step of the merge
    assert plan_of(case).parts == min(tiles, -(-tiles // -(-tiles // max(1, programs // 4))))
    first = check(case)
    again = attend(case.to(torch.float32))
    assert [torch.equal(x, y) for x, y in zip(first, again, strict=True)] == [True, True]


@pytest.mark.parametrize("sequence", ["cache", "padded", "one query"])
def test_slices_of_a_cache(sequence, cut):
    """Layer and length cut out of (L, B, H, Smax, D); what lies beyond the valid keys is NaN."""
    cut(programs=12)
    case = named_case("bank, index, ragged", sequence, 5, D=16)
    exact = check(case)
    case = case.to(torch.float32)
    (q, k, v, pk, pv), S = case.tensors, case.tensors[1].shape[2]
    nan = float("nan")
    cache = torch.full((2, 2, *k.shape[:2], S + 9, k.shape[3]), nan)  # (2, L, B, H, Smax, D)
    cache[0, 1, :, :, :S], cache[1, 1, :, :, :S] = k, v
    for b, kv_len in enumerate(case.options.get("kv_lens", [])):
        cache[:, :, b, :, kv_len:] = nan
    bank = torch.full((2, *pk.shape[:2], 8, pk.shape[3]), nan)  # (2, N, H, 8, D)
    bank[0, :, :, :5], bank[1, :, :, :5] = pk, pv
    for n, prefix_len in enumerate(case.options["prefix_lens"]):
        bank[:, n, :, prefix_len:] = nan
    fused = torch.full((*q.transpose(1, 2).shape[:3], 3, q.shape[3]), nan)  # (B, T, H, 3, D)
    fused[:, :, :, 0] = q.transpose(1, 2)
    keys, values = cache[:, 1]
    values = values.transpose(1, 2).contiguous().transpose(1, 2)  # other strides than the keys
    views = (
        fused[:, :, :, 0].transpose(1, 2),
        keys[:, :, :S],
        values[:, :, :S],
        *bank[:, :, :, :5],
    )
    assert [x.is_contiguous() for x in views] == [False] * 5
    for x, y in zip(attend(replace(case, tensors=views)), exact, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5])
def test_scale(scale, cut):
    for stack in (False, True):
        cut(programs=18, stack=stack)
        for sequence in ("cache", "one query"):
            check(named_case("one prefix", sequence, 20, D=16, scale=scale))


@pytest.mark.parametrize("stack", [False, True])
def test_extreme_scores(stack, cut):
    """Scores of +-1e4 and more: the largest wins, whichever part it lies in."""
    cut(programs=18, stack=stack)
    case = make_case(B=2, H=2, T=2, S=40, P=20, D=16)
    q, k, v, prefix_k, prefix_v = case.tensors
    for large_k, large_p in ((2e4, 1), (1, 2e4), (2e4, 2e4), (-2e4, 0)):
        check(replace(case, tensors=(q, large_k * k, v, large_p * prefix_k, prefix_v)))


@pytest.mark.parametrize("stack", [False, True])
def test_blind_queries_give_zero(stack, cut):
    for programs in (1, 99):
        cut(programs, stack)
        case = make_case(
            B=2, T=4, S=40, P=3, D=16, kv_lens=[0, 40], prefix_lens=[0], q_offset=[0, -2]
        )
        o, lse = check(case)
        assert (o[0] == 0).all() and lse[0].isneginf().all()
        assert (o[1, :, :2] == 0).all() and lse[1, :, :2].isneginf().all()
        assert lse[1, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    "sizes", [{"T": 0}, {"B": 0}, {"S": 0}, {"P": 0, "S": 0}, {"S": 0, "P": 0}]
)
def test_nothing_to_attend(sizes):
    check(make_case(**{"T": 3, "S": 4, "P": 2, "D": 16, **sizes}))


@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.data())
def test_random_calls(data):
    """Shapes, ways to name prefixes and keys, splits and stacks, drawn at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_rules, "SPLIT_BYTES", -1)
        programs = 8 * data.draw(st.integers(1, 4))
        patch.setattr(cut_rules, "programs_wanted", lambda q: programs)
        patch.setattr(cut_rules, "STACK_BYTES", data.draw(st.sampled_from([1, 2**60])))
        check(drawn_case(data, B=(1, 4), H=(1, 2), T=(1, 8), S=(0, 70), D=(16, 16), P=(0, 40)))


@pytest.mark.parametrize("programs, stack", [(1, False), (30, False), (30, True), (1, True)])
def test_workspace_bytes(programs, stack, cut, monkeypatch):
    """The formula gives the bytes that are allocated besides o and lse."""
    cut(programs, stack)
    case = make_case(B=3, H=2, T=5, S=90, P=20, D=16).to(torch.float32)
    q, k, _, prefix_k, _ = (x.to(DEVICE) for x in case.tensors)
    allocated, new_empty = [], torch.Tensor.new_empty

    def counted(x, *size, **kwargs):
        out = new_empty(x, *size, **kwargs)
        allocated.append(out.nbytes)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    _, lse = attend(case)
    workspace = sum(allocated) - lse.nbytes  # o is made by new_empty_strided
    assert workspace == cut_rules.workspace_bytes(q, k, prefix_k)
    assert (workspace == 0) == (programs == 1 and not stack)


def launches(B=8, H=4, T=1, S=500, P=20, N=None, lens=True, target="sm_90"):
    """What a call would launch on a GPU."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    prefix = empty(H, P, 64) if N is None else empty(N, H, P, 64)
    rows = empty(B, dtype=torch.int64) if lens else None
    index = None if N is None else rows
    cache = empty(2, B, H, 1024, 64)[:, :, :, :S]
    with launch.recorded(target) as made:
        decode.decode(Inputs(empty(B, H, T, 64), *cache, prefix, prefix, index, None, rows, rows))
    return made


def compiled_for(made) -> list:
    """What a compiled kernel depends on: constants, tiles, and whether 1 or 16 divide the rest."""
    varying = {"batch_size", "seq_len", "kv_len", "prefix_len", "queries", "parts"}
    varying |= set(cut_rules.Cut._fields)
    keys = []
    for kernel, _, tile, arguments, _ in made:
        key = {"kernel": kernel.__name__, "tile": tile}
        for name, value in arguments.items():
            if name.isupper() or value is None:
                key[name] = value
            elif isinstance(value, int) and name not in varying:
                key[name] = (value == 1, value % 16 == 0)
        keys.append(key)
    return keys


@pytest.mark.parametrize("N", [None, 5])
def test_no_new_kernel_from_token_to_token(N):
    """T, S and P within a bucket, and the rows' number, reach no constant of the kernels."""
    for of_kind in (  # one program for all columns; several
        ((1, 180, 20, 8), (2, 150, 20, 8), (8, 190, 32, 8), (3, 130, 20, 5)),
        ((1, 1000, 20, 8), (2, 777, 20, 8), (8, 800, 32, 8), (1, 1024, 17, 5)),
    ):
        first, *others = [compiled_for(launches(B=B, T=T, S=S, P=P, N=N)) for T, S, P, B in of_kind]
        assert others == [first] * 3


def test_grids_of_the_h100():
    """One launch where rows and heads fill the GPU, splits where they do not."""
    (kernel,) = launches(B=64, H=12, S=512, P=10)
    assert kernel.programs == 64 * 12
    (whole,) = launches(B=1, H=16, S=192, P=10)  # 4 tiles: read before a second launch is over
    assert whole.programs == 16
    split, merge = launches(B=1, H=16, S=1024, P=10)
    assert split.programs == 16 * 9 and merge.programs == 16  # 17 tiles, 2 to a program
    stacked, merge = launches(B=64, H=16, S=512, P=1000)
    assert stacked.programs == 64 * 16 + 16 * 2 * 4  # 2 stacks, 4 splits of the prefix
    assert merge.arguments["parts"] == 5


def test_wanted():
    for T, answer in ((1, True), (8, True), (9, False)):
        case = make_case(T=T, S=20)
        assert decode.wanted(case.tensors[0]) is answer
