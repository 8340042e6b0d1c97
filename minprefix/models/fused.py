"""The blocks of `gpt2.py` and `bart.py` in fewer kernels, for a frozen model in eval mode.

`fused_forward` has one kernel for each sum and the norm after it: for GPT-2 nine kernels instead of
ten with attention, and eight where the blocks are linked. Training uses it (`training/blocks.py`)
and so do the graphs of generation; `fused_encoder` and `fused_decoder` are the same for BART.
`step_forward` is for a decoding step with few positions, which costs mostly the number of its
kernels: each of the four products includes the operations around it (`kernels.fused_linear`), so
there are five. `rows_forward`, for up to 32 positions, has seven: two of the products leave partial
sums, which the norms add. `fused_blocks` lets the blocks of a model run like that for a while.
Launching Triton's kernels takes the host longer than PyTorch's, so this pays within a CUDA graph,
or where the GPU has much to do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from kernels import add_norm, fused_linear, fuses, linear_parts, takes_few, takes_some
from minprefix.models.bart import DecoderBlock, EncoderBlock
from minprefix.models.base import LanguageModel, tanh_gelu
from minprefix.models.gpt2 import Block


def normed(x: Tensor, y: Tensor | None, norm: Any, bias=None) -> tuple[Tensor, Tensor]:
    """x + y (or x if y is None) and its layer norm, in one kernel; each (..., C). With a bias, y is
    the result of `linear_parts`."""
    return add_norm(x, y, norm.weight, norm.bias, norm.eps, bias)


def fused_forward(self: Any, x, prefix, visible, attend=None, at=None, following=None) -> Any:
    """`Block.forward` without dropout, with one kernel for each sum and the norm after it, also in
    the backward pass. If `following` is given, it returns the pair (x, its norm by the first layer
    of `following`), which the following block takes instead of x."""
    x, n = x if isinstance(x, tuple) else normed(x, None, self.ln_1)
    y = self.attn(n, prefix, visible, attend)
    if at is not None:
        x, y = (x + y).flatten(0, 1).index_select(0, at), None  # (n, C)
    x, n = normed(x, y, self.ln_2)
    y = self.mlp(n)
    return x + y if following is None else normed(x, y, following.ln_1)


def fused_encoder(self: Any, x, prefix, visible, attend=None) -> Tensor:
    """`EncoderBlock.forward` without dropout, like `fused_forward`."""
    x = normed(x, self.attn(x, prefix, visible, attend), self.ln_1)[1]
    return normed(x, self.mlp(x), self.ln_2)[1]


def fused_decoder(self: Any, x, prefix, visible, attend, at, cross) -> Tensor:
    """`DecoderBlock.forward` without dropout, like `fused_forward`."""
    x = normed(x, self.attn(x, prefix, visible, attend), self.ln_1)[1]
    x = normed(x, self.read(x, cross), self.ln_2)[1]
    if at is not None:
        x = x.flatten(0, 1).index_select(0, at)  # (n, C)
    return normed(x, self.mlp(x), self.ln_3)[1]


FUSED: dict[type[nn.Module], Any] = {
    Block: fused_forward, EncoderBlock: fused_encoder, DecoderBlock: fused_decoder,
}  # fmt: skip


def fused_form(block: nn.Module, after: nn.Module | None) -> Callable[..., Any]:
    """The fused `forward` of a block, to be called with the block; `after` is the following one."""
    form = FUSED[type(block)]
    if isinstance(block, Block):
        form = partial(form, following=linked(block, after))
    return form


def linked(block: nn.Module, after: nn.Module | None) -> nn.Module | None:
    """The block whose first norm `block` may compute: `after`, unless the hook of an adapter
    expects a tensor."""
    if after is None or after.training or block._forward_hooks:
        return None
    return after


def step_forward(block: Any, x: Tensor, prefix, visible, attend, at=None) -> Tensor:
    """`Block.forward` in a decoding step, four products and attention: (B, T, C) -> (B, T, C)."""
    attn, mlp, norms = block.attn, block.mlp, (block.ln_1, block.ln_2)
    norm_1, norm_2 = ((norm.weight, norm.bias, norm.eps) for norm in norms)
    qkv = fused_linear(x, attn.c_attn.weight, attn.c_attn.bias, norm=norm_1)
    o = attn.heads(qkv, prefix, visible, attend)
    x = fused_linear(o, attn.c_proj.weight, attn.c_proj.bias, residual=x)
    h = fused_linear(x, mlp.c_fc.weight, mlp.c_fc.bias, norm=norm_2, gelu=True)
    return fused_linear(h, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)


def rows_forward(
    block: Any, x, prefix, visible, attend, at=None, following=None
) -> Tensor | tuple[Tensor, Tensor]:
    """`Block.forward` in a decoding step, with the products of `kernels/some_rows.py`; x and the
    result are those of `fused_forward`."""
    attn, mlp = block.attn, block.mlp
    x, n = x if isinstance(x, tuple) else normed(x, None, block.ln_1)
    qkv = fused_linear(n, attn.c_attn.weight, attn.c_attn.bias)
    o = attn.heads(qkv, prefix, visible, attend)
    x, n = normed(x, linear_parts(o, attn.c_proj.weight), block.ln_2, attn.c_proj.bias)
    h = fused_linear(n, mlp.c_fc.weight, mlp.c_fc.bias, gelu=True)
    if following is None:
        return fused_linear(h, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)
    return normed(x, linear_parts(h, mlp.c_proj.weight), following.ln_1, mlp.c_proj.bias)


def suits_step(block: Any) -> bool:
    """Whether `step_forward` and `rows_forward` compute the same: GPT-2's own function in the MLP,
    and no adapter, whose hooks come after attention and MLP."""
    hooks = block.attn._forward_hooks or block.mlp._forward_hooks
    return isinstance(block, Block) and not hooks and block.mlp.act is tanh_gelu


@contextmanager
def fused_blocks(model: LanguageModel, positions: int) -> Iterator[None]:
    """Within the block, the model's blocks run in fewer kernels, if our kernels run at all.

    Args:
        positions: how many the model reads at once, B T.
    """
    blocks, weight = model.blocks(), model.wte.weight
    frozen = not any(block.training or "forward" in vars(block) for block in blocks)
    if not (frozen and fuses(weight) and all(type(block) in FUSED for block in blocks)):
        yield
        return
    x, step = weight.new_empty(positions, weight.shape[1]), all(map(suits_step, blocks))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if step and takes_few(x):
            run: Callable = step_forward
        elif step and takes_some(x):
            run = partial(rows_forward, following=linked(block, after))
        else:
            run = fused_form(block, after)
        vars(block)["forward"] = partial(run, block)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]
