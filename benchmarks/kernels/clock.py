"""Measures time on a GPU without the host's share, by replaying CUDA graphs.

Read `graph_times`, then `measure`. A graph holds one call on each of several sets of inputs,
together 160 MB if 32 sets are enough (an H100's L2 cache has 50 MB), so that inputs come from
memory, as between the layers of a model. On a CPU small shapes run once or twice through the same
code, and the times mean nothing.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.machine import machine, read_rows
from kernels import on_triton

INPUT_BYTES, MOST_SETS = 160e6, 32
REPLAYS = 20  # of a graph


def sets_of(bytes_of_one: int, device: str) -> int:
    """The number of sets of inputs of a graph."""
    return min(MOST_SETS, max(2, math.ceil(INPUT_BYTES / bytes_of_one))) if device == "cuda" else 1


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_times(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds per call of CUDA graphs that hold all the calls, one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, plan and load, which is not allowed in a capture
        for call in (calls * 3)[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = captured(calls)
    except RuntimeError:  # an H200 refused the first capture of a process with a backward pass
        graph = captured(calls)
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    # let the GPU wait about a millisecond, so that replays are queued before they can start
    torch.cuda._sleep(2_000_000)
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) / len(calls) for a, b in pairwise(events)]


def cpu_times(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds of each call, twice."""
    times = []
    for call in calls * 2:
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return times


def measure(calls: list[Callable[[], object]], device: str) -> dict[str, float]:
    """Median and quantiles of a call in microseconds, and the MiB that one call allocates."""
    row = {}
    if device == "cuda":
        calls[0]()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        calls[0]()
        torch.cuda.synchronize()
        row["mib_peak"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    times = graph_times(calls) if device == "cuda" else cpu_times(calls)
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {
        "us": round(statistics.median(times), 2), "us_20": round(low, 2), "us_80": round(high, 2),
    } | row  # fmt: skip


def machine_limits(device: str) -> Iterator[dict]:
    """Rows with the limits of the machine: a large bf16 product, and a large copy."""
    n = 8192 if device == "cuda" else 64
    a, b, c = (torch.randn(n, n, device=device).bfloat16() for _ in range(3))
    for name, call, flops, moved in (
        ("matmul", lambda: torch.mm(a, b, out=c), 2 * n**3, 6 * n * n),
        ("copy", lambda: c.copy_(a), 0, 4 * n * n),
    ):
        row = {"B": 1, "T": n, "H": 1, "P": 0, "N": 0, "D": n, "dtype": "bfloat16"}
        row |= {"pass": "forward", "method": name} | measure([call] * 4, device)
        row["tflops"] = round(flops / row["us"] / 1e6, 2)
        yield row | {"gbs": round(moved / row["us"] / 1e3, 1), "note": ""}


def need_kernels() -> None:
    """Exit if the kernels do not run on this GPU, since ours would then be plain PyTorch."""
    if not on_triton(torch.empty(1, 64, dtype=torch.bfloat16, device="cuda")):
        sys.exit("The Triton kernels do not run on this GPU, so there is nothing to time.")


def device_name() -> str:
    """For names of files: h100, h200, cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    words = [
        word for word in words if word not in ("nvidia", "amd", "geforce", "instinct", "tesla")
    ]
    return words[0] if words else "gpu"


def rows_of_this_commit(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV from the present commit; a changed CSV does not make it another commit."""
    here = machine()["commit"].rstrip("+")
    return [row for row in read_rows(path) if row["commit"].rstrip("+") == here]


def go_on_if_lost(args: argparse.Namespace, began: float) -> None:
    """After a CUDA error, restart this process with --resume and the remaining time.

    After an illegal memory access every later call fails; the CSV has the rows so far.
    """
    if not torch.cuda.is_available() or not args.out:
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"CUDA has failed in this process, starting a new one: {error}"[:200], flush=True)
        words = [word for word in sys.argv[1:] if word != "--resume"]
        left = max(1.0, args.seconds - (time.monotonic() - began))
        words += ["--resume", "--seconds", f"{left:.0f}"]  # the last one counts
        module = sys.modules["__main__"].__spec__.name
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
