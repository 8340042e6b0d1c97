"""Compiles the kernels for the GPU benchmarks in many processes, before anything is timed.

    python -m benchmarks.kernels.warm [--what attention] [--seconds 70]

Compiling on first use takes seconds for each kernel and half a minute for FlexAttention. Here a
process compiles one of those peers at one shape, or every n-th launch of our kernels: each tile at
the shapes with targets, found as in `tiles.py` but recorded instead of run; then the defaults at
the shapes of the sweeps. Triton and Inductor cache the results on disk, where the benchmarks find
them. Nothing is timed, and failures are reported by the benchmarks.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from benchmarks.kernels import attention as bench
from benchmarks.kernels import decode as steps
from benchmarks.kernels.clock import need_kernels
from benchmarks.kernels.peers import COMPILED, METHODS, make_sample, run
from benchmarks.kernels.tiles import ATTENTION, DECODE, Choice, attention_case, decode_case
from kernels import launch

OWN = 10  # processes for our kernels


def launches(cases: Iterable, every: bool, target: str) -> Iterator[launch.Launch]:
    """The launches of the cases on a target, each kernel once; nothing runs."""
    seen = set()
    for case in cases:
        with launch.recorded(target) as made, Choice(record=True, every=every).at_work():
            case.calls[0]()
        for one in made:
            values = tuple((name, key_of(x)) for name, x in one.arguments.items())
            key = (one.kernel.__name__, one.tile, values)
            if key not in seen:
                seen.add(key)
                yield one


def key_of(value):
    """The properties for which Triton may compile again: a pointer's dtype, constants, and roughly
    those of integers."""
    if torch.is_tensor(value):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, value if value < 256 else 256
    return value


def compile_peer(shape: bench.Shape, name: str) -> None:
    """Both passes, as the benchmark calls them."""
    for backward in (True, False):
        run(METHODS[name], make_sample(shape, "cuda", 0), backward)


def peers() -> Iterator[Callable[[], object]]:
    for name in COMPILED[::-1]:
        for shape in bench.ISSUE:
            yield partial(compile_peer, shape, name)


def own(what: str) -> Iterator[Callable[[], object]]:
    """Our launches, the most important first. One case is made at a time, to limit memory."""
    make = decode_case if what == "decode" else attention_case
    tried = DECODE if what == "decode" else ATTENTION
    others = steps.OVER_S + steps.OVER_B + steps.ONE_ROW + steps.OVER_P
    if what == "attention":
        others = bench.BANKS + bench.OVER_T + bench.OVER_P_SHORT + bench.OVER_P_LONG + bench.OVER_B
    target = launch.target_of(torch.device("cuda", 0))
    for shapes, every in ((tried, True), (others, False)):
        for one in launches((make(shape, "cuda", sets=1) for shape in shapes), every, target):
            # one program is enough, and the values of its arguments do not matter
            yield partial(launch.launch, one.kernel, 1, one.tile, **one.arguments)


def do_part(what: str, number: int, of: int) -> None:
    """Every `of`-th item, from `number` on."""
    for n, item in enumerate(peers() if what == "peers" else own(what)):
        if n % of == number:
            try:
                item()
                torch.cuda.synchronize()
            except Exception as error:
                print(f"{what} {n}: {type(error).__name__}: {error}"[:160], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile what the benchmarks will run.")
    parser.add_argument("--what", choices=("attention", "decode"), default="attention")
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--part", nargs=3, metavar=("WHAT", "N", "OF"), help="of one process")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("warm-up: no GPU")
        return 1
    need_kernels()
    if args.part:
        do_part(args.part[0], int(args.part[1]), int(args.part[2]))
        return 0
    began = time.monotonic()
    kinds = {args.what: OWN}
    if args.what == "attention":
        kinds["peers"] = len(COMPILED) * len(bench.ISSUE)
    words = [sys.executable, "-m", "benchmarks.kernels.warm", "--part"]
    one_thread = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*words, kind, str(n), str(of)], env=one_thread)
        for kind, of in kinds.items()
        for n in range(of)
    ]
    late = 0
    for process in running:
        try:
            process.wait(max(0.1, args.seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    print(f"warm-up: {time.monotonic() - began:.0f} s, {late} of {len(running)} did not finish")
    return 0


if __name__ == "__main__":
    sys.exit(main())
