"""Times the CPU path of the operator, to show why bf16 training uses `masked_products`.

    python -m benchmarks.kernels.reference [--out FILE.csv]        (or: make bench)

For each dtype and length, it times forward + backward through a fused qkv leaf and a shared fp32
prefix, by PyTorch's fused attention and by two batched products, after comparing their results.
Times are medians of 20 runs, in ms. They say nothing about a GPU.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import add_row, machine
from kernels.reference import lean_mask, masked_products, prefix_rows

B, H, D, P = 32, 6, 64, 10  # the shape of tuning `mini` on E2E
LENGTHS = (32, 64, 128, 256)


def fused(q, keys, values, mask, scale):
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def milliseconds(attend, T: int, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Median of forward + backward, and o of fixed inputs."""
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, 3, H, D, generator=generator).to(dtype).requires_grad_()
    prefix = torch.randn(2, H, P, D, generator=generator).requires_grad_()
    do = torch.randn(B, T, H, D, generator=generator).to(dtype).transpose(1, 2)
    times = []
    for _ in range(23):
        began = time.perf_counter()
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        keys = torch.cat([prefix_rows(prefix[0], None, q), k], dim=2)
        values = torch.cat([prefix_rows(prefix[1], None, q), v], dim=2)
        mask = lean_mask(T, T, P, q.device, True, None, None, None)
        o = attend(q, keys, values, mask, D**-0.5)
        o.backward(do)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:]), o.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU path of prefix attention.")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    args = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        for T in LENGTHS:
            t_fused, o_fused = milliseconds(fused, T, dtype)
            t_products, o_products = milliseconds(masked_products, T, dtype)
            gap = (o_fused - o_products).abs().max().item()
            # both round, so allow a few units in the last place of outputs of order 1
            assert gap < 16 * torch.finfo(dtype).eps, f"{dtype} T={T}: they differ by {gap:.1e}"
            row = {"dtype": str(dtype).removeprefix("torch."), "B": B, "H": H, "D": D, "P": P}
            row |= {
                "T": T,
                "fused_ms": round(t_fused, 2),
                "products_ms": round(t_products, 2),
                "ratio": round(t_fused / t_products, 2),
            }
            print(row, flush=True)
            if args.out:
                add_row(args.out, row | machine(), ("dtype", "T"))


if __name__ == "__main__":
    main()
