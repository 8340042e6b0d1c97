"""The products of a decoding step, each one kernel with the operations around it.

A step has n positions, one for each row or beam. While n is small, a product reads each weight once
and does little with it, so its time is the time to read W, plus what a launch costs. PyTorch runs a
block of GPT-2 as ten kernels: two norms, four products, GELU, two sums, and attention. Here it is
five: attention (`decode.py`, which also writes the cache), and four times

    y = residual + act(norm(x) W + b)        x (n, K), W (K, N), b (N,), residual and y (n, N)

namely norm and the projection to q, k and v; the output projection and the first sum; norm, the
first product of the MLP and GELU; its second product and the second sum. norm, act (the tanh form
of GELU) and the residual are optional. Sums are fp32. norm(x) is rounded to its dtype, as PyTorch
does, and so is y.

**Layout.** W stays as GPT-2's checkpoints store it, (in, out); there is no second copy. A program
computes BLOCK_N outputs from all K inputs, so it reads K pieces of BLOCK_N contiguous weights. With
16 or 32 columns of bf16 a piece is one or two sectors of memory, so everything that is fetched is
used. With 8 columns, two programs share a sector, and the second finds it in the L2 cache.

**Weights wait in registers.** A thread holds up to 128 of them (`Form`), and the loads of all
threads of a program are under way at once. The products are plain multiplications and additions:
matrix instructions need at least 8 positions, and to bring the operands into their layout takes
longer than the sums of one position. The positions are computed one after another; each takes
another microsecond, so that PyTorch's products win from five on, and `kernels.FEW_ROWS` is 4. There
are no atomics and no second launch, and results repeat bit for bit.

If a program cannot hold all its weights (K > 4096), it holds the first BLOCK_K rows and requests
the others for the L2 cache. A norm needs all of x, so PyTorch computes norms of more than 4096.

**Overlap** (`PDL`, programmatic dependent launch, Hopper and later). Weights do not depend on the
previous kernel. So a program first allows the next kernel to start, then loads its weights, its
bias and the norm's parameters, and only then waits for the previous kernel to end. All programs of
all kernels launched this way must wait before they read anything else or write: then a kernel that
has waited knows that all kernels before it have ended. The decode kernel waits too, so that the
weights of the output projection are on their way while attention runs.

With e the bytes of an element and G = ceil(N / BLOCK_N) programs:

    launches      4 in a block, beside attention, instead of 9
    memory        e (K N + N + n K + n N); with a residual also e n N, with a norm 2 e K
    L2 cache      e G (n K), and with a norm 2 e G K
    FLOPs         2 n K N

Measured on an H200 (bf16, C = 1024, 24 layers without attention, CUDA graph; torch 2.11, Triton
3.6): 827 us with PyTorch's kernels for n = 1, 2 and 4; 383, 470 and 694 us with these (BLOCK_N = 32
and 8). With tensor cores, K split over the warps and weights that were only requested before the
wait, an earlier form took 935 us for n = 1 and 1,779 us, twice PyTorch's time, for n = 32.

Source: programmatic dependent launch: https://docs.nvidia.com/cuda/cuda-c-programming-guide/,
section of that name.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import assembled
from kernels.launch import MULTIPROCESSORS, Tile, bucket, cdiv, launch, target_of
from kernels.tiles import gelu

HELD = 128 * 2**10  # bytes of W that a program holds, at most; for several positions half of them
PIECE = 2 * 2**10  # bytes of a column of W that are held if that is too little


class Form(NamedTuple):
    """How a product is divided."""

    block_n: int  # outputs of a program
    block_k: int  # inputs whose weights it holds
    num_warps: int


@triton.jit
def request(w_ptr, start, width, stride_w, LINES: tl.constexpr):
    """Request rows start.. of the program's columns of W (width, BLOCK_N) for the L2 cache."""
    for k0 in range(start, width, LINES):
        k = tl.minimum(k0 + tl.arange(0, LINES), width - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [(w_ptr + k * stride_w).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@assembled
@triton.jit(do_not_specialize=["n"])
def _few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, y_ptr,
    n, width, outputs, stride_x, stride_w, stride_r, eps,
    GELU: tl.constexpr, PDL: tl.constexpr, ONE_ROW: tl.constexpr, ALL_HELD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs y of all n positions; width is K, outputs N."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_N
    k, j = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_N)
    inside, wanted = k < width, j < outputs
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_w + j[None, :]
    w = tl.load(w_ptrs, mask=inside[:, None] & wanted[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
    bias = tl.load(bias_ptr + j, mask=wanted, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + k, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        if not ALL_HELD:
            request(w_ptr + first, BLOCK_K, width, stride_w, 1024)
        tl.extra.cuda.gdc_wait()

    for m in range(0, 1 if ONE_ROW else n):
        x = tl.load(x_ptr + m * stride_x + k, mask=inside, other=0.0).to(tl.float32)
        if gain_ptr is not None:
            mean = tl.sum(x, 0) / width
            d = tl.where(inside, x - mean, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(d * d, 0) / width + eps)
            x = (d * rstd * gain + shift).to(x_ptr.dtype.element_ty).to(tl.float32)
        # A_kj <- sum over pieces of x_k W_kj; its sum over k is x W
        acc = x[:, None] * w.to(tl.float32)  # [BLOCK_K, BLOCK_N]
        if not ALL_HELD:
            for k0 in range(BLOCK_K, width, BLOCK_K):
                there = k0 + k < width
                more = tl.load(x_ptr + m * stride_x + k0 + k, mask=there, other=0.0)
                mask = there[:, None] & wanted[None, :]
                w_more = tl.load(w_ptrs + tl.cast(k0, tl.int64) * stride_w, mask=mask, other=0.0)
                acc += more.to(tl.float32)[:, None] * w_more.to(tl.float32)
        y = tl.sum(acc, 0) + bias  # [BLOCK_N]
        if GELU:
            y = gelu(y)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + m * stride_r + j, mask=wanted, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * outputs + j, y.to(y_ptr.dtype.element_ty), mask=wanted)


def form_of(x: Tensor, outputs: int) -> Form:
    """How the product of x (n, K) with N outputs is divided.

    With enough outputs to give half of the multiprocessors a program each, 64 bytes of a row of W;
    else 32, and with several positions 16, since more programs then share their work. Several
    positions also need the weights in fp32, which takes twice the registers.
    """
    (n, width), e = x.shape, x.element_size()
    wide, narrow, most = 64 // e, (32 if n == 1 else 16) // e, HELD if n == 1 else HELD // 2
    block_k = max(16, bucket(width))
    enough = 2 * cdiv(outputs, wide) >= MULTIPROCESSORS[target_of(x.device)]
    block_n = wide if enough and block_k * wide * e <= most else narrow
    if block_k * block_n * e > most:
        block_k = PIECE // e
    held = block_k * block_n * e
    return Form(block_n, block_k, max(8 if n == 1 else 4, min(16, held // (32 * 256))))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `kernels.fused_linear`, here of x (n, K) and residual (n, N)."""
    (n, width), outputs = x.shape, weight.shape[1]
    gain, shift, eps = norm or (None, None, 0.0)
    y = x.new_empty(n, outputs)
    form = form_of(x, outputs)
    tile = Tile(1, form.block_n, form.num_warps, 1 if form.block_k >= width else 3)
    launch(
        _few_rows_kernel, cdiv(outputs, form.block_n), tile, x_ptr=x, w_ptr=weight, bias_ptr=bias,
        gain_ptr=gain, shift_ptr=shift, residual_ptr=residual, y_ptr=y,
        n=n, width=width, outputs=outputs, stride_x=x.stride(0), stride_w=weight.stride(0),
        stride_r=None if residual is None else residual.stride(0), eps=eps, GELU=gelu,
        ONE_ROW=n == 1, ALL_HELD=form.block_k >= width, BLOCK_K=form.block_k,
    )  # fmt: skip
    return y
