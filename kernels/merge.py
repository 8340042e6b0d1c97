"""Merges attention over two sets of keys by their log-sum-exps.

With o_a, lse_a over the keys of A and o_b, lse_b over those of B, where every softmax term of B is
multiplied by g,

    o = (o_a + r o_b) / (1 + r) = o_a + share (o_b - o_a),
    r = g exp(lse_b - lse_a),   share = r / (1 + r) = g / (g + exp(lse_a - lse_b)).

g = 1 is attention over both sets, g = 0 exactly attention over A. There is no log of g, so its
gradient exists at 0. `decode.py` merges many parts in its own kernel, by the same equation.
"""

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]  # o (B, H, T, D), lse (B, H, T): attention to some of the keys

FAR = 80.0  # nats; exp(80) is finite in fp32, and exp(-80) is negligible compared with 1


def merge_gated(a: Partial, b: Partial, gate: Tensor, seen: Tensor | None = None) -> Tensor:
    """o over both sets, with the softmax terms of b multiplied by `gate`.

    Args:
        gate: g >= 0, broadcast to (B, H, T).
        seen: bool, broadcast to (B, H, T): the queries that see b; None = all.
    """
    (o_a, lse_a), (o_b, lse_b) = a, b
    if seen is not None:  # unseen parts may be NaN, which a factor of 0 does not remove
        lse_b, o_b = lse_b.where(seen, 0.0), o_b.where(seen[..., None], 0.0)
    share = gate / (gate + (lse_a - lse_b).clamp(-FAR, FAR).exp())
    share = share if seen is None else share * seen
    # in the dtype of lse, because the gradient of a gate is the sum of many small terms
    o = torch.lerp(o_a.to(share.dtype), o_b.to(share.dtype), share[..., None])
    return o.to(o_a.dtype)
