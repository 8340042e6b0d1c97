"""Forward and backward of a training step: the plain form, and the same as CUDA graphs.

With a frozen model a step is a function of little: token ids, labels and the prefix's activations
(h_i of eq. (3), i in P_idx) go in, the summed loss and the activations' gradients come out.
`Trainer.step` makes the activations once per step (an MLP may compute them) and takes their
gradients on from there. In between stands `PlainPasses`, or on a GPU `GraphedPasses`: static
buffers, and one graph for each bucket of (rows, tokens, labels), recorded when a batch first needs
it.

Shapes are rounded up to buckets, and what is added changes nothing: tokens after a row's end are
hidden by causality, labels that are added weigh 0. Rows are not packed: batches of similar length
(`batches.epoch_batches`) leave so little padding that the column `padding` of
`benchmarks.peft train --data` is all that packing could win.
Shapes use the letters of `models/gpt2.py`; n counts labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minprefix.data.batches import Batch, pinned
from minprefix.generation.graphs import capture, round_up
from minprefix.models.activations import BARTActivations, PrefixActivations
from minprefix.models.losses import IGNORE

TOKENS = 16  # T is rounded up to a multiple
LABELS = 8  # n is rounded up to a multiple of B T / LABELS

Activations = PrefixActivations | BARTActivations
Losses = Callable[[Batch, Activations | None], Tensor]  # of each label, nats: (n,)


def detached(acts: Activations) -> Any:
    """The same values as leaves, at which gradients arrive."""
    return acts.map(lambda x: x.detach().requires_grad_())


def dropped(acts: Activations, probability: float, seed: int) -> Activations:
    """Prefix dropout: each entry of the table is 0 with this probability, else enlarged to match.

    One draw serves a whole step, all its batches and ranks; the authors' code draws for each row.
    """
    first = acts.leaves()[0]
    generator = torch.Generator(first.device).manual_seed(seed)

    def drop(x: Tensor) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=x.device)
        return x * (u >= probability) / (1 - probability)

    return acts.map(drop, gates=False)


def own_copy(acts: PrefixActivations) -> PrefixActivations:
    """Leaves at addresses of our own."""
    return detached(acts.map(Tensor.clone))


def leaves(acts: Activations | None) -> list[Tensor]:
    """What has a gradient: tables and gates; nothing without a prefix."""
    return [] if acts is None else acts.leaves()


class PlainPasses:
    """A step's sums, one batch after the other: begin, add, ..., add, end."""

    def __init__(self, losses: Losses):
        self.losses = losses

    def begin(self, acts: Activations | None, scale: float) -> None:
        """A step with these activations; its loss is `scale` times the sum over all labels."""
        self.acts, self.scale = None if acts is None else detached(acts), scale
        self.nats: Any = 0.0

    def add(self, batch: Batch) -> None:
        """Forward and backward of one batch. Trained weights collect their gradients, too."""
        nats = self.losses(batch, self.acts).sum()
        (self.scale * nats).backward()
        self.nats = self.nats + nats.detach()

    def end(self) -> tuple[Tensor, list]:
        """The sum in nats, without scale; the gradients of the loss at the `leaves`."""
        return self.nats, [leaf.grad for leaf in leaves(self.acts)]


@dataclass(frozen=True)
class Padded(Batch):
    """A batch of a bucket's shapes."""

    weights: Tensor  # (n,): 1, or 0 for a label that was added


def padded(batch: Batch, longest: int) -> Padded:
    """T and n rounded up, T to `longest` at most; an added label repeats the first one."""
    B, T = batch.input_ids.shape
    n, more = len(batch.at), min(round_up(T, TOKENS), longest) - T
    n_added = round_up(n, max(1, B * (T + more) // LABELS)) - n
    row, t = batch.at // T, batch.at % T
    at = row * (T + more) + t
    return Padded(
        F.pad(batch.input_ids, (0, more)),
        F.pad(batch.labels, (0, more), value=IGNORE),
        batch.lengths,
        torch.cat([at, at[:1].expand(n_added)]),
        batch.starts,
        F.pad(torch.ones(n), (0, n_added)),
    )


class GraphedPasses:
    """The same with a prefix, replayed. All buckets add to the same sums.

    Args:
        longest: most tokens that a row may have once it is padded.
    """

    def __init__(self, losses: Losses, acts: PrefixActivations, longest: int):
        self.losses, self.longest = losses, longest
        self.acts = own_copy(acts)
        self.grads = [torch.zeros_like(leaf) for leaf in leaves(self.acts)]
        self.device, wide = acts.table.device, torch.promote_types(acts.table.dtype, torch.float32)
        self.nats, self.scale = (torch.zeros((), dtype=wide, device=self.device) for _ in range(2))
        self.batches: dict[tuple[int, int, int], Padded] = {}  # static, by bucket
        self.replays: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        # the sums lie outside of it, so that all buckets need the memory of the largest only
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.no_grad()
    def begin(self, acts: Activations | None, scale: float) -> None:
        for own, leaf in zip(leaves(self.acts), leaves(acts), strict=True):
            own.copy_(leaf)
        for total in (*self.grads, self.nats):
            total.zero_()
        self.scale.fill_(scale)

    def add(self, batch: Batch) -> None:
        batch = padded(batch, self.longest)
        bucket = (*batch.input_ids.shape, len(batch.at))
        if bucket not in self.batches:
            self.batches[bucket] = batch.to(self.device)
            sums = (*self.grads, self.nats)
            before = [total.clone() for total in sums]  # a recording takes effect once, too
            self.replays[bucket] = capture(lambda: self._pass(bucket), self.device, self.pool)
            for total, value in zip(sums, before, strict=True):
                total.copy_(value)
        for name, static in vars(self.batches[bucket]).items():
            if static is not None:
                static.copy_(pinned(vars(batch)[name], self.device), non_blocking=True)
        self.replays[bucket]()

    def _pass(self, bucket: tuple[int, int, int]) -> Tensor:
        batch = self.batches[bucket]
        losses = self.losses(batch, self.acts)  # (n,), padding included
        nats = losses.mul(batch.weights).sum()
        grads = torch.autograd.grad(nats * self.scale, leaves(self.acts))
        for total, grad in zip(self.grads, grads, strict=True):
            total += grad
        self.nats += nats.detach()
        return self.nats

    def end(self) -> tuple[Tensor, list]:
        return self.nats.clone(), self.grads
