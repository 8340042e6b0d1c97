"""The head's cross entropy in Triton: each row of logits is replaced by its gradient.

For a position with logits s_v over a vocabulary of V, b_v an optional bias and y its label,

    loss = log sum_v exp(s_v + b_v) - (s_y + b_y)
    d loss / d s_v = exp(s_v + b_v) / sum_w exp(s_w + b_w) - [v = y].

The gradient replaces the logits, so nothing else is in memory. One program processes a row. Its
first pass finds the largest score m and z = sum_v exp(s_v + b_v - m), tile by tile (the running
softmax of attention.py, with numbers instead of vectors). Its second pass overwrites the logits by
exp(s_v + b_v - m) / z - [v = y]. A row of GPT-2's vocabulary in bf16 is 100 KB, so the second pass
finds it in the L2 cache. All arithmetic is in fp32 on scores minus m: subtracting before
multiplying by log2(e) keeps a small loss accurate even if scores are as large as 1e4.

Rows may have columns past V, which make the matrix products before and after this kernel faster,
because cuBLAS has no good kernel for an odd V. They are not part of the sums, and their gradient is
0.

    bytes   read the logits (again from L2), write the gradient: 2 n V e (e = bytes of an element)

It is called between the two products of `minprefix/models/losses.py`, which has the autograd
function. torch.compile never traces a call, so it need not be a registered operator. The definition
is `reference.cross_entropy_plain_`. Each element is written once, without atomics, so results
repeat bit for bit.

Source: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867 (the sum in one pass); Liger
Kernel, https://arxiv.org/abs/2410.10989 (the gradient in the place of the logits).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import assembled
from kernels.launch import Tile, launch
from kernels.tiles import LN2, LOG2E

TILE = Tile(1, 4096, 8, 1)  # 4096 columns in a step of both loops, 16 for each thread


@triton.jit
def load_scores(logits_ptr, bias_ptr, offs, vocab_size, columns):
    """Scores with their bias in fp32: [BLOCK_N], -inf past the vocabulary.

    The mask of the loads is the number of columns, a multiple of 16, not the vocabulary: a mask
    that may change within 16 bytes would split the loads into single numbers.
    """
    s = tl.load(logits_ptr + offs, mask=offs < columns, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + offs, mask=offs < columns, other=0.0).to(tl.float32)
    return tl.where(offs < vocab_size, s, float("-inf"))


@assembled
@triton.jit
def _cross_entropy_kernel(
    logits_ptr, bias_ptr, labels_ptr, losses_ptr, stride_n, vocab_size, columns,
    GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loss of one row; its gradient replaces the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    y = tl.load(labels_ptr + row)
    s_y = load_scores(logits_ptr, bias_ptr, y, vocab_size, columns)
    m = float("-inf")
    z = tl.zeros([BLOCK_N], tl.float32)
    for v0 in range(0, vocab_size, BLOCK_N):
        offs = v0 + tl.arange(0, BLOCK_N)
        s = load_scores(logits_ptr, bias_ptr, offs, vocab_size, columns)
        # m <- max(m, max_v s_v); what was summed under the old maximum shrinks
        m_new = tl.maximum(m, tl.max(s, 0))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # only -inf so far
        z = z * tl.exp2((m - m_finite) * LOG2E) + tl.exp2((s - m_finite) * LOG2E)
        m = m_new
    total = tl.sum(z, 0)
    tl.store(losses_ptr + row, tl.log2(total) * LN2 + (m - s_y))
    if GRADIENT:
        for v0 in range(0, columns, BLOCK_N):
            offs = v0 + tl.arange(0, BLOCK_N)
            s = load_scores(logits_ptr, bias_ptr, offs, vocab_size, columns)
            p = tl.exp2((s - m) * LOG2E) / total
            p = tl.where(offs == y, p - 1.0, p)
            tl.store(logits_ptr + offs, p.to(logits_ptr.dtype.element_ty), mask=offs < columns)


def cross_entropy_(
    logits: Tensor, labels: Tensor, bias: Tensor | None, vocab_size: int, gradient: bool,
    tile: Tile = TILE,
) -> Tensor:  # fmt: skip
    """The losses of `kernels.cross_entropy_`, from checked arguments."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    launch(
        _cross_entropy_kernel, len(logits), tile, logits_ptr=logits, bias_ptr=bias,
        labels_ptr=labels, losses_ptr=losses, stride_n=logits.stride(0), vocab_size=vocab_size,
        columns=logits.shape[1], GRADIENT=gradient,
    )  # fmt: skip
    return losses
