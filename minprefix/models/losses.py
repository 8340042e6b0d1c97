"""The loss of eq. (2) without the logits: head and cross entropy, a few positions at a time.

For one target position with hidden state h (C,), label y and head W (V, C), logits s = W h (in BART
W h + b),

    loss = log sum_v exp(s_v) - s_y,     d loss / d h = W^T (softmax(s) - e_y),

e_y being 1 at y and 0 elsewhere. The gradient needs nothing that comes later, so it is made with
the loss, while the logits of a few positions are at hand; the backward pass only scales it.
`kernels.cross_entropy_` writes softmax(s) - e_y over the logits, between the two products with W.
All logits of a batch, (positions, V) in fp32 and again as their gradient, never exist.

This is for a frozen head. `LanguageModel.token_losses` takes PyTorch's own functions where W is
trained. A head of many rows is multiplied faster on a GPU where their number is a multiple of 64
(cuBLAS has no good kernel for V = 50257): `with_padding` makes room for that.
"""

import torch
from torch import Tensor

from kernels import cross_entropy_

IGNORE = -100  # a label at which there is no loss
CHUNK = 1024  # positions at a time: for V = 50257 0.2 GB in fp32
GPU_CHUNK = 2048  # the same in bf16, and rows enough for a GPU
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
        hidden: (n, C), what the head reads at the positions with a label.
        weight: (V', C), the head; it gets no gradient. Rows from V on are not looked at.
        labels: (n,) int64 in [0, V).
        chunk: positions whose logits exist at once; None = `CHUNK`, on a GPU `GPU_CHUNK`.
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
