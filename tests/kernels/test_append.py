"""A step that also writes the cache: `append` and `seen` against the definition.

The kernels run in Triton's interpreter (`make test-kernels`) or on a GPU; the plain paths run
everywhere. Columns of the cache that no query may see hold NaN: those of new tokens, later ones,
and slots from which no beam descends.
"""

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
from test_reference import Case, make_case

from kernels import prefix_attention, prefix_attention_eager, prefix_attention_lean

needs_kernels()

import kernels.attention  # noqa: E402, F401  (registers the operators; imports Triton)
from kernels import cut as cut_rules  # noqa: E402
from kernels import decode, launch  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
BANK = {"N": 3, "prefix_index": [2, -1, 0], "prefix_lens": [3, 0, 5]}
LAYOUTS = {  # T new tokens on S columns of a cache
    "equal rows": {"T": 1, "S": 40},
    "rows": {"T": 1, "S": 40, "q_offset": [39, 0, 17]},
    "bank": {"T": 1, "S": 40, "q_offset": [5, 16, 31], **BANK},
    "several tokens": {"T": 3, "S": 40, "q_offset": [37, 0, 15]},
    "first column": {"T": 1, "S": 1},
    "nothing but new ones": {"T": 4, "S": 4},
    "not causal": {"T": 3, "S": 20, "q_offset": [17, 0, 9], "causal": False},
    "no prefix": {"T": 2, "S": 33, "P": 0, "q_offset": [30, 31, 0]},
    "beams": {"T": 5, "S": 60, "q_offset": [25, 30, 55], "causal": False, "seen": 0.3},
    "beams, equal rows": {"T": 16, "S": 64, "causal": False, "seen": 0.3},
    "beams of a bank": {
        "T": 2,
        "S": 40,
        "q_offset": [20] * 3,
        "causal": False,
        "seen": 0.1,
        **BANK,
    },
}


def make(layout: str, **sizes) -> tuple[Case, tuple, torch.Tensor]:
    """A case whose k and v lack the new tokens, those, and the cache as it must be afterwards."""
    options = {"P": 5, "D": 16, **LAYOUTS[layout], **sizes}
    share = options.pop("seen", None)
    case = make_case(**options)
    q, k, v, *prefix = case.tensors
    (B, _, T, _), S = q.shape, k.shape[2]
    first = case.options.get("q_offset", torch.full((B,), S - T)).tolist()
    whole = torch.stack([k, v])
    cache, new = whole.clone(), torch.empty(2, *q.shape, dtype=q.dtype)
    for b, at in enumerate(first):
        new[:, b] = whole[:, b, :, at : at + T]
        cache[:, b, :, at:] = float("nan")
        whole[:, b, :, at + T :] = float("nan")
    if share is not None:
        generator = torch.Generator().manual_seed(1)
        seen = torch.rand(B, T, S, generator=generator) < share
        for b, at in enumerate(first):
            seen[b, :, at : at + T] = torch.eye(T, dtype=torch.bool)  # each its own
            seen[b, :, at + T :] = True  # later ones are hidden, whatever this says
            unseen = ~seen[b].any(0)
            cache[:, b, :, unseen] = float("nan")
            whole[:, b, :, unseen] = float("nan")
        case = replace(case, options=case.options | {"seen": seen})
    return replace(case, tensors=(q, *cache, *prefix)), tuple(new), whole


def exact_of(case: Case, new: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, which does not read the NaN of columns that no query sees."""
    q, k, v, *prefix = case.tensors
    k, v = k.clone(), v.clone()
    return prefix_attention_eager(q, k, v, *prefix, **case.options, append=new, return_lse=True)


def call(case: Case, new: tuple, attend=prefix_attention, device="cpu"):
    """o, lse and the cache afterwards, a slice of a longer one whose rest stays as it is."""
    case = case.on(device)
    (q, k, v, *prefix), S = case.tensors, case.tensors[1].shape[2]
    cache = torch.full((2, *k.shape[:2], S + 3, k.shape[3]), 7.0, dtype=k.dtype, device=device)
    cache[:, :, :, :S] = torch.stack([k, v])
    fused = torch.stack([q, *(x.to(device) for x in new)], 2).transpose(1, 3)  # (B, T, 3, H, D)
    q, *pair = fused.contiguous().permute(2, 0, 3, 1, 4)  # views, as in a layer
    o, lse = attend(
        q, *cache[:, :, :, :S], *prefix, **case.options, append=tuple(pair), return_lse=True
    )
    assert (cache[:, :, :, S:] == 7).all()
    return o.cpu(), lse.cpu(), cache[:, :, :, :S].cpu()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_paths_write_and_attend(layout):
    """The definition against the definition without `append`; then the lean path."""
    case, new, whole = make(layout)
    o, lse = exact_of(case, new)
    q, _, _, *prefix = case.tensors
    (B, _, T, _), S = q.shape, whole.shape[3]
    rules = {n: x for n, x in case.options.items() if n != "seen"}
    first = rules.get("q_offset", torch.full((B,), S - T))
    if "seen" not in case.options:
        want = prefix_attention_eager(
            q, *whole.nan_to_num(), *prefix, **rules | {"kv_lens": first + T}, return_lse=True
        )
        assert torch.equal(o, want[0]) and torch.equal(lse, want[1])
    else:  # query by query, on the keys that it sees alone
        index = rules.get("prefix_index", torch.zeros(B, dtype=torch.long)).tolist()
        for b in range(B):
            for t in range(T):
                mine = case.options["seen"][b, t, : first[b] + T].nonzero()[:, 0]
                k, v = whole[:, b : b + 1, :, mine]
                p = [x if x.dim() == 3 else x[index[b]] for x in prefix]
                n = int(rules["prefix_lens"][index[b]]) if "prefix_lens" in rules else p[0].shape[1]
                p = [x[:, : n if index[b] >= 0 else 0] for x in p]
                want = prefix_attention_eager(q[b : b + 1, :, t : t + 1], k, v, *p, causal=False)
                # fp64, another order of summation; worst seen: 8.9e-16
                assert_close(o[b, :, t], want[0, :, 0], 1e-14)
    quiet = replace(case, tensors=tuple(x.nan_to_num() for x in case.tensors))
    mine, my_lse, cache = call(quiet, new, prefix_attention_lean)
    assert_close(mine, o, 1e-14)
    assert_close(my_lse, lse, 1e-14)
    assert torch.equal(cache.nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_writes_and_attends(layout, dtype, monkeypatch):
    """One program for a row and head, and several; the cache is written to the last bit."""
    case, new, whole = make(layout)
    case, new = case.to(dtype), tuple(x.to(dtype) for x in new)
    wide, wide_new = case.to(torch.float64), tuple(x.double() for x in new)
    exact, low = exact_of(wide, wide_new), exact_of(case, new)
    q, k, v, prefix_k, prefix_v = wide.tensors
    sizes = exact_of(
        replace(wide, tensors=(q, k, v.abs(), prefix_k, prefix_v.abs())),
        (wide_new[0], wide_new[1].abs()),
    )[0]
    keys = torch.cat([whole[0].nan_to_num().flatten(0, 2), prefix_k.flatten(0, -2)])
    max_score = (q.flatten(0, 2) @ keys.T).abs().max().item() * q.shape[-1] ** -0.5
    for programs in (1, 999):
        monkeypatch.setattr(cut_rules, "programs_wanted", lambda q, n=programs: n)
        monkeypatch.setattr(cut_rules, "SPLIT_BYTES", -1)
        o, lse, cache = call(case, new, device=DEVICE)
        assert_within_rounding(o, low[0], exact[0], sizes.abs().max().item(), max_score, "o")
        assert_within_rounding(lse, low[1], exact[1], 1.0, max_score, "lse")
        assert torch.equal(cache.isnan(), whole.isnan())
        assert torch.equal(cache.nan_to_num(), whole.to(dtype).nan_to_num())


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_head_dims(head_dim):
    for layout in ("rows", "beams"):
        case, new, whole = make(layout, D=head_dim, B=3, H=1)
        case, new = case.to(torch.float32), tuple(x.float() for x in new)
        exact, _ = exact_of(case.to(torch.float64), tuple(x.double() for x in new))
        o, _, cache = call(case, new, device=DEVICE)
        assert_close(o, exact, 1e-6)  # fp32, 60 keys; worst seen: 1.9e-7
        assert torch.equal(cache.nan_to_num(), whole.float().nan_to_num())


def test_steps_that_fill_a_cache():
    """Token by token from an empty cache to a full one: as all tokens at once."""
    case = make_case(B=2, H=2, T=20, S=20, P=5, D=16).to(torch.float32)
    q, k, v, *prefix = (x.to(DEVICE) for x in case.tensors)
    cache = torch.full_like(torch.stack([k, v]), float("nan"))
    for t in range(20):
        one = slice(t, t + 1)
        at = torch.tensor([t, t], device=DEVICE)
        o = prefix_attention(
            q[:, :, one], *cache, *prefix, q_offset=at, append=(k[:, :, one], v[:, :, one])
        )
        exact = prefix_attention_eager(*(x.double() for x in (q, k, v, *prefix)))[:, :, one]
        assert_close(o, exact, 1e-6)  # fp32; worst seen: 2.2e-7
    assert torch.equal(cache, torch.stack([k, v]))


def test_more_new_tokens_than_a_tile():
    """They take the plain path."""
    case, new, whole = make("beams, equal rows", T=17, S=70)
    case, new = case.to(torch.float32), tuple(x.float() for x in new)
    quiet = replace(case, tensors=tuple(x.nan_to_num() for x in case.tensors))
    o, _, cache = call(quiet, new, device=DEVICE)
    exact, _ = exact_of(case.to(torch.float64), tuple(x.double() for x in new))
    assert_close(o, exact, 1e-6)  # fp32; worst seen: 2.0e-7
    assert torch.equal(cache.nan_to_num(), whole.float().nan_to_num())


ERRORS = {
    "like q": {"append": lambda q: (q[..., :8], q)},
    "do not fit into": {"k": 2},
    "append excludes kv_lens": {"kv_lens": torch.tensor([9, 9, 9])},
    "seen must be bool": {"seen": torch.ones(3, 3, 8, dtype=torch.bool), "causal": False},
    "causal=False": {"seen": torch.ones(3, 3, 9, dtype=torch.bool)},
    "needs append": {"append": None, "seen": torch.ones(3, 3, 9, dtype=torch.bool)},
    "no gradient": {"grad": True},
    r"lie in \[0, 6\]": {"q_offset": torch.tensor([0, 7, 0])},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    q, k, v, *prefix = make_case(T=3, S=9, D=16).to(torch.float32).tensors
    options = {"append": lambda q: (q, q), **ERRORS[message]}
    S, append = options.pop("k", 9), options.pop("append")
    q.requires_grad_(options.pop("grad", False))
    with pytest.raises(ValueError, match=message):
        prefix_attention(
            q, k[:, :, :S], v[:, :, :S], *prefix, append=append and append(q), **options
        )


@pytest.mark.parametrize("layout", ["equal rows", "rows", "beams"])
def test_opcheck(layout):
    """The operator says that it writes to k and v."""
    case, new, _ = make(layout)
    case, new = case.to(torch.float32), tuple(x.float() for x in new)
    tensors = [x.nan_to_num().to(DEVICE) for x in (*case.tensors, *new)]
    offset, seen = (case.options.get(name) for name in ("q_offset", "seen"))
    offset, seen = (x if x is None else x.to(DEVICE) for x in (offset, seen))
    args = (*tensors[:5], None, None, None, offset, seen is None, None, *tensors[5:], seen)
    torch.library.opcheck(torch.ops.minprefix.attention_append.default, args)


class Step(torch.nn.Module):
    def forward(self, q, cache, prefix, new):
        return prefix_attention(q, *cache, *prefix, append=tuple(new))


@torch.no_grad()
def test_compiles_without_a_break():
    case, new, _ = make("equal rows")
    q, k, v, *prefix = (x.float().nan_to_num().to(DEVICE) for x in case.tensors)
    args = q, torch.stack([k, v]), torch.stack(prefix), torch.stack(new).float().to(DEVICE)
    exact, mine = args[1].clone(), args[1].clone()
    want = Step()(q, exact, *args[2:])
    backend = "aot_eager" if INTERPRETED else "inductor"
    compiled = torch.compile(Step(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, mine, *args[2:]), want)
    assert torch.equal(mine, exact) and not torch.equal(exact, args[1])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_cuda_graph():
    """Captured once; each replay appends where the offsets now say."""
    case, new, _ = make("rows")
    q, k, v, *prefix = (x.bfloat16().nan_to_num().to(DEVICE) for x in case.tensors)
    offset, new = (
        torch.zeros(3, dtype=torch.long, device=DEVICE),
        torch.stack(new).bfloat16().cuda(),
    )
    cache = torch.stack([k, v])

    def run() -> torch.Tensor:
        return prefix_attention(q, *cache, *prefix, q_offset=offset, append=tuple(new))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for at in ([3, 9, 0], [4, 10, 1]):
        offset.copy_(torch.tensor(at))
        new.normal_()
        exact = cache.double()
        want = prefix_attention(
            q.double(), *exact, *(x.double() for x in prefix), q_offset=offset,
            append=tuple(new.double()),
        )  # fmt: skip
        graph.replay()
        assert_close(out.double(), want, 2e-2)  # bf16: 2 eps
        assert torch.equal(cache, exact.bfloat16())


def test_one_launch_for_each_step():
    """No copy kernel: at B = 1 over two hundred keys a step of a layer is one launch."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    for B, T in ((1, 1), (32, 1), (16, 5)):
        q, cache, prefix = empty(B, 16, T, 64), empty(2, B, 16, 192, 64), empty(2, 16, 10, 64)
        lens = empty(B, dtype=torch.int64)
        seen = empty(B, T, 192, dtype=torch.bool) if T > 1 else None
        inputs = decode.Inputs(q, *cache, *prefix, q_offset=lens, causal=T == 1)
        with launch.recorded("sm_90") as made:
            decode.decode(inputs, decode.Append(q, q, seen))
        assert [one.programs for one in made] == [B * 16]
