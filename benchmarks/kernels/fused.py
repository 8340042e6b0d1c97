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
  - products: those of a token in 24 layers without attention, for n = 1 to 32 positions. `plain`
    is PyTorch's products with our norms, `few` has the kernel of `few_rows.py`, `some` that of
    `some_rows.py`, also divided otherwise (FORMS).

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
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.clock import device_name, measure, need_kernels, sets_of
from benchmarks.machine import add_row, machine
from kernels import cross_entropy_, fuses, some_rows
from kernels.launch import Tile
from minprefix.models.activations import Visible
from minprefix.models.config import GPT2Config
from minprefix.models.fused import fused_blocks
from minprefix.models.gpt2 import GPT2
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
TOKENS = [Shape(n, 1024, 0) for n in (32, 16, 8, 4, 1, 2)]
FORMS = [(16, 4, 4), (32, 4, 8), (32, 8, 4), (64, 4, 4)]  # columns of a program, warps, PARTS
MOST_FEW = 8  # most positions for which `few` is timed
TILE_OF = some_rows.tile_of
SMALL, SMALL_TOKENS = [Shape(40, 32, 101)], [Shape(2, 32, 0)]


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
    """The products of a token. Results are as far from PyTorch's as bf16 is after 24 layers."""
    n, C, _ = shape
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=C, n_layer=24, n_head=max(1, C // 64))
    model = GPT2(config).to(device, torch.bfloat16).requires_grad_(False).eval().init_weights(0)
    x, visible = normal(n, 1, C, device=device), Visible()
    prefix = model.activations_of(None).layers()[0]

    def run(few: int, some: int, tile_of: Callable, parts: int) -> Tensor:
        limits = patch.multiple(kernels, FEW_ROWS=few, SOME_ROWS=some)
        tiles = patch.multiple(some_rows, tile_of=tile_of, PARTS=parts)
        with limits, tiles, torch.no_grad(), fused_blocks(model, n):
            y = x
            for block in model.h:
                y = block(y, prefix, visible, attend=lambda q, *_: q)
        return y

    usual: Any = some_rows.tile_of, some_rows.PARTS
    forms = {"plain": (0, 0, *usual), "few": (n, 0, *usual), "some": (0, n, *usual)}
    for columns, warps, parts in FORMS:
        other = partial(tile_with, columns, warps)
        forms[f"some, {columns} columns, {warps} warps, {parts} parts"] = 0, n, other, parts
    plain = run(*forms["plain"]).float()
    for method, form in forms.items():
        if method != "plain" and not (fuses(x) and (method != "few" or n <= MOST_FEW)):
            continue
        error = ((run(*form).float() - plain).norm() / plain.norm()).item()
        assert error < 0.05, f"products, {method}: they differ by {error} of their norm"
        n_bytes = 2 * sum(p.numel() for p in model.h.parameters())
        yield Timed("products", method, [partial(run, *form)], n_bytes)


def tile_with(columns: int, warps: int, n: int, inputs: int) -> tuple[Tile, int]:
    """`some_rows.tile_of` with another division of the outputs and of the inputs."""
    tile, block_k = TILE_OF(n, inputs)
    return tile._replace(block_n=columns, num_warps=warps), block_k


def verdicts(rows: list[dict[str, str]]) -> list[str]:
    """One line for each target, and one for the fastest tile or form of each shape."""
    us = {(row["what"], row["method"], row["n"]): float(row["us"]) for row in rows}
    lines = [] if rows else ["the kernels other than attention: not measured"]
    for n in dict.fromkeys(row["n"] for row in rows):
        default = "few" if int(n) <= kernels.FEW_ROWS else "some"
        for what, above, below, aim, most in (
            ("head", "plain", "ours", 5.0, False),  # 6.9 in a trial on an H200
            ("head", "ours", "products", 1.5, True),  # 1.4 there
            ("add_norm", "plain", "ours", 1.2, False),
            ("norm_grad", "plain", "ours", 1.2, False),
            ("products", "plain", default, 1.0, False),
        ):
            keys = (what, above, n), (what, below, n)
            if (what == "products") != (int(n) <= kernels.SOME_ROWS):
                continue
            if not all(key in us for key in keys):
                lines.append(f"n={n:5} {what}: {above} / {below}  not measured")
                continue
            value = us[keys[0]] / us[keys[1]]
            mark = "ok" if (value <= aim if most else value >= aim) else "MISSED"
            sign = "<=" if most else ">="
            lines.append(f"n={n:5} {what + ': ' + above + ' / ' + below:30} {value:6.2f} "
                         f"{sign} {aim:.2f}  {mark}")  # fmt: skip
        for what, usual in (("cross_entropy", "ours"), ("products", default)):
            tried = {key[1]: t for key, t in us.items() if (key[0], key[2]) == (what, n)}
            if usual in tried:
                best = min(tried, key=lambda name: tried[name])
                lines.append(f"n={n:5} {what}: the default takes {tried[usual]:.1f} us, the "
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
