"""How the blocks of a model run during training: fused, compiled, or recomputed in the backward
pass.

The models need not know about it. `wrap_blocks` replaces each block's `forward` by a `Wrapped`, and
`unwrap_blocks` removes it; weights, their names and hooks stay as they are.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minprefix.models.base import LanguageModel
from minprefix.models.fused import FUSED, fused_form


@functools.cache
def compiled_forward(kind: type[nn.Module]) -> Callable[..., Tensor]:
    """`kind.forward` by torch.compile, shared by all layers; B and T may change."""
    # first, middle and last layers; prefix, infix and gate; one row or many: more than 8 graphs
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(kind.forward, dynamic=True)


class Wrapped:
    """The forward pass of one block.

    Args:
        compiled: use torch.compile if there is no cache (`attend` is None).
        recomputed: do not keep activations, but recompute them in the backward pass.
        fused: use `fused_form` in eval mode, unless the block is compiled.
        following: the block whose first norm a fused block computes; None = it does that itself.
    """

    def __init__(
        self, block: nn.Module, compiled: bool, recomputed: bool, fused: bool,
        following: nn.Module | None = None,
    ):  # fmt: skip
        self.block, self.compiled, self.recomputed = block, compiled, recomputed
        self.fused, self.following = fused, following

    def __call__(self, x, prefix, visible, attend=None, *rest) -> Tensor:
        kind: Any = type(self.block)
        run = kind.forward
        if self.compiled and attend is None:
            run = compiled_forward(kind)
        elif self.fused and not self.block.training:
            run = fused_form(self.block, self.following)
        run, args = partial(run, self.block), (x, prefix, visible, attend, *rest)
        if self.recomputed and torch.is_grad_enabled():
            random = self.block.training  # dropout
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=random)
        return run(*args)


def wrap_blocks(
    model: LanguageModel, *, compiled: bool = False, recomputed: bool = False, fused: bool = False
) -> None:
    """Make the blocks run as described in `Wrapped`, or as they are if no option is set."""
    unwrap_blocks(model)
    if not (compiled or recomputed or fused):
        return
    blocks = model.blocks()
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        here = fused and type(block) in FUSED
        alone = compiled or recomputed or not here
        block.forward = Wrapped(block, compiled, recomputed, here, None if alone else after)


def unwrap_blocks(model: LanguageModel) -> None:
    """Make the blocks run as they are."""
    for block in model.blocks():
        vars(block).pop("forward", None)


def is_compiled(model: LanguageModel) -> bool:
    return any(getattr(block.forward, "compiled", False) for block in model.blocks())
