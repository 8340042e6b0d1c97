"""The loss of eq. (2) without the logits: head and cross entropy, a few positions at a time.

For one target position with hidden state h (C,), label y and head W (V, C), logits s = W h (in BART
W h + b),

    loss = log sum_v exp(s_v) - s_y,     d loss / d h = W^T (softmax(s) - e_y),

e_y being 1 at y and 0 elsewhere. The gradient needs nothing that comes later, so it is made with
the loss, while the logits of a few positions are at hand; the backward pass only scales it.
All logits of a batch, (positions, V) in fp32 and again as their gradient, never exist.

This is for a frozen head. `LanguageModel.token_losses` takes PyTorch's own functions where W is
trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label at which there is no loss
CHUNK = 1024  # positions at a time: for V = 50257 about 0.5 GB in fp32, and rows enough for a GPU


class FrozenHeadLoss(torch.autograd.Function):
    """hidden (n, C), weight (V, C), bias (V,) or None, labels (n,) -> losses (n,), in nats, fp32
    (fp64 from fp64)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias, labels: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        need = hidden.requires_grad
        dhidden = torch.empty_like(hidden) if need else None  # d losses_i / d hidden_i
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            y = labels[rows, None]  # (rows, 1)
            s = F.linear(hidden[rows], weight, bias).to(wide)  # (rows, V)
            lse = s.logsumexp(-1, keepdim=True)
            losses[rows] = (lse - s.gather(-1, y))[:, 0]
            if dhidden is not None:
                p = s.sub_(lse).exp_()  # softmax(s), in the place of s
                p.scatter_add_(-1, y, p.new_full(y.shape, -1.0))
                dhidden[rows] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * dlosses[:, None].to(dhidden.dtype), None, None, None, None


def frozen_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK, bias: Tensor | None = None
) -> Tensor:
    """-log p of each label, in nats: (n,), fp32 (fp64 from fp64).

    Args:
        hidden: (n, C), what the head reads at the positions with a label.
        weight: (V, C), the head; it gets no gradient.
        labels: (n,) int64 in [0, V).
        chunk: positions whose logits exist at once.
        bias: (V,), the head's; it gets no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return FrozenHeadLoss.apply(hidden.to(dtype), weight.to(dtype), bias, labels, chunk)
    return FrozenHeadLoss.apply(hidden, weight, bias, labels, chunk)
