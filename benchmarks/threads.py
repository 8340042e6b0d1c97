"""Seconds of a training step on a CPU by threads, and by how threads wait (OMP_WAIT_POLICY).

    python -m benchmarks.threads [--busy]

It times steps of `mini` on batches of 16 restaurants. Each row of benchmarks/threads.csv is
measured in a new process, because PyTorch reads the policy when it is imported. `--busy` runs
another training at the same time, on one thread. Run it on an otherwise idle machine.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

CSV = Path(__file__).parent / "threads.csv"
WARM, TIMED = 3, 12  # steps


def step_seconds(threads: int, precision: str, steps: int) -> float:
    """Mean wall time of a step, in this process."""
    import tempfile

    import torch

    from minprefix.data.load import load_examples
    from minprefix.models.weights import load
    from minprefix.prefix.config import PrefixConfig
    from minprefix.prefix.make import make_prefix
    from minprefix.training.config import TrainConfig
    from minprefix.training.trainer import Trainer

    torch.set_num_threads(threads)
    model, tokenizer = load("mini")
    config = TrainConfig(steps=10**6, batch_size=16, precision=precision)
    prefix = make_prefix(model, tokenizer, PrefixConfig(init="random"), 0)
    with tempfile.TemporaryDirectory() as out:
        train = load_examples("restaurants", "train")
        trainer = Trainer(model, tokenizer, config, train, [], out, prefix)
        for _ in range(WARM):
            trainer.step()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step()
    return (time.perf_counter() - began) / steps


def child(threads: int, precision: str, policy: str, steps: int = TIMED) -> subprocess.Popen:
    """A process that prints the seconds of a step."""
    words = ["-m", "benchmarks.threads", "--threads", str(threads), "--precision", precision]
    return subprocess.Popen(
        [sys.executable, *words, "--steps", str(steps)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": policy},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", action="store_true", help="next to another training run")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=TIMED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        print(step_seconds(args.threads, args.precision, args.steps))
        return
    from benchmarks.machine import add_row, machine

    key = ("precision", "threads_set", "policy", "busy")
    for precision in ("bf16", "fp32"):
        for threads in (1, os.cpu_count() or 1):
            for policy in ("ACTIVE", "PASSIVE"):
                other = child(1, precision, "PASSIVE", 10**6) if args.busy else None
                out, _ = child(threads, precision, policy).communicate()
                if other is not None:
                    other.kill()
                values = (precision, threads, policy, args.busy)
                row = dict(zip(key, values, strict=True)) | {"seconds": round(float(out), 3)}
                add_row(CSV, row | machine(), key)
                print(row, flush=True)


if __name__ == "__main__":
    main()
