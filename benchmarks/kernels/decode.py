"""Times one step of decoding, one query per row over [prefix; cached keys], and alternatives.

    python -m benchmarks.kernels.decode [--out FOLDER] [--seconds 100]
    python -m benchmarks.kernels.decode --draw benchmarks/gpu/decode-h200.csv

bf16, D = 64, T = 1. A step writes the new key and value to the cache and attends to all of it. Each
method's o is first compared with the definition, `prefix_attention_eager`, in fp64. Methods:

  - grown: Hugging Face's default. Each row's cache holds its prefix, and `torch.cat` makes a new
    one with the new key and value at each step; then SDPA.
  - static: the cache holds the prefix and has room; `index_copy_`, then SDPA on the filled part.
  - ours: the cache has room and no prefix; `kernels.decode` writes the new tokens and attends. It
    gets their columns as a tensor, as in a CUDA graph. The prefix is not copied.
  - split: ours with splits wherever there are multiprocessors for them, which was the rule before
    `kernels.cut.SPLIT_BYTES`; up to 8 rows.
  - ours_only: `kernels.decode` without the update of the cache, from which its bandwidth follows.

The bytes that any method must move, with e = 2, S keys including the new one, and R different
prefixes, are

    attention: e (2 D H (B S + R P) + 2 B H D) + 4 B H,    the update: 4 e B H D

gbs is this number divided by the median time of a step, in GB/s. of_copy is its ratio to the GB/s
of a large copy (bytes read and written) in the same run. A method that moves more bytes, such as
`grown`, has fewer GB/s.

us is the median time of a step in microseconds, us_20 and us_80 are the quantiles, by CUDA graphs
that read each step's cache from memory (`clock.py`). The rows are written to decode-DEVICE.csv,
with a figure next to it. On a CPU small shapes run once or twice, with `prefix_attention_lean`
instead of the kernels; those times say nothing about a GPU.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.clock import device_name, machine_limits, measure, need_kernels, sets_of
from benchmarks.kernels.peers import reason
from benchmarks.machine import add_row, machine, read_rows
from kernels import prefix_attention_eager, prefix_attention_lean
from kernels.inputs import Append, Inputs
from minprefix.palette import FAINT, OTHER, PALE, PREFIX

D = 64
KEY = ("B", "H", "S", "P", "N", "method")


class Shape(NamedTuple):
    """N = 0: one prefix (H, P, D) for all rows; else a bank of N, row b uses prefix b % N."""

    B: int
    H: int
    S: int  # keys that a step attends to, the new one with them
    P: int
    N: int = 0


REFERENCE = [Shape(64, 12, 512, 10), Shape(64, 16, 512, 10), Shape(1, 16, 512, 10)]
BANKS = [Shape(64, 16, 512, P, N) for P in (10, 200) for N in (0, 64)]
OVER_S = [Shape(64, 16, S, 10) for S in (64, 128, 256, 512, 1024, 2048, 4096)]
OVER_B = [Shape(B, 16, 512, 10) for B in (1, 2, 4, 8, 16, 32, 64)]
ONE_ROW = [Shape(1, 16, S, 10) for S in (128, 512, 1024, 4096, 16384)]
OVER_P = [Shape(64, 16, 512, P) for P in (0, 10, 32, 64, 128, 200, 512, 1024)]
SMALL = [Shape(2, 2, 16, 5), Shape(3, 2, 24, 0), Shape(4, 2, 16, 5, 3)]  # on a CPU


class Sample(NamedTuple):
    """Inputs of one step. The new key and value belong to column S - 1."""

    q: Tensor  # (B, H, 1, D)
    new: Tensor  # (2, B, H, 1, D)
    cache: Tensor  # (2, B, H, Smax, D), S - 1 of them filled
    prefix: Tensor  # (2, H, P, D) or (2, N, H, P, D)
    index: Tensor | None  # (B,)
    kv_lens: Tensor  # (B,), S in each row
    q_offset: Tensor  # (B,), S - 1 in each row

    def keys(self) -> Tensor:
        """The part of the cache that a step reads: (2, B, H, S, D)."""
        return self.cache[:, :, :, : self.cache.shape[3] - 32]


def make_sample(shape: Shape, device: str, seed: int) -> Sample:
    B, H, S, P, N = shape
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device).bfloat16()

    bank = (2, N, H, P, D) if N else (2, H, P, D)
    lens = torch.full((B,), S, device=device)
    index = torch.arange(B, device=device) % N if N else None
    # with some room for later tokens
    cache = normal(2, B, H, S + 32, D)
    return Sample(
        normal(B, H, 1, D), normal(2, B, H, 1, D), cache, normal(*bank), index, lens, lens - 1
    )


def with_prefix(s: Sample, room: int) -> Tensor:
    """A cache that holds each row's prefix, the S - 1 keys and `room`: (2, B, H, P + ..., D)."""
    rows = s.prefix[:, None] if s.index is None else s.prefix[:, s.index]  # (2, 1 or B, H, P, D)
    rows = rows.expand(2, s.q.shape[0], -1, -1, -1)
    filled = s.cache.shape[3] - 32 - 1
    return torch.cat([rows, s.cache[:, :, :, : filled + room]], dim=3)


def grown(s: Sample) -> Callable[[], Tensor]:
    k, v = with_prefix(s, room=0)

    def step() -> Tensor:
        return F.scaled_dot_product_attention(
            s.q, torch.cat([k, s.new[0]], dim=2), torch.cat([v, s.new[1]], dim=2)
        )

    return step


def static(s: Sample) -> Callable[[], Tensor]:
    k, v = with_prefix(s, room=32)
    last = k.shape[2] - 32  # the column of the new key
    place = torch.tensor([last], device=k.device)

    def step() -> Tensor:
        k.index_copy_(2, place, s.new[0])
        v.index_copy_(2, place, s.new[1])
        return F.scaled_dot_product_attention(s.q, k[:, :, : last + 1], v[:, :, : last + 1])

    return step


def ours(s: Sample) -> Callable[[], Tensor]:
    k, v = s.keys()
    if not s.q.is_cuda:
        options = {"prefix_index": s.index, "q_offset": s.q_offset, "append": s.new}
        return lambda: prefix_attention_lean(s.q, k, v, *s.prefix, **options)
    from kernels.decode import decode  # imported here, because a CPU has no Triton

    inputs = Inputs(s.q, k, v, *s.prefix, s.index, None, None, s.q_offset)
    new = Append(s.new[0], s.new[1])
    return lambda: decode(inputs, new)[0]


def split(s: Sample) -> Callable[[], Tensor]:
    from kernels import cut

    step = ours(s)

    def split_step() -> Tensor:
        with patch.object(cut, "SPLIT_BYTES", -1):
            return step()

    return split_step


def ours_only(s: Sample) -> Callable[[], Tensor]:
    """The kernel, on a cache that already has the new key and value."""
    s.cache[:, :, :, s.cache.shape[3] - 33 : s.cache.shape[3] - 32] = s.new
    if not s.q.is_cuda:
        options = {"prefix_index": s.index, "kv_lens": s.kv_lens, "q_offset": s.q_offset}
        return lambda: prefix_attention_lean(s.q, *s.keys(), *s.prefix, **options)
    from kernels.decode import decode

    inputs = Inputs(s.q, *s.keys(), *s.prefix, s.index, None, s.kv_lens, s.q_offset)
    return lambda: decode(inputs)[0]


METHODS = {"ours": ours, "ours_only": ours_only, "split": split, "grown": grown,
           "static": static}  # fmt: skip


class Truth:
    """o of one sample by the definition, in fp64 and in bf16."""

    def __init__(self, s: Sample) -> None:
        S = s.cache.shape[3] - 32
        k, v = (
            torch.cat([x[:, :, : S - 1], new], dim=2) for x, new in zip(s.cache, s.new, strict=True)
        )
        inputs = (s.q, k, v, *s.prefix)
        self.low = prefix_attention_eager(*inputs, prefix_index=s.index)
        self.exact = prefix_attention_eager(*(x.double() for x in inputs), prefix_index=s.index)

    def problem(self, o: Tensor) -> str:
        """Empty if |o - exact| <= 2 |low - exact| + 4 eps max|exact|: sums in another order."""
        error, low = ((x.double() - self.exact).abs().max().item() for x in (o, self.low))
        budget = 2 * low + 4 * torch.finfo(o.dtype).eps * self.exact.abs().max().item()
        return "" if error <= budget else f"wrong: error {error:.1e}, budget {budget:.1e}"


def work(shape: Shape, method: str) -> int:
    """Bytes of a step by the formula of the header."""
    B, H, S, P, N = shape
    prefixes = min(B, N) if N else 1
    update = 0 if method == "ours_only" else 8 * B * H * D
    return 2 * (2 * D * H * (B * S + prefixes * P) + 2 * B * H * D) + 4 * B * H + update


def bench_shape(shape: Shape, copy_gbs: float, device: str) -> Iterator[dict]:
    """A row for each method; if it fails or is wrong, there is a note instead of a time."""
    bytes_of_one = work(shape, "ours")
    sets = sets_of(bytes_of_one, device)
    samples = [make_sample(shape, device, seed) for seed in range(sets)]
    truth = Truth(samples[0])
    for method, prepare in METHODS.items():
        if method == "split" and (shape.B > 8 or device != "cuda"):
            continue
        row = shape._asdict() | {"T": 1, "D": D, "dtype": "bfloat16", "method": method}
        row |= {"us": "", "us_20": "", "us_80": "", "mib_peak": "", "gbs": "", "of_copy": ""}
        row |= {"mib_inputs": round(sets * bytes_of_one / 2**20, 2), "note": ""}
        try:
            steps = [prepare(s) for s in samples]
            row["note"] = truth.problem(steps[0]())
            if not row["note"]:
                row |= measure(steps, device)
                gbs = work(shape, method) / row["us"] / 1e3
                row |= {"gbs": round(gbs, 1), "of_copy": round(gbs / copy_gbs, 3)}
        except Exception as error:  # a peer's failure is part of the result
            row["note"] = reason(error)
        yield row


class Times:
    """Columns of the rows by shape and method; NaN if there is none."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = {tuple(str(row[name]) for name in KEY): row for row in rows}

    def of(self, shape: Shape, method: str, column: str = "us") -> float:
        return float(self.rows.get((*map(str, shape), method), {}).get(column) or math.nan)


def verdicts(times: Times) -> list[str]:
    """One line for each target (for an H100): its value and whether it was reached."""
    lines = []

    def line(shape: Shape, what: str, value: float, aim: float, most: bool = False) -> None:
        mark = "ok" if (value <= aim if most else value >= aim) else "MISSED"
        mark = "not measured" if math.isnan(value) else mark
        name = "B={} H={} S={} P={}".format(*shape[:4])
        sign = "<=" if most else ">="
        lines.append(f"{name:23} {what:48} {value:6.2f} {sign} {aim:.2f}  {mark}")

    for shape in REFERENCE:
        B, _, S, P, _ = shape
        ours = times.of(shape, "ours")
        if B > 1:
            grown, static = (times.of(shape, name) / ours for name in ("grown", "static"))
            line(shape, "decode: cache with prefix, grown / ours", grown, 1.5)
            aim = 0.9 * (S + P) / (S + P / B)  # of the ratio of bytes
            line(shape, "decode: static cache with prefix / ours", static, aim)
        line(shape, "decode: share of a copy's bandwidth (a stretch)",
             times.of(shape, "ours_only", "of_copy"), 0.85)  # fmt: skip
    for shape in [one for one in ONE_ROW + OVER_B if one.B <= 8]:
        ratio = times.of(shape, "split") / times.of(shape, "ours")
        line(shape, "decode: splits wherever they fit / ours", ratio, 0.98)
    for bank in BANKS:
        if bank.N and bank.P <= 32:
            ratio = times.of(bank, "ours") / times.of(bank._replace(N=0), "ours")
            line(bank, f"decode: bank of {bank.N} / one prefix", ratio, 1.1, most=True)
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Plot times against S, B and P, and the kernel's bandwidth; skips empty panels."""
    from matplotlib.figure import Figure

    times = Times(rows)
    panels = [
        (OVER_S, "S", "cached keys S (tokens)", "B 64, H 16, P 10"),
        (OVER_B, "B", "rows B", "S 512, H 16, P 10"),
        (OVER_P, "P", "prefix length P (positions)", "B 64, H 16, S 512"),
    ]
    panels = [p for p in panels if sum(times.of(shape, "ours") > 0 for shape in p[0]) > 1]
    lines = 1 if len(panels) < 3 else 2
    columns = -(-(len(panels) + 1) // lines)
    figure = Figure(figsize=(5.0 * columns, 4.2 * lines), dpi=100, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).T.flatten()
    for axis in grid[len(panels) + 1 :]:
        axis.set_axis_off()
    labels = {
        "grown": ("cache with prefix, grown by cat", FAINT),
        "static": ("static cache with prefix, SDPA", OTHER),
        "ours": ("ours", PREFIX),
        "ours_only": ("ours, the kernel alone", PALE),
    }
    for axis, (shapes, over, name, title) in zip(grid, panels, strict=False):
        for method, (label, colour) in labels.items():
            points = [(getattr(shape, over), times.of(shape, method)) for shape in shapes]
            points = sorted(point for point in points if not math.isnan(point[1]))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        axis.set(xlabel=name, ylabel="time of a step (µs)", title=title, ylim=(0, None))
        axis.legend(frameon=False, fontsize=9)
    axis = grid[len(panels)]
    measured = {
        shape: times.of(shape, "ours_only", "of_copy")
        for shape in REFERENCE + BANKS + OVER_S + OVER_B + ONE_ROW + OVER_P
    }
    for few, label, colour in ((False, "B > 8", PREFIX), (True, "B <= 8", PALE)):
        points = [
            (work(shape, "ours_only") / 2**20, share)
            for shape, share in measured.items()
            if (shape.B <= 8) == few
        ]
        axis.plot(*zip(*points, strict=True), "o", color=colour, label=label)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(xlabel="bytes to move (MiB)", ylabel="bandwidth / a large copy's", ylim=(0, 1.1))
    axis.set(xscale="log", title="ours, the kernel alone")
    axis.legend(frameon=False)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    names = sorted({row["gpu"] for row in rows if row.get("gpu")})
    figure.suptitle(f"One step of decoding, bf16, D {D}: {', '.join(names)}")
    figure.savefig(path)


def show(rows: list[dict], path: Path | None) -> None:
    """Print the verdicts, and write the figure next to the CSV."""
    print("\n".join(verdicts(Times(rows))))
    if path:
        draw(rows, path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time a step of decoding.")
    parser.add_argument("--out", type=Path, help="folder for decode-DEVICE.csv and its picture")
    parser.add_argument("--seconds", type=float, default=270, help="start no shape after this")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only its verdicts and picture")
    args = parser.parse_args(arguments)
    if args.draw:
        show(read_rows(args.draw), args.draw)
        return 0
    path = args.out / f"decode-{device_name()}.csv" if args.out else None
    if path:
        args.out.mkdir(parents=True, exist_ok=True)
    device, began, rows = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic(), []
    where = machine()
    if device == "cuda":
        need_kernels()
    else:
        print("No GPU: small shapes on the CPU, only to run the code. These times mean nothing.")
    copy_gbs = next(x["gbs"] for x in machine_limits(device) if x["method"] == "copy")
    print(f"a large copy: {copy_gbs} GB/s", flush=True)
    shapes = REFERENCE + BANKS + OVER_S + OVER_B + ONE_ROW + OVER_P
    for shape in dict.fromkeys(shapes if device == "cuda" else SMALL):
        if time.monotonic() - began > args.seconds:
            print(f"{shape}: left out, {args.seconds:.0f} s are over", flush=True)
            continue
        for row in bench_shape(shape, copy_gbs, device):
            rows.append(row)
            shown = (*(row[name] for name in KEY), row["us"], "us", row["gbs"], "GB/s", row["note"])
            print(*shown, flush=True)
            if path:
                add_row(path, row | {"copy_gbs": copy_gbs} | where, KEY)
    if device == "cuda":  # the small shapes of a CPU are not plotted
        show(rows, path)
    wrong = [row for row in rows if row["method"].startswith("ours") and row["note"]]
    print(f"{time.monotonic() - began:.0f} s; {len(wrong)} rows of ours failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
