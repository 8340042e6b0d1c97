"""Attention over two sets of keys, from attention over each: merged by the log-sum-exps.

With o_a, lse_a over the keys of A and o_b, lse_b over those of B, and every softmax term of B
weighing g times its value,

    o = (o_a + r o_b) / (1 + r) = o_a + share (o_b - o_a),
    r = g exp(lse_b - lse_a),   share = r / (1 + r) = g / (g + exp(lse_a - lse_b)).

g = 1 is attention over both sets, g = 0 exactly attention over A. No log of g is taken, so its
gradient exists at 0. `decode.py` merges many parts in its own kernel, by the same equation.
"""

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]  # o (B, H, T, D), lse (B, H, T): attention to some of the keys

FAR = 80.0  # nats; exp(80) is still finite in fp32, and exp(-80) is nothing beside 1


def merge_gated(a: Partial, b: Partial, gate: Tensor, seen: Tensor | None = None) -> Tensor:
    """o, in which the terms of b weigh `gate` times their value.

    Args:
        gate: g >= 0, broadcast to (B, H, T).
        seen: bool, broadcast to (B, H, T): queries to which b counts; None = all.
    """
    (o_a, lse_a), (o_b, lse_b) = a, b
    if seen is not None:  # what is not seen may be NaN, which no factor of 0 removes
        lse_b, o_b = lse_b.where(seen, 0.0), o_b.where(seen[..., None], 0.0)
    share = gate / (gate + (lse_a - lse_b).clamp(-FAR, FAR).exp())
    share = share if seen is None else share * seen
    # in the dtype of lse: a gate's gradient is the sum of many small terms
    o = torch.lerp(o_a.to(share.dtype), o_b.to(share.dtype), share[..., None])
    return o.to(o_a.dtype)
