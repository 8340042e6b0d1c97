"""Prefix attention timed beside what PyTorch offers: forward, and forward + backward.

    python -m kernels.bench_attention [--out FOLDER] [--quick]

bf16, D = 64, causal. Everything that is timed is first compared with the definition,
`prefix_attention_eager`, in fp64 on the same inputs. Methods (`METHODS`):

  - ours: `prefix_attention` on views of one qkv; ours_qkv: `prefix_attention_qkv`.
  - peers, each of which first concatenates the prefix, expanded over the batch, with k and v:
    flash: SDPA's flash kernel, bottom-right causal; cudnn: SDPA's cuDNN kernel, P rows put before
    the queries so that plain causality holds; efficient: SDPA's memory-efficient kernel with a
    mask; flex: FlexAttention, compiled; eager: the definition.
  - bare, attention with no prefix at all: bare_flash and bare_cudnn on views of one qkv, whose
    gradient autograd stacks (a copy); bare_flash_leaves and bare_cudnn_leaves on the same views as
    three leaves, whose gradients are not copied.

Work per call, with W = B H (T P + T (T + 1) / 2) visible pairs of query and key, e = 2 bytes:

    FLOPs:  forward 4 D W; forward + backward 14 D W (two products, then five more)
    bytes:  forward  e (4 B T H D + 2 N H P D) + 4 B H T
            forward + backward  e (12 B T H D + 6 N H P D) + 8 B H T
            (forward; then q, k, v, o, do, lse and the prefix are read, all gradients are written)

"Work-adjusted" to bare: the time of bare times 1 + 2 P / (T + 1), the ratio of both W.

A CUDA graph holds one call on each of several sets of inputs, together 160 MB where 32 sets reach
that (an H100's L2 cache has 50 MB; column mib_inputs has the sum in MiB), so inputs come from
memory as they do between the layers of a model. The graph is replayed 20 times or more; us is the
median time of a call, in microseconds, us_20 and us_80 are the quantiles. mib_peak is what one call
allocates at its highest, outputs included, in MiB. On a CPU small shapes run once or twice through
the same code: those times mean nothing.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.machine import add_row, machine
from kernels import prefix_attention, prefix_attention_eager, prefix_attention_qkv

D = 64
KEY = ("B", "T", "H", "P", "N", "pass", "method")
PASSES = ("forward", "forward+backward")
INPUT_BYTES, MOST_SETS = 160e6, 32


class Shape(NamedTuple):
    """N = 0: one prefix (H, P, D) for all rows; else a bank of N, and an index drawn at random."""

    B: int
    T: int
    H: int
    P: int
    N: int = 0


ISSUE = [  # the shapes with targets
    Shape(64, 128, 12, 10),
    Shape(16, 128, 16, 10),
    Shape(32, 256, 16, 10),
    Shape(16, 1000, 16, 10),
    Shape(8, 824, 16, 200),
]
BANKS = [Shape(64, 128, 12, P, N) for P in (10, 32) for N in (0, 64)]
OVER_T = [Shape(16, T, 16, 10) for T in (60, 96, 128, 192, 256, 384, 512, 768, 1024)]
PREFIX_LENS = (0, 10, 16, 32, 64, 128, 200, 512)
OVER_P_SHORT = [Shape(64, 128, 12, P) for P in PREFIX_LENS]
OVER_P_LONG = [Shape(8, 824, 16, P) for P in PREFIX_LENS]
OVER_B = [Shape(B, 128, 16, 10) for B in (1, 4, 16, 64, 256)]
SMALL = [Shape(2, 16, 2, 5), Shape(2, 24, 2, 0), Shape(3, 16, 2, 5, 4)]  # on a CPU


class Sample(NamedTuple):
    """Inputs of one call, and the gradient that comes back."""

    qkv: Tensor  # (B, T, 3, H, D), a leaf
    leaves: tuple[Tensor, Tensor, Tensor]  # views of it (B, H, T, D), as three leaves
    prefix_k: Tensor  # (H, P, D) or (N, H, P, D), a leaf
    prefix_v: Tensor
    index: Tensor | None  # (B,)
    do: Tensor  # (B, H, T, D) in the memory order (B, T, H, D)


def make_sample(shape: Shape, device: str, seed: int, dtype=torch.bfloat16) -> Sample:
    B, T, H, P, N = shape
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    qkv, bank = normal(B, T, 3, H, D), ((N,) if N else ()) + (H, P, D)
    index = torch.randint(N, (B,), generator=random, device=device) if N else None
    return with_leaves(Sample(qkv, (), normal(*bank), normal(*bank), index, normal(B, T, H, D)))


def with_leaves(sample: Sample, dtype: torch.dtype | None = None) -> Sample:
    """The same values, in another dtype perhaps, as leaves of autograd."""
    qkv, prefix_k, prefix_v, do = (
        x.detach().to(dtype or x.dtype)
        for x in (sample.qkv, sample.prefix_k, sample.prefix_v, sample.do)
    )
    leaves = tuple(x.detach().requires_grad_() for x in heads(qkv))
    do = do if sample.leaves else do.transpose(1, 2)
    for x in (qkv, prefix_k, prefix_v):
        x.requires_grad_()
    return Sample(qkv, leaves, prefix_k, prefix_v, sample.index, do)


def heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v as views (B, H, T, D)."""
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def backend(wanted: SDPBackend, x: Tensor):
    """SDPA takes the wanted kernel, on CUDA; elsewhere its plain one."""
    return sdpa_kernel(wanted if x.is_cuda else SDPBackend.MATH)


def concatenated(s: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D) and k, v (B, H, P + T, D), as the peers need them."""
    q, k, v = heads(s.qkv)
    if s.prefix_k.shape[-2] == 0:  # then nobody would concatenate
        return q, k, v
    rows = (x if s.index is None else x[s.index] for x in (s.prefix_k, s.prefix_v))
    prefix_k, prefix_v = (x.expand(len(q), -1, -1, -1) for x in rows)
    return q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)


@lru_cache(maxsize=1)
def additive_mask(T: int, P: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, P + T): 0 or -inf; rows are padded to 8 elements, so that SDPA copies nothing."""
    width = math.ceil((P + T) / 8) * 8
    full = torch.full((T, width), float("-inf"), device=device, dtype=dtype)
    return full.triu(P + 1)[None, None, :, : P + T]


@lru_cache(maxsize=1)
def block_mask(T: int, P: int, device: torch.device):
    def visible(b, h, i, j):
        return j <= i + P

    return create_block_mask(visible, None, None, T, P + T, device=str(device))


@lru_cache(maxsize=1)
def flex_of(T: int, P: int, device: torch.device) -> Callable:
    """FlexAttention, compiled anew for each shape: it would give up after a few otherwise."""
    if device.type != "cuda":
        return flex_attention
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def ours(s: Sample) -> Tensor:
    return prefix_attention(*heads(s.qkv), s.prefix_k, s.prefix_v, prefix_index=s.index)


def ours_qkv(s: Sample) -> Tensor:
    return prefix_attention_qkv(s.qkv, s.prefix_k, s.prefix_v, prefix_index=s.index)


def flash(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    with backend(SDPBackend.FLASH_ATTENTION, q):
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cudnn(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    P = k.shape[2] - q.shape[2]
    with backend(SDPBackend.CUDNN_ATTENTION, q):
        padded = F.pad(q, (0, 0, P, 0)) if P else q
        return F.scaled_dot_product_attention(padded, k, v, is_causal=True)[:, :, P:]


def efficient(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    mask = additive_mask(q.shape[2], k.shape[2] - q.shape[2], q.device, q.dtype)
    with backend(SDPBackend.EFFICIENT_ATTENTION, q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    key = (q.shape[2], k.shape[2] - q.shape[2], q.device)
    return flex_of(*key)(q, k, v, block_mask=block_mask(*key))


def eager(s: Sample) -> Tensor:
    q, k, v = heads(s.qkv)
    return prefix_attention_eager(q, k, v, s.prefix_k, s.prefix_v, prefix_index=s.index)


def bare(wanted: SDPBackend, separate: bool) -> Callable[[Sample], Tensor]:
    """Attention with no prefix, on views of qkv or on three leaves."""

    def attend(s: Sample) -> Tensor:
        q, k, v = s.leaves if separate else heads(s.qkv)
        with backend(wanted, q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


METHODS: dict[str, Callable[[Sample], Tensor]] = {
    "ours": ours,
    "ours_qkv": ours_qkv,
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "flex": flex,
    "eager": eager,
    "bare_flash": bare(SDPBackend.FLASH_ATTENTION, False),
    "bare_cudnn": bare(SDPBackend.CUDNN_ATTENTION, False),
    "bare_flash_leaves": bare(SDPBackend.FLASH_ATTENTION, True),
    "bare_cudnn_leaves": bare(SDPBackend.CUDNN_ATTENTION, True),
}
PEERS = ("flash", "cudnn", "efficient", "flex", "eager")
BARE, BARE_LEAVES = ("bare_flash", "bare_cudnn"), ("bare_flash_leaves", "bare_cudnn_leaves")
IN_SWEEPS = ("ours", "ours_qkv", "flash", "cudnn", *BARE)
IN_BANKS = ("ours", "ours_qkv")


def run(attend: Callable[[Sample], Tensor], s: Sample, backward: bool) -> list[Tensor]:
    """o, and with `backward` the gradients of what the method reads."""
    if not backward:
        with torch.no_grad():
            return [attend(s)]
    o = attend(s)
    inputs = [s.qkv, *s.leaves, s.prefix_k, s.prefix_v]
    return [
        o,
        *(x for x in torch.autograd.grad(o, inputs, s.do, allow_unused=True) if x is not None),
    ]


def results(name: str, attend: Callable[[Sample], Tensor], s: Sample) -> dict[str, Tensor]:
    """o and the gradients by name; three leaves' gradients are stacked as that of qkv."""
    found = run(attend, s, True)
    if name.endswith("_leaves"):
        found = [found[0], torch.stack([x.transpose(1, 2) for x in found[1:]], dim=2)]
    names = ("o", "dqkv", "dprefix_k", "dprefix_v")[: len(found)]
    return {key: x for key, x in zip(names, found, strict=True) if x.numel()}


class Truth:
    """What results are compared with, for one sample: fp64, and the same formula in its dtype."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        none = sample._replace(
            prefix_k=sample.prefix_k[..., :0, :].detach().requires_grad_(),
            prefix_v=sample.prefix_v[..., :0, :].detach().requires_grad_(),
        )
        self.low, self.exact = {}, {}
        for prefixed, s in ((True, sample), (False, none)):
            self.low[prefixed] = results("eager", eager, s)
            self.exact[prefixed] = results("eager", eager, with_leaves(s, torch.float64))

    def problem(self, name: str, attend: Callable[[Sample], Tensor]) -> str:
        """What is wrong with a method; empty where nothing is.

        |actual - exact| <= 2 |low - exact| + 4 eps max|exact|: another order of summation, and the
        roundings of a recomputation. Eager rounds more: its scores are bf16.
        """
        prefixed = not name.startswith("bare")
        try:
            actual = results(name, attend, self.sample)
        except Exception as error:  # what a peer cannot do is part of the result
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        low, exact = self.low[prefixed], self.exact[prefixed]
        if set(actual) != set(exact):
            return f"wrong: gives {', '.join(actual)}, not {', '.join(exact)}"
        for key, x in actual.items():
            error, low_error = ((y.double() - exact[key]).abs().max().item() for y in (x, low[key]))
            top = exact[key].abs().max().item()
            budget = 2 * low_error + 4 * torch.finfo(x.dtype).eps * top
            if not error <= budget:  # also NaN
                return f"wrong: error of {key} {error:.1e}, budget {budget:.1e}"
        return ""


def graph_times(calls: list[Callable[[], object]], replays: int = 20) -> list[float]:
    """Microseconds per call of CUDA graphs that hold all the calls, one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, plans and loads, which a capture may not do
        for call in (calls * 3)[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    # the GPU waits about a millisecond, so that replays are queued before they can start
    torch.cuda._sleep(2_000_000)
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = zip(events, events[1:], strict=False)
    return [1e3 * a.elapsed_time(b) / len(calls) for a, b in times]


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


def work(shape: Shape, which: str, prefixed: bool = True) -> tuple[float, float]:
    """FLOPs and bytes of a call, by the formulas of the header."""
    B, T, H, P, N = shape
    P, N = (P, max(1, N)) if prefixed else (0, 1)
    pairs = B * H * (T * P + T * (T + 1) / 2)
    if which == "forward":
        return 4 * D * pairs, 2 * (4 * B * T * H * D + 2 * N * H * P * D) + 4 * B * H * T
    return 14 * D * pairs, 2 * (12 * B * T * H * D + 6 * N * H * P * D) + 8 * B * H * T


def bench_shape(shape: Shape, names: tuple[str, ...], device: str) -> Iterator[dict]:
    """A row for each method and pass; where a method does not run or is wrong, a note says why."""
    first = make_sample(shape, device, 0)
    bytes_of_one = first.qkv.nbytes + 2 * first.prefix_k.nbytes + first.do.nbytes
    sets = min(MOST_SETS, max(2, math.ceil(INPUT_BYTES / bytes_of_one))) if device == "cuda" else 1
    samples = [first, *(make_sample(shape, device, seed) for seed in range(1, sets))]
    truth = Truth(first)
    for name in names:
        attend = METHODS[name]
        note = truth.problem(name, attend)
        for which in PASSES:
            row = shape._asdict() | {"D": D, "dtype": "bfloat16", "pass": which}
            row |= {"method": name, "us": "", "us_20": "", "us_80": "", "tflops": "", "gbs": ""}
            row |= {"mib_peak": "", "mib_inputs": round(sets * bytes_of_one / 2**20), "note": note}
            if not note:
                backward = which != "forward"
                calls = [lambda s=s, b=backward, f=attend: run(f, s, b) for s in samples]
                try:
                    row |= measure(calls, device)
                    flops, moved = work(shape, which, not name.startswith("bare"))
                    row["tflops"] = round(flops / row["us"] / 1e6, 2)
                    row["gbs"] = round(moved / row["us"] / 1e3, 1)
                except Exception as error:  # as above
                    row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            yield row


def machine_limits(device: str) -> Iterator[dict]:
    """Rows of what the machine reaches: a large bf16 product, and a large copy."""
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


class Times:
    """Median times out of rows, in microseconds; NaN where there is none."""

    def __init__(self, rows: list[dict]) -> None:
        self.us = {
            tuple(str(row[name]) for name in KEY): float(row["us"]) for row in rows if row["us"]
        }
        copies = [float(row["gbs"]) for row in rows if row["method"] == "copy"]
        self.copy_gbs = copies[0] if copies else math.nan  # GB/s, read and written

    def of(self, shape: Shape, which: str, *names: str) -> float:
        """The best of some methods."""
        keys = [tuple(map(str, (*shape, which, name))) for name in names]
        return min((self.us[key] for key in keys if key in self.us), default=math.nan)

    def adjusted(self, shape: Shape, which: str, name: str, bares: tuple[str, ...]) -> float:
        """Time over that of bare, times the ratio of their work."""
        factor = 1 + 2 * shape.P / (shape.T + 1)
        return self.of(shape, which, name) / (self.of(shape, which, *bares) * factor)


def verdicts(rows: list[dict]) -> list[str]:
    """What was reached of what was aimed at, on an H100; a line each."""
    times, lines = Times(rows), []

    def line(what: str, shape: Shape, value: float, aim: float, stretch: float, most: bool):
        mark = "not measured"
        if not math.isnan(value) and not math.isnan(aim):
            fine, better = (value <= x if most else value >= x for x in (aim, stretch))
            mark = "ok, stretch too" if better else "ok" if fine else "MISSED"
        sign = "<=" if most else ">="
        name = "B={} T={} H={} P={}".format(*shape[:4])
        lines.append(f"{name:24} {what:58} {value:6.2f} {sign} {aim} ({stretch})  {mark}")

    for shape in ISSUE:
        forward, both = PASSES
        # 0: up to 256 tokens; 1: 1000 tokens; 2: a long prefix
        kind = 0 if shape.T <= 256 else 1 if shape.P < 100 else 2
        peers = times.of(shape, forward, *PEERS), times.of(shape, both, *PEERS)
        for name in ("ours", "ours_qkv"):
            if kind < 2:
                ratio = times.adjusted(shape, forward, name, BARE)
                line(f"forward: {name} / bare, work-adjusted", shape, ratio,
                     (1.0, 1.1)[kind], 0.9, True)  # fmt: skip
            ratio = peers[0] / times.of(shape, forward, name)
            line(f"forward: best peer / {name}", shape, ratio,
                 (5, 2.8, 2.6)[kind], (6, 3.2, 3)[kind], False)  # fmt: skip
        for bares, what in ((BARE, "bare of one qkv"), (BARE_LEAVES, "bare of three leaves")):
            ratio = times.adjusted(shape, both, "ours_qkv", bares)
            line(f"forward+backward: ours_qkv / {what}, adjusted", shape, ratio, 1.1, 0.95, True)
        ratio = peers[1] / times.of(shape, both, "ours_qkv")
        line("forward+backward: best peer / ours_qkv", shape, ratio,
             (2, 1.7, 1.5)[kind], (2.5, 2, 1.9)[kind], False)  # fmt: skip
        missing = [x for x in (*PEERS, *BARE) if math.isnan(times.of(shape, both, x))]
        if missing:
            lines[-1] += f" (without {', '.join(missing)})"
    for bank in BANKS:
        for which in PASSES if bank.N else ():
            one = times.of(bank._replace(N=0), which, "ours")
            ratio = times.of(bank, which, "ours") / one
            aim = 1.1
            if which != PASSES[0]:  # and the larger gradient, written at the rate of a copy
                more = 2 * 2 * (bank.N - 1) * bank.H * bank.P * D  # bytes
                aim = round(aim + more / times.copy_gbs / 1e3 / one, 2)
            line(f"{which}: bank of {bank.N} / one prefix", bank, ratio, aim, aim, True)
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Times against T and P, ratios to bare, and the roofline."""
    from matplotlib.figure import Figure

    times = Times(rows)
    figure = Figure(figsize=(15, 8.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    curves = (
        (axes[0, 0], OVER_T, PASSES[0], "T", "P = 10, B = 16, H = 16"),
        (axes[0, 1], OVER_T, PASSES[1], "T", "P = 10, B = 16, H = 16"),
        (axes[1, 0], OVER_P_SHORT, PASSES[0], "P", "T = 128, B = 64, H = 12"),
        (axes[1, 1], OVER_P_LONG, PASSES[1], "P", "T = 824, B = 8, H = 16"),
    )
    names = {"ours_qkv": "ours", "flash": "flash + concatenation", "cudnn": "cuDNN + concatenation"}
    for axis, shapes, which, over, title in curves:
        x = [getattr(shape, over) for shape in shapes]
        for name, label in names.items():
            axis.plot(x, [times.of(shape, which, name) for shape in shapes], "o-", label=label)
        y = [times.of(shape, which, *BARE) for shape in shapes]
        axis.plot(x, y, "k--", label="no prefix (best of flash, cuDNN)")
        long = "sequence length T, tokens" if over == "T" else "prefix length P, positions"
        axis.set(xlabel=long, ylabel="time, µs", title=f"{which}, {title}", ylim=(0, None))
        axis.legend()
    axis, width = axes[0, 2], 0.38
    for n, which in enumerate(PASSES):
        y = [times.adjusted(shape, which, "ours_qkv", BARE) for shape in ISSUE]
        at = [i + (n - 0.5) * width for i in range(len(ISSUE))]
        axis.bar_label(axis.bar(at, y, width, label=which), fmt="%.2f")
    axis.axhline(1, color="black", lw=0.8)
    labels = ["B={}\nT={}\nH={}\nP={}".format(*shape[:4]) for shape in ISSUE]
    axis.set_xticks(range(len(ISSUE)), labels)
    axis.set(ylabel="time / time without prefix, work-adjusted", title="ours against no prefix")
    axis.legend()
    roofline(axes[1, 2], rows, times)
    figure.savefig(path)


def roofline(axis, rows: list[dict], times: Times) -> None:
    """FLOP/s against FLOPs per byte, under what the machine reached in this run."""
    limits = {row["method"]: row for row in rows if row["method"] in ("matmul", "copy")}
    peak, copy = float(limits["matmul"]["tflops"]), float(limits["copy"]["gbs"])
    x = [2.0**n for n in range(3, 12)]
    axis.plot(x, [min(peak, copy * i / 1e3) for i in x], "k-", label="measured limits")
    for which in PASSES:
        at = [work(shape, which) for shape in ISSUE]
        intensity = [flops / moved for flops, moved in at]
        reached = [
            flops / times.of(shape, which, "ours_qkv") / 1e6
            for shape, (flops, _) in zip(ISSUE, at, strict=True)
        ]
        axis.plot(intensity, reached, "o", label=f"ours, {which}")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    axis.set_title("Roofline, bf16")
    axis.legend()


def plan(device: str, quick: bool) -> list[tuple[Shape, tuple[str, ...]]]:
    """Shapes and methods, what matters first; FlexAttention compiles for a long time."""
    everything = tuple(METHODS)
    if device != "cuda":
        return [(shape, IN_BANKS if shape.N else everything) for shape in SMALL]
    if quick:
        fewer = tuple(name for name in everything if name not in ("flex", "eager", "efficient"))
        return [(shape, fewer) for shape in ISSUE]
    first = tuple(name for name in everything if name != "flex")
    steps = [(shape, first) for shape in ISSUE] + [(shape, IN_BANKS) for shape in BANKS]
    steps += [(shape, ("flex",)) for shape in ISSUE]
    sweeps = OVER_T + OVER_P_SHORT + OVER_P_LONG + OVER_B
    return steps + [(shape, IN_SWEEPS) for shape in sweeps]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time prefix attention beside PyTorch's own.")
    parser.add_argument("--out", type=Path, help="folder for attention.csv and attention.png")
    parser.add_argument("--quick", action="store_true", help="a minute: five shapes, fewer peers")
    parser.add_argument("--seconds", type=float, default=270, help="start no shape after this")
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    device, began, rows = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic(), []
    if device == "cpu":
        print("No GPU: small shapes on the CPU, to run the code. These times say nothing.")

    def put(row: dict) -> None:
        rows.append(row)
        print(*(row[name] for name in KEY), row["us"], "us", row["note"], flush=True)
        if args.out:
            add_row(args.out / "attention.csv", row | machine(), KEY)

    for row in machine_limits(device):
        put(row)
    measured = set()
    for shape, names in plan(device, args.quick):
        if time.monotonic() - began > args.seconds:
            print(f"{shape}: left out, {args.seconds:.0f} s are over", flush=True)
            continue
        left = tuple(name for name in names if (shape, name) not in measured)
        measured |= {(shape, name) for name in left}
        for row in bench_shape(shape, left, device) if left else ():
            put(row)
    print("\n".join(verdicts(rows)) if device == "cuda" else "")
    if args.out and device == "cuda":  # the small shapes of a CPU are on no axis
        draw(rows, args.out / "attention.png")
    wrong = [row for row in rows if row["method"].startswith("ours") and row["note"]]
    print(f"{time.monotonic() - began:.0f} s; {len(wrong)} rows of ours failed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
