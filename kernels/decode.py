"""Attention of a few queries over [prefix; KV cache], forward only: one step of decoding in Triton.

Decoding reads every cached key once for one query, so it is bound by memory, and with few rows one
program per row and head leaves most of the GPU idle. Therefore the columns of a row are divided
into splits that run as separate programs. A program c with the columns C_c computes, as in [1] and
[2],

    lse_c = log sum_(j in C_c) exp(s_ij),   o_c = sum_(j in C_c) exp(s_ij - lse_c) v_j

and the softmax over all columns follows from these partial results alone:

    lse = log sum_c exp(lse_c),   o = sum_c exp(lse_c - lse) o_c.                              (*)

`decode` is the entry. It plans from the shapes alone (`cut_for`), so a CUDA graph can replay it for
any lengths of the rows. Read `_decode_kernel`, then `_merge_kernel`, which computes (*). The
programs of `_decode_kernel` are

  - (row, head, split): the row's T queries, padded to a tile of 16, and `chunk` columns of the
    row's [prefix; cache], each part rounded up to whole tiles. Splits past a row's length see no
    column and give o_c = 0, lse_c = -inf, which (*) ignores.
  - (head, split of the prefix, stack), if all rows share the prefix and stacking pays (`stacks`):
    BLOCK_M of the batch's B T queries as one matrix, so that a tile of the prefix is read
    B T / BLOCK_M times instead of B times. The programs above then read only the cache.

There are no atomics, and (*) sums in the order of c, so results repeat bit for bit. If one program
sees all columns of its queries, it writes o and lse itself: one launch, no workspace. Splits pay
only if each program reads so much less that this makes up for the second launch (SPLIT_BYTES). (A
cache that grows from call to call passes once from one form to the other, which compiles a second
form of the kernel; a static cache never does.)

With `append` the kernel also writes the cache: it copies the keys and values of the row's own T
tokens, which are in separate tensors, to the columns from `first` on. Split 0 reads them from those
tensors, as a tile of 16 columns. No program reads the cache from column `first` on, so the order of
the programs does not matter. `seen` says for each column which queries see it (for beams: those
that descend from its token); columns that no query of a row sees are not read.

With e the bytes of an element and C the number of partial results per query (`Cut.parts`):

    bytes of `_decode_kernel`:   2 e D H (B S + P R) + 2 e B H T D      R = B, or B T / BLOCK_M
      with `append` also         2 e B H T D written
    FLOPs of `_decode_kernel`:   4 D H (B S + B P) T                    (done: 16 for T, padded)
    bytes of `_merge_kernel`:    4 C B H T (D + 1) + e B H T D
    FLOPs of `_merge_kernel`:    2 C B H T (D + 1)
    workspace, in bytes:         4 C B H T (D + 1) for C > 1, else 0    (`workspace_bytes`)

Only the first of the P R reads of the prefix comes from memory, the others from the L2 cache.

[1] Dao et al. 2023, https://pytorch.org/blog/flash-decoding/   [2] Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867   [3] Hydragen, stacked queries on a shared prefix: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import assembled
from kernels.cut import Plan, cut_for, plans_for, prefix_tiles
from kernels.inputs import Append, Inputs
from kernels.launch import (
    Tile,
    bucket,
    cdiv,
    empty_results,
    kernel_arguments,
    launch,
    run_best,
)
from kernels.tiles import (
    LN2,
    LOG2E,
    await_previous,
    load_rows,
    row_prefix,
    row_sequence,
    softmax_step,
    store_rows,
)

MAX_QUERIES = 8  # T
BLOCK_T = tl.constexpr(16)  # a row's queries, padded to the smallest tile of a matrix product

MERGE = Tile(block_m=1, block_n=16, num_warps=2, num_stages=1)  # a query; partial results a step


@triton.jit
def prefix_steps(
    o, z, m, q, k_ptr, v_ptr, start, end, stride, scale2,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the prefix columns start <= p < end to the running softmax of queries q [M, BLOCK_D]."""
    for p0 in range(start, end, BLOCK):
        k = load_rows(k_ptr, p0, end, stride, BLOCK, D, BLOCK_D)
        v = load_rows(v_ptr, p0, end, stride, BLOCK, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [M, BLOCK]
        s = tl.where((p0 + tl.arange(0, BLOCK) < end)[None, :], s, float("-inf"))
        o, z, m = softmax_step(o, z, m, s, v.to(q.dtype), scale2)
    return o, z, m


@triton.jit
def stacked_prefix(
    pid, q_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr, prefix_lens_ptr,
    stride_qb, stride_qh, stride_qt, stride_ph, stride_pp,
    stride_oc, stride_ob, stride_oh, stride_ot,
    batch_size, n_head, seq_len, prefix_len, prefix_splits, prefix_chunk, scale2,
    Q_SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """o_c, lse_c for BLOCK_M of the batch's B T queries of one head and one split of the prefix."""
    blocks = tl.cdiv(batch_size * seq_len, BLOCK_M)
    c = (pid // blocks % prefix_splits).to(tl.int64)
    h = (pid // blocks // prefix_splits).to(tl.int64)
    _, columns = row_prefix(0, None, prefix_lens_ptr, 0, prefix_len)
    prefix_k_ptr += h * stride_ph
    prefix_v_ptr += h * stride_ph

    row = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # b T + t
    b, t, offs_d = (row // seq_len).to(tl.int64), row % seq_len, tl.arange(0, BLOCK_D)
    inside = row < batch_size * seq_len
    mask = inside[:, None]
    if D < BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    at = b * stride_qb + h * stride_qh + t * stride_qt
    q = tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if Q_SIGN != 1:
        q = (q * Q_SIGN).to(q_ptr.dtype.element_ty)

    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = c.to(tl.int32) * prefix_chunk
    end = tl.minimum(columns, start + prefix_chunk)
    o, z, m = prefix_steps(
        o, z, m, q, prefix_k_ptr, prefix_v_ptr, start, end, stride_pp, scale2, BLOCK_P, D, BLOCK_D
    )
    o = o / tl.where(z > 0.0, z, 1.0)[:, None]
    at = c * stride_oc + b * stride_ob + h * stride_oh + t * stride_ot
    tl.store(o_ptr + at[:, None] + offs_d[None, :], o, mask=mask)
    query = ((c * batch_size + b) * n_head + h) * seq_len + t
    tl.store(lse_ptr + query, (m + tl.log2(z)) * LN2, mask=inside)


@triton.jit
def load_seen(ptr, n0, end, stride, seq_len, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which queries see which of the columns n0..: [BLOCK_T, BLOCK_N], 0 or 1."""
    t, columns = tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
    mask = (t < seq_len)[:, None] & (columns < end)[None, :]
    return tl.load(ptr + t[:, None] * stride + columns[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit
def load_some(ptr, start, some, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Like `load_rows`: the rows start.. for which `some` [ROWS] is true, else zeros."""
    rows, columns = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = some[:, None] & (columns < D)[None, :]
    return tl.load(ptr + (start + rows)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def appended(
    o, z, m, c, q, new_k_ptr, new_v_ptr, k_ptr, v_ptr, seen_ptr,
    first, seq_len, kv_len, stride_nt, stride_ks, stride_vs, stride_st, scale2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """In split 0, add the new tokens to the softmax of q, and write them to k and v at `first`."""
    if c == 0:
        i, end = tl.arange(0, BLOCK_T), first + seq_len
        k = load_rows(new_k_ptr, 0, seq_len, stride_nt, BLOCK_T, D, BLOCK_D)
        v = load_rows(new_v_ptr, 0, seq_len, stride_nt, BLOCK_T, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_T, BLOCK_T]
        if seen_ptr is not None:
            seen = load_seen(seen_ptr, first, end, stride_st, seq_len, BLOCK_T, BLOCK_T)
            s = tl.where(seen > 0, s, float("-inf"))
        elif CAUSAL:
            s = tl.where(i[None, :] <= i[:, None], s, float("-inf"))
        s = tl.where((i < seq_len)[None, :], s, float("-inf"))
        o, z, m = softmax_step(o, z, m, s, v, scale2)
        end = tl.minimum(end, kv_len)
        store_rows(k_ptr, k, first, end, stride_ks, BLOCK_T, D, BLOCK_D)
        store_rows(v_ptr, v, first, end, stride_vs, BLOCK_T, D, BLOCK_D)
    return o, z, m


@assembled
@triton.jit(
    do_not_specialize=[
        "batch_size", "seq_len", "kv_len", "prefix_len",
        "splits", "chunk", "prefix_splits", "prefix_chunk",
    ]
)  # fmt: skip
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr, new_k_ptr, new_v_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_nb, stride_nh, stride_nt, stride_sb, stride_st,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_oc, stride_ob, stride_oh, stride_ot,
    batch_size, n_head, seq_len, kv_len, prefix_len,
    splits, chunk, prefix_splits, prefix_chunk, scale2,
    CAUSAL: tl.constexpr, Q_SIGN: tl.constexpr, STACKED: tl.constexpr, PDL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, MORE_P: tl.constexpr,
):  # fmt: skip
    """o_c (parts, B, H, T, D) and lse_c (parts, B, H, T), in nats, by both kinds of programs."""
    await_previous(PDL)
    pid = tl.program_id(0)
    stacked = tl.cdiv(batch_size * seq_len, BLOCK_M) * prefix_splits * n_head
    if STACKED and pid < stacked:
        stacked_prefix(
            pid, q_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr, prefix_lens_ptr,
            stride_qb, stride_qh, stride_qt, stride_ph, stride_pp,
            stride_oc, stride_ob, stride_oh, stride_ot,
            batch_size, n_head, seq_len, prefix_len, prefix_splits, prefix_chunk, scale2,
            Q_SIGN, D, BLOCK_D, BLOCK_M, BLOCK_P,
        )  # fmt: skip
    else:
        pid -= stacked
        c = (pid % splits).to(tl.int64)
        h, b = (pid // splits % n_head).to(tl.int64), (pid // splits // n_head).to(tl.int64)
        n, columns = row_prefix(b, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len)
        keys, first = row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL)
        if new_k_ptr is not None:
            keys = tl.minimum(keys, first)  # the keys in the cache
        if seen_ptr is not None:
            seen_ptr += b * stride_sb
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
        prefix_k_ptr += n * stride_pn + h * stride_ph
        prefix_v_ptr += n * stride_pn + h * stride_ph

        # query t sees the sequence columns below limit_t; at least one query sees those below last
        offs_m, offs_n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
        limit, last = tl.full([BLOCK_T], 0, tl.int32) + keys, keys
        if CAUSAL:
            limit = tl.minimum(keys, first + offs_m + 1)
            last = tl.minimum(keys, first + seq_len)
        # columns of split c: of the prefix start..prefix_end, of the cache from start - padded on
        start, padded = c.to(tl.int32) * chunk, 0
        if BLOCK_P > 0 and not STACKED:
            padded = tl.cdiv(prefix_len, BLOCK_N) * BLOCK_N
            prefix_end = tl.minimum(columns, start + chunk)
            # this load is issued first and used last
            pk = load_rows(prefix_k_ptr, start, prefix_end, stride_pp, BLOCK_P, D, BLOCK_D)
            pv = load_rows(prefix_v_ptr, start, prefix_end, stride_pp, BLOCK_P, D, BLOCK_D)
        last = tl.minimum(last, start + chunk - padded)

        q_ptr += b * stride_qb + h * stride_qh
        q = load_rows(q_ptr, 0, seq_len, stride_qt, BLOCK_T, D, BLOCK_D)
        if Q_SIGN != 1:
            q = (q * Q_SIGN).to(q_ptr.dtype.element_ty)
        o = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        z = tl.zeros([BLOCK_T], tl.float32)
        m = tl.full([BLOCK_T], float("-inf"), tl.float32)
        if new_k_ptr is not None:
            new = b * stride_nb + h * stride_nh
            o, z, m = appended(
                o, z, m, c, q, new_k_ptr + new, new_v_ptr + new, k_ptr, v_ptr, seen_ptr,
                first, seq_len, kv_len, stride_nt, stride_ks, stride_vs, stride_st, scale2,
                CAUSAL, D, BLOCK_D,
            )  # fmt: skip
        for n0 in range(tl.maximum(start - padded, 0), last, BLOCK_N):
            if seen_ptr is None:
                visible = (n0 + offs_n)[None, :] < limit[:, None]
                k = load_rows(k_ptr, n0, last, stride_ks, BLOCK_N, D, BLOCK_D)
                v = load_rows(v_ptr, n0, last, stride_vs, BLOCK_N, D, BLOCK_D)
            else:
                seen = load_seen(seen_ptr, n0, last, stride_st, seq_len, BLOCK_T, BLOCK_N)
                visible, some = seen > 0, tl.max(seen, 0) > 0
                k = load_some(k_ptr, n0, some, stride_ks, BLOCK_N, D, BLOCK_D)
                v = load_some(v_ptr, n0, some, stride_vs, BLOCK_N, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_T, BLOCK_N]
            s = tl.where(visible, s, float("-inf"))
            o, z, m = softmax_step(o, z, m, s, v, scale2)
        if BLOCK_P > 0 and not STACKED:
            if start < prefix_end:
                s = tl.dot(q, tl.trans(pk.to(q.dtype)), input_precision="ieee")  # [M, BLOCK_P]
                s = tl.where(
                    (start + tl.arange(0, BLOCK_P) < prefix_end)[None, :], s, float("-inf")
                )
                o, z, m = softmax_step(o, z, m, s, pv.to(q.dtype), scale2)
            if MORE_P:
                o, z, m = prefix_steps(
                    o, z, m, q, prefix_k_ptr, prefix_v_ptr, start + BLOCK_P, prefix_end,
                    stride_pp, scale2, BLOCK_P, D, BLOCK_D,
                )  # fmt: skip

        c += prefix_splits
        o = o / tl.where(z > 0.0, z, 1.0)[:, None]
        o_ptr += c * stride_oc + b * stride_ob + h * stride_oh
        store_rows(o_ptr, o, 0, seq_len, stride_ot, BLOCK_T, D, BLOCK_D)
        lse_ptr += ((c * batch_size + b) * n_head + h) * seq_len
        lse = (m + tl.log2(z)) * LN2  # -inf if no column is visible
        tl.store(lse_ptr + offs_m, lse, mask=offs_m < seq_len)


@assembled
@triton.jit(do_not_specialize=["queries", "seq_len", "parts"])
def _merge_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, lse_ptr, queries, n_head, seq_len, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """o, lse of one query from its partial results, by (*) of the header."""
    query = tl.program_id(0).to(tl.int64)  # (b H + h) T + t
    offs_c, offs_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    o = tl.zeros([BLOCK_D], tl.float32)
    z, m = 0.0, float("-inf")
    for c0 in range(0, parts, BLOCK_C):
        at = (c0 + offs_c) * tl.cast(queries, tl.int64) + query
        inside = c0 + offs_c < parts
        lse2 = tl.load(part_lse_ptr + at, mask=inside, other=float("-inf")) * LOG2E  # [BLOCK_C]
        mask = inside[:, None] & (offs_d < D)[None, :]
        x = tl.load(part_o_ptr + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        # the running maximum and sums of `softmax_step`; lse_c are the scores, o_c the values
        m_new = tl.maximum(m, tl.max(lse2, 0))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        w = tl.exp2(lse2 - m_finite)
        alpha = tl.exp2(m - m_finite)
        z = z * alpha + tl.sum(w, 0)
        o = o * alpha + tl.sum(w[:, None] * x, 0)  # [BLOCK_D]
        m = m_new
    o = o / tl.where(z > 0.0, z, 1.0)
    b, h, t = query // seq_len // n_head, query // seq_len % n_head, query % seq_len
    o_ptr += ((b * seq_len + t) * n_head + h) * D  # memory order (B, T, H, D)
    tl.store(o_ptr + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(lse_ptr + query, (m + tl.log2(z)) * LN2)


def wanted(q: Tensor) -> bool:
    """Whether to use `decode` rather than `attention.forward`: for at most MAX_QUERIES queries.

    With few queries the time goes into reading keys, and a tile of 16 queries wastes least of the
    matrix products. More queries profit from larger tiles, which share the keys that they read.
    """
    return q.shape[2] <= MAX_QUERIES


def append_arguments(append: Append | None) -> dict[str, Any]:
    """The arguments of the kernel from `Append`."""
    if append is None:
        return dict.fromkeys(APPEND)
    new_k, new_v, seen = append
    if new_k.stride() != new_v.stride() or new_k.stride(-1) != 1:
        new_k, new_v = new_k.contiguous(), new_v.contiguous()
    if seen is not None and seen.stride(-1) != 1:
        seen = seen.contiguous()
    strides = (*new_k.stride()[:3], *(seen.stride()[:2] if seen is not None else (None, None)))
    return dict(zip(APPEND, (new_k, new_v, seen, *strides), strict=True))


APPEND = ("new_k_ptr", "new_v_ptr", "seen_ptr",
          "stride_nb", "stride_nh", "stride_nt", "stride_sb", "stride_st")  # fmt: skip


def decode(inputs: Inputs, append: Append | None = None) -> tuple[Tensor, Tensor]:
    """o, lse of `kernels.prefix_attention` for T <= 8, or 16 with `append`; inputs were checked.

    Returns:
        o: (B, H, T, D) in q's dtype, in the memory order (B, T, H, D); lse: (B, H, T), fp32, nats.
    """
    q, k, prefix_k, prefix_index = inputs.q, inputs.k, inputs.prefix_k, inputs.prefix_index
    (B, H, T, D), call = q.shape, (q, k, prefix_k, prefix_index)
    if append is not None and (k.stride(-1) != 1 or inputs.v.stride(-1) != 1):
        raise ValueError("append needs k and v with a contiguous last dimension")
    a = kernel_arguments(inputs) | append_arguments(append)
    scale = D**-0.5 if inputs.scale is None else inputs.scale

    def run(plan: Plan) -> tuple[Tensor, Tensor]:
        cut, tile = cut_for(*call, plan), plan.tile
        stacked, parts = cut.prefix_splits > 0, cut.parts
        o, lse = empty_results(q)
        part_o, part_lse = o[None], lse  # one part: the result
        if parts > 1:
            part_o = q.new_empty(parts, B, H, T, D, dtype=torch.float32)
            part_lse = q.new_empty(parts, B, H, T, dtype=torch.float32)
        names = ("stride_oc", "stride_ob", "stride_oh", "stride_ot")
        strides = dict(zip(names, part_o.stride(), strict=False))
        programs = H * cdiv(B * T, tile.block_m) * cut.prefix_splits + B * H * cut.splits
        launch(
            _decode_kernel, programs, tile, **a, **strides, o_ptr=part_o, lse_ptr=part_lse,
            batch_size=B, **cut._asdict(),
            Q_SIGN=(scale > 0) - (scale < 0), scale2=(abs(scale) or 1.0) * LOG2E.value,
            CAUSAL=inputs.causal, STACKED=stacked,
            **prefix_tiles(prefix_k, a["BLOCK_D"]),
        )  # fmt: skip
        if parts > 1:
            launch(
                _merge_kernel, B * H * T, MERGE, part_o_ptr=part_o, part_lse_ptr=part_lse,
                o_ptr=o, lse_ptr=lse, queries=B * H * T, n_head=H, seq_len=T, parts=parts,
                D=D, BLOCK_D=a["BLOCK_D"], BLOCK_C=MERGE.block_n,
            )  # fmt: skip
        return o, lse

    key = bucket(B * H), bucket(k.shape[2]), bucket(prefix_k.shape[-2])
    return run_best("decode", q, key, run, list(plans_for(*call)))
