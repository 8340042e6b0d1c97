"""Times the kernels other than attention, and PyTorch's: the loss of the head, a sum with its layer
norm, the products of a token.

    python -m benchmarks.kernels.fused [--out FOLDER] [--seconds 25]

bf16, at the shapes of GPT-2 medium: C = 1024, V = 50257, n positions. It times

  - head: from hidden states to losses and their gradient. `plain` is PyTorch's softmax in fp32 with
    V columns; `ours` pads V to a multiple of 64 and has one kernel between the two products;
    `products` has only these two, padded, which is the least cost of the head.
  - cross_entropy: that kernel alone, with each of TILES.
  - add_norm, norm_grad: x + y with its layer norm, and the gradient of both; `plain` is PyTorch's
    two kernels for each. Inputs are not in the L2 cache.
  - products: those of a token, with all that `few_rows.py` includes, in 24 layers without
    attention, for n = 1, 2, 4 positions.

Ours is first compared with `plain`. gbs is the bytes from the header of each kernel, divided by the
median time. us, us_20 and us_80 are as in `decode.py`. The rows are written to fused-DEVICE.csv;
the summary of `benchmarks/gpu.sh train` judges them (`verdicts`). On a CPU small shapes run once or
twice, without the kernels; those times say nothing about a GPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.clock import device_name, measure, need_kernels, sets_of
from benchmarks.machine import add_row, machine
from kernels import cross_entropy_, fused_linear, fuses
from kernels.launch import Tile
from minprefix.models.losses import frozen_head_loss, with_padding

KEY = ("what", "method", "n", "C", "V", "dtype")
TILES = [Tile(1, 4096, 8, 1), Tile(1, 2048, 4, 1), Tile(1, 4096, 16, 1), Tile(1, 8192, 16, 1),
         Tile(1, 8192, 8, 1), Tile(1, 4096, 8, 2)]  # the default first  # fmt: skip
EPS = 1e-5


class Shape(NamedTuple):
    """The sizes of a step: positions, width, vocabulary."""

    n: int
    C: int
    V: int


ISSUE = [Shape(1280, 1024, 50257), Shape(8192, 1024, 50257)]
TOKENS = [Shape(n, 1024, 0) for n in (1, 2, 4)]
SMALL, SMALL_TOKENS = [Shape(12, 32, 101)], [Shape(2, 32, 0)]


class Timed(NamedTuple):
    """One method: calls on several inputs, and the bytes that one call moves (0: not counted)."""

    what: str
    method: str
    calls: list[Callable[[], object]]
    n_bytes: int = 0


def normal(*size: int, device: str) -> Tensor:
    return torch.randn(size, device=device).to(torch.bfloat16)


def agree(ours: Tensor, plain: Tensor, what: str) -> None:
    """Assert that both agree within 4 units in the last place of the largest value, since both
    round to bf16 once or twice."""
    error, most = ((x).abs().max().item() for x in (ours.float() - plain.float(), plain.float()))
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * most, f"{what}: they differ by {error}"


def head(shape: Shape, device: str) -> Iterator[Timed]:
    """Losses and the gradient of the hidden states."""
    n, C, V = shape
    weight, labels = 0.1 * normal(V, C, device=device), torch.randint(V, (n,), device=device)
    padded, hidden = with_padding(weight), normal(n, C, device=device).requires_grad_()

    def run(matrix: Tensor, fused: str) -> tuple[Tensor, Tensor]:
        with patch.dict("os.environ", {"MINPREFIX_FUSED": fused}):
            losses = frozen_head_loss(hidden, matrix, labels, vocab_size=V)
        return losses, torch.autograd.grad(losses.sum(), hidden)[0]

    def products() -> Tensor:
        with torch.no_grad():
            return (hidden @ padded.T) @ padded

    ours, plain = partial(run, padded, "1"), partial(run, weight, "0")
    for one, other, name in zip(ours(), plain(), ("losses", "gradient"), strict=True):
        agree(one.detach(), other.detach(), f"head, {name}")
    for method, call in (("plain", plain), ("products", products), ("ours", ours)):
        yield Timed("head", method, [call])  # the head is larger than the L2 cache


def cross_entropy(shape: Shape, device: str) -> Iterator[Timed]:
    """The kernel alone, applied to its own results, which takes as long."""
    n, _, V = shape
    n = min(n, 2048)  # one chunk
    logits, labels = normal(n, -(-V // 64) * 64, device=device), torch.randint(V, (n,)).to(device)
    if not fuses(logits):
        yield Timed("cross_entropy", "plain", [partial(cross_entropy_, logits, labels, None, V)])
        return
    from kernels import cross_entropy

    for tile in TILES:
        call = partial(cross_entropy.cross_entropy_, logits, labels, None, V, True, tile)
        name = "ours" if tile == TILES[0] else "{1} x {2} warps, {3} stages".format(*tile)
        yield Timed("cross_entropy", name, [call], 2 * logits.nbytes)


def norms(shape: Shape, device: str) -> Iterator[Timed]:
    """Forward and backward, each on several inputs."""
    n, C, _ = shape
    gain, shift = normal(C, device=device), normal(C, device=device)
    samples = [[normal(n, C, device=device) for _ in range(4)]
               for _ in range(sets_of(8 * n * C, device))]  # fmt: skip

    def plain_forward(x: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        s = x + y
        return s, *torch.native_layer_norm(s, [C], gain, shift, EPS)

    def plain_backward(s: Tensor, mean: Tensor, rstd: Tensor, ds: Tensor, dn: Tensor) -> Tensor:
        dx = torch.ops.aten.native_layer_norm_backward(
            dn, s, [C], mean, rstd, gain, shift, [True, False, False]
        )[0]
        return dx + ds

    made = [plain_forward(*sample) for sample in samples]
    kept = [(s, mean, rstd, *sample[2:])
            for (s, _, mean, rstd), sample in zip(made, samples, strict=True)]  # fmt: skip
    forwards = {"plain": [partial(plain_forward, *sample) for sample in samples]}
    backwards = {"plain": [partial(plain_backward, *one) for one in kept]}
    if fuses(gain):
        from kernels import layer_norm

        forwards["ours"] = [partial(layer_norm.forward, *sample[:2], gain, shift, EPS)
                            for sample in samples]  # fmt: skip
        backwards["ours"] = [partial(layer_norm.backward, s, gain, ds, dn, EPS)
                             for s, _, _, ds, dn in kept]  # fmt: skip
        agree(forwards["ours"][0]()[1], made[0][1], "add_norm")
        agree(backwards["ours"][0](), backwards["plain"][0](), "norm_grad")
    for what, methods in (("add_norm", forwards), ("norm_grad", backwards)):
        for method, calls in methods.items():
            yield Timed(what, method, calls, 8 * n * C)


def products(shape: Shape, device: str) -> Iterator[Timed]:
    """The products of a token. Both results are as far from fp64 as bf16 is after 24 layers."""
    n, C, _ = shape
    sizes = (C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,)
    layers = [[0.02 * normal(*size, device=device) for size in sizes] for _ in range(24)]
    for layer in layers:
        layer[0] += 1  # the norm's gain
    x = normal(n, C, device=device)

    def run(most: int) -> Tensor:
        y = x
        with patch.object(kernels, "FEW_ROWS", most), torch.no_grad():
            for gain, shift, *w in layers:
                norm = gain, shift, EPS
                o = fused_linear(y, w[0], w[1], norm=norm)[:, :C]
                y = fused_linear(o, w[2], w[3], residual=y)
                h = fused_linear(y, w[4], w[5], norm=norm, gelu=True)
                y = fused_linear(h, w[6], w[7], residual=y)
        return y

    ours, plain = (run(most).float() for most in (kernels.FEW_ROWS, 0))
    error = ((ours - plain).norm() / plain.norm()).item()
    assert error < 0.05, f"products: they differ by {error} of their norm"
    for method, most in (("plain", 0), ("ours", kernels.FEW_ROWS)):
        n_bytes = 2 * sum(w.numel() for layer in layers for w in layer)
        yield Timed("products", method, [partial(run, most)], n_bytes)


def verdicts(rows: list[dict[str, str]]) -> list[str]:
    """One line for each target, and one for the fastest tile of each shape."""
    us = {(row["what"], row["method"], row["n"]): float(row["us"]) for row in rows}
    lines = [] if rows else ["the kernels other than attention: not measured"]
    for n in dict.fromkeys(row["n"] for row in rows):
        for what, above, below, aim, most in (
            ("head", "plain", "ours", 5.0, False),  # 6.9 in a trial on an H200
            ("head", "ours", "products", 1.5, True),  # 1.4 there
            ("add_norm", "plain", "ours", 1.2, False),
            ("norm_grad", "plain", "ours", 1.2, False),
            ("products", "plain", "ours", 1.0, False),
        ):
            keys = (what, above, n), (what, below, n)
            if (what == "products") != (int(n) <= kernels.FEW_ROWS):
                continue
            if not all(key in us for key in keys):
                lines.append(f"n={n:5} {what}: {above} / {below}  not measured")
                continue
            value = us[keys[0]] / us[keys[1]]
            mark = "ok" if (value <= aim if most else value >= aim) else "MISSED"
            sign = "<=" if most else ">="
            lines.append(f"n={n:5} {what + ': ' + above + ' / ' + below:30} {value:6.2f} "
                         f"{sign} {aim:.2f}  {mark}")  # fmt: skip
        tried = {key[1]: t for key, t in us.items() if (key[0], key[2]) == ("cross_entropy", n)}
        if "ours" in tried:
            best = min(tried, key=lambda name: tried[name])
            lines.append(f"n={n:5} cross_entropy: the default takes {tried['ours']:.1f} us, the "
                         f"fastest ({best}) {tried[best]:.1f} us")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels other than attention.")
    parser.add_argument("--out", type=Path, help="folder for fused-DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=25, help="start nothing after this time")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        need_kernels()
    began, rows = time.monotonic(), []
    torch.manual_seed(0)
    shapes = (ISSUE, TOKENS) if device == "cuda" else (SMALL, SMALL_TOKENS)
    parts: list = [(products, shape) for shape in shapes[1]]
    parts += [(part, shape) for shape in shapes[0] for part in (head, cross_entropy, norms)]
    for part, shape in parts:
        for what, method, calls, n_bytes in part(shape, device):
            if time.monotonic() - began > args.seconds:
                print("the time is over")
                return
            row = {"what": what, "method": method, **shape._asdict(), "dtype": "bfloat16"}
            row |= measure(calls, device)
            row["gbs"] = round(n_bytes / row["us"] / 1e3, 1) if n_bytes else ""
            print(row, flush=True)
            rows.append({name: str(value) for name, value in row.items()})
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                path = args.out / f"fused-{device_name()}.csv"
                add_row(path, row | machine(), KEY)
    print(*verdicts(rows), sep="\n")


if __name__ == "__main__":
    main()
