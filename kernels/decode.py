"""Attention of a few queries over [prefix; KV cache], forward only: one step of decoding in Triton.

Decoding reads every cached key once for one query, so it is bound by memory, and with few rows one
program per row and head leaves most of the GPU idle. So the columns of a row are cut into splits
that run as separate programs. A program c that sees the columns C_c leaves, as [1] and [2] do,

    lse_c = log sum_(j in C_c) exp(s_ij),   o_c = sum_(j in C_c) exp(s_ij - lse_c) v_j

and the softmax over all columns follows from these partial results alone:

    lse = log sum_c exp(lse_c),   o = sum_c exp(lse_c - lse) o_c.                              (*)

`decode` is the entry; it plans from the shapes alone (`cut_for`), so CUDA graphs replay it whatever
the lengths of the rows. Read `_decode_kernel`, then `_merge_kernel`, which is (*). Its programs:

  - (row, head, split): the row's T queries, padded to a tile of 16, on `chunk` columns of the
    row's [prefix; cache], each part rounded up to whole tiles. Splits past a row's length see no
    column and leave o_c = 0, lse_c = -inf, which (*) ignores.
  - (head, split of the prefix, stack), where all rows share the prefix and `stacks` says that it
    pays: BLOCK_M of the batch's B T queries as one matrix, so that a tile of the prefix is read
    B T / BLOCK_M times instead of B times. The programs above then see the cache only.

Nothing is added atomically, and (*) sums in the order of c: results repeat bit for bit. Where one
program sees all columns of its queries it writes o and lse itself: one launch, no workspace. (A
cache that grows from call to call, as a longer and longer view, passes from the one to the other
once, which compiles a second form of the kernel; a static cache never does.)

With e the bytes of an element and C the number of partial results per query (`Cut.parts`):

    bytes of `_decode_kernel`:   2 e D H (B S + P R) + 2 e B H T D      R = B, or B T / BLOCK_M
    FLOPs of `_decode_kernel`:   4 D H (B S + B P) T                    (done: 16 for T, padded)
    bytes of `_merge_kernel`:    4 C B H T (D + 1) + e B H T D
    FLOPs of `_merge_kernel`:    2 C B H T (D + 1)
    workspace, in bytes:         4 C B H T (D + 1) for C > 1, else 0    (`workspace_bytes`)

Of the P R reads of the prefix only the first comes from memory, the others from the L2 cache.

[1] Dao et al. 2023, https://pytorch.org/blog/flash-decoding/   [2] Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867   [3] Hydragen, stacked queries on a shared prefix: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import assembled
from kernels.inputs import Inputs
from kernels.launch import (
    Tile,
    bucket,
    cdiv,
    empty_results,
    kernel_arguments,
    launch,
    programs_wanted,
    run_best,
    tiles_of,
)
from kernels.tiles import LN2, LOG2E, load_rows, row_prefix, row_sequence, softmax_step, store_rows

MAX_QUERIES = 8  # T
BLOCK_T = tl.constexpr(16)  # a row's queries, padded to the smallest tile of a matrix product
SPLIT_FROM = 4  # tiles; fewer are read faster than a second launch starts
EARLY_BYTES = 16 * 2**10  # prefix that a program holds in registers: 32 for each of 128 threads
PREFIX_TILES = 4  # in one split of a stacked prefix: like a short split of the cache
STACK_BYTES = 16 * 2**20  # reads saved from which stacking pays: 3 us of L2, one more launch

MERGE = Tile(block_m=1, block_n=16, num_warps=2, num_stages=1)  # a query; partial results a step


@triton.jit
def prefix_steps(
    o, z, m, q, k_ptr, v_ptr, start, end, stride, scale2,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Prefix columns start <= p < end into the running softmax of queries q [M, BLOCK_D]."""
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
    """o_c, lse_c of BLOCK_M of the batch's B T queries, of one head, on one split of the prefix."""
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


@assembled
@triton.jit(
    do_not_specialize=[
        "batch_size", "seq_len", "kv_len", "prefix_len",
        "splits", "chunk", "prefix_splits", "prefix_chunk",
    ]
)  # fmt: skip
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_pn, stride_ph, stride_pp, stride_lens, stride_oc, stride_ob, stride_oh, stride_ot,
    batch_size, n_head, seq_len, kv_len, prefix_len,
    splits, chunk, prefix_splits, prefix_chunk, scale2,
    CAUSAL: tl.constexpr, Q_SIGN: tl.constexpr, STACKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, MORE_P: tl.constexpr,
):  # fmt: skip
    """o_c (parts, B, H, T, D) and lse_c (parts, B, H, T), in nats: the two kinds of programs."""
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
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
        prefix_k_ptr += n * stride_pn + h * stride_ph
        prefix_v_ptr += n * stride_pn + h * stride_ph

        # query t sees the sequence columns below limit_t, some query those below last
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
            # requested first, used last
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
        for n0 in range(tl.maximum(start - padded, 0), last, BLOCK_N):
            k = load_rows(k_ptr, n0, last, stride_ks, BLOCK_N, D, BLOCK_D)
            v = load_rows(v_ptr, n0, last, stride_vs, BLOCK_N, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_T, BLOCK_N]
            s = tl.where((n0 + offs_n)[None, :] < limit[:, None], s, float("-inf"))
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
        lse = (m + tl.log2(z)) * LN2  # -inf where nothing was seen
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


class Cut(NamedTuple):
    """How the columns of a call are cut."""

    splits: int  # programs per row and head
    chunk: int  # columns of each, in whole tiles
    prefix_splits: int  # programs per head and stack; 0: the prefix is not stacked
    prefix_chunk: int

    @property
    def parts(self) -> int:
        """C, the partial results per query."""
        return self.splits + self.prefix_splits


def stacks(q: Tensor, prefix_k: Tensor, prefix_index: Tensor | None, tile: Tile) -> bool:
    """Whether the queries of all rows are stacked on the prefix; from the shapes alone.

    They can be where all rows share it. It pays where the reads that it saves take longer than
    merging one partial result more; a short prefix comes from the L2 cache in less than that.
    """
    (B, H, T, D), P = q.shape, prefix_k.shape[-2]
    shared = prefix_index is None and (prefix_k.dim() == 3 or prefix_k.shape[0] == 1)
    saved = (B - cdiv(B * T, tile.block_m)) * 2 * H * P * D * prefix_k.element_size()
    return shared and saved >= STACK_BYTES


def cut_for(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index: Tensor | None, tile: Tile) -> Cut:
    """The splits, from the shapes and the tables above; never from the lengths of the rows.

    So many that PROGRAMS_EACH programs run on each multiprocessor, if there are as many tiles.
    """
    (B, H, _, _), S, P = q.shape, k.shape[2], prefix_k.shape[-2]
    tiles, prefix_splits = cdiv(S, tile.block_n), 0
    if stacks(q, prefix_k, prefix_index, tile):
        prefix_splits = cdiv(P, PREFIX_TILES * tile.block_n)
    else:
        tiles += cdiv(P, tile.block_n)
    wanted_splits = programs_wanted(q) // max(B * H, 1)
    each = cdiv(tiles, max(wanted_splits, 1)) if tiles >= SPLIT_FROM else tiles
    splits = max(1, cdiv(tiles, max(each, 1)))
    return Cut(splits, max(each, 1) * tile.block_n, prefix_splits, PREFIX_TILES * tile.block_n)


def prefix_tiles(prefix_k: Tensor, block_d: int) -> dict[str, int | bool]:
    """BLOCK_P: prefix columns in a tile (0: none), a power of two; MORE_P: are there more tiles?

    The first tile of a row waits in registers while the cache is read, so its size is limited.
    """
    prefix_len = prefix_k.shape[-2]
    most = EARLY_BYTES // (2 * block_d * prefix_k.element_size())
    block = min(64, most, max(16, bucket(prefix_len))) if prefix_len else 0
    return {"BLOCK_P": block, "MORE_P": prefix_len > block}


def workspace_bytes(
    q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index: Tensor | None = None
) -> int:
    """What `decode` allocates beside o and lse, with the default tile: 4 C B H T (D + 1)."""
    B, H, T, D = q.shape
    parts = cut_for(q, k, prefix_k, prefix_index, tiles_of("decode", q)[0]).parts
    return 4 * parts * B * H * T * (D + 1) if parts > 1 else 0


def wanted(q: Tensor) -> bool:
    """Whether `decode` is taken rather than `attention.forward`: up to MAX_QUERIES queries.

    Then a program's work is to read keys, whatever their number, and its tile of 16 queries wastes
    the least of the matrix product. More queries share the keys that a larger tile reads.
    """
    return q.shape[2] <= MAX_QUERIES


def decode(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """o, lse of `kernels.prefix_attention` for T <= 8; the inputs are checked already.

    Returns:
        o: (B, H, T, D) in q's dtype, in the memory order (B, T, H, D); lse: (B, H, T), fp32, nats.
    """
    q, k, prefix_k, prefix_index = inputs.q, inputs.k, inputs.prefix_k, inputs.prefix_index
    B, H, T, D = q.shape
    a = kernel_arguments(inputs)
    scale = D**-0.5 if inputs.scale is None else inputs.scale

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        cut = cut_for(q, k, prefix_k, prefix_index, tile)
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

    return run_best("decode", q, (bucket(k.shape[2]), bucket(prefix_k.shape[-2])), run)
