"""CUDA graphs, with which a whole step costs the host only one launch.

A graph replays fixed kernels on fixed addresses, so its inputs are in static buffers and shapes are
rounded up to a few buckets. `fast.py` has one graph per bucket for decoding steps, and
`training/graphs.py` one per bucket for training steps.
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
    """Record the work of `run` on the GPU; returns a function that repeats it on the same tensors.

    `run` is called twice. The first call takes effect, and the caller must undo it if necessary.

    Args:
        pool: memory shared by graphs that never run at the same time and whose memory is not read
            later (`torch.cuda.graph_pool_handle`); None = memory of its own.
    Raises:
        RuntimeError: CUDA cannot capture this step; the message says how to run without graphs.
    """
    with torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # compile kernels and allocate workspaces outside of the graph
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
