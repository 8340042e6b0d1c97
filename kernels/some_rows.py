"""The products of a decoding step with 5 to 32 positions, on tensor cores.

    y = act(x W + b)         x (n, K), W (K, N), b (N,), y (n, N)
    y_s = x_s W_s            the same without b and act, as S partial sums (S, n, N) in fp32

`few_rows.py` computes up to four positions one after another, with norm and residual included. With
more positions each program would normalise them all again, so here the norm keeps its own kernel,
`add_norm`, which runs once between two products and also adds what the product before it has left:

    1  q, k, v = n W + b              4  x, n = add_norm(x, sum_s y_s + b)
    2  attention                      5  h = gelu(n W + b)
    3  y_s = o_s W_s                  6  y_s = h_s W_s
                                      7  x, n = add_norm(x, sum_s y_s + b)     of the next block

**Programs.** One program computes BLOCK_N outputs of all positions from BLOCK_K inputs: from all K
in 1 and 5, from a quarter of them or a little more in 3 and 6 (`PARTS`), where N = C alone gives
too few programs. For C = 1024 the four products have 96, 128, 128 and 128 programs, at most one for
each multiprocessor. Every program reads its inputs of all positions from the L2 cache, so fewer and
wider programs read less there; W is read from memory once. There are no atomics, and the partial
sums are added in a fixed order, so results repeat bit for bit.

**In a program** each warp multiplies its own slice of the BLOCK_K inputs, as one batch of SLICES
products, and the slices are then added. A single product would be a chain of BLOCK_K / 16 matrix
instructions, each waiting for the one before. W passes through registers into shared memory before
the program waits for the previous kernel (`PDL` in `few_rows.py`). After the wait only x is loaded,
all of it at once. Programs of two kernels are on a multiprocessor at the same time only if both fit
into its shared memory. With C = 1024, those of the MLP's two products do so for up to 16 positions.
With more, those of the second start only where those of the first have ended.

With e the bytes of an element, G = ceil(N / BLOCK_N) and n padded to BLOCK_M = 16 or 32:

    launches        7 in a block with attention and norms, instead of 8 (GELU is included)
    memory          e (K N + N + n K + n N); as partial sums e K N + e n K + 4 S n N
    L2 cache        e G n K
    shared memory   e BLOCK_K (BLOCK_M + BLOCK_N) in a program, at most 192 KiB
    FLOPs           2 n K N needed, 2 BLOCK_M K N done

The kernel needs Hopper's shared memory and 16-bit numbers; in all other cases PyTorch computes the
products. No GPU has run this kernel yet. `benchmarks/gpu.sh train` times it beside PyTorch's
products and `few_rows.py` for n = 1 to 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import MOST_INPUTS
from kernels.assembler import assembled
from kernels.launch import Tile, bucket, cdiv, launch
from kernels.tiles import gelu

TARGETS = ("sm_90", "sm_100", "interpreter")  # with enough shared memory
PARTS = 4  # partial sums of a product with few outputs, at most, while K <= PARTS * MOST_INPUTS


@assembled
@triton.jit(do_not_specialize=["n"])
def _some_rows_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, n, width, outputs, stride_x, stride_w,
    GELU: tl.constexpr, PDL: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all n positions from BLOCK_K inputs; width is K, outputs N."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    groups = tl.cdiv(outputs, BLOCK_N)
    part, first = tl.program_id(0) // groups, tl.program_id(0) % groups * BLOCK_N
    m, j = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    IN_SLICE: tl.constexpr = BLOCK_K // SLICES
    k = tl.arange(0, SLICES)[:, None] * IN_SLICE + tl.arange(0, IN_SLICE)[None, :]
    k += part * BLOCK_K  # [SLICES, IN_SLICE]
    inside, there, wanted = k < width, m < n, j < outputs
    w = tl.load(
        w_ptr + k.to(tl.int64)[:, :, None] * stride_w + j[None, None, :],
        mask=inside[:, :, None] & wanted[None, None, :], other=0.0,
    )  # [SLICES, IN_SLICE, BLOCK_N]  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + j, mask=wanted, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x = tl.load(
        x_ptr + (m * stride_x)[None, :, None] + k[:, None, :],
        mask=there[None, :, None] & inside[:, None, :], other=0.0,
    )  # [SLICES, BLOCK_M, IN_SLICE]  # fmt: skip
    # A_s = x_s W_s; x W is the sum over s
    y = tl.sum(tl.dot(x, w), 0)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        y += bias[None, :]
    if GELU:
        y = gelu(y)
    row = (part * n + m) * outputs
    mask = there[:, None] & wanted[None, :]
    tl.store(y_ptr + row[:, None] + j[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def tile_of(n: int, inputs: int) -> tuple[Tile, int]:
    """The tile of a product of n positions, and BLOCK_K, if a program reads this many inputs."""
    block_k = max(64, bucket(inputs))
    wide = block_k <= 1024
    return Tile(16 if n <= 16 else 32, 32 if wide else 16, 4 if wide else 8, 1), block_k


def run(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, y: Tensor, inputs: int) -> None:
    (n, width), outputs = x.shape, weight.shape[1]
    tile, block_k = tile_of(n, inputs)
    launch(
        _some_rows_kernel, cdiv(width, block_k) * cdiv(outputs, tile.block_n), tile, x_ptr=x,
        w_ptr=weight, bias_ptr=bias, y_ptr=y, n=n, width=width, outputs=outputs,
        stride_x=x.stride(0), stride_w=weight.stride(0), GELU=gelu, SLICES=tile.num_warps,
        BLOCK_K=block_k,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """y (n, N) of x (n, K) and W (K, N): `kernels.fused_linear` without norm and residual."""
    y = x.new_empty(len(x), weight.shape[1])
    run(x, weight, bias, gelu, y, x.shape[1])
    return y


def partial_sums(x: Tensor, weight: Tensor) -> Tensor:
    """y_s (S, n, N) of x (n, K) and W (K, N), see `kernels.linear_parts`."""
    (n, width), outputs = x.shape, weight.shape[1]
    inputs = min(cdiv(width, PARTS), MOST_INPUTS)
    parts = cdiv(width, tile_of(n, inputs)[1])
    y = x.new_empty(parts, n, outputs, dtype=torch.float32)
    run(x, weight, None, False, y, inputs)
    return y
