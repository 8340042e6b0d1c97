"""Attention over [prefix; sequence] in Triton: the forward kernel, and the operator around both.

Forward. With x_ij = scale <q_i, k_j> over the columns j that query i sees, prefix and sequence,

    lse_i = log sum_j exp(x_ij),    o_i = sum_j exp(x_ij - lse_i) v_j                          [1]

Nothing says that the columns must lie in one tensor. The sum is made tile by tile with the running
maximum m_i of the scores so far, and what was summed under an older maximum shrinks by
exp(m_old - m_new) [2]: a tile may come from the sequence's keys or from the prefix's. So nothing is
concatenated, no prefix is copied per row, and no mask exists in memory. Exponentials are powers of
two, 2^(x log2(e)), with scale log2(e) multiplied in once.

One program makes one tile of queries of one row b and head h: the prefix first, whose first tile
(up to 64 columns) it requests together with q, then the sequence. (The other way round would hide
that latency, but ptxas then makes Hopper's matrix products wait for one another.) Tiles that no
query of the tile sees are not visited, those that all of them see are not masked. Only lse is kept
for the backward pass (backward.py).

    bytes   read q, k, v, write o: 4 B H T D e (e = bytes of an element; k, v once more per further
            tile of queries where L2 does not hold them), lse: 4 B H T, prefix: 2 N H P D e
    FLOPs   4 D B H (visible pairs): T (T + 1) / 2 + P T where causal and T = S, T (S + P) if not

The operator. `minprefix::attention` and its backward are registered with torch.library, each with
a fake, for torch.compile and torch.export. In eager mode an autograd.Function around the same two
functions takes their place, which costs less per call (`python -m benchmarks.kernels.overhead`).
The `_qkv` pair differs in its gradient alone: one dqkv instead of dq, dk and dv. There is no second
derivative, and torch.func's transforms are not supported.

[1] Li & Liang 2021, https://arxiv.org/abs/2101.00190, eq. (3)
[2] Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao 2023, arXiv:2307.08691, alg. 1
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from kernels import decode
from kernels.assembler import assembled
from kernels.launch import (
    Tile,
    bucket,
    by_length,
    cdiv,
    empty_results,
    kernel_arguments,
    launch,
    prefix_blocks,
    run_best,
)  # fmt: skip
from kernels.plan import backward
from kernels.tiles import (
    LN2,
    LOG2E,
    limits,
    load_rows,
    row_prefix,
    row_sequence,
    softmax_step,
    store_rows,
)


@triton.jit
def attend_tile(o, z, m, q, k, v, n0, limit, whole, scale2, BLOCK_N: tl.constexpr):
    """One tile of keys, from column n0 on, of which query i sees those below limit_i."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if n0 + BLOCK_N > whole:
        s = tl.where((n0 + tl.arange(0, BLOCK_N))[None, :] < limit[:, None], s, float("-inf"))
    return softmax_step(o, z, m, s, v, scale2)


@assembled
@triton.jit(do_not_specialize=["seq_len", "kv_len", "prefix_len"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr,
    prefix_index_ptr, prefix_lens_ptr, kv_lens_ptr, q_offset_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_pn, stride_ph, stride_pp, stride_lens,
    n_head, seq_len, kv_len, prefix_len, scale2,
    CAUSAL: tl.constexpr, Q_SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, MORE_P: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries of one row and head."""
    tiles_m = tl.cdiv(seq_len, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (tiles_m - 1 - pid % tiles_m) * BLOCK_M  # under causality the last tile takes longest
    b, h = (pid // tiles_m // n_head).to(tl.int64), (pid // tiles_m % n_head).to(tl.int64)
    n, columns = row_prefix(b, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len)
    keys, first = row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    prefix_k_ptr += n * stride_pn + h * stride_ph
    prefix_v_ptr += n * stride_pn + h * stride_ph

    q = load_rows(q_ptr, m0, seq_len, stride_qt, BLOCK_M, D, BLOCK_D)
    if Q_SIGN != 1:
        q = (q * Q_SIGN).to(q_ptr.dtype.element_ty)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)

    if BLOCK_P > 0:
        pk = load_rows(prefix_k_ptr, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        pv = load_rows(prefix_v_ptr, 0, columns, stride_pp, BLOCK_P, D, BLOCK_D).to(q.dtype)
        every = tl.zeros([BLOCK_M], tl.int32) + columns
        o, z, m = attend_tile(o, z, m, q, pk, pv, 0, every, columns, scale2, BLOCK_P)
        if MORE_P:
            for p0 in range(BLOCK_P, columns, BLOCK_P):
                k = load_rows(prefix_k_ptr, p0, columns, stride_pp, BLOCK_P, D, BLOCK_D)
                v = load_rows(prefix_v_ptr, p0, columns, stride_pp, BLOCK_P, D, BLOCK_D)
                k, v = k.to(q.dtype), v.to(q.dtype)
                o, z, m = attend_tile(o, z, m, q, k, v, p0, every, columns, scale2, BLOCK_P)

    limit, whole = limits(m0, keys, first, CAUSAL, BLOCK_M)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, first + m0 + BLOCK_M)
    for n0 in range(0, last, BLOCK_N):
        k = load_rows(k_ptr, n0, last, stride_ks, BLOCK_N, D, BLOCK_D)
        v = load_rows(v_ptr, n0, last, stride_vs, BLOCK_N, D, BLOCK_D)
        o, z, m = attend_tile(o, z, m, q, k, v, n0, limit, whole, scale2, BLOCK_N)

    o = o / tl.where(z > 0.0, z, 1.0)[:, None]
    o_ptr += (b * seq_len * n_head + h) * D  # memory order (B, T, H, D)
    store_rows(o_ptr, o, m0, seq_len, n_head * D, BLOCK_M, D, BLOCK_D)
    lse = (m + tl.log2(z)) * LN2  # -inf where nothing was seen
    offs_m = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (b * n_head + h) * seq_len + offs_m, lse, mask=offs_m < seq_len)


def forward(
    q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset, causal, scale
) -> tuple[Tensor, Tensor]:
    """o, lse of `kernels.prefix_attention`, whose arguments these are, checked already."""
    arguments = (q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset)
    if decode.wanted(q):
        return decode.decode(*arguments, causal, scale)
    a = kernel_arguments(*arguments)
    (B, H, T, D), P = q.shape, prefix_k.shape[-2]
    o, lse = empty_results(q)
    scale = D**-0.5 if scale is None else scale
    # the kernel's maximum needs a positive factor: the sign (or zero) goes to q
    a |= {"Q_SIGN": (scale > 0) - (scale < 0), "scale2": (abs(scale) or 1.0) * LOG2E.value}

    def run(tile: Tile) -> None:
        programs = B * H * cdiv(T, tile.block_m)
        launch(_fwd_kernel, programs, tile, **a, o_ptr=o, lse_ptr=lse, CAUSAL=causal,
               **prefix_blocks(P, q))  # fmt: skip

    key = bucket(T), bucket(k.shape[2]), bucket(P)
    run_best(by_length("fwd", T), q, key, run)
    return o, lse


def attention_backward(
    do, dlse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
    causal, scale, o, lse, need_dq, need_dkdv, need_prefix,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dprefix_k, dprefix_v; an empty tensor for what is not needed."""
    dq, dk, dv, *dprefix = attention_backward_fake(
        do, dlse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
        causal, scale, o, lse, need_dq, need_dkdv, need_prefix,
    )  # fmt: skip
    backward(
        do, dlse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
        causal, scale, o, lse, dq if need_dq else None, *((dk, dv) if need_dkdv else (None, None)),
        *(dprefix if need_prefix else (None, None)),
    )  # fmt: skip
    return dq, dk, dv, *dprefix


def attention_backward_fake(
    do, dlse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
    causal, scale, o, lse, need_dq, need_dkdv, need_prefix,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, not filled in."""
    dqkv = (
        empty_results(x)[0] if need else x.new_empty(0)
        for x, need in zip((q, k, v), (need_dq, need_dkdv, need_dkdv), strict=True)
    )
    return (*dqkv, *(x.new_empty(x.shape if need_prefix else 0) for x in (prefix_k, prefix_v)))


def qkv_backward(
    do, dlse, qkv, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
    causal, scale, o, lse, need_dqkv, need_prefix,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dqkv (B, T, 3, H, D), dprefix_k, dprefix_v; an empty tensor for what is not needed."""
    dqkv, *dprefix = qkv_backward_fake(
        do, dlse, qkv, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
        causal, scale, o, lse, need_dqkv, need_prefix,
    )  # fmt: skip
    backward(
        do, dlse, *heads(qkv), prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
        causal, scale, o, lse, *(heads(dqkv) if need_dqkv else (None, None, None)),
        *(dprefix if need_prefix else (None, None)),
    )  # fmt: skip
    return dqkv, *dprefix


def qkv_backward_fake(
    do, dlse, qkv, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset,
    causal, scale, o, lse, need_dqkv, need_prefix,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, not filled in."""
    dqkv = qkv.new_empty(qkv.shape if need_dqkv else 0)
    return (dqkv, *(x.new_empty(x.shape if need_prefix else 0) for x in (prefix_k, prefix_v)))


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D) as views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def operator(name: str, tensors: str, forward: Callable, fake: Callable, backward: Callable,
             backward_fake: Callable, needs: str) -> Callable:  # fmt: skip
    """Register `minprefix::name` and its backward; returns what to call.

    Args:
        tensors: the schema of the inputs before prefix_k; needs: that of the flags that say which
            of their gradients are needed.
        forward, fake: give o, lse from the inputs, with and without filling them in.
        backward, backward_fake: give the gradients from do, dlse, the inputs, o, lse and the flags.
    """
    inputs = f"{tensors}, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index, "
    inputs += "Tensor? prefix_lens, Tensor? kv_lens, Tensor? q_offset, bool causal, float? scale"
    n = len(tensors.split(","))
    LIBRARY.define(f"{name}({inputs}) -> (Tensor, Tensor)")
    LIBRARY.define(
        f"{name}_backward(Tensor? do, Tensor? dlse, {inputs}, Tensor o, Tensor lse, {needs}, "
        f"bool need_prefix) -> ({'Tensor, ' * n}Tensor, Tensor)"
    )
    for suffix, real, unfilled in (("", forward, fake), ("_backward", backward, backward_fake)):
        LIBRARY.impl(name + suffix, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"minprefix::{name}{suffix}", unfilled, lib=LIBRARY)
    op = getattr(torch.ops.minprefix, name).default
    backward_op = getattr(torch.ops.minprefix, name + "_backward").default

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:-2], *output)
        ctx.causal, ctx.scale = inputs[-2:]
        ctx.set_materialize_grads(False)

    def grads(ctx, do, dlse, backward=backward_op) -> tuple[Tensor | None, ...]:
        *inputs, o, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        flags = need[:1] if n == 1 else (need[0], need[1] or need[2])
        results = backward(
            do, dlse, *inputs, ctx.causal, ctx.scale, o, lse, *flags, need[n] or need[n + 1]
        )
        return (*(x if y else None for x, y in zip(results, need, strict=False)), *[None] * 6)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, do, dlse):
            return grads(ctx, do, dlse, backward)

    torch.library.register_autograd(f"minprefix::{name}", grads, setup_context=save, lib=LIBRARY)

    def call(*inputs):
        # whoever watches or replaces operators (a tracer, a mode, a tensor subclass) must see one
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        plain = all(type(x) in (Tensor, Parameter) for x in inputs if isinstance(x, Tensor))
        return (Eager.apply if plain and not watched else op)(*inputs)

    return call


LIBRARY = torch.library.Library("minprefix", "DEF")
attention = operator(
    "attention", "Tensor q, Tensor k, Tensor v", forward, lambda q, *_: empty_results(q),
    attention_backward, attention_backward_fake, "bool need_dq, bool need_dkdv",
)  # fmt: skip
attention_qkv = operator(
    "attention_qkv", "Tensor qkv", lambda qkv, *rest: forward(*heads(qkv), *rest),
    lambda qkv, *_: empty_results(heads(qkv)[0]), qkv_backward, qkv_backward_fake, "bool need_dqkv",
)  # fmt: skip
