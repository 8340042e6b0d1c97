"""Times the Python part of a call of the operator, before a kernel is launched.

    python -m benchmarks.kernels.overhead [--out FILE.csv]

Launches are recorded, not executed, so this runs wherever Triton is installed. It measures the
operator's own time (checks, allocation, arguments, autograd) without Triton's launch. There are two
forms of the same functions: the op registered with torch.library, which torch.compile needs, and
the autograd.Function that eager mode uses instead. Times are microseconds per call, the median of
20 batches of 50.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.machine import add_row, machine
from kernels import launch
from kernels.attention import attention


def microseconds(call) -> float:
    times = []
    for _ in range(21):
        began = time.perf_counter()
        for _ in range(50):
            call()
        times.append((time.perf_counter() - began) / 50 * 1e6)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operator's calls without its kernels.")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors = [torch.randn(2, 4, 64, 64, requires_grad=True) for _ in range(3)]
    tensors += [torch.randn(4, 10, 64, requires_grad=True) for _ in range(2)]
    rest = (None, None, None, None, True, None)
    do = torch.randn(2, 4, 64, 64)
    forms = {"torch.library": torch.ops.minprefix.attention.default, "autograd.Function": attention}
    for name, form in forms.items():

        def step(form=form):
            torch.autograd.grad(form(*tensors, *rest)[0], tensors, do)

        with launch.recorded("sm_90") as launches:
            forward = microseconds(lambda form=form: (form(*tensors, *rest), launches.clear()))
            both = microseconds(lambda step=step: (step(), launches.clear()))
        row = {"form": name, "forward_us": round(forward, 1), "forward_backward_us": round(both, 1)}
        print(row, flush=True)
        if args.out:
            add_row(args.out, row | machine(), ("form",))


if __name__ == "__main__":
    main()
