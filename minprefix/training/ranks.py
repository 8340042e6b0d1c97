"""Training on several processes (torchrun): the rank of this process, and sums over all ranks.

The frozen model is on every rank; only the gradients of trained weights are summed. Only rank 0
writes files. Without torchrun there is one rank and nothing is sent.

    torchrun --nproc-per-node 2 -m minprefix train --data E2E --out runs/e2e

Source: https://docs.pytorch.org/docs/stable/elastic/run.html (the environment that torchrun sets).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that train one run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """The ranks in the open `process_group`; without one, a single rank."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)))

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Within the block, the processes that torchrun has started form a process group; without
    torchrun, this does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
