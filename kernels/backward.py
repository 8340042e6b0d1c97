"""The backward kernels of attention over [prefix; sequence].

With x_ij = scale <q_i, k_j>, p_ij = exp(x_ij - lse_i) and o_i = sum_j p_ij v_j, let do and dlse be
the gradients that arrive at o and lse. By the chain rule, d lse_i / d x_ij = p_ij and
d o_i / d x_ij = p_ij (v_j - o_i), so

    dx_ij = p_ij (<do_i, v_j> - delta_i),    delta_i = <do_i, o_i> - dlse_i
    dq_i = scale sum_j dx_ij k_j,    dk_j = scale sum_i dx_ij q_i,    dv_j = sum_i p_ij do_i.

A prefix column is a column j like any other, but one that many rows b see: dprefix is the sum of
dk_j, dv_j over them too. p is computed again from q, k and lse: besides the inputs only o and lse
are kept, 4 B H T bytes more than o itself. One function does all of this arithmetic, `tile_grads`:
one tile of queries against one of keys, wherever they come from. Around it, three plans:

  - `_bwd_short_kernel`, where a row's queries, keys and prefix are one tile each (T and S up to 64
    or 128): one program per row and head reads everything once and writes dq, dk, dv and the row's
    part of dprefix. delta exists in registers only. 5 products per pair of query and column.
  - else `_bwd_dq_kernel` (a program per tile of queries: delta, dq and, for short prefixes, a part
    of dprefix), then `_bwd_dkdv_kernel` (a program per tile of keys, over the queries that see
    them). s and dp are made twice: 7 products.
  - `_bwd_dprefix_kernel`, for longer prefixes: a program per tile of prefix columns, over all
    queries of `rows` rows, its sums in registers. 4 products more per pair with a prefix column.

No atomics: parts of dprefix go to memory in fp32 (`partial_k`, `partial_v`), `_reduce_kernel` adds
those of each prefix in their order, which follows from the shapes: results repeat bit for bit. A
part per tile of queries costs 16 P D bytes, written and read; where that is more than reading q and
do of the tile once more, 2 e BLOCK_M D bytes, the third kernel makes dprefix (`fuses`).

Bytes, with e per element, M = ceil(T / BLOCK_M) tiles of queries and G parts (below):

    short            e B H D (3 T + 2 S) read, e B H D (T + 2 S) written
    dq, dkdv         e B H D (3 T + 2 S) + e B H D (2 T + 2 S) read, e B H D (T + 2 S) written;
                     keys, or queries, once more per further tile where L2 does not hold them
    dprefix          2 e B H D T read (all from L2 or memory once per tile of prefix columns)
    parts            8 G H P D written, then read; G = B (short), B M (dq), the number of chunks of
                     rows (dprefix)
    workspace        4 B H T (delta; not where short) + 8 G H P D: `workspace_bytes`

FLOPs: 2 D B H times the number of products per pair of a query and a column that it sees.

Source: the split into kernels by query and by key is that of Dao 2023 (arXiv:2307.08691), alg. 2.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import (
    PROGRAMS,
    Tile,
    bucket,
    cdiv,
    kernel_arguments,
    launch,
    prefix_blocks,
    run_best,
    tiles_of,
)  # fmt: skip
from kernels.tiles import LOG2E, limits, load_rows, row_prefix, row_sequence, store_rows

SIZES = ["seq_len", "kv_len", "prefix_len", "batch_size", "rows"]  # change from call to call


@triton.jit
def load_terms(lse_ptr, delta_ptr, m0, seq_len, BLOCK_M: tl.constexpr):
    """lse2_i and delta_i of a tile of queries; p_ij = 2^(.. - inf) = 0 for those that see nothing
    and for those past seq_len."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < seq_len, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    return lse2, tl.load(delta_ptr + offs_m, mask=offs_m < seq_len, other=0.0)


@triton.jit
def load_queries(
    q_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, stride_qt, stride_dot, stride_ot, m0, seq_len,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, do, lse2 and delta_i = <do_i, o_i> - dlse_i of a tile of queries; o is read only here."""
    q = load_rows(q_ptr, m0, seq_len, stride_qt, BLOCK_M, D, BLOCK_D)
    do = load_rows(do_ptr, m0, seq_len, stride_dot, BLOCK_M, D, BLOCK_D)
    o = load_rows(o_ptr, m0, seq_len, stride_ot, BLOCK_M, D, BLOCK_D)
    offs_m = m0 + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < seq_len, other=float("-inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offs_m, mask=offs_m < seq_len, other=0.0)
    blind = lse == float("-inf")
    return q, do, tl.where(blind, float("inf"), lse * LOG2E), tl.where(blind, 0.0, delta)


@triton.jit
def tile_grads(
    dq, dk, dv, q, do, k, v, lse2, delta, n0, limit, whole, scale2,
    NEED_DQ: tl.constexpr, NEED_DKDV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one tile of queries and one of keys add to dq / scale [BLOCK_M, BLOCK_D] and, both
    transposed, to dk / scale and dv [BLOCK_D, BLOCK_N].

    Query i sees the columns below limit_i, every query those below `whole`; the tile begins at n0.
    """
    # p_ij = exp(scale <q_i, k_j> - lse_i)                                    [BLOCK_M, BLOCK_N]
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale2 - lse2[:, None])
    if n0 + BLOCK_N > whole:
        p = tl.where((n0 + tl.arange(0, BLOCK_N))[None, :] < limit[:, None], p, 0.0)
    # ds_ij = p_ij (<do_i, v_j> - delta_i)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    if NEED_DKDV:
        # dv_j = sum_i p_ij do_i, dk_j = scale sum_i ds_ij q_i: transposed, so that do and q are
        # left operands as they lie in shared memory, and p and ds right ones
        dv = tl.dot(tl.trans(do), p.to(q.dtype), dv, input_precision="ieee")
        dk = tl.dot(tl.trans(q), ds, dk, input_precision="ieee")
    if NEED_DQ:
        # dq_i = scale sum_j ds_ij k_j
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq, dk, dv


@triton.jit
def key_grads(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot,
    n0, end, first, m_start, seq_len, scale2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of one tile of keys, n0 <= j < end, over the queries from m_start on."""
    dq = 0.0
    for m0 in range(m_start, seq_len, BLOCK_M):
        q = load_rows(q_ptr, m0, seq_len, stride_qt, BLOCK_M, D, BLOCK_D)
        do = load_rows(do_ptr, m0, seq_len, stride_dot, BLOCK_M, D, BLOCK_D)
        lse2, delta = load_terms(lse_ptr, delta_ptr, m0, seq_len, BLOCK_M)
        limit, whole = limits(m0, end, first, CAUSAL, BLOCK_M)
        dq, dk, dv = tile_grads(
            dq, dk, dv, q, do, k, v, lse2, delta, n0, limit, whole, scale2, False, True, BLOCK_N
        )
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _bwd_short_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, partial_k_ptr, partial_v_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_dob, stride_doh, stride_dot,
    stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    stride_dkb, stride_dkh, stride_dks,
    n_head, seq_len, kv_len, prefix_len, scale, scale2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All gradients of one row and head whose queries, keys and prefix are one tile each."""
    dtype = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b, h = (pid // n_head).to(tl.int64), (pid % n_head).to(tl.int64)
    NEED_DQKV: tl.constexpr = dq_ptr is not None
    NEED_PREFIX: tl.constexpr = partial_k_ptr is not None
    dpk = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)
    dpv = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)
    n, columns = row_prefix(b, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len)
    keys, first = row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL)
    at_terms = (b * n_head + h) * seq_len
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += at_terms
    if dlse_ptr is not None:
        dlse_ptr += at_terms
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if NEED_DQKV:
        dq_ptr += b * stride_dqb + h * stride_dqh
        dk_ptr += b * stride_dkb + h * stride_dkh
        dv_ptr += b * stride_dkb + h * stride_dkh
    if BLOCK_P > 0:
        at_p = n * stride_pn + h * stride_ph
        pk = load_rows(prefix_k_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(dtype)
        pv = load_rows(prefix_v_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(dtype)

    q, do, lse2, delta = load_queries(
        q_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, stride_qt, stride_dot, stride_ot, 0, seq_len,
        BLOCK_M, D, BLOCK_D,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if NEED_DQKV:
        k = load_rows(k_ptr, 0, keys, stride_ks, BLOCK_N, D, BLOCK_D)
        v = load_rows(v_ptr, 0, keys, stride_vs, BLOCK_N, D, BLOCK_D)
        dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        dv = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        limit, whole = limits(0, keys, first, CAUSAL, BLOCK_M)
        dq, dk, dv = tile_grads(
            dq, dk, dv, q, do, k, v, lse2, delta, 0, limit, whole, scale2, True, True, BLOCK_N
        )
        store_rows(dk_ptr, tl.trans(dk * scale), 0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)
        store_rows(dv_ptr, tl.trans(dv), 0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)
    if BLOCK_P > 0:
        every = tl.zeros([BLOCK_M], tl.int32) + columns
        dq, dpk, dpv = tile_grads(
            dq, dpk, dpv, q, do, pk, pv, lse2, delta, 0, every, columns, scale2,
            NEED_DQKV, NEED_PREFIX, BLOCK_P,
        )  # fmt: skip
    if NEED_DQKV:
        store_rows(dq_ptr, dq * scale, 0, seq_len, stride_dqt, BLOCK_M, D, BLOCK_D)
    if NEED_PREFIX:
        at = (b * n_head + h) * prefix_len * D
        store_rows(partial_k_ptr + at, tl.trans(dpk * scale), 0, prefix_len, D, BLOCK_P, D, BLOCK_D)
        store_rows(partial_v_ptr + at, tl.trans(dpv), 0, prefix_len, D, BLOCK_P, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, delta_ptr,
    dq_ptr, partial_k_ptr, partial_v_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_dob, stride_doh, stride_dot,
    stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    n_head, seq_len, kv_len, prefix_len, scale, scale2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, MORE_P: tl.constexpr,
):  # fmt: skip
    """delta, dq and a part of dprefix of one tile of queries of one row and head."""
    tiles_m = tl.cdiv(seq_len, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = tiles_m - 1 - pid % tiles_m  # under causality the last tile takes longest
    m0 = tile_m * BLOCK_M
    b, h = (pid // tiles_m // n_head).to(tl.int64), (pid // tiles_m % n_head).to(tl.int64)
    NEED_DQ: tl.constexpr = dq_ptr is not None
    NEED_PREFIX: tl.constexpr = partial_k_ptr is not None
    dpk = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)
    dpv = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)
    n, columns = row_prefix(b, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len)
    keys, first = row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL)
    at_terms = (b * n_head + h) * seq_len
    if dlse_ptr is not None:
        dlse_ptr += at_terms
    q, do, lse2, delta = load_queries(
        q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh,
        o_ptr + b * stride_ob + h * stride_oh, lse_ptr + at_terms, dlse_ptr,
        stride_qt, stride_dot, stride_ot, m0, seq_len, BLOCK_M, D, BLOCK_D,
    )  # fmt: skip
    offs_m = m0 + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + at_terms + offs_m, delta, mask=offs_m < seq_len)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_P > 0:  # first, as in the forward kernel
        at_p = n * stride_pn + h * stride_ph
        pk = load_rows(prefix_k_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        pv = load_rows(prefix_v_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        every = tl.zeros([BLOCK_M], tl.int32) + columns
        dq, dpk, dpv = tile_grads(
            dq, dpk, dpv, q, do, pk, pv, lse2, delta, 0, every, columns, scale2,
            NEED_DQ, NEED_PREFIX, BLOCK_P,
        )  # fmt: skip
        if MORE_P and NEED_DQ:  # then dprefix is made by _bwd_dprefix_kernel
            for p0 in range(BLOCK_P, columns, BLOCK_P):
                k = load_rows(prefix_k_ptr + at_p, p0, columns, stride_pp, BLOCK_P, D, BLOCK_D)
                v = load_rows(prefix_v_ptr + at_p, p0, columns, stride_pp, BLOCK_P, D, BLOCK_D)
                k, v = k.to(q.dtype), v.to(q.dtype)
                dq, dpk, dpv = tile_grads(
                    dq, dpk, dpv, q, do, k, v, lse2, delta, p0, every, columns, scale2,
                    True, False, BLOCK_P,
                )  # fmt: skip
    if NEED_DQ:
        limit, whole = limits(m0, keys, first, CAUSAL, BLOCK_M)
        last = keys
        if CAUSAL:
            last = tl.minimum(keys, first + m0 + BLOCK_M)
        k_at, v_at = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
        for n0 in range(0, last, BLOCK_N):
            k = load_rows(k_at, n0, last, stride_ks, BLOCK_N, D, BLOCK_D)
            v = load_rows(v_at, n0, last, stride_vs, BLOCK_N, D, BLOCK_D)
            dq, dpk, dpv = tile_grads(
                dq, dpk, dpv, q, do, k, v, lse2, delta, n0, limit, whole, scale2,
                True, False, BLOCK_N,
            )  # fmt: skip
    if NEED_DQ:
        dq_at = dq_ptr + b * stride_dqb + h * stride_dqh
        store_rows(dq_at, dq * scale, m0, seq_len, stride_dqt, BLOCK_M, D, BLOCK_D)
    if NEED_PREFIX:
        at = ((b * tiles_m + tile_m) * n_head + h) * prefix_len * D
        store_rows(partial_k_ptr + at, tl.trans(dpk * scale), 0, prefix_len, D, BLOCK_P, D, BLOCK_D)
        store_rows(partial_v_ptr + at, tl.trans(dpv), 0, prefix_len, D, BLOCK_P, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dks,
    n_head, seq_len, kv_len, scale, scale2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one row and head."""
    tiles_n = tl.cdiv(kv_len, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % tiles_n * BLOCK_N  # under causality the first tile takes longest
    b, h = (pid // tiles_n // n_head).to(tl.int64), (pid // tiles_n % n_head).to(tl.int64)
    keys, first = row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL)
    k_at, v_at = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    k = load_rows(k_at, n0, keys, stride_ks, BLOCK_N, D, BLOCK_D)
    v = load_rows(v_at, n0, keys, stride_vs, BLOCK_N, D, BLOCK_D)
    dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dv = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    m_start = 0
    if CAUSAL:  # the tile of the first query that sees key n0
        m_start = tl.maximum(n0 - first, 0) // BLOCK_M * BLOCK_M
    m_start = tl.where(n0 < keys, m_start, seq_len)
    at_terms = (b * n_head + h) * seq_len
    dk, dv = key_grads(
        dk, dv, k, v, q_ptr + b * stride_qb + h * stride_qh,
        do_ptr + b * stride_dob + h * stride_doh, lse_ptr + at_terms, delta_ptr + at_terms,
        stride_qt, stride_dot, n0, keys, first, m_start, seq_len, scale2,
        CAUSAL, D, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    at = b * stride_dkb + h * stride_dkh
    store_rows(dk_ptr + at, tl.trans(dk * scale), n0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr + at, tl.trans(dv), n0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dprefix_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, lse_ptr, delta_ptr, partial_k_ptr, partial_v_ptr,
    prefix_index_ptr, prefix_lens_ptr, stride_qb, stride_qh, stride_qt,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_dob, stride_doh, stride_dot,
    n_head, batch_size, rows, seq_len, prefix_len, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of dprefix: one tile of prefix columns of one head, over `rows` rows that share it."""
    tiles_p = tl.cdiv(prefix_len, BLOCK_N)
    pid = tl.program_id(0)
    p0, chunk = pid % tiles_p * BLOCK_N, pid // tiles_p // n_head
    h = (pid // tiles_p % n_head).to(tl.int64)
    first_row = chunk * rows
    n, columns = row_prefix(first_row, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len)
    at_p = n * stride_pn + h * stride_ph
    k = load_rows(prefix_k_ptr + at_p, p0, columns, stride_pp, BLOCK_N, D, BLOCK_D)
    v = load_rows(prefix_v_ptr + at_p, p0, columns, stride_pp, BLOCK_N, D, BLOCK_D)
    k, v = k.to(q_ptr.dtype.element_ty), v.to(q_ptr.dtype.element_ty)
    dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dv = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    end = tl.where(p0 < columns, tl.minimum(first_row + rows, batch_size), first_row)
    for row in range(first_row, end):
        b = tl.cast(row, tl.int64)
        at_terms = (b * n_head + h) * seq_len
        dk, dv = key_grads(
            dk, dv, k, v, q_ptr + b * stride_qb + h * stride_qh,
            do_ptr + b * stride_dob + h * stride_doh, lse_ptr + at_terms, delta_ptr + at_terms,
            stride_qt, stride_dot, p0, columns, 0, 0, seq_len, scale2,
            False, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    at = (chunk * n_head + h) * prefix_len * D
    store_rows(partial_k_ptr + at, tl.trans(dk * scale), p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
    store_rows(partial_v_ptr + at, tl.trans(dv), p0, prefix_len, D, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_partials", "per_row"])
def _reduce_kernel(
    partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr, prefix_index_ptr,
    n_partials, n_elements, per_row,
    BANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum over the partials of each prefix, in their order: BLOCK_N of its H P D elements."""
    tiles = tl.cdiv(n_elements, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    offs_e = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    dk, dv = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    start, end = 0, n_partials
    if BANK and prefix_index_ptr is None:  # prefix n is that of row n
        start, end = n * per_row, (n + 1) * per_row
    for g0 in range(start, end, BLOCK_M):
        g = g0 + tl.arange(0, BLOCK_M)
        used = g < end
        if BANK and prefix_index_ptr is not None:
            used &= tl.load(prefix_index_ptr + g // per_row, mask=used, other=-1) == n
        at = g.to(tl.int64)[:, None] * n_elements + offs_e[None, :]
        mask = used[:, None] & (offs_e < n_elements)[None, :]
        dk += tl.sum(tl.load(partial_k_ptr + at, mask=mask, other=0.0), 0)
        dv += tl.sum(tl.load(partial_v_ptr + at, mask=mask, other=0.0), 0)
    at = n * n_elements + offs_e
    dtype = dprefix_k_ptr.dtype.element_ty
    tl.store(dprefix_k_ptr + at, dk.to(dtype), mask=offs_e < n_elements)
    tl.store(dprefix_v_ptr + at, dv.to(dtype), mask=offs_e < n_elements)


def backward(
    do, dlse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
    causal, scale, o, lse, dq, dk, dv, dprefix_k, dprefix_v,
) -> None:  # fmt: skip
    """Write the gradients of `kernels.prefix_attention`.

    Args:
        do: (B, H, T, D) or None (zero); dlse: (B, H, T) fp32 or None (zero).
        dq, dk, dv: (B, H, T or S, D), a contiguous last dimension; dprefix_k, dprefix_v: as
            prefix_k, contiguous. None where none is needed; dk and dv, and the last two, together.
            dk and dv have the same strides.
    """
    (B, _, T, D), S, P = q.shape, k.shape[2], prefix_k.shape[-2]
    do = torch.zeros_like(o) if do is None else do
    do, o = (x if x.stride(-1) == 1 else x.contiguous() for x in (do, o))
    scale = D**-0.5 if scale is None else scale
    a = kernel_arguments(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset)
    a |= {
        "do_ptr": do, "o_ptr": o, "lse_ptr": lse.contiguous(),
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "stride_dob": do.stride(0), "stride_doh": do.stride(1), "stride_dot": do.stride(2),
        "stride_ob": o.stride(0), "stride_oh": o.stride(1), "stride_ot": o.stride(2),
        "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, **strides("dq", dq), **strides("dk", dk),
        "batch_size": B, "scale": scale, "scale2": scale * LOG2E.value,
        "CAUSAL": causal, **prefix_blocks(P, q),
    }  # fmt: skip
    key = bucket(T), bucket(S), bucket(P)
    need_prefix = dprefix_k is not None and P > 0
    partials, per_row = NO_PARTIALS, 1
    short = short_tiles(q, k, P)
    if short and (dq is None) == (dk is None):
        run = partial(run_short, a, need_prefix)
        partials = run_best("bwd_short", q, key, run, short)
    else:
        a["delta_ptr"] = torch.empty_like(lse)
        fused = need_prefix and fuses(q, P)
        run = partial(run_dq, a, fused)
        partials, per_row = run_best("bwd_dq", q, key, run)
        if dk is not None:
            run_best("bwd_dkdv", q, key, partial(run_dkdv, a))
        if need_prefix and not fused:
            partials, per_row = run_best("bwd_dprefix", q, key, partial(run_dprefix, a)), 1
    if need_prefix:
        reduce_partials(a, partials, per_row, dprefix_k, dprefix_v)


def short_tiles(q: Tensor, k: Tensor, prefix_len: int) -> list[Tile]:
    """Tiles of `_bwd_short_kernel`, the smallest that hold a row's queries and keys; or none."""
    if prefix_blocks(prefix_len, q)["MORE_P"]:
        return []
    fit = [t for t in tiles_of("bwd_short", q) if t.block_m >= max(q.shape[2], k.shape[2])]
    return [t for t in fit if t.block_m == min(t.block_m for t in fit)]


def fuses(q: Tensor, prefix_len: int) -> bool:
    """Whether `_bwd_dq_kernel` also makes the prefix's gradient: see the header."""
    block_m = tiles_of("bwd_dq", q)[0].block_m
    cheaper = 16 * prefix_len <= 2 * q.element_size() * block_m
    return cheaper and not prefix_blocks(prefix_len, q)["MORE_P"]


NO_PARTIALS = {"partial_k_ptr": None, "partial_v_ptr": None}


def new_partials(a: dict, n: int) -> dict[str, Tensor]:
    """Room for n partial sums of the prefix's gradient."""
    shape = (n, a["n_head"], a["prefix_len"], a["D"])
    return {name: a["lse_ptr"].new_empty(shape) for name in NO_PARTIALS}


def run_short(a: dict, need_prefix: bool, tile: Tile) -> dict[str, Tensor | None]:
    partials = new_partials(a, a["batch_size"]) if need_prefix else NO_PARTIALS
    launch(_bwd_short_kernel, a["batch_size"] * a["n_head"], tile, **a, **partials)
    return partials


def run_dq(a: dict, need_prefix: bool, tile: Tile) -> tuple[dict[str, Tensor | None], int]:
    """Also writes delta. Partial sums, if needed, and how many of them a row has."""
    tiles_m = cdiv(a["seq_len"], tile.block_m)
    partials = new_partials(a, a["batch_size"] * tiles_m) if need_prefix else NO_PARTIALS
    launch(_bwd_dq_kernel, a["batch_size"] * a["n_head"] * tiles_m, tile, **a, **partials)
    return partials, tiles_m


def run_dkdv(a: dict, tile: Tile) -> None:
    tiles_n = cdiv(a["kv_len"], tile.block_n)
    launch(_bwd_dkdv_kernel, a["batch_size"] * a["n_head"] * tiles_n, tile, **a)


def run_dprefix(a: dict, tile: Tile) -> dict[str, Tensor]:
    tiles_p = cdiv(a["prefix_len"], tile.block_n)
    rows = 1 if a["BANK"] else rows_a_program(a["batch_size"], a["n_head"] * tiles_p)
    chunks = cdiv(a["batch_size"], rows)
    partials = new_partials(a, chunks)
    launch(_bwd_dprefix_kernel, chunks * a["n_head"] * tiles_p, tile, **a, **partials, rows=rows)
    return partials


def rows_a_program(batch_size: int, programs_a_row: int) -> int:
    """Over how many rows of the batch one program sums the gradient of a shared prefix.

    Given by the shapes alone, so that the sum is always made in the same order.
    """
    chunks = max(1, min(batch_size, PROGRAMS // max(1, programs_a_row)))
    return max(1, cdiv(batch_size, chunks))


def reduce_partials(a: dict, partials: dict, per_row: int, dprefix_k, dprefix_v) -> None:
    """dprefix_k, dprefix_v: the partials summed over the rows that used each prefix."""
    n_partials, H, P, D = partials["partial_k_ptr"].shape
    n_elements, tile = H * P * D, Tile(32, 64, 4, 1)
    n_prefixes = dprefix_k.numel() // n_elements
    launch(
        _reduce_kernel, n_prefixes * cdiv(n_elements, tile.block_n), tile, **a, **partials,
        dprefix_k_ptr=dprefix_k, dprefix_v_ptr=dprefix_v,
        n_partials=n_partials, n_elements=n_elements, per_row=per_row,
    )  # fmt: skip


def workspace_bytes(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index=None) -> int:
    """Memory, in bytes, that all gradients take besides themselves: delta and parts of dprefix.

    For the default tiles. Arguments as in `kernels.prefix_attention`.
    """
    (B, H, T, D), P = q.shape, prefix_k.shape[-2]
    bank = prefix_k.dim() == 4 and (prefix_index is not None or prefix_k.shape[0] > 1)
    delta, parts = 4 * B * H * T, B
    if short_tiles(q, k, P):
        delta = 0
    elif fuses(q, P):
        parts = B * cdiv(T, tiles_of("bwd_dq", q)[0].block_m)
    elif not bank:
        tiles_p = cdiv(P, tiles_of("bwd_dprefix", q)[0].block_n)
        parts = cdiv(B, rows_a_program(B, H * tiles_p))
    return delta + 8 * parts * H * P * D


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of an output (B, H, T or S, D); zeros where it is not needed."""
    b, h, rows = (0, 0, 0) if x is None else x.stride()[:3]
    return {
        f"stride_{name}b": b,
        f"stride_{name}h": h,
        f"stride_{name}{'t' if name == 'dq' else 's'}": rows,
    }
