"""The calls whose kernels are compiled without a GPU, and the launches of each call.

`cover` and `every_case` combine all options of a kernel; `calls` are those of training and
decoding. `launches_of` records the launches for tensors on the "meta" device, with all tiles of a
target.
"""

from collections.abc import Iterator
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget

from kernels import (
    FEW_ROWS,
    HEAD_DIMS,
    SOME_ROWS,
    attention,
    cross_entropy,
    few_rows,
    layer_norm,
    some_rows,
)
from kernels.decode import decode
from kernels.inputs import Append, Inputs
from kernels.launch import Launch, recorded
from kernels.plan import Gradients, backward

GPU_TARGETS = {  # architecture, threads of a warp
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMENSIONS: dict[str, tuple] = {
    "target": tuple(GPU_TARGETS),
    "op": ("forward", "backward", "decode", "cross_entropy", "add_norm", "few_rows", "some_rows"),
    "dtype": tuple(DTYPES),
    "head_dim": HEAD_DIMS,
    "batch_size": (2, 1, 1000),  # decode splits them differently; with the last, q exceeds 2 GB
    "n_head": (12, 16),  # 16 divides the second, which the compiler exploits
    "seq_len": (50, 128, 1000),  # decode: see QUERIES
    "prefix_len": (0, 10, 33, 200),  # none; a tile of 16; of 64; more than one tile
    "prefix_dtype": ("same", "fp32"),
    "causal": (True, False),
    "prefix_index": (False, True),
    "prefix_lens": (False, True),
    "kv_lens": (False, True),
    "q_offset": (False, True),
    "need": ("all", "prefix", "qkv", "q"),  # which gradients the backward pass computes
    "dlse": (False, True),  # whether there is a gradient of lse
    "append": ("no", "rows", "slots"),  # in decode: the kernel writes the cache; slots: for beams
}
# not attention; see `call_other` for the use of a case
OTHERS = ("cross_entropy", "add_norm", "few_rows", "some_rows")
QUERIES = {50: 1, 128: 2, 1000: 5}  # in decode, with 1000 keys; other seq_len: 1, with seq_len keys
# The usual calls: every length with every prefix, and one additional option at a time.
CALLS: dict[str, tuple] = {
    "op": DIMENSIONS["op"][:3],
    "head_dim": HEAD_DIMS,
    "n_head": DIMENSIONS["n_head"],
    "seq_len": (16, 50, 64, 100, 128, 200, 256, 512, 1000),
    "prefix_len": (0, 1, 5, 10, 16, 20, 33, 40, 100, 200),
}
ONE_MORE: tuple[dict[str, Any], ...] = (
    {},
    {"prefix_index": True},  # a bank
    {"kv_lens": True},
    {"q_offset": True},
    {"prefix_dtype": "fp32"},
    {"need": "prefix"},  # the gradients of the first layer
    {"batch_size": 1},  # there is only one part to sum
    {"append": "rows", "q_offset": True},
    {"append": "rows", "q_offset": True, "batch_size": 1},
    {"append": "slots", "q_offset": True, "causal": False},
)
Case = NamedTuple("Case", [(name, Any) for name in DIMENSIONS])  # one value of each dimension


def pairwise(dimensions: dict[str, tuple]) -> list[dict[str, Any]]:
    """Few cases in which each pair of values of two dimensions occurs: greedy, deterministic."""
    open_pairs = {
        ((a, x), (b, y)): None  # a dict, because it keeps its order
        for a, b in combinations(dimensions, 2)
        for x, y in product(dimensions[a], dimensions[b])
    }
    cases = []
    while open_pairs:
        case = dict(next(iter(open_pairs)))
        for name in sorted(dimensions, key=lambda name: -len(dimensions[name])):
            if name not in case:
                case[name] = max(
                    dimensions[name],
                    key=lambda x: sum(p in open_pairs for p in pairs_with(case, name, x)),
                )
        case = {name: case[name] for name in dimensions}
        for pair in combinations(case.items(), 2):
            open_pairs.pop(pair, None)
        cases.append(case)
    return cases


def pairs_with(case: dict[str, Any], name: str, value: Any) -> Iterator[tuple]:
    """The pairs of (name, value) with each value of a case, in both orders."""
    for item in case.items():
        yield item, (name, value)
        yield (name, value), item


def cover(**chosen: tuple) -> list[Case]:
    """A pairwise cover for each op, of all dimensions or restricted to the `chosen` values."""
    dimensions = DIMENSIONS | chosen
    one_op = [dimensions | {"op": (op,)} for op in dimensions["op"]]
    return [Case(**case) for part in one_op for case in pairwise(part)]


def every_case(**chosen: tuple) -> Iterator[Case]:
    """All combinations of values."""
    return (Case(*values) for values in product(*(DIMENSIONS | chosen).values()))


def calls(**chosen: tuple) -> Iterator[Case]:
    """The usual calls of training and decoding (CALLS x ONE_MORE), or the `chosen` ones of them.

    In bf16 on sm_90, unless `chosen` has others.
    """
    usual = {name: values[:1] for name, values in DIMENSIONS.items()}
    usual |= {"target": ("sm_90",), "dtype": ("bf16",)} | CALLS
    more = {name for change in ONE_MORE for name in change}
    usual |= {name: values for name, values in chosen.items() if name not in more}
    usual |= {"op": tuple(op for op in usual["op"] if op not in OTHERS)}
    for values in product(*usual.values()):
        case = Case(*values)
        for change in ONE_MORE:
            if not case.prefix_len and change.keys() & {"prefix_index", "prefix_dtype", "need"}:
                continue  # there is no prefix
            one = case._replace(**change)
            wanted = all(getattr(one, name) in values for name, values in chosen.items())
            of_op = {"need": "backward", "append": "decode"}
            if wanted and all(case.op == op for name, op in of_op.items() if name in change):
                yield one
    usual |= {"op": tuple(op for op in chosen.get("op", OTHERS) if op in OTHERS)}
    usual |= {name: usual[name][:1] for name in ("seq_len", "prefix_len")}
    for values in product(*usual.values()):
        for change in ({}, {"need": "q", "q_offset": True}):
            one = Case(*values)._replace(**change)
            if all(getattr(one, name) in values for name, values in chosen.items()):
                yield one


def launches_of(case: Case) -> list[Launch]:
    """The launches of a case, with the default tiles and with all others that tuning tries."""
    with recorded(case.target, every=True) as launches:
        call(case)
    return launches


def call(case: Case) -> None:
    """Call the launcher of a case, with a bank of 3 prefixes if there is an index.

    q, k, v and their gradients are views of one projection, as in training.
    """
    if case.op in OTHERS:
        call_other(case)
        return
    B, H, T, P, D = case.batch_size, case.n_head, case.seq_len, case.prefix_len, case.head_dim
    dtype = DTYPES[case.dtype]
    prefix_dtype = torch.float32 if case.prefix_dtype == "fp32" else dtype
    empty = partial(torch.empty, device="meta")
    q, k, v = empty(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)
    if case.op == "decode":
        q = q[:, :, : QUERIES.get(T, 1)]
        k, v = empty(2, B, H, 1000 if T in QUERIES else T, D, dtype=dtype)
    bank = (3, H, P, D) if case.prefix_index else (H, P, D)
    prefix_k, prefix_v = empty(bank, dtype=prefix_dtype), empty(bank, dtype=prefix_dtype)
    index = empty(B, dtype=torch.int64) if case.prefix_index else None
    lens = empty(3 if case.prefix_index else 1, dtype=torch.int32) if case.prefix_lens else None
    kv_lens = empty(B, dtype=torch.int64) if case.kv_lens and case.append == "no" else None
    q_offset = empty(B, dtype=torch.int32) if case.q_offset else None
    inputs = Inputs(q, k, v, prefix_k, prefix_v, index, lens, kv_lens, q_offset, case.causal)
    if case.op == "decode":
        seen = (
            empty(B, q.shape[2], k.shape[2], dtype=torch.bool) if case.append == "slots" else None
        )
        decode(inputs, None if case.append == "no" else Append(q, q, seen))
    elif case.op == "forward":
        attention.forward(*inputs)
    else:
        o, dqkv = empty(B, T, H, D, dtype=dtype).transpose(1, 2), empty(B, T, 3, H, D, dtype=dtype)
        lse, dlse = empty(2, B, H, T, dtype=torch.float32)
        dq, dk, dv = (None if case.need == "prefix" else x.transpose(1, 2) for x in dqkv.unbind(2))
        dk, dv = (None, None) if case.need == "q" else (dk, dv)
        no_prefix = case.need in ("qkv", "q")
        dprefix = (None, None) if no_prefix else (torch.empty_like(prefix_k) for _ in range(2))
        to = Gradients(dq, dk, dv, *dprefix)
        backward(inputs, o, lse, o, dlse if case.dlse else None, to)


def call_other(case: Case) -> None:
    """Launch a kernel other than attention, with the width of all heads together.

    With `q_offset` there is a bias, or no y; with `need` "q" no gradient is computed; with `causal`
    the head is padded. "few_rows" launches the product after a norm (with `need` "q" to q, k and v,
    otherwise of the MLP) and that before a sum, for up to FEW_ROWS positions and heads of 64;
    "some_rows" the same products for up to SOME_ROWS, and the norm that adds partial sums.
    """
    n, C, V = case.batch_size * case.seq_len, case.n_head * case.head_dim, 50257
    empty = partial(torch.empty, device="meta", dtype=DTYPES[case.dtype])
    if case.op == "cross_entropy":
        columns = 50304 if case.causal else V
        logits, labels = empty(n, columns), empty(n, dtype=torch.int64)
        bias = empty(columns) if case.q_offset else None
        cross_entropy.cross_entropy_(logits, labels, bias, V, gradient=case.need != "q")
        return
    if case.op == "few_rows":
        n, C, gelu = min(case.batch_size, FEW_ROWS), 64 * case.n_head, case.need != "q"
        N, norm = (4 if gelu else 3) * C, (empty(C), empty(C), 1e-5)
        few_rows.linear(empty(n, C), empty(C, N), empty(N), norm, gelu, None)
        few_rows.linear(empty(n, N), empty(N, C), empty(C), None, False, empty(n, C))
        return
    if case.op == "some_rows":
        if case.target not in some_rows.TARGETS or case.dtype == "fp32":
            return
        n, C, gelu = min(case.batch_size, SOME_ROWS), 64 * case.n_head, case.need != "q"
        N = (4 if gelu else 3) * C
        some_rows.linear(empty(n, C), empty(C, N), empty(N), gelu)
        y = some_rows.partial_sums(empty(n, N), empty(N, C))
        layer_norm.forward(empty(n, C), y, empty(C), empty(C), 1e-5, empty(C))
        return
    x, y, gain, shift = empty(n, C), None if case.q_offset else empty(n, C), empty(C), empty(C)
    s, dn = layer_norm.forward(x, y, gain, shift, 1e-5)
    if case.need != "q":
        layer_norm.backward(s, gain, None if case.q_offset else x, dn, 1e-5)
