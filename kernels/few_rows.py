"""The products of a step of decoding, with what stands before and after them, as one kernel each.

A step has n positions, one for each row or beam, and n is small. A product then reads each weight
once and uses it n times, so its time is that of reading W, as long as little stands in between. In
PyTorch a block of GPT-2 is ten kernels: two norms, four products, GELU, two sums, and attention.
Here it is five, of which four are

    y = residual + act(norm(x) W + b)        x (n, K), W (K, N), b (N,), residual and y (n, N)

namely norm and the projection to q, k and v; after attention (`decode.py`), which also writes the
cache, the output projection and the first sum; norm, the wider product and GELU; the narrower
product and the second sum. norm and act = GELU (tanh form) may be left out, and so may the
residual. Sums are fp32, and y is rounded once; norm(x) is rounded to its dtype, as PyTorch does.

**Layout.** W stays as GPT-2's checkpoints have it, (in, out), and there is no second copy. A
program takes BLOCK_N outputs and all K inputs. It reads K pieces of BLOCK_N contiguous weights, at
least 16 x 2 bytes = one sector of memory: all that is fetched is used. A W of (out, in) would have
longer pieces, and not one byte less.

**Parallelism.** The bytes in flight bound the speed of reading, so as many multiprocessors as
possible should read. `tile_of` takes the widest BLOCK_N that gives programs to half of them, else
16: for C = 1024 on an H100 these are 96, 64, 128 and 64 programs, in the order of the kernels. A
program of 256 threads splits K between its eight warps: they make SLICES = 8 products of BLOCK_K
inputs each, a batch in which Triton gives each warp one. A single product of 16 x BLOCK_N outputs
would be one chain of K / 16 matrix instructions, each waiting for the last; at K = 4096 that takes
longer than to read W. The partial sums meet at the end in a fixed order, without atomics or a
second launch: results repeat bit for bit.

**The norm.** Each program needs mean and variance of whole positions, so each computes them, from
the mean first and then from differences to it. norm(x) itself is made tile by tile in the product.

**Overlap** (`PDL`, Hopper and later). Weights do not depend on the kernel before. So a program
first asks for its part of W to be brought to the L2 cache (`request`), and only then waits for the
kernel before to end; by then it lets the kernel after it start, which does the same. Every kernel
that is launched so must wait, in all its programs, before it reads or writes anything else: then
all kernels before it have ended too. Attention takes part (`await_previous` in `tiles.py`), so the
output projection is on its way while attention runs.

With e the bytes of an element and G = ceil(N / BLOCK_N) programs:

    launches      4 in a block, beside attention, instead of 9
    memory        e (K N + N + n K + n N), with a residual e n N more, with a norm 2 e K more
    L2 cache      e G n K for the product, as much again for the norm (its second pass is in L1)
    FLOPs         2 n K N; done: 2 BLOCK_M K N, with n padded to BLOCK_M = 16 or 32

What grows with n is the second line: at n = 32 and BLOCK_N = 16 x is twice as many bytes as W. Five
launches less in a block, of 2 us each, still make up for this, by the count of
`benchmarks/kernels/launches.py`, which takes the L2 cache to be no faster than memory. Hence
`kernels.FEW_ROWS` = 32, and more positions take PyTorch's products. No GPU has measured this yet.

Sources: split K, Osama et al. 2023, https://arxiv.org/abs/2301.03598; programmatic dependent
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
    """Ask for the program's columns of W (width, BLOCK_N) to be brought to the L2 cache."""
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
    # half of the memory: the next kernel's programs wait beside those of this one
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
