"""Residual add and layer norm in one Triton kernel, and their gradients in another.

Forward, for C numbers of the residual stream x and the output y of a layer:

    s = x + y                                  the stream after the layer
    n = xhat * gain + shift,   xhat = (s - mean) * rstd,   rstd = 1 / sqrt(var + eps)

where mean and var are those of the C numbers. s is rounded to its dtype before it is normalised, as
with two separate kernels. All arithmetic is in fp32.

Backward. Since d xhat_j / d s_i = rstd ([i = j] - 1/C - xhat_i xhat_j / C), the gradient through n
is rstd (g - mean(g) - xhat mean(g xhat)) with g = dn * gain. The stream also continues past the
norm, so its gradient ds is added. As s = x + y, the sum is the gradient of x and of y:

    dx = dy = ds + rstd (g - mean(g) - xhat mean(g xhat))

One tensor serves for both. mean and rstd are recomputed from s, which costs nothing because a
program holds all C numbers, so only s is saved. Gain and shift are frozen and get no gradient.

    bytes   for N positions, forward: read x, y, write s, n: 4 N C e (without y: 2); backward: read
            s, dn, ds, write dx: 4 N C e. PyTorch, with separate kernels for sums, moves 5 and 6.

There is one program per position and there are no atomics, so results repeat bit for bit.

In a decoding step y may be what `some_rows.py` leaves, S partial sums in fp32 without their bias
(`bias_ptr`). They are added here, and the kernel overlaps with its neighbours as described in
`few_rows.py`. For y, 4 S N C bytes are then read instead of N C e.

`torch.compile` fuses the plain form itself and never sees these kernels, so they need not be
registered operators.

Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450; Triton's tutorial 05 has the same backward
pass without the residual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.assembler import assembled
from kernels.launch import Tile, bucket, launch


@triton.jit
def normalised(s, mask, width, eps):
    """xhat [BLOCK_N] of one position, zeros past its end, and rstd."""
    d = tl.where(mask, s - tl.sum(s, 0) / width, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 0) / width + eps)
    return d * rstd, rstd


@assembled
@triton.jit
def _add_norm_kernel(
    x_ptr, y_ptr, bias_ptr, gain_ptr, shift_ptr, s_ptr, n_ptr, width, stride_part, eps,
    PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s and n of one position. y is the sum of PARTS parts and a bias; without y, s is x and is not
    written."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK_N)
    mask = columns < width
    gain = tl.load(gain_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    s = tl.load(x_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        for part in tl.static_range(PARTS):
            part_ptr = y_ptr + part * stride_part + start
            y += tl.load(part_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        s += y
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + start + columns, rounded, mask=mask)
        s = rounded.to(tl.float32)
    xhat, _ = normalised(s, mask, width, eps)
    n = xhat * gain + shift
    tl.store(n_ptr + start + columns, n.to(n_ptr.dtype.element_ty), mask=mask)


@assembled
@triton.jit
def _norm_grad_kernel(s_ptr, gain_ptr, ds_ptr, dn_ptr, dx_ptr, width, eps, BLOCK_N: tl.constexpr):
    """dx of one position; a missing ds means zero."""
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK_N)
    mask = columns < width
    # all loads come first, because the sums below wait for all C numbers
    s = tl.load(s_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dn_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(gain_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    ds = tl.zeros([BLOCK_N], tl.float32)
    if ds_ptr is not None:
        ds = tl.load(ds_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    xhat, rstd = normalised(s, mask, width, eps)
    dx = ds + rstd * (g - tl.sum(g, 0) / width - xhat * (tl.sum(g * xhat, 0) / width))
    tl.store(dx_ptr + start + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def tile_of(width: int) -> Tile:
    """One position, with 8 numbers per thread: a load of 16 bytes in bf16."""
    columns = bucket(width)
    return Tile(1, columns, min(16, max(1, columns // 256)), 1)


def forward(
    x: Tensor, y: Tensor | None, gain: Tensor, shift: Tensor, eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s and n of contiguous x and y (..., C); s is x itself if y is None. With a bias (C,), y is
    (S, ..., C) in fp32."""
    s, n = x if y is None else torch.empty_like(x), torch.empty_like(x)
    parts = 1 if y is None or bias is None else len(y)
    launch(
        _add_norm_kernel, x[..., 0].numel(), tile_of(x.shape[-1]), x_ptr=x, y_ptr=y, bias_ptr=bias,
        gain_ptr=gain, shift_ptr=shift, s_ptr=s, n_ptr=n, width=x.shape[-1],
        stride_part=x.numel(), eps=eps, PARTS=parts, PDL=bias is not None,
    )  # fmt: skip
    return s, n


def backward(s: Tensor, gain: Tensor, ds: Tensor | None, dn: Tensor, eps: float) -> Tensor:
    """The gradient of x, which is also that of y."""
    dx = torch.empty_like(s)
    launch(
        _norm_grad_kernel, s[..., 0].numel(), tile_of(s.shape[-1]), s_ptr=s, gain_ptr=gain,
        ds_ptr=None if ds is None else ds.contiguous(), dn_ptr=dn.contiguous(), dx_ptr=dx,
        width=s.shape[-1], eps=eps,
    )  # fmt: skip
    return dx


class AddNorm(torch.autograd.Function):
    """x, y (..., C) or None, gain, shift (C,), eps -> s, n (..., C)."""

    @staticmethod
    def forward(ctx, x, y, gain, shift, eps):
        x, y = x.contiguous(), None if y is None else y.contiguous()
        s, n = forward(x, y, gain, shift, eps)
        s = x.view_as(x) if y is None else s
        ctx.save_for_backward(s, gain)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return s, n

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dn):
        s, gain = ctx.saved_tensors
        dx = ds if dn is None else backward(s, gain, ds, dn, ctx.eps)
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dx if needs[1] else None, None, None, None
