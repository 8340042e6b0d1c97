"""The forward and backward passes of a training step, in plain form and as CUDA graphs.

With a frozen model, a step has few inputs and outputs: token ids, labels and the prefix's
activations (h_i of eq. (3), i in P_idx) go in, the summed loss and the activations' gradients come
out. `Trainer.step` computes the activations once per step, possibly by an MLP, and continues the
backward pass from their gradients. In between it uses `PlainPasses`, or on a GPU `GraphedPasses`:
static buffers, and one graph for each bucket of (rows, tokens, labels), recorded when a batch first
needs it.

Shapes are rounded up to buckets. The padding has no effect: tokens after a row's end are hidden by
causality, and added labels have weight 0. Rows are not packed, because batches of similar length
(`batches.epoch_batches`) need little padding; the column `padding` of `benchmarks.peft train
--data` shows the most that packing could save.
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
Losses = Callable[[Batch, Activations | None], Tensor]  # the loss of each label, nats: (n,)


def detached(acts: Activations) -> Any:
    """The same values as leaf tensors, which receive gradients."""
    return acts.map(lambda x: x.detach().requires_grad_())


def drop_entries(acts: Activations, probability: float, seed: int) -> Activations:
    """Prefix dropout: each entry of the table is 0 with this probability, otherwise scaled up.

    One mask is used for all batches and ranks of a step; the authors' code draws one for each row.
    """
    first = acts.leaves()[0]
    generator = torch.Generator(first.device).manual_seed(seed)

    def drop(x: Tensor) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=x.device)
        return x * (u >= probability) / (1 - probability)

    return acts.map(drop, gates=False)


def own_copy(acts: PrefixActivations) -> PrefixActivations:
    """A copy as leaf tensors, at fixed addresses for the graphs."""
    return detached(acts.map(Tensor.clone))


def leaves(acts: Activations | None) -> list[Tensor]:
    """The tensors that receive gradients: tables and gates; [] without a prefix."""
    return [] if acts is None else acts.leaves()


class PlainPasses:
    """Sums up a step, batch by batch: begin, add, ..., add, end."""

    def __init__(self, losses: Losses):
        self.losses = losses

    def begin(self, acts: Activations | None, scale: float) -> None:
        """Begin a step with these activations; its loss is `scale` times the sum over labels."""
        self.acts, self.scale = None if acts is None else detached(acts), scale
        self.nats: Any = 0.0

    def add(self, batch: Batch) -> None:
        """Forward and backward pass of one batch; trained weights also accumulate gradients."""
        nats = self.losses(batch, self.acts).sum()
        (self.scale * nats).backward()
        self.nats = self.nats + nats.detach()

    def end(self) -> tuple[Tensor, list]:
        """The sum of losses in nats, without `scale`, and the gradients at the `leaves`."""
        return self.nats, [leaf.grad for leaf in leaves(self.acts)]


@dataclass(frozen=True)
class Padded(Batch):
    """A batch of a bucket's shapes."""

    weights: Tensor  # (n,): 1, or 0 for an added label


def padded(batch: Batch, longest: int) -> Padded:
    """The batch with T and n rounded up, T to `longest` at most; added labels repeat the first."""
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
    """`PlainPasses` with a prefix, replayed as graphs. All buckets add to the same sums.

    Args:
        longest: largest number of tokens of a padded row.
    """

    def __init__(self, losses: Losses, acts: PrefixActivations, longest: int):
        self.losses, self.longest = losses, longest
        self.acts = own_copy(acts)
        self.grads = [torch.zeros_like(leaf) for leaf in leaves(self.acts)]
        self.device, wide = acts.table.device, torch.promote_types(acts.table.dtype, torch.float32)
        self.nats, self.scale = (torch.zeros((), dtype=wide, device=self.device) for _ in range(2))
        self.batches: dict[tuple[int, int, int], Padded] = {}  # static, by bucket
        self.replays: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        # the sums are outside of the pool, so that the buckets together need only as much memory
        # as the largest one
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
            before = [total.clone() for total in sums]  # warm-up and recording also change the sums
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
