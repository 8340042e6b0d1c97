"""The backward kernels of attention over [prefix; sequence].

With x_ij = scale <q_i, k_j>, p_ij = exp(x_ij - lse_i) and o_i = sum_j p_ij v_j, let do and dlse be
the gradients of the loss in o and lse. By the chain rule, d lse_i / d x_ij = p_ij and
d o_i / d x_ij = p_ij (v_j - o_i), so

    dx_ij = p_ij (<do_i, v_j> - delta_i),    delta_i = <do_i, o_i> - dlse_i
    dq_i = scale sum_j dx_ij k_j,    dk_j = scale sum_i dx_ij q_i,    dv_j = sum_i p_ij do_i.

A prefix column is a column j like any other, except that many rows b see it: dprefix is the sum of
dk_j, dv_j over these rows as well. p is recomputed from q, k and lse, so besides the inputs only o
and lse are saved, which is 4 B H T bytes more than o. All of this arithmetic is in one function,
`tile_grads`, for one tile of queries and one tile of keys of either kind. It is used by these
kernels, among which `plan.py` chooses:

  - `_bwd_short_kernel`, for rows of one tile or a few: one program per row and head reads
    everything once and writes dq, dk, dv and the row's part of dprefix. delta exists only in
    registers. It computes 5 products per pair of query and column.
  - Otherwise `_bwd_dq_kernel` (a program per tile of queries: delta, dq and, for short prefixes, a
    part of dprefix), then `_bwd_dkdv_kernel` (a program per tile of keys, over the queries that see
    them). They compute s and dp twice: 7 products.
  - `_bwd_dprefix_kernel`, for longer prefixes: a program per tile of prefix columns, over all
    queries of `rows` rows, with its sums in registers. It adds 4 products per pair with a prefix
    column.

There are no atomics: parts of dprefix are written in fp32 (`partial_k`, `partial_v`), and
`_reduce_kernel` adds the parts of each prefix in an order that follows from the shapes and the
index, so results repeat bit for bit. If a prefix has only one part, because one row uses it, the
program of that part writes the gradient itself (`store_part`).

FLOPs: 2 D B H times the number of products per pair of a query and a column that it sees. `plan.py`
counts the bytes.

Source: the split into kernels by query and by key is that of Dao 2023 (arXiv:2307.08691), alg. 2.
"""

import triton
import triton.language as tl

from kernels.assembler import assembled
from kernels.tiles import LOG2E, limits, load_rows, row_prefix, row_sequence, store_rows

SIZES = ["seq_len", "kv_len", "prefix_len", "batch_size", "rows"]  # change from call to call


@triton.jit
def load_terms(lse_ptr, delta_ptr, m0, seq_len, BLOCK_M: tl.constexpr):
    """lse2_i and delta_i of a tile of queries. For queries that see nothing or are past seq_len,
    lse2_i is inf, so that p_ij = 2^(.. - inf) = 0."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < seq_len, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    return lse2, tl.load(delta_ptr + offs_m, mask=offs_m < seq_len, other=0.0)


@triton.jit
def load_queries(
    q_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, stride_qt, stride_dot, stride_ot, m0, seq_len,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, do, lse2 and delta_i = <do_i, o_i> - dlse_i of a tile of queries; only this reads o."""
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
    """The contribution of one tile of queries and one of keys to dq / scale [BLOCK_M, BLOCK_D] and,
    transposed, to dk / scale and dv [BLOCK_D, BLOCK_N].

    The tile of keys begins at n0. Query i sees the columns below limit_i, and all queries see those
    below `whole`.
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
        # dv_j = sum_i p_ij do_i, dk_j = scale sum_i ds_ij q_i: computed transposed, so that do and
        # q are left operands in their layout in shared memory, and p and ds right operands
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
    """dk / scale and dv for one tile of keys, n0 <= j < end, over the queries from m_start on."""
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


@triton.jit
def uses_of(n, prefix_index_ptr, batch_size):
    """How many rows of the batch use prefix n."""
    uses = 0
    for b0 in range(0, batch_size, 128):
        offs_b = b0 + tl.arange(0, 128)
        index = tl.load(prefix_index_ptr + offs_b, mask=offs_b < batch_size, other=-1)
        uses += tl.sum((index == n).to(tl.int32))
    return uses


@triton.jit
def store_part(
    dk, dv, part, n, h, p0, prefix_index_ptr, batch_size, n_head, prefix_len,
    partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr,
    DIRECT: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store dk and dv [BLOCK_D, BLOCK_N] of prefix columns: as the gradient if there is no other
    part (DIRECT, or an index that names prefix n once), else as a part."""
    dk, dv = tl.trans(dk), tl.trans(dv)
    at = (part * n_head + h) * prefix_len * D
    at_prefix = (n * n_head + h) * prefix_len * D
    if DIRECT:
        store_rows(dprefix_k_ptr + at_prefix, dk, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
        store_rows(dprefix_v_ptr + at_prefix, dv, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
    elif prefix_index_ptr is None:
        store_rows(partial_k_ptr + at, dk, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
        store_rows(partial_v_ptr + at, dv, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
    else:
        own = tl.load(prefix_index_ptr + part)  # -1: no prefix; must not be added to prefix 0
        if (own >= 0) & (uses_of(own, prefix_index_ptr, batch_size) == 1):
            store_rows(dprefix_k_ptr + at_prefix, dk, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
            store_rows(dprefix_v_ptr + at_prefix, dv, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
        else:
            store_rows(partial_k_ptr + at, dk, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)
            store_rows(partial_v_ptr + at, dv, p0, prefix_len, D, BLOCK_N, D, BLOCK_D)


@assembled
@triton.jit(do_not_specialize=SIZES)
def _bwd_short_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_dob, stride_doh, stride_dot,
    stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    stride_dkb, stride_dkh, stride_dks,
    n_head, batch_size, seq_len, kv_len, prefix_len, scale, scale2,
    CAUSAL: tl.constexpr, SQUARE: tl.constexpr, DIRECT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr,
):  # fmt: skip
    """All gradients of one row and head: TILES_M tiles of queries, TILES_N of keys, one of prefix.

    The loops are unrolled. SQUARE: query i is at column i, so tiles above the diagonal are skipped.
    """
    dtype = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b, h = (pid // n_head).to(tl.int64), (pid % n_head).to(tl.int64)
    NEED_DQKV: tl.constexpr = dq_ptr is not None
    NEED_PREFIX: tl.constexpr = dprefix_k_ptr is not None
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
    dpk = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)
    dpv = tl.zeros([BLOCK_D, max(BLOCK_P, 16)], tl.float32)

    queries, dq = (), ()  # of the tiles of queries so far: the last one, the one before, ..
    for j in tl.static_range(TILES_N - 1, -1, -1):
        if NEED_DQKV:
            k = load_rows(k_ptr, j * BLOCK_N, keys, stride_ks, BLOCK_N, D, BLOCK_D)
            v = load_rows(v_ptr, j * BLOCK_N, keys, stride_vs, BLOCK_N, D, BLOCK_D)
            dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
            dv = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        for met in tl.static_range(TILES_M):
            if j * BLOCK_N < (TILES_M - met) * BLOCK_M or not SQUARE:
                m0 = (TILES_M - 1 - met) * BLOCK_M
                if met == len(queries):
                    tile = load_queries(
                        q_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, stride_qt, stride_dot, stride_ot,
                        m0, seq_len, BLOCK_M, D, BLOCK_D,
                    )  # fmt: skip
                    queries += (tile,)
                    dq += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
                q, do, lse2, delta = queries[met]
                dq_i = dq[met]
                if NEED_DQKV:
                    limit, whole = limits(m0, keys, first, CAUSAL, BLOCK_M)
                    dq_i, dk, dv = tile_grads(
                        dq_i, dk, dv, q, do, k, v, lse2, delta, j * BLOCK_N, limit, whole, scale2,
                        True, True, BLOCK_N,
                    )  # fmt: skip
                if j == 0 and BLOCK_P > 0:
                    every = tl.zeros([BLOCK_M], tl.int32) + columns
                    dq_i, dpk, dpv = tile_grads(
                        dq_i, dpk, dpv, q, do, pk, pv, lse2, delta, 0, every, columns, scale2,
                        NEED_DQKV, NEED_PREFIX, BLOCK_P,
                    )  # fmt: skip
                if j == 0 and NEED_DQKV:
                    store_rows(dq_ptr, dq_i * scale, m0, seq_len, stride_dqt, BLOCK_M, D, BLOCK_D)
                dq = dq[:met] + (dq_i,) + dq[met + 1 :]
        if NEED_DQKV:
            n0 = j * BLOCK_N
            store_rows(dk_ptr, tl.trans(dk * scale), n0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)
            store_rows(dv_ptr, tl.trans(dv), n0, kv_len, stride_dks, BLOCK_N, D, BLOCK_D)
    if NEED_PREFIX:
        store_part(
            dpk * scale, dpv, b, n, h, 0, prefix_index_ptr, batch_size, n_head, prefix_len,
            partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr,
            DIRECT, BLOCK_P, D, BLOCK_D,
        )  # fmt: skip


@assembled
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
    """delta, dq and a part of dprefix for one tile of queries of one row and head."""
    tiles_m = tl.cdiv(seq_len, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = tiles_m - 1 - pid % tiles_m  # if causal, the last tile takes longest
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
    if BLOCK_P > 0:  # the prefix first, as in the forward kernel
        at_p = n * stride_pn + h * stride_ph
        pk = load_rows(prefix_k_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        pv = load_rows(prefix_v_ptr + at_p, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        every = tl.zeros([BLOCK_M], tl.int32) + columns
        dq, dpk, dpv = tile_grads(
            dq, dpk, dpv, q, do, pk, pv, lse2, delta, 0, every, columns, scale2,
            NEED_DQ, NEED_PREFIX, BLOCK_P,
        )  # fmt: skip
        if MORE_P and NEED_DQ:  # then _bwd_dprefix_kernel computes dprefix
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


@assembled
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
    """dk and dv for one tile of keys of one row and head."""
    tiles_n = tl.cdiv(kv_len, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % tiles_n * BLOCK_N  # if causal, the first tile takes longest
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


@assembled
@triton.jit(do_not_specialize=SIZES)
def _bwd_dprefix_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, lse_ptr, delta_ptr,
    partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr,
    prefix_index_ptr, prefix_lens_ptr, stride_qb, stride_qh, stride_qt,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_dob, stride_doh, stride_dot,
    n_head, batch_size, rows, seq_len, prefix_len, scale, scale2,
    DIRECT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of dprefix: one tile of prefix columns of one head, summed over `rows` rows."""
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
    store_part(
        dk * scale, dv, chunk.to(tl.int64), n, h, p0, prefix_index_ptr, batch_size, n_head,
        prefix_len, partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr,
        DIRECT, BLOCK_N, D, BLOCK_D,
    )  # fmt: skip


@assembled
@triton.jit(do_not_specialize=["n_partials", "per_row", "batch_size"])
def _reduce_kernel(
    partial_k_ptr, partial_v_ptr, dprefix_k_ptr, dprefix_v_ptr, prefix_index_ptr,
    n_partials, n_elements, per_row, batch_size,
    BANK: tl.constexpr, LEFT_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum over the parts of each prefix, in order, for BLOCK_N of its H P D elements.

    LEFT_OUT: skip prefixes that the index names once; `store_part` has written their gradients.
    """
    tiles = tl.cdiv(n_elements, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    offs_e = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_e = offs_e < n_elements
    dk, dv = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    start, end = 0, n_partials
    if BANK and prefix_index_ptr is None:  # prefix n belongs to row n
        start, end = n * per_row, (n + 1) * per_row
    if BANK and prefix_index_ptr is not None:
        uses = uses_of(n, prefix_index_ptr, batch_size)
        if LEFT_OUT:
            mask_e &= uses != 1
            uses = tl.where(uses == 1, 0, uses)
        end = tl.where(uses == 0, 0, n_partials)
    for g0 in range(start, end, BLOCK_M):
        g = g0 + tl.arange(0, BLOCK_M)
        used = g < end
        if BANK and prefix_index_ptr is not None:
            used &= tl.load(prefix_index_ptr + g // per_row, mask=used, other=-1) == n
        at = g.to(tl.int64)[:, None] * n_elements + offs_e[None, :]
        mask = used[:, None] & mask_e[None, :]
        dk += tl.sum(tl.load(partial_k_ptr + at, mask=mask, other=0.0), 0)
        dv += tl.sum(tl.load(partial_v_ptr + at, mask=mask, other=0.0), 0)
    at = n * n_elements + offs_e
    dtype = dprefix_k_ptr.dtype.element_ty
    tl.store(dprefix_k_ptr + at, dk.to(dtype), mask=mask_e)
    tl.store(dprefix_v_ptr + at, dv.to(dtype), mask=mask_e)
