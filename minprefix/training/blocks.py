"""How the blocks of a model run while it trains: compiled, or computed again in the backward pass.

The models know of neither. `wrap_blocks` puts a `Wrapped` in the place of each block's `forward`,
`unwrap_blocks` takes it away; weights, their names and hooks stay as they are.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minprefix.models.base import LanguageModel


@functools.cache
def compiled_forward(kind: type[nn.Module]) -> Callable[..., Tensor]:
    """`kind.forward` by torch.compile: all layers share it, rows and tokens may change."""
    # first, middle and last layers, prefix, infix and gate, one row or many: more than 8 graphs
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(kind.forward, dynamic=True)


class Wrapped:
    """The forward pass of one block.

    Args:
        compiled: by torch.compile, where there is no cache (`attend` is None).
        recomputed: activations are not kept, but computed again in the backward pass.
    """

    def __init__(self, block: nn.Module, compiled: bool, recomputed: bool):
        self.block, self.compiled, self.recomputed = block, compiled, recomputed

    def __call__(self, x, prefix, visible, attend=None, *rest) -> Tensor:
        kind: Any = type(self.block)
        run = compiled_forward(kind) if self.compiled and attend is None else kind.forward
        run, args = partial(run, self.block), (x, prefix, visible, attend, *rest)
        if self.recomputed and torch.is_grad_enabled():
            random = self.block.training  # dropout
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=random)
        return run(*args)


def wrap_blocks(model: LanguageModel, *, compiled: bool = False, recomputed: bool = False) -> None:
    """From now on the blocks run as `Wrapped` says; without either they run as they are."""
    unwrap_blocks(model)
    if compiled or recomputed:
        for block in model.blocks():
            block.forward = Wrapped(block, compiled, recomputed)


def unwrap_blocks(model: LanguageModel) -> None:
    """The blocks run as they are."""
    for block in model.blocks():
        vars(block).pop("forward", None)


def is_compiled(model: LanguageModel) -> bool:
    return any(getattr(block.forward, "compiled", False) for block in model.blocks())
