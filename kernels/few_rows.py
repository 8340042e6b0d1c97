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
computes BLOCK_N outputs from all K inputs. It reads K pieces of BLOCK_N contiguous weights, each at
least 16 x 2 bytes = one sector of memory, so everything that is fetched is used. In a W stored as
(out, in) the pieces would be longer, but the bytes the same.

**Parallelism.** Reading is fast when many multiprocessors read at once. `tile_of` takes the widest
BLOCK_N with programs for at least half of them, or else 16. For C = 1024 on an H100 the four
kernels have 96, 64, 128 and 64 programs. Within a program of 256 threads K is split between the
eight warps: they compute SLICES = 8 partial products as one batch, of which Triton gives each warp
one. A single product would be a chain of K / 16 matrix instructions, each waiting for the one
before; with eight the chain is an eighth as long. The partial sums are added at the end in a fixed
order. There are no atomics and no second launch, and results repeat bit for bit.

**Norm.** A program needs mean and variance of whole positions, so each program computes them all
(`statistics`): first the mean, then the mean square of the differences to it. norm(x) itself is
computed tile by tile inside the product.

**Overlap** (`PDL`, programmatic dependent launch, Hopper and later). Weights do not depend on the
previous kernel. So a program first requests its part of W for the L2 cache (`request`), then waits
for the previous kernel to end, and then allows the next kernel to start, which does the same. All
programs of all kernels launched this way must wait before they read anything else or write: then a
kernel that has waited knows that all kernels before it have ended. The decode kernel waits too, so
that the weights of the output projection are on their way while attention runs.

With e the bytes of an element and G = ceil(N / BLOCK_N) programs:

    launches      4 in a block, beside attention, instead of 9
    memory        e (K N + N + n K + n N); with a residual also e n N, with a norm 2 e K
    L2 cache      e G n K for the product, and again for the norm (its second pass reads from L1)
    FLOPs         2 n K N needed; 2 BLOCK_M K N done, as n is padded to BLOCK_M = 16 or 32

The third line grows with n: at n = 32 and BLOCK_N = 16 the programs read twice as many bytes of x
as of W. The count of `benchmarks/kernels/launches.py` takes 2 us for a launch and reads x at the
speed of memory, although the L2 cache is faster. By that count (`benchmarks/launches.csv`) a token
of GPT-2 medium gains most at n = 1, less at n = 20, and nothing any more at n = 32. Hence
`kernels.FEW_ROWS` = 32; more positions take PyTorch's products. No GPU has run or timed this yet.

Sources: splitting K: Osama et al. 2023, https://arxiv.org/abs/2301.03598. Programmatic dependent
launch: https://docs.nvidia.com/cuda/cuda-c-programming-guide/, section of that name.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import assembled
from kernels.launch import MULTIPROCESSORS, SHARED_MEMORY, Tile, cdiv, launch, target_of
from kernels.tiles import await_previous

SLICES = 8  # of K, one for each warp
STAGE = 16 * 1024  # bytes of W in a stage of the pipeline over K


@triton.jit
def request(w_ptr, width, stride_w, LINES: tl.constexpr):
    """Request the program's columns of W (width, BLOCK_N) for the L2 cache."""
    for k0 in range(0, width, LINES):
        k = tl.minimum(k0 + tl.arange(0, LINES), width - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [(w_ptr + k * stride_w).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def statistics(x_ptr, n, width, stride_x, eps, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """mean and 1 / sqrt(var + eps) of each position: [BLOCK_M, 1] each."""
    m = tl.arange(0, BLOCK_M)[:, None]
    x_ptr += m * stride_x
    total = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    for k0 in range(0, width, CHUNK):
        k = k0 + tl.arange(0, CHUNK)[None, :]
        total += tl.load(x_ptr + k, mask=(m < n) & (k < width), other=0.0).to(tl.float32)
    mean = tl.sum(total, 1, keep_dims=True) / width
    total = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    for k0 in range(0, width, CHUNK):
        k = k0 + tl.arange(0, CHUNK)[None, :]
        d = tl.load(x_ptr + k, mask=(m < n) & (k < width), other=0.0).to(tl.float32) - mean
        total += tl.where(k < width, d * d, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(total, 1, keep_dims=True) / width + eps)


@assembled
@triton.jit(do_not_specialize=["n"])
def _few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, y_ptr,
    n, width, outputs, stride_x, stride_w, stride_r, eps,
    GELU: tl.constexpr, PDL: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs y of all n positions; width is K, outputs N."""
    first = tl.program_id(0) * BLOCK_N
    if PDL:
        request(w_ptr + first, width, stride_w, 1024)
    await_previous(PDL)
    if gain_ptr is not None:
        mean, rstd = statistics(x_ptr, n, width, stride_x, eps, BLOCK_M, CHUNK)

    m, j = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    there, wanted = m < n, j < outputs
    slices = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros([SLICES, BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, width, SLICES * BLOCK_K):
        k = k0 + slices  # [SLICES, BLOCK_K]
        inside = k < width
        w = tl.load(
            w_ptr + k.to(tl.int64)[:, :, None] * stride_w + j[None, None, :],
            mask=inside[:, :, None] & wanted[None, None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + (m * stride_x)[None, :, None] + k[:, None, :],
            mask=there[None, :, None] & inside[:, None, :], other=0.0,
        )  # fmt: skip
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + k, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + k, mask=inside, other=0.0).to(tl.float32)
            xhat = (x.to(tl.float32) - mean[None]) * rstd[None]
            x = (xhat * gain[:, None, :] + shift[:, None, :]).to(x_ptr.dtype.element_ty)
        # A_s <- A_s + norm(x)_s W_s                                  [SLICES, BLOCK_M, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = tl.sum(acc, 0)  # [BLOCK_M, BLOCK_N]
    y += tl.load(bias_ptr + j, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # y (1 + tanh u) / 2 = y / (1 + exp(-2 u)),  u = sqrt(2 / pi) (y + 0.044715 y^3)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    mask = there[:, None] & wanted[None, :]
    if residual_ptr is not None:
        at = residual_ptr + (m * stride_r)[:, None] + j[None, :]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (m * outputs)[:, None] + j[None, :], y, mask=mask)


def tile_of(x: Tensor, outputs: int) -> tuple[Tile, int]:
    """The tile for x (n, K) and N outputs, and BLOCK_K."""
    target, block_m = target_of(x.device), 16 if len(x) <= 16 else 32
    wide = [b for b in (64, 32) if 2 * cdiv(outputs, b) >= MULTIPROCESSORS[target]]
    block_n = max([16, *wide])
    block_k = max(16, STAGE // (SLICES * block_n * x.element_size()))
    # half of the shared memory: programs of the next kernel wait beside those of this one
    stage = SLICES * block_k * (block_m + block_n) * x.element_size()
    stages = max(2, min(4, SHARED_MEMORY.get(target, 0) // 2 // stage))
    return Tile(block_m, block_n, SLICES, stages), block_k


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `kernels.fused_linear`, here of x (n, K) and residual (n, N)."""
    (n, width), outputs = x.shape, weight.shape[1]
    gain, shift, eps = norm or (None, None, 0.0)
    y = x.new_empty(n, outputs)
    tile, block_k = tile_of(x, outputs)
    launch(
        _few_rows_kernel, cdiv(outputs, tile.block_n), tile, x_ptr=x, w_ptr=weight, bias_ptr=bias,
        gain_ptr=gain, shift_ptr=shift, residual_ptr=residual, y_ptr=y,
        n=n, width=width, outputs=outputs, stride_x=x.stride(0), stride_w=weight.stride(0),
        stride_r=None if residual is None else residual.stride(0), eps=eps, GELU=gelu,
        SLICES=SLICES, CHUNK=8192 // tile.block_m, BLOCK_K=block_k,
    )  # fmt: skip
    return y
