"""Attention over [prefix; sequence] in Triton: the forward kernel and the registered operator.

Forward. With x_ij = scale <q_i, k_j> over the columns j that query i sees, prefix and sequence,

    lse_i = log sum_j exp(x_ij),    o_i = sum_j exp(x_ij - lse_i) v_j                          [1]

The columns need not be in one tensor. The sum is computed tile by tile with the running maximum m_i
of the scores so far, and sums under an older maximum are multiplied by exp(m_old - m_new) [2]. A
tile may contain keys of the sequence or of the prefix. Therefore nothing is concatenated, no prefix
is copied per row, and there is no mask in memory. Exponentials are computed as powers of two,
2^(x log2(e)), with scale log2(e) as one factor.

One program computes one tile of queries of one row b and head h. It reads the prefix first, whose
first tile (up to 64 columns) it requests together with q, and then the sequence. (The reverse order
would hide that latency, but ptxas then makes Hopper's matrix products wait for one another.) Tiles
that no query sees are skipped, and tiles that all queries see are not masked. Only lse is saved for
the backward pass (backward.py).

    bytes   read q, k, v, write o: 4 B H T D e (e = bytes of an element; k, v again for each further
            tile of queries if L2 does not hold them), lse: 4 B H T, prefix: 2 N H P D e
    FLOPs   4 D B H (visible pairs): T (T + 1) / 2 + P T if causal and T = S, else T (S + P)

The operator. `minprefix::attention`, its backward, and `minprefix::attention_append`, which writes
into the given keys and values, are registered with torch.library, each with a fake, for
torch.compile and torch.export. In eager mode an autograd.Function around the first two is used
instead, because it costs less per call (`python -m benchmarks.kernels.overhead`). Both accept qkv
instead of q, with neither k nor v, and then return one dqkv instead of dq, dk and dv. There is no
second derivative, and torch.func's transforms are not supported.

[1] Li & Liang 2021, https://arxiv.org/abs/2101.00190, eq. (3)
[2] Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao 2023, arXiv:2307.08691, alg. 1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from kernels import decode
from kernels.assembler import assembled
from kernels.inputs import Append, Inputs, heads
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
)
from kernels.plan import Gradients, backward
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
    """Add one tile of keys, from column n0 on, of which query i sees the columns below limit_i."""
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
    """o and lse for one tile of queries of one row and head."""
    tiles_m = tl.cdiv(seq_len, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (tiles_m - 1 - pid % tiles_m) * BLOCK_M  # if causal, the last tile takes longest
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
    lse = (m + tl.log2(z)) * LN2  # -inf if no column is visible
    offs_m = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (b * n_head + h) * seq_len + offs_m, lse, mask=offs_m < seq_len)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """o, lse of `kernels.prefix_attention`, from the arguments of `Inputs`, which were checked."""
    inputs = Inputs(*arguments).split()
    if decode.wanted(inputs.q):
        return decode.decode(inputs)
    q, k = inputs.q, inputs.k
    (B, H, T, D), P = q.shape, inputs.prefix_k.shape[-2]
    o, lse = empty_results(q)
    scale = D**-0.5 if inputs.scale is None else inputs.scale
    # the kernel's running maximum needs a positive scale, so its sign (or zero) is applied to q
    a = kernel_arguments(inputs)
    a |= {"Q_SIGN": (scale > 0) - (scale < 0), "scale2": (abs(scale) or 1.0) * LOG2E.value}

    def run(tile: Tile) -> None:
        programs = B * H * cdiv(T, tile.block_m)
        launch(_fwd_kernel, programs, tile, **a, o_ptr=o, lse_ptr=lse, CAUSAL=inputs.causal,
               **prefix_blocks(P, q))  # fmt: skip

    key = bucket(T), bucket(k.shape[2]), bucket(P)
    run_best(by_length("fwd", T), q, key, run)
    return o, lse


def empty_forward(*arguments) -> tuple[Tensor, Tensor]:
    """The results of `forward`, uninitialised."""
    return empty_results(Inputs(*arguments).split().q)


def forward_append(*arguments) -> tuple[Tensor, Tensor]:
    """o, lse from the arguments of `Inputs` and `Append`; writes into k and v."""
    return decode.decode(Inputs(*arguments[:11]), Append(*arguments[11:]))


def attention_backward(
    do, dlse, o, lse, need_q: bool, need_kv: bool, need_prefix: bool, *arguments
) -> tuple[Tensor, ...]:
    """The gradients of q (or qkv), k, v, prefix_k, prefix_v from those of o and lse (None: zero).

    The arguments after the flags are those of `Inputs`. An empty tensor stands for a gradient that
    is not needed.
    """
    dq, dk, dv, *dprefix = empty_backward(
        do, dlse, o, lse, need_q, need_kv, need_prefix, *arguments
    )
    inputs, none = Inputs(*arguments), (None, None)
    if inputs.k is None:
        parts = heads(dq) if need_q else (None, *none)
    else:
        parts = (dq if need_q else None, *((dk, dv) if need_kv else none))
    to = Gradients(*parts, *(dprefix if need_prefix else none))
    backward(inputs.split(), o, lse, do, dlse, to)
    return dq, dk, dv, *dprefix


def empty_backward(
    do, dlse, o, lse, need_q: bool, need_kv: bool, need_prefix: bool, *arguments
) -> tuple[Tensor, ...]:
    """The results of `attention_backward`, uninitialised."""
    inputs, nothing = Inputs(*arguments), o.new_empty(0)
    if inputs.k is None:
        dqkv = (inputs.q.new_empty(inputs.q.shape if need_q else 0), nothing, o.new_empty(0))
    else:
        needs = zip(inputs[:3], (need_q, need_kv, need_kv), strict=True)
        dqkv = tuple(empty_results(x)[0] if need else x.new_empty(0) for x, need in needs)
    prefix = inputs.prefix_k, inputs.prefix_v
    return (*dqkv, *(x.new_empty(x.shape if need_prefix else 0) for x in prefix))


INPUTS = (  # the arguments of `Inputs`
    "Tensor q, Tensor? k, Tensor? v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index, "
    "Tensor? prefix_lens, Tensor? kv_lens, Tensor? q_offset, bool causal, float? scale"
)
LIBRARY = torch.library.Library("minprefix", "DEF")
LIBRARY.define(f"attention({INPUTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"attention_append({INPUTS.replace('Tensor? k, Tensor? v', 'Tensor(a!) k, Tensor(b!) v')}, "
    "Tensor new_k, Tensor new_v, Tensor? seen) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor? do, Tensor? dlse, Tensor o, Tensor lse, bool need_q, "
    f"bool need_kv, bool need_prefix, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attention", forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_append", forward_append, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("minprefix::attention", empty_forward, lib=LIBRARY)
torch.library.register_fake(
    "minprefix::attention_append", lambda *x: empty_forward(*x[:11]), lib=LIBRARY
)
torch.library.register_fake("minprefix::attention_backward", empty_backward, lib=LIBRARY)


def save(ctx, inputs, output) -> None:
    """Save the inputs of the backward pass: all inputs, o and lse."""
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.rule = inputs[9:]  # causal, scale
    ctx.set_materialize_grads(False)


def gradients(ctx, do, dlse, backward=torch.ops.minprefix.attention_backward.default):
    """The gradient of each argument; None if it is not needed or does not exist."""
    *inputs, o, lse = ctx.saved_tensors
    need = ctx.needs_input_grad
    flags = need[0], need[1] or need[2], need[3] or need[4]
    found = backward(do, dlse, o, lse, *flags, *inputs, *ctx.rule)
    return (*(x if y else None for x, y in zip(found, need, strict=False)), *[None] * 6)


torch.library.register_autograd("minprefix::attention", gradients, setup_context=save, lib=LIBRARY)


class EagerAttention(torch.autograd.Function):
    """The same two functions without the dispatcher, which costs more per call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        return gradients(ctx, do, dlse, attention_backward)


def is_observed(inputs: tuple) -> bool:
    """Whether something observes or replaces operators: a tracer, a mode, a tensor subclass."""
    plain = all(type(x) in (Tensor, Parameter) for x in inputs if isinstance(x, Tensor))
    return not plain or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def attention(*inputs) -> tuple[Tensor, Tensor]:
    """o, lse from the arguments of `Inputs`, differentiable."""
    run = torch.ops.minprefix.attention.default if is_observed(inputs) else EagerAttention.apply
    return run(*inputs)


def attention_append(*inputs) -> tuple[Tensor, Tensor]:
    """o, lse from the arguments of `Inputs` and `Append`, without gradients."""
    run = torch.ops.minprefix.attention_append.default if is_observed(inputs) else forward_append
    return run(*inputs)
