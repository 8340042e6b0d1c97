"""The loss of eq. (2) without all logits in memory: head and cross entropy, in parts.

For one target position with hidden state h (C,), label y and head W (V, C), logits s = W h (in BART
W h + b),

    loss = log sum_v exp(s_v) - s_y,     d loss / d h = W^T (softmax(s) - e_y),

where e_y is 1 at y and 0 elsewhere. The gradient depends on nothing that comes later, so it is
computed together with the loss, while the logits of some positions are in memory; the backward pass
only scales it. `kernels.cross_entropy_` overwrites the logits by softmax(s) - e_y, between the two
products with W. The logits of a whole batch, (positions, V) in fp32, and their gradient never
exist.

This is for a frozen head. If W is trained, `LanguageModel.token_losses` uses PyTorch's own
functions. On a GPU, products with the head are faster if its number of rows is a multiple of 64
(cuBLAS has no good kernel for V = 50257), which `with_padding` provides.
"""

import torch
from torch import Tensor

from kernels import cross_entropy_

IGNORE = -100  # the label of positions without a loss
CHUNK = 1024  # positions at a time: for V = 50257 0.2 GB in fp32, and on a CPU log p
GPU_CHUNK = 2048  # 0.2 GB in bf16, and enough rows for a GPU
MULTIPLE = 64  # rows of a padded head


class FrozenHeadLoss(torch.autograd.Function):
    """hidden (n, C), weight (V', C), bias (V',) or None, labels (n,), V <= V' -> losses (n,), in
    nats, fp32 (fp64 from fp64)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias, labels: Tensor, V: int, chunk: int):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        need = hidden.requires_grad
        dhidden = torch.empty_like(hidden) if need else None  # d losses_i / d hidden_i
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            s = hidden[rows] @ weight.T  # (rows, V'), logits
            losses[rows] = cross_entropy_(s, labels[rows], bias, V, gradient=need)
            if dhidden is not None:  # s is now d losses / d logits
                torch.mm(s, weight, out=dhidden[rows])
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * dlosses[:, None].to(dhidden.dtype), None, None, None, None, None


def frozen_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None,
    bias: Tensor | None = None, vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """-log p of each label, in nats: (n,), fp32 (fp64 from fp64).

    Args:
        hidden: (n, C), the input of the head at the positions with a label.
        weight: (V', C), the head; it gets no gradient. Rows from V on are ignored.
        labels: (n,) int64 in [0, V).
        chunk: number of positions whose logits exist at once; None = `CHUNK` or `GPU_CHUNK`.
        bias: (V',), the head's; it gets no gradient.
        vocab_size: V; None = V'.
    """
    V = len(weight) if vocab_size is None else vocab_size
    if chunk is None:
        chunk = CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return FrozenHeadLoss.apply(hidden, weight, bias, labels, V, chunk)
    return FrozenHeadLoss.apply(hidden, weight, bias, labels, V, chunk)


def with_padding(x: Tensor) -> Tensor:
    """A copy of x (V, ...) with rows of zeros after it, to a multiple of `MULTIPLE`."""
    padded = x.new_zeros(-(-len(x) // MULTIPLE) * MULTIPLE, *x.shape[1:])
    padded[: len(x)] = x
    return padded
