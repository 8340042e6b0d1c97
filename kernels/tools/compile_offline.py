"""Compile the kernels for GPUs that are not here, and show what they take.

    python -m kernels.tools.compile_offline                   a cover of the cases, all targets
    python -m kernels.tools.compile_offline --all --target sm_90 --op forward --head_dim 64

`kernels.launch.recorded` collects what the launchers would launch for tensors on the "meta" device.
Each launch is specialised by Triton's own binder and compiled by its own compiler, so what is
compiled here is what runs there. Launches that come to the same kernel are compiled once.

A row of the table gives the registers of a thread, the shared memory of a program and the bytes of
local memory of a thread, which is where registers are spilled; "wgmma one by one" means that ptxas
could not keep Hopper's matrix products in flight beside other work. A row fails where a kernel does
not compile, takes more shared or tensor memory than the target has, or spills with a default tile
(more than TRADED allows) and is not in ALLOWED_SPILLS, or where a default tile of heads of 64 on
Hopper is "one by one". The exit code is then 1. On NVIDIA a row of
32 registers and thousands of spilled bytes is ptxas giving up: the tile is far too large.

Without --all only a pairwise cover is compiled: a few cases in which each two values of different
dimensions meet at least once. Defects that need three values to meet are left to --all.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.machine import add_row, machine
from kernels import HEAD_DIMS, INTERPRETED, assembler, attention
from kernels.assembler import compile_kernel
from kernels.decode import decode
from kernels.launch import SHARED_MEMORY, TILES, Launch, recorded
from kernels.plan import backward

GPU_TARGETS = {  # architecture, threads of a warp
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_MEMORY = 512  # columns; a kernel that needs more compiles, to nothing but a trap
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMENSIONS: dict[str, tuple] = {
    "target": tuple(GPU_TARGETS),
    "op": ("forward", "backward", "decode"),
    "dtype": tuple(DTYPES),
    "head_dim": HEAD_DIMS,
    "batch_size": (2, 1000),  # decode cuts them differently; the second is past 2 GB of q
    "seq_len": (50, 128, 1000),  # decode: 1, 2, 5 queries on 1000 keys
    "prefix_len": (0, 10, 33, 200),  # none; a tile of 16; of 64; more than one tile
    "prefix_dtype": ("same", "fp32"),
    "causal": (True, False),
    "prefix_index": (False, True),
    "prefix_lens": (False, True),
    "kv_lens": (False, True),
    "q_offset": (False, True),
    "need": ("all", "prefix", "qkv", "q"),  # which gradients the backward pass makes
    "dlse": (False, True),  # whether it gets one
    "tile": tuple(range(max(len(tiles) for rows in TILES.values() for tiles in rows.values()))),
}
Case = NamedTuple("Case", [(name, Any) for name in DIMENSIONS])  # one value of each dimension

# Registers that a thread can have, and bytes that may be spilled with fewer: ptxas gives up as many
# as four registers of a thread by its own choice, where one more program then fits beside others.
MOST_REGISTERS = {"cuda": 255, "hip": 512}
TRADED = 16
# (kernel, target, dtype, D): (bytes of local memory, why this much is accepted)
ALLOWED_SPILLS: dict[tuple[str, str, str, int], tuple[int, str]] = {
    (kernel, target, "fp32", d): (512, "IEEE products of fp32 are unrolled over D: no smaller tile")
    for kernel in ("fwd", "fwd_short", "bwd_dq")
    for target in ("sm_80", "sm_90", "sm_100")
    for d in (80, 128)
}


class Compiled(NamedTuple):
    """What the compiler says about one kernel."""

    registers: int  # of a thread
    shared: int  # bytes, of a program
    spills: int  # bytes of local memory, of a thread
    tensor_memory: int  # columns of it, of a program (Blackwell)
    one_by_one: bool  # wgmma instructions wait for each other
    seconds: float
    assembly: str  # PTX or GCN


def pairwise(dimensions: dict[str, tuple]) -> list[dict[str, Any]]:
    """Few cases in which each pair of values of two dimensions appears: greedy, deterministic."""
    open_pairs = {
        ((a, x), (b, y)): None  # a dict, since it keeps its order
        for a, b in combinations(dimensions, 2)
        for x, y in product(dimensions[a], dimensions[b])
    }
    cases = []
    while open_pairs:
        case = dict(next(iter(open_pairs)))
        for name in sorted(dimensions, key=lambda name: -len(dimensions[name])):
            if name not in case:
                case[name] = max(
                    dimensions[name],
                    key=lambda x: sum(p in open_pairs for p in pairs_with(case, name, x)),  # noqa: B023
                )
        case = {name: case[name] for name in dimensions}
        for pair in combinations(case.items(), 2):
            open_pairs.pop(pair, None)
        cases.append(case)
    return cases


def pairs_with(case: dict[str, Any], name: str, value: Any) -> Iterator[tuple]:
    """The pairs of (name, value) with what a case has, each in both orders."""
    for item in case.items():
        yield item, (name, value)
        yield (name, value), item


def cover(**chosen: tuple) -> list[Case]:
    """A pairwise cover for each op, of the dimensions or of the `chosen` part of them."""
    dimensions = DIMENSIONS | chosen
    one_op = [dimensions | {"op": (op,)} for op in dimensions["op"]]
    return [Case(**case) for part in one_op for case in pairwise(part)]


def every_case(**chosen: tuple) -> Iterator[Case]:
    """All combinations of values."""
    return (Case(*values) for values in product(*(DIMENSIONS | chosen).values()))


def launches_of(case: Case) -> list[tuple[Launch, bool]]:
    """What a case launches, each with whether its tile is the default one."""
    with recorded(case.target) as defaults:
        call(case)
    with tile_first(case.target, case.tile), recorded(case.target) as launches:
        call(case)
    return [(one, one.tile == other.tile) for one, other in zip(launches, defaults, strict=True)]


@contextmanager
def tile_first(target: str, n: int) -> Iterator[None]:
    """Makes the n-th tile of each row of the table the default; a shorter row is counted round."""
    rows = TILES[target]
    TILES[target] = {
        key: [tiles[(n + i) % len(tiles)] for i in range(len(tiles))] for key, tiles in rows.items()
    }
    try:
        yield
    finally:
        TILES[target] = rows


def call(case: Case) -> None:
    """Call the launcher of a case: 12 heads, a bank of 3 prefixes where there is an index.

    q, k, v and their gradients are views of one projection, as in training.
    """
    B, H, T, P, D = case.batch_size, 12, case.seq_len, case.prefix_len, case.head_dim
    dtype = DTYPES[case.dtype]
    prefix_dtype = torch.float32 if case.prefix_dtype == "fp32" else dtype
    empty = partial(torch.empty, device="meta")
    q, k, v = empty(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)
    if case.op == "decode":
        q = q[:, :, : {50: 1, 128: 2, 1000: 5}[T]]
        k, v = empty(2, B, H, 1000, D, dtype=dtype)
    bank = (3, H, P, D) if case.prefix_index else (H, P, D)
    prefix_k, prefix_v = empty(bank, dtype=prefix_dtype), empty(bank, dtype=prefix_dtype)
    index = empty(B, dtype=torch.int64) if case.prefix_index else None
    lens = empty(3 if case.prefix_index else 1, dtype=torch.int32) if case.prefix_lens else None
    kv_lens = empty(B, dtype=torch.int64) if case.kv_lens else None
    q_offset = empty(B, dtype=torch.int32) if case.q_offset else None
    inputs = (q, k, v, prefix_k, prefix_v, index, lens, kv_lens, q_offset)
    rule = (case.causal, None)  # None: the usual scale
    if case.op == "decode":
        decode(*inputs, *rule)
    elif case.op == "forward":
        attention.forward(*inputs, *rule)
    else:
        o, dqkv = empty(B, T, H, D, dtype=dtype).transpose(1, 2), empty(B, T, 3, H, D, dtype=dtype)
        lse, dlse = empty(2, B, H, T, dtype=torch.float32)
        dq, dk, dv = (None if case.need == "prefix" else x.transpose(1, 2) for x in dqkv.unbind(2))
        dk, dv = (None, None) if case.need == "q" else (dk, dv)
        no_prefix = case.need in ("qkv", "q")
        dprefix = (None, None) if no_prefix else (torch.empty_like(prefix_k) for _ in range(2))
        backward(o, dlse if case.dlse else None, *inputs, *rule, o, lse, dq, dk, dv, *dprefix)


def specialise(launch: Launch, target: str) -> tuple[ASTSource, Any, str]:
    """What Triton's compiler gets for a launch on a target, and a key that says if two are equal.

    A tensor becomes a pointer with its alignment, None and the integer 1 become constants, an
    integer that 16 divides says so, except where the kernel asks not to.
    """
    kernel, backend = launch.kernel, make_backend(GPU_TARGETS[target])
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, rest = bind(**launch.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, kinds, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return source, options, f"{target} {source.name} {source.hash()} {options.hash()}"


def compile_launch(launch: Launch, target: str, ptxas: str | None = None) -> Compiled:
    """Compile a recorded launch, or take it from Triton's cache on disk.

    ptxas: path of an assembler, which may be one that is refused; None takes ours.
    """
    source, options, _ = specialise(launch, target)
    began = time.perf_counter()
    kernel = compile_kernel(source, GPU_TARGETS[target], options.__dict__, path=ptxas)
    seconds = time.perf_counter() - began
    if "ptx" in kernel.asm:
        registers, spills = nvidia_usage(kernel.asm["cubin"])
        assembly = kernel.asm["ptx"]
        one_by_one = "wgmma" in assembly and "wgmma" in ptxas_messages(assembly, ptxas)
    else:
        assembly = kernel.asm["amdgcn"]
        usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", assembly))
        registers, spills = (int(usage[x]) for x in ("vgpr_count", "private_segment_fixed_size"))
        one_by_one = False
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0)
    return Compiled(registers, shared, spills, columns, one_by_one, seconds, assembly)


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def ptxas_messages(ptx: str, ptxas: str | None) -> str:
    """What an assembler (None: ours) says of PTX for sm_90."""
    ptxas = ptxas or assembler.choose(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "-arch=sm_90a", file.name]
        result = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    return result.stderr


class Job(NamedTuple):
    """One kernel to compile: the n-th launch of a case (None: the case launches nothing)."""

    case: Case
    n: int | None
    name: str  # of the kernel
    tile: str
    default: bool


class Result(NamedTuple):
    job: Job
    compiled: Compiled | None
    problem: str  # empty where all is well


def jobs_of(cases: Iterable[Case]) -> list[Job]:
    """The different kernels that some cases launch."""
    jobs: dict[str, Job] = {}
    for case in cases:
        try:
            launches = launches_of(case)
        except Exception:  # `run_job` meets it again, and reports it
            jobs[str(case)] = Job(case, 0, case.op, "-", False)
            continue
        if not launches:
            jobs[str(case)] = Job(case, None, "-", "-", False)
        for n, (launch, default) in enumerate(launches):
            key = specialise(launch, case.target)[2]
            tile = "{} x {}, {} warps, {} stages".format(*launch.tile)
            name = launch.kernel.fn.__name__.strip("_").removesuffix("_kernel")
            # where a default and another tile are the same kernel, it counts as the default
            default = default or key in jobs and jobs[key].default
            jobs[key] = Job(case, n, name, tile, default)
    return list(jobs.values())


def run_job(job: Job) -> Result:
    """Compile one kernel and judge it; runs in any process."""
    if job.n is None:
        return Result(job, None, "")
    try:
        compiled = compile_launch(launches_of(job.case)[job.n][0], job.case.target)
    except Exception as error:  # whatever the compiler does, it is this row's result
        return Result(job, None, f"{type(error).__name__}: {str(error).strip()[:300]}")
    return Result(job, compiled, problem(job, compiled))


def problem(job: Job, compiled: Compiled) -> str:
    """What is wrong with a compiled kernel; empty where nothing is."""
    case = job.case
    room = SHARED_MEMORY[case.target]
    if compiled.shared > room:
        return f"shared memory: {compiled.shared} of {room} bytes"
    if compiled.tensor_memory > TENSOR_MEMORY:
        return f"tensor memory: {compiled.tensor_memory} of {TENSOR_MEMORY} columns"
    hopper = case.target == "sm_90" and case.dtype != "fp32" and case.head_dim == 64
    if job.default and hopper and compiled.one_by_one:
        return "wgmma instructions wait for one another (see ptxas -v)"
    key = (job.name, case.target, case.dtype, case.head_dim)
    pressed = compiled.registers >= MOST_REGISTERS[GPU_TARGETS[case.target].backend]
    allowed = ALLOWED_SPILLS.get(key, (0 if pressed else TRADED, ""))[0]
    if job.default and compiled.spills > allowed:
        return f"spills {compiled.spills} bytes with a default tile, {allowed} are allowed"
    return ""


def run_jobs(jobs: list[Job], processes: int) -> Iterator[Result]:
    """Compile, in a few new processes, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(run_job, jobs)


def row(result: Result) -> str:
    """One line of the table."""
    job, compiled, wrong = result
    case = job.case
    options = [name for name in DIMENSIONS if getattr(case, name) is True]
    options += [f"P={case.prefix_len}", f"prefix {case.prefix_dtype}"]
    options += [f"need {case.need}"] if case.op == "backward" else []
    line = f"{job.name:12} {case.target:7} {case.dtype} {case.head_dim:4}  {job.tile:33}"
    if compiled is None:
        line += "      -       -      -      -"
    else:
        line += f" {compiled.registers:6} {compiled.shared:7} {compiled.spills:6}"
        line += f" {compiled.seconds:6.1f}"
        options += ["wgmma one by one"] if compiled.one_by_one else []
    options += ["default tile"] if job.default else []
    return f"{line}  {' '.join(options)}" + (f"\n    FAILED {wrong}" if wrong else "")


def csv_row(result: Result) -> dict[str, Any]:
    """The columns that name a kernel come first."""
    case, compiled = result.job.case, result.compiled
    of = {"kernel": result.job.name, "tile": result.job.tile, "target": case.target}
    of |= {"dtype": case.dtype, "head_dim": case.head_dim, "prefix_len": case.prefix_len}
    of |= {"registers": compiled.registers, "shared_bytes": compiled.shared}
    of |= {"spilled_bytes": compiled.spills, "wgmma_one_by_one": compiled.one_by_one}
    return of | {"triton": triton.__version__, "commit": machine()["commit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs that are not here.")
    parser.add_argument("--all", action="store_true", help="every combination, not a cover")
    parser.add_argument("--processes", type=int, default=2, help="compile in this many (default 2)")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    for name, values in DIMENSIONS.items():
        is_bool = isinstance(values[0], bool)
        kind = (lambda text: text == "True") if is_bool else type(values[0])
        parser.add_argument(f"--{name}", nargs="+", type=kind, choices=values, help="only these")
    args = vars(parser.parse_args())
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled; unset it")
    chosen = {name: tuple(args[name]) for name in DIMENSIONS if args[name] is not None}
    jobs = jobs_of((every_case if args["all"] else cover)(**chosen))
    print(f"{len(jobs)} kernels, Triton {triton.__version__}", flush=True)
    print(
        "kernel       target  dtype  D  tile (queries x keys)             "
        " regs.  shared  spill      s  case"
    )
    began, failed = time.perf_counter(), 0
    for result in run_jobs(jobs, args["processes"]):
        failed += bool(result.problem)
        print(row(result), flush=True)
        if args["out"] and result.compiled:
            add_row(args["out"], csv_row(result), tuple(csv_row(result))[:6])
    print(f"{len(jobs)} kernels, {failed} failed, {time.perf_counter() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
