"""Times prefix attention and PyTorch's alternatives: forward, and forward + backward.

    python -m benchmarks.kernels.attention [--out FOLDER] [--part targets] [--seconds 100]
    python -m benchmarks.kernels.attention --draw benchmarks/gpu/attention-h200.csv

All calls are in bf16, D = 64, causal. `peers.py` has the methods and their check, `clock.py` the
clock. Everything that is timed is first compared with the definition, `prefix_attention_eager`, in
fp64 on the same inputs. A small shape is measured first and discarded (`WARM_UP`): without it, CUDA
on an H200 could not capture the first calls of a process that stack a gradient of qkv.

Work per call, with W = B H (T P + T (T + 1) / 2) visible pairs of query and key, e = 2 bytes:

    FLOPs:  forward 4 D W; forward + backward 14 D W (two products, then five more)
    bytes:  forward  e (4 B T H D + 2 N H P D) + 4 B H T
            forward + backward  e (12 B T H D + 6 N H P D) + 8 B H T
            (forward; then q, k, v, o, do, lse and the prefix are read, all gradients are written)

"Work-adjusted" means relative to the time of bare times 1 + 2 P / (T + 1), the ratio of the two W.
bare is the best of cuDNN and the flash kernels, with a backward pass on three leaves. `aims` has
the targets.

us is the median time of a call in microseconds, and us_20 and us_80 are quantiles. mib_inputs is
the size of all sets of inputs, and mib_peak the peak allocation of one call including its outputs,
both in MiB. The rows are written to attention-DEVICE.csv, with a figure next to it.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.kernels.clock import (
    device_name,
    go_on_if_lost,
    machine_limits,
    measure,
    need_kernels,
    rows_of_this_commit,
    sets_of,
)
from benchmarks.kernels.peers import (
    BARE,
    BARE_LEAVES,
    COMPILED,
    METHODS,
    PEERS,
    D,
    Shape,
    Truth,
    implementation,
    make_sample,
    missing,
    reason,
    run,
)
from benchmarks.machine import add_row, machine, read_rows
from minprefix.palette import OTHER, PALE, PREFIX, TEXT

KEY = ("B", "T", "H", "P", "N", "pass", "method")
PASSES = ("forward", "forward+backward")
WARM_UP = Shape(4, 64, 4, 10)
ISSUE = [  # the shapes with targets
    Shape(64, 128, 12, 10),
    Shape(16, 128, 16, 10),
    Shape(32, 256, 16, 10),
    Shape(16, 1000, 16, 10),
    Shape(8, 824, 16, 200),
]
MORE = [Shape(16, 60, 16, 10), Shape(16, 512, 16, 10), Shape(256, 128, 16, 10)]  # judged alike
BANKS = [Shape(64, 128, 12, P, N) for P in (10, 32) for N in (0, 64)]
OVER_T = [Shape(16, T, 16, 10) for T in (60, 96, 128, 192, 256, 384, 512, 768, 1000)]
PREFIX_LENS = (0, 10, 16, 32, 64, 128, 200, 512)
OVER_P_SHORT = [Shape(64, 128, 12, P) for P in PREFIX_LENS]
OVER_P_LONG = [Shape(8, 824, 16, P) for P in PREFIX_LENS]
OVER_B = [Shape(B, 128, 16, 10) for B in (1, 4, 16, 64, 256)]
SMALL = [Shape(2, 16, 2, 5), Shape(2, 24, 2, 0), Shape(3, 16, 2, 5, 4)]  # on a CPU
IN_SWEEPS = ("ours", "ours_qkv", "flash", "cudnn", *BARE, "bare_flash_leaves", "bare_cudnn_leaves")
IN_BANKS = ("ours", "ours_qkv")
MORE_THAN_ONE_PREFIX = 1.1  # a bank of 64 against one prefix, P <= 32: at most, in both passes


def aims(shape: Shape) -> dict[str, float]:
    """The targets by pass: the largest work-adjusted ratio to the time of bare."""
    long = shape.T > 256 or shape.P >= 100
    both = 1.0 if long else 0.75 if shape.T <= 128 else 0.85
    return dict(zip(PASSES, (1.1 if long else 1.0, both), strict=True))


def work(shape: Shape, which: str, prefixed: bool = True) -> tuple[float, float]:
    """FLOPs and bytes of a call, by the formulas of the header."""
    B, T, H, P, N = shape
    P, N = (P, max(1, N)) if prefixed else (0, 1)
    pairs = B * H * (T * P + T * (T + 1) / 2)
    if which == "forward":
        return 4 * D * pairs, 2 * (4 * B * T * H * D + 2 * N * H * P * D) + 4 * B * H * T
    return 14 * D * pairs, 2 * (12 * B * T * H * D + 6 * N * H * P * D) + 8 * B * H * T


def bench_shape(shape: Shape, names: tuple[str, ...], device: str) -> Iterator[dict]:
    """A row for each method and pass; if a method fails or is wrong, a note says why."""
    first = make_sample(shape, device, 0)
    bytes_of_one = first.qkv.nbytes + 2 * first.prefix_k.nbytes + first.do.nbytes
    sets = sets_of(bytes_of_one, device)
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
                    with implementation(name):
                        row |= measure(calls, device)
                    flops, moved = work(shape, which, not name.startswith("bare"))
                    row["tflops"] = round(flops / row["us"] / 1e6, 2)
                    row["gbs"] = round(moved / row["us"] / 1e3, 1)
                except Exception as error:  # a peer's failure is part of the result
                    row["note"] = reason(error)
            yield row


class Times:
    """Median times from rows, in microseconds; NaN if there is none."""

    def __init__(self, rows: list[dict]) -> None:
        self.us = {
            tuple(str(row[name]) for name in KEY): float(row["us"]) for row in rows if row["us"]
        }

    def of(self, shape: Shape, which: str, *names: str) -> float:
        """The best of some methods."""
        return min(self.by_method(shape, which, *names).values(), default=math.nan)

    def by_method(self, shape: Shape, which: str, *names: str) -> dict[str, float]:
        """The times of the methods that were measured."""
        keys = {name: tuple(map(str, (*shape, which, name))) for name in names}
        return {name: self.us[key] for name, key in keys.items() if key in self.us}

    def bare(self, shape: Shape, which: str) -> float:
        """The best time of attention without a prefix."""
        return self.of(shape, which, *BARE_LEAVES, *(BARE if which == PASSES[0] else ()))

    def adjusted(self, shape: Shape, which: str) -> float:
        """Time over that of bare, times the ratio of their work."""
        factor = 1 + 2 * shape.P / (shape.T + 1)
        return self.of(shape, which, "ours_qkv") / (self.bare(shape, which) * factor)


def verdicts(rows: list[dict]) -> list[str]:
    """One line for each target: its value and whether it was reached."""
    times, lines = Times(rows), []

    def line(what: str, shape: Shape, value: float, aim: float, after: str) -> None:
        mark = "not measured" if math.isnan(value) else "ok" if value <= aim else "MISSED"
        name = "B={} T={} H={} P={}".format(*shape[:4])
        lines.append(f"{name:23} {what:42} {value:6.2f} <= {aim:.2f}  {mark:12} {after}".rstrip())

    for shape in ISSUE + MORE:
        for which in PASSES:
            ours = times.of(shape, which, "ours_qkv")
            after = f"{ours:.1f} us, bare {times.bare(shape, which):.1f}"
            if peers := times.by_method(shape, which, *PEERS):
                best = min(peers, key=peers.get)
                after += f"; best peer {best}, {peers[best] / ours:.1f} times ours"
            line(f"{which}: ours / bare, adjusted", shape, times.adjusted(shape, which),
                 aims(shape)[which], after)  # fmt: skip
    for bank in BANKS:
        for which in PASSES if bank.N else ():
            pair = [times.of(x, which, "ours_qkv") for x in (bank, bank._replace(N=0))]
            line(f"{which}: bank of {bank.N} / one prefix", bank, pair[0] / pair[1],
                 MORE_THAN_ONE_PREFIX, "{:.1f} us, one prefix {:.1f}".format(*pair))  # fmt: skip
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Plot times against T and P, ratios to bare, and the roofline; skips empty panels."""
    from matplotlib.figure import Figure

    times = Times(rows)
    long, short = "sequence length T (tokens)", "prefix length P (positions)"
    curves = [
        (OVER_T, PASSES[0], "T", long, "P 10, B 16, H 16"),
        (OVER_T, PASSES[1], "T", long, "P 10, B 16, H 16"),
        (OVER_P_SHORT, PASSES[1], "P", short, "T 128, B 64, H 12"),
        (OVER_P_LONG, PASSES[1], "P", short, "T 824, B 8, H 16"),
    ]
    curves = [c for c in curves if sum(times.of(s, c[1], "ours_qkv") > 0 for s in c[0]) > 1]
    columns = -(-(len(curves) + 2) // 2)
    figure = Figure(figsize=(5.2 * columns, 8.4), dpi=100, layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False).T.flatten()
    for axis in panels[len(curves) + 2 :]:
        axis.set_axis_off()
    for axis, (shapes, which, over, label, title) in zip(panels, curves, strict=False):
        lines = {
            "ours": ("o-", PREFIX, lambda s, w=which: times.of(s, w, "ours_qkv")),
            "best peer": ("s-", OTHER, lambda s, w=which: times.of(s, w, *PEERS)),
            "no prefix": ("--", TEXT, lambda s, w=which: times.bare(s, w)),
        }
        for name, (style, colour, us) in lines.items():
            points = [(getattr(shape, over), us(shape)) for shape in shapes]
            points = [point for point in points if not math.isnan(point[1])]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=name)
        axis.set(xlabel=label, ylabel="time of a call (µs)", title=f"{which}, {title}")
        axis.set(ylim=(0, None))
        axis.legend(frameon=False)
    bars(panels[len(curves)], times)
    roofline(panels[len(curves) + 1], rows, times)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    names = {row["gpu"] for row in rows if row.get("gpu")}
    figure.suptitle(f"Attention with a prefix, bf16, D {D}: {', '.join(sorted(names))}")
    figure.savefig(path)


def bars(axis, times: Times) -> None:
    """Ours over attention without a prefix, with the targets."""
    shapes, width = [s for s in ISSUE + MORE if times.of(s, PASSES[0], "ours_qkv") > 0], 0.38
    for n, (which, colour) in enumerate(zip(PASSES, (PALE, PREFIX), strict=True)):
        at = [i + (n - 0.5) * width for i in range(len(shapes))]
        drawn = axis.bar(
            at, [times.adjusted(s, which) for s in shapes], width, color=colour, label=which
        )
        axis.bar_label(drawn, fmt="%.2f", fontsize=7, label_type="center")
        marks = [aims(shape)[which] for shape in shapes]
        axis.hlines(marks, [x - width / 2 for x in at], [x + width / 2 for x in at], color="black",
                    lw=1.5, label="target" if n else None)  # fmt: skip
    axis.set_xticks(range(len(shapes)), ["{}\n{}\n{}\n{}".format(*s[:4]) for s in shapes])
    axis.set(ylabel="time / (time without prefix, work-adjusted)", xlabel="B, T, H, P")
    axis.set(title="ours against no prefix: lower is better", ylim=(0, 1.5))
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")


def roofline(axis, rows: list[dict], times: Times) -> None:
    """FLOP/s against FLOPs per byte, below the limits that the machine reached in this run."""
    limits = {row["method"]: row for row in rows if row["method"] in ("matmul", "copy")}
    if len(limits) == 2:
        peak, copy = float(limits["matmul"]["tflops"]), float(limits["copy"]["gbs"])
        x = [8.0, 1e3 * peak / copy, 2048.0]  # both limits meet at the corner
        axis.plot(x, [min(peak, copy * i / 1e3) for i in x], "k-", label="measured limits")
    for which, colour in zip(PASSES, (PALE, PREFIX), strict=True):
        at = [work(shape, which) for shape in ISSUE]
        reached = [
            flops / times.of(shape, which, "ours_qkv") / 1e6
            for shape, (flops, _) in zip(ISSUE, at, strict=True)
        ]
        axis.plot([flops / moved for flops, moved in at], reached, "o", color=colour,
                  label=f"ours, {which}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    ticks = (20, 50, 100, 200, 500, 1000)
    axis.set_yticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_title("roofline: the shapes with targets")
    axis.legend(frameon=False)


def plan(device: str, part: str) -> list[tuple[Shape, tuple[str, ...]]]:
    """Shapes and methods, the most important first; compiled ones take longest and come last."""
    everything = tuple(name for name in METHODS if name not in missing())
    if device != "cuda":
        return [(shape, IN_BANKS if shape.N else everything) for shape in SMALL]
    first = tuple(name for name in everything if name not in COMPILED)
    targets = [(shape, first) for shape in ISSUE]
    targets += [(shape, IN_BANKS) for shape in BANKS] + [(shape, IN_SWEEPS) for shape in MORE]
    targets += [(shape, (name,)) for name in reversed(COMPILED) for shape in ISSUE]
    sweeps = [(s, IN_SWEEPS) for s in OVER_T + OVER_P_LONG + OVER_P_SHORT + OVER_B]
    return {"targets": targets, "sweeps": sweeps, "all": targets + sweeps}[part]


def steps_left(
    steps: list[tuple[Shape, tuple[str, ...]]], rows: list[dict]
) -> list[tuple[Shape, tuple[str, ...]]]:
    """The plan without methods that have rows, and each method of a shape only once."""
    counts: dict[tuple, int] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in KEY if name != "pass")
        counts[key] = counts.get(key, 0) + (len(PASSES) if row["note"] else 1)
    done = {key for key, n in counts.items() if n >= len(PASSES)}
    left = []
    for shape, names in steps:
        keys = {name: (*map(str, shape), name) for name in names}
        names = tuple(name for name, key in keys.items() if key not in done)
        done |= set(keys.values())
        left += [(shape, names)] if names else []
    return left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time prefix attention and PyTorch's own.")
    parser.add_argument("--out", type=Path, help="folder for attention-DEVICE.csv and its picture")
    parser.add_argument("--part", choices=("targets", "sweeps", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=270, help="start no shape after this")
    parser.add_argument("--resume", action="store_true", help="only what the CSV lacks")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only its verdicts and picture")
    args = parser.parse_args(arguments)
    if args.draw:
        show(read_rows(args.draw), args.draw)
        return 0
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    if device == "cuda":
        need_kernels()
    else:
        print("No GPU: small shapes on the CPU, only to run the code. These times mean nothing.")
    path = args.out / f"attention-{device_name()}.csv" if args.out else None
    if path:
        args.out.mkdir(parents=True, exist_ok=True)
    rows = rows_of_this_commit(path) if path and (args.resume or args.part == "sweeps") else []

    def put(row: dict) -> None:
        rows.append(row)
        print(*(row[name] for name in KEY), row["us"], "us", row["note"], flush=True)
        if path:
            add_row(path, row | machine(), KEY)

    for name, why in missing().items():
        print(f"{name}: not here, {why}")
    for row in [] if rows else machine_limits(device):
        put(row)
    if device == "cuda":
        list(bench_shape(WARM_UP, ("ours_qkv", "ours", *BARE), device))
    for shape, names in steps_left(plan(device, args.part), rows):
        if time.monotonic() - began > args.seconds:
            print(f"{shape}: left out, {args.seconds:.0f} s are over", flush=True)
            continue
        untold = list(names)
        try:
            for row in bench_shape(shape, names, device):
                put(row)
                untold = [name for name in untold if name != row["method"]]
                if row["note"]:
                    go_on_if_lost(args, began)
        except Exception as error:  # the inputs or the definition failed
            note = {"pass": PASSES[0], "us": "", "note": reason(error)}
            for name in untold:
                put(shape._asdict() | {"method": name} | note)
            go_on_if_lost(args, began)
    if device == "cuda":  # the small shapes of a CPU are not plotted
        show(rows, path)
    wrong = [row for row in rows if row["method"].startswith("ours") and row["note"]]
    print(f"{time.monotonic() - began:.0f} s; {len(wrong)} rows of ours failed")
    return 1 if wrong else 0


def show(rows: list[dict], path: Path | None) -> None:
    """Print the verdicts, and write the figure next to the CSV."""
    print("\n".join(verdicts(rows)))
    if path:
        draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
