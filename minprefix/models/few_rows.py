"""A block of GPT-2 in a decoding step: the `Block` of `gpt2.py` in five kernels instead of ten.

A step has few positions, so it costs mostly the number of its kernels. Here each of the four
products of a block includes the operations around it (`kernels.fused_linear`).
"""

from typing import Any

from torch import Tensor

from kernels import fused_linear, takes_few
from minprefix.models.base import tanh_gelu


def suits(block: Any, x: Tensor) -> bool:
    """Whether `forward` replaces `Block.forward` for x (B, T, C): no gradients, no dropout, GPT-2's
    own function in the MLP, and no adapter, whose hooks come after attention and MLP."""
    hooks = block.attn._forward_hooks or block.mlp._forward_hooks
    return takes_few(x) and not (block.training or hooks) and block.mlp.act is tanh_gelu


def forward(block: Any, x: Tensor, prefix, visible, attend) -> Tensor:
    """As `Block.forward`: (B, T, C) -> (B, T, C)."""
    attn, mlp, norms = block.attn, block.mlp, (block.ln_1, block.ln_2)
    norm_1, norm_2 = ((norm.weight, norm.bias, norm.eps) for norm in norms)
    qkv = fused_linear(x, attn.c_attn.weight, attn.c_attn.bias, norm=norm_1)
    o = attn.heads(qkv, prefix, visible, attend)
    x = fused_linear(o, attn.c_proj.weight, attn.c_proj.bias, residual=x)
    h = fused_linear(x, mlp.c_fc.weight, mlp.c_fc.bias, norm=norm_2, gelu=True)
    return fused_linear(h, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)
