"""CUDA graphs: a whole step costs the host one launch.

A graph replays fixed kernels on fixed addresses, so what it reads lies in static buffers and shapes
are rounded up to a few buckets. `fast.py` has one graph per bucket of a decoding step,
`training/graphs.py` one per bucket of a training step.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def uses_graphs(device: torch.device) -> bool:
    """Whether steps are captured, with static shapes: on CUDA, unless MINPREFIX_CUDA_GRAPHS=0."""
    return device.type == "cuda" and os.environ.get("MINPREFIX_CUDA_GRAPHS") != "0"


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def capture(
    run: Callable[[], Tensor], device: torch.device, pool: Any = None
) -> Callable[[], Tensor]:
    """Record what `run` does on the GPU; the result repeats it, into the same tensors.

    `run` is called twice, and its first call takes effect: the caller undoes it where that matters.

    Args:
        pool: memory that graphs share which never run at once, and leave nothing in it that is
            read later (`torch.cuda.graph_pool_handle`); None = memory of its own.
    Raises:
        RuntimeError: CUDA cannot capture this step; the message says how to do without.
    """
    with torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # kernels are compiled and workspaces allocated outside the graph
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                out = run()
        except RuntimeError as error:
            raise RuntimeError(
                "CUDA could not capture this step as a graph; "
                f"MINPREFIX_CUDA_GRAPHS=0 runs without graphs: {error}"
            ) from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
