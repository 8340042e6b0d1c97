"""The parts of the time of a training step or of a token, from PyTorch's profiler.

Read `traced`, then `parts_of`, the parts of a step in ms, and `kernels_of`, a table of how often
and how long each kernel ran. `results.py` writes both. On a GPU the table has kernels, also those
in a CUDA graph; on a CPU it has operators, each without the time of those that it calls.
"""

import re
import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: str) -> None:
    """Wait until the GPU has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


PARTS = {  # parts of a step: patterns in the names of operators and kernels; the first match counts
    "optimizer": "optimizer|adam|foreach|multi_tensor",
    "head + loss": "log_softmax|nll_loss|cross_entropy|logsoftmax",
    "attention": "attention|attn|fmha|flash|_fwd_kernel|_bwd_|bmm|softmax",
    "matrix products": "gemm|addmm|aten::mm|linear|matmul|nvjet|cutlass|xmma|splitk",
    "norms, GELU, sums, copies": "^(aten|void|triton|mem)|compiled|elementwise|layer_norm",
}
REST = "Python, autograd, waiting"
WAITING = "no kernel runs"


def part_of(names: list[str], shapes: list, vocab_size: int) -> str:
    """The part of a step to which an event belongs; names: its own, then those of outer events."""
    text = " ".join(names).lower()
    for part, pattern in PARTS.items():
        of_head = any(vocab_size in s for s in shapes if isinstance(s, (list, tuple)))
        if part == "head + loss" and of_head and "embedding" not in text:
            return part
        searched = names[0].lower() if part.startswith("norms") else text
        if re.search(pattern, searched):
            return part
    return REST


def traced(call: Callable[[], object], device: str) -> tuple[Any, float]:
    """A profile of one call, and its milliseconds under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.startswith("cuda")
    wait(device)
    with profile(activities=kinds, record_shapes=True) as run:
        began = time.perf_counter()
        call()
        wait(device)
        ms = 1e3 * (time.perf_counter() - began)
    return run, ms


def on_gpu(event: Any) -> bool:
    """Whether an event is a kernel or a copy on a GPU, and not a range of them."""
    return event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation


def parts_of(run: Any, device: str, vocab_size: int, total: float) -> dict[str, float]:
    """Milliseconds of each part of the step in a profile, which add up to `total`.

    On a GPU these are the times of kernels; the rest of the total is the time in which it waits.
    """
    parts = dict.fromkeys([*PARTS, REST], 0.0)
    loose: dict[str, float] = {}  # kernels, such as those of a CUDA graph, that no operator names
    for event in run.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            if on_gpu(event):
                loose[event.name] = loose.get(event.name, 0.0) + event.device_time_total / 1e3
            continue
        names, around = [event.name], event.cpu_parent
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        if not device.startswith("cuda"):
            part = part_of(names, event.input_shapes or [], vocab_size)
            parts[part] += event.self_cpu_time_total / 1e3
        for kernel in event.kernels:
            part = part_of([kernel.name, *names], event.input_shapes or [], vocab_size)
            parts[part] += kernel.duration / 1e3
            loose[kernel.name] = loose.get(kernel.name, 0.0) - kernel.duration / 1e3
    for name, left in loose.items():
        parts[part_of([name], [], vocab_size)] += max(0.0, left)
    parts[REST] += max(0.0, total - sum(parts.values()))
    return {part: round(value, 3) for part, value in parts.items()}


Kernels = dict[str, tuple[float, float]]  # by name: how often it ran, and its microseconds


def kernels_of(run: Any, device: str) -> Kernels:
    """The kernels in a profile."""
    found: Kernels = {}
    for event in run.events():
        if on_gpu(event) != device.startswith("cuda"):
            continue
        us = event.device_time_total if on_gpu(event) else event.self_cpu_time_total
        name = event.name.removeprefix("void ")[:100]
        count, before = found.get(name, (0, 0.0))
        found[name] = count + 1, before + us
    return found


def kernel_rows(found: Kernels, total: float | None = None) -> list[dict[str, Any]]:
    """Rows of the table, the longest first; the last row is the time in which nothing runs.

    Args:
        total: microseconds without the profiler; None = only the time of the kernels.
    """
    busy = sum(us for _, us in found.values())
    total = max(busy, total or 0.0)
    ordered = sorted(found.items(), key=lambda one: -one[1][1])
    rows = [(name, round(count, 2), us) for name, (count, us) in ordered]
    return [
        {"kernel": name, "count": count, "us": round(us, 1), "share": round(100 * us / total, 1)}
        for name, count, us in [*rows, (WAITING, "", total - busy)]
    ]


def of_one(more: Kernels, fewer: Kernels, times: int) -> Kernels:
    """The kernels of one token, from two profiles that differ by `times` tokens."""
    each = {}
    for name, (count, us) in more.items():
        less = fewer.get(name, (0, 0.0))
        if count > less[0]:
            each[name] = (count - less[0]) / times, max(0.0, us - less[1]) / times
    return each
