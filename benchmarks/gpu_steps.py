"""Times whole steps with GPT-2's shapes on a GPU, in one process, the most important first.

    python -m benchmarks.gpu_steps train --out FOLDER [--data FOLDER] [--seconds 150]

`RUNS` are calls of `python -m benchmarks.peft` in bf16 with a prefix of 10 positions; using one
process saves repeated imports. `train` and `generate` are the parts `steps` and `generate` of
gpu.sh, which stops them when the time is over; therefore each row is written as soon as it is
measured. A run that fails is reported and does not stop the others; the exit code is then 1.
Profiles come after the times of the targets, which the profiler might affect, and PEFT's compiled
step, which takes long, comes last.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.peft.run import BenchConfig, run_bench

MEDIUM, LARGE = "random-medium", "random-large"
TEXTS = {"data": "restaurants"}  # or --data: real rows, so that batches have different shapes
RUNS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "train": [
        (MEDIUM, {"batch_size": "10", "peers": "unfused,peft"}),
        (MEDIUM, {"batch_size": "64", "peers": "unfused,peft"}),
        (MEDIUM, {"batch_size": "10", "peers": "peft"} | TEXTS),
        (MEDIUM, {"batch_size": "10", "peers": "peft", "profile": True}),
        (MEDIUM, {"batch_size": "64", "peers": "peft-compiled"}),
        (LARGE, {"batch_size": "16", "seq_len": "256", "peers": "peft"}),
        (MEDIUM, {"batch_size": "10", "peers": "eager,compiled,peft-compiled"}),
    ],
    "generate": [
        (MEDIUM, {"batch_size": "1", "peers": "many-rows,unfused,peft"}),
        (MEDIUM, {"batch_size": "32", "peers": "many-rows,unfused,peft"}),
        (MEDIUM, {"batch_size": "16", "num_beams": "5", "peers": "unfused,peft"}),
        (MEDIUM, {"batch_size": "1", "peers": "none", "profile": True}),
        (MEDIUM, {"batch_size": "4,16", "peers": "many-rows"}),
        (MEDIUM, {"batch_size": "1", "peers": "eager"}),
    ],
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time whole steps, also of transformers + PEFT.")
    parser.add_argument("work", choices=RUNS)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.csv and others")
    parser.add_argument("--data", default=TEXTS["data"], help="real tables (restaurants)")
    parser.add_argument("--seconds", type=float, default=150, help="start nothing after this time")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    began, failed = time.monotonic(), 0
    machine()  # record the commit at the start, not at the end
    for model, options in RUNS[args.work]:
        spent = time.monotonic() - began
        if spent > args.seconds:
            print(f"the time is over after {spent:.0f} s; not measured: {model} {options}")
            continue
        print(f"after {spent:.0f} s: {model} {options}", flush=True)
        if "data" in options:
            options = options | {"data": args.data}
        try:
            config = BenchConfig(dtype="bf16", seconds=1.0, out=args.out, **options)
            run_bench(args.work, model, args.device, config)
        except Exception:
            failed = 1
            traceback.print_exc()
    return failed


if __name__ == "__main__":
    sys.exit(main())
