"""Merging by log-sum-exps against one softmax over all keys."""

import pytest
import torch

from kernels import prefix_attention
from kernels.merge import merge_gated


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0, 40.0])
def test_merged_parts_are_one_softmax(gate):
    generator = torch.Generator().manual_seed(0)
    q, k, v, more_k, more_v = (
        torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (4, 5, 5, 7, 7)
    )
    none, options = q.new_empty(3, 0, 8), {"causal": False, "return_lse": True}
    one, two = (
        prefix_attention(q, *pair, none, none, **options) for pair in ((k, v), (more_k, more_v))
    )
    s = q @ torch.cat([k, more_k], dim=2).mT * 8**-0.5
    weights = s.exp() * torch.tensor([1.0] * 5 + [gate] * 7, dtype=torch.float64)
    exact = weights / weights.sum(-1, keepdim=True) @ torch.cat([v, more_v], dim=2)
    g = torch.tensor(gate, dtype=torch.float64, requires_grad=True)
    o = merge_gated(one, two, g)
    assert (o - exact).abs().max() < 1e-14  # fp64: about 50 eps for outputs of order 1
    assert torch.autograd.grad(o.sum(), g)[0].isfinite()
    assert torch.equal(merge_gated(one, two, g, torch.zeros(2, 1, 4, dtype=torch.bool)), one[0])
