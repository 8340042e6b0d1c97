"""The least cost of the benchmark's work, the limits of the machine, and peak memory.

Training, in useful FLOPs, with N the parameters of the layers' matrices, m labels and
W = sum over rows of T_b P + T_b (T_b + 1) / 2 visible pairs, T_b a row's real tokens:

    4 N tokens  +  4 C V m  +  12 L C W

Weights are frozen, so a parameter costs 2 FLOPs forward and 2 backward, and a visible pair 4 and 8
per channel. Work for padding, for positions without a label, and recomputation do not count; the
prefix's MLP, for P positions, is left out. `percent` of a training step is relative to a square
matrix product (4096; CPU: 1024) timed just before. It is slightly too high, because work that is
not done (the first layer's c_attn backward, the last layer's MLP at positions without a label) is
not subtracted. `padding` is the percentage of padding in the batches, without what CUDA graphs add
to fill their buckets.

A step of decoding reads every weight once and multiplies each row by it, 2 FLOPs. It takes at least
the longer of these two times, and `percent` is relative to it. Keys and values are left out.

Peak memory covers building a method and its first steps, including weights: on CUDA, the memory
that the allocator gave out (and that it held from the driver); on a Linux CPU, the growth of the
resident set.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peft.traces import wait
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2


def train_flops(config: GPT2Config, lengths: list[int], n_labels: int, prefix_len: int) -> float:
    """FLOPs of one training step by the formula in the header; `lengths` are T_b."""
    C, n_inner = config.n_embd, config.n_inner or 4 * config.n_embd
    N = config.n_layer * (4 * C * C + 2 * C * n_inner)
    W = sum(T * prefix_len + T * (T + 1) / 2 for T in lengths)
    head = 4 * C * config.vocab_size * n_labels
    return 4 * N * sum(lengths) + head + 12 * config.n_layer * C * W


def decode_limit(model: GPT2, rows: int, read_speed: float, flops: float) -> float:
    """The least number of seconds of a decoding step with `rows` rows, see the header."""
    weights = [w for name, w in model.named_parameters() if name != "wpe.weight"]
    n_bytes = sum(w.numel() * w.element_size() for w in weights)
    return max(n_bytes / read_speed, 2 * rows * sum(w.numel() for w in weights) / flops)


def best_rate(call: Callable[[], object], amount: float, calls: int, device: str) -> float:
    """amount / s over `calls` calls, the best of 5 repetitions."""
    best = 0.0
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        best = max(best, amount * calls / (time.perf_counter() - began))
    return best


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product."""
    n, calls = (4096, 20) if device.startswith("cuda") else (1024, 4)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return best_rate(lambda: a @ b, 2 * n**3, calls, device)


def read_speed(device: str) -> float:
    """Bytes/s of a sum over a large tensor."""
    n, calls = (2**30, 20) if device.startswith("cuda") else (2**28, 2)
    x = torch.ones(n // 4, device=device)
    return best_rate(x.sum, n, calls, device)


class Peak:
    """The peak of memory in MiB since this object was made, minus the memory in use then."""

    def __init__(self, device: str):
        gc.collect()
        self.device, self.cuda = device, device.startswith("cuda")
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        else:
            try:
                ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
                self.before = (self._resident("VmRSS"),)
            except (AttributeError, OSError):  # not Linux, or not the GNU C library
                self.before = None

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    def row(self) -> dict:
        """Columns for the CSV; empty if it cannot be measured."""
        if self.cuda:
            now = (
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device),
            )
        elif self.before is None:
            return {"peak_mib": "", "reserved_mib": ""}
        else:
            now = (self._resident("VmHWM"),)
        mib = [round((a - b) / 2**20) for a, b in zip(now, self.before, strict=True)]
        return {"peak_mib": mib[0], "reserved_mib": mib[1] if self.cuda else ""}
