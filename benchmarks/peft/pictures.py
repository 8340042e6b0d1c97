"""The benchmark's pictures: throughput against B, T and P, and where a training step's time goes.

Read `draw` and `profile_step`; `run.py` measures and calls them.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minprefix.files import atomic_write

AXES = {"B": "batch size B (rows)", "T": "tokens per row T", "P": "prefix positions P"}


def longest_series(rows: list[dict[str, str]], x: str) -> tuple[dict, list[dict[str, str]]]:
    """The rows that differ in column x (and method and beams) only, and what they have in common.

    Of several such series the one with most values of x.
    """
    same = [n for n in ("B", "T", "P", "data", "labels", "mlp", "new") if n != x]
    series: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        series.setdefault(tuple(row[n] for n in same), []).append(row)
    key = max(series, key=lambda k: len({row[x] for row in series[k]}))
    return dict(zip(same, key, strict=True)), series[key]


def draw(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Throughput against those of B, T and P that vary, from the CSV's rows; nothing if none does.

    A panel's title says what stays the same.
    """
    from matplotlib.figure import Figure

    panels = []
    for work in ("train", "generate"):
        done = [row for row in rows if row["work"] == work and row["ms"]]
        found = [(work, x, *longest_series(done, x)) for x in AXES] if done else []
        panels += [panel for panel in found if len({row[panel[1]] for row in panel[3]}) > 1]
    if not panels:
        return
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * n_rows + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (work, x, common, series) in zip(grid, panels, strict=False):
        for method, beams in dict.fromkeys((row["method"], row["beams"]) for row in series):
            points = sorted(
                (int(row[x]), float(row["tokens_per_s"]))
                for row in series
                if (row["method"], row["beams"]) == (method, beams)
            )
            label = method if beams in ("", "1") else f"{method}, {beams} beams"
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        fixed = (f"{name} {common[name]}" for name in (*AXES, "labels") if common.get(name))
        top = max(float(row["tokens_per_s"]) for row in series)
        axes.set(xlabel=AXES[x], ylabel="tokens/s", ylim=(0, 1.1 * top))
        axes.set_title(f"{work}: {', '.join(fixed)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def wait(device: str) -> None:
    """Until the GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


PARTS = {  # of a step: what is in the names of operators and kernels; the first that fits
    "optimizer": "optimizer|adam|foreach|multi_tensor",
    "head + loss": "log_softmax|nll_loss|cross_entropy|logsoftmax",
    "attention": "attention|attn|fmha|flash|_fwd_kernel|_bwd_|bmm|softmax",
    "matrix products": "gemm|addmm|aten::mm|linear|matmul|nvjet|cutlass|xmma|splitk",
    "norms, GELU, sums, copies": "^(aten|void|triton|mem)|compiled|elementwise|layer_norm",
}
REST = "Python, autograd, waiting"


def part_of(names: list[str], shapes: list, vocab_size: int) -> str:
    """Which part of a step an event belongs to; names: its own, then those around it."""
    text = " ".join(names).lower()
    for part, pattern in PARTS.items():
        of_head = any(vocab_size in s for s in shapes if isinstance(s, (list, tuple)))
        if part == "head + loss" and of_head and "embedding" not in text:
            return part
        searched = names[0].lower() if part.startswith("norms") else text
        if re.search(pattern, searched):
            return part
    return REST


def profile_step(step: Callable[[], object], device: str, vocab_size: int, ms: float) -> dict:
    """Milliseconds of each part of one step; they add up to the step.

    On a GPU: of the kernels, and what is missing to the `ms` measured without a profiler is the
    time in which the GPU waits. On a CPU: of the operators themselves, under the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    wait(device)
    with profile(activities=kinds, record_shapes=True) as run:
        began = time.perf_counter()
        step()
        wait(device)
        total = ms if cuda else 1e3 * (time.perf_counter() - began)
    parts = dict.fromkeys([*PARTS, REST], 0.0)
    loose: dict[str, float] = {}  # kernels, such as those of a CUDA graph, that no operator names
    for event in run.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            if event.is_user_annotation:  # a range of kernels, not one
                continue
            loose[event.name] = loose.get(event.name, 0.0) + event.device_time_total / 1e3
            continue
        names, around = [event.name], event.cpu_parent
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        if not cuda:
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


def draw_profile(rows: list[dict], path: Path, title: str) -> None:
    """One bar per method: the parts of a step, in ms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.6 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for part in (*PARTS, REST):
        widths = [float(row[part]) for row in rows]
        colour = {"color": "#d9d9d9"} if part == REST else {}
        axes.barh(range(len(rows)), widths, left=left, label=part, **colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="one training step (ms)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=3, loc="outside lower center", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
