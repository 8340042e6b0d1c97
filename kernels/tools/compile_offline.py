"""Compile the kernels for GPUs that this machine does not have, and show what they use.

    python -m kernels.tools.compile_offline          a cover of the cases, and the usual calls
    python -m kernels.tools.compile_offline --target sm_90 --op forward --all

`kernels.tools.cases` has the calls and records their launches on the "meta" device. Each launch is
specialised by Triton's own binder and compiled by its own compiler, so the result is the code that
would run on the GPU. Launches of the same kernel are compiled once.

Each line of the table gives the registers of a thread, the shared memory of a program and the bytes
of local memory of a thread, into which registers are spilled. "wgmma one by one" means that ptxas
could not overlap Hopper's matrix products with other work. A line fails, and the exit code is 1,

  - if the kernel does not compile, or needs more shared or tensor memory than the target has,
  - if a default tile spills more than SPILLED and is not in ALLOWED_SPILLS,
  - if a default tile for heads of 64 on Hopper is "one by one",
  - if the machine code looks miscompiled (`kernels.tools.sass`).

On NVIDIA, 32 registers with thousands of spilled bytes mean that ptxas has given up, because the
tile is far too large.

Without --all, two sets are compiled. One is a pairwise cover: a few cases in which any two values
of different dimensions occur together at least once. The other (`calls`) has the calls of training
and decoding on Hopper in bf16, each length with each prefix. It is needed because a miscompiled
product depends on three values or more, and the cover contained none of those that were found.
Only --all finds further defects of that kind.
"""

import argparse
import csv
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels import INTERPRETED, assembler
from kernels.assembler import compile_kernel
from kernels.launch import SHARED_MEMORY, Launch, options_of
from kernels.tools.cases import (
    DIMENSIONS,
    GPU_TARGETS,
    Case,
    calls,
    cover,
    every_case,
    launches_of,
)
from kernels.tools.sass import signs

TENSOR_MEMORY = 512  # columns; a kernel that needs more compiles to a mere trap

# Bytes that a default tile may spill: a dozen registers of a thread. On an H200 a tile of
# `_bwd_dprefix_kernel` that spills 40 is twice as fast as one that spills none (benchmarks/gpu).
SPILLED = 48
# (kernel, target, dtype, D): (bytes of local memory, why this much is accepted)
ALLOWED_SPILLS: dict[tuple[str, str, str, int], tuple[int, str]] = {
    (kernel, target, "fp32", d): (512, "IEEE products of fp32 are unrolled over D: no smaller tile")
    for kernel in ("fwd", "fwd_short", "bwd_dq")
    for target in ("sm_80", "sm_90", "sm_100")
    for d in (80, 128)
} | {
    ("bwd_dkdv", "sm_80", "fp16", 64): (96, "q_offset and dlse at once, which no usual call has"),
}


class Compiled(NamedTuple):
    """What the compiler says about one kernel."""

    registers: int  # of a thread
    shared: int  # bytes, of a program
    spills: int  # bytes of local memory, of a thread
    tensor_memory: int  # columns of it, of a program (Blackwell)
    one_by_one: bool  # whether wgmma instructions wait for each other
    seconds: float
    assembly: str  # PTX or GCN
    binary: bytes = b""  # cubin; empty on AMD


def specialise(launch: Launch, target: str) -> tuple[ASTSource, Any, str]:
    """The input of Triton's compiler for a launch on a target, and a key that identifies it.

    A tensor becomes a pointer with its alignment. None and the integer 1 become constants. An
    integer that 16 divides is marked, unless the kernel disables that.
    """
    kernel, backend = launch.kernel, make_backend(GPU_TARGETS[target])
    options = options_of(launch.tile, launch.arguments)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, rest = bind(**launch.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, kinds, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return source, options, f"{target} {source.name} {source.hash()} {options.hash()}"


def quick_key(launch: Launch, target: str) -> tuple:
    """A cheap key for `specialise`: launches with equal keys are the same kernel.

    It has the value of an integer that is a constant, else whether it is 1, whether 16 divides it,
    and whether it needs 64 bits.
    """
    seen: list[Any] = [target, id(launch.kernel), *launch.tile]
    for parameter in launch.kernel.params:
        x = launch.arguments[parameter.name]
        if isinstance(x, torch.Tensor):
            seen.append(x.dtype)
        elif parameter.is_constexpr or not isinstance(x, int):
            seen.append(type(x) if isinstance(x, float) else x)
        else:
            seen.append((x == 1, x % 16 == 0, abs(x) >> 31 == 0))
    return tuple(seen)


def compile_launch(launch: Launch, target: str, ptxas: str | None = None) -> Compiled:
    """Compile a recorded launch, or take it from Triton's cache on disk.

    ptxas: path of an assembler, which may be one that we reject; None = ours.
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
    binary = kernel.asm.get("cubin", b"")
    return Compiled(registers, shared, spills, columns, one_by_one, seconds, assembly, binary)


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)[0]
    return int(registers), int(stack) + int(local)


def ptxas_messages(ptx: str, ptxas: str | None) -> str:
    """The messages of an assembler (None = ours) about PTX for sm_90."""
    ptxas = ptxas or assembler.choose(90).path  # type: ignore[union-attr]
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
    problem: str  # empty if there is none


def jobs_of(cases: Iterable[Case]) -> list[Job]:
    """The different kernels that some cases launch."""
    jobs: dict[str, Job] = {}
    keys: dict[tuple, str] = {}  # Triton's own key takes a millisecond
    for case in cases:
        try:
            launches = launches_of(case)
        except Exception:  # occurs again in `run_job`, which reports it
            jobs[str(case)] = Job(case, 0, case.op, "-", False)
            continue
        if not launches:
            jobs[str(case)] = Job(case, None, "-", "-", False)
        for n, launch in enumerate(launches):
            seen = quick_key(launch, case.target)
            key = keys[seen] = keys.get(seen) or specialise(launch, case.target)[2]
            tile = "{} x {}, {} warps, {} stages".format(*launch.tile)
            name = launch.kernel.fn.__name__.strip("_").removesuffix("_kernel")
            # if a default and another tile give the same kernel, it counts as the default
            default = launch.default or (key in jobs and jobs[key].default)
            jobs[key] = Job(case, n, name, tile, default)
    return list(jobs.values())


def run_job(job: Job) -> Result:
    """Compile one kernel and judge it; runs in any process."""
    if job.n is None:
        return Result(job, None, "")
    try:
        compiled = compile_launch(launches_of(job.case)[job.n], job.case.target)
    except Exception as error:  # any failure of the compiler is the result of this job
        return Result(job, None, f"{type(error).__name__}: {str(error).strip()[:300]}")
    return Result(job, compiled, problem(job, compiled))


def problem(job: Job, compiled: Compiled) -> str:
    """The problem of a compiled kernel, or ""."""
    case = job.case
    room = SHARED_MEMORY[case.target]
    if compiled.shared > room:
        return f"shared memory: {compiled.shared} of {room} bytes"
    if compiled.tensor_memory > TENSOR_MEMORY:
        return f"tensor memory: {compiled.tensor_memory} of {TENSOR_MEMORY} columns"
    if compiled.binary and (found := signs(compiled.binary)):
        return f"machine code: {found[0].kind}: {found[0].text}"
    hopper = case.target == "sm_90" and case.dtype != "fp32" and case.head_dim == 64
    if job.default and hopper and compiled.one_by_one:
        return "wgmma instructions wait for one another (see ptxas -v)"
    key = (job.name, case.target, case.dtype, case.head_dim)
    allowed = ALLOWED_SPILLS.get(key, (SPILLED, ""))[0]
    if job.default and compiled.spills > allowed:
        return f"spills {compiled.spills} bytes with a default tile, {allowed} are allowed"
    return ""


def run_jobs(jobs: list[Job], processes: int) -> Iterator[Result]:
    """Compile in a few new processes; yields the results in order."""
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
    """The row of the CSV; the columns that name a kernel come first."""
    case = result.job.case
    compiled: Any = result.compiled
    of = {"kernel": result.job.name, "tile": result.job.tile, "target": case.target}
    of |= {"default": int(result.job.default)}
    of |= {"dtype": case.dtype, "head_dim": case.head_dim}
    of |= {"seq_len": case.seq_len, "prefix_len": case.prefix_len}
    of |= {"registers": compiled.registers, "shared_bytes": compiled.shared}
    of |= {"spilled_bytes": compiled.spills, "wgmma_one_by_one": compiled.one_by_one}
    return of | {"triton": triton.__version__}


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one row per kernel, tile, shape and target; of equal ones the last."""
    names = ("kernel", "tile", "target", "default", "dtype", "head_dim", "seq_len", "prefix_len")
    found = {tuple(row[name] for name in names): row for row in rows}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, next(iter(found.values()), {}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for absent GPUs.")
    parser.add_argument("--all", action="store_true", help="every combination, not a cover")
    parser.add_argument("--processes", type=int, default=2, help="compile in this many (default 2)")
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV")
    for name, values in DIMENSIONS.items():
        is_bool = isinstance(values[0], bool)
        kind = (lambda text: text == "True") if is_bool else type(values[0])
        parser.add_argument(f"--{name}", nargs="+", type=kind, choices=values, help="only these")
    args = vars(parser.parse_args())
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled; unset it")
    chosen = {name: tuple(args[name]) for name in DIMENSIONS if args[name] is not None}
    cases = every_case(**chosen) if args["all"] else [*cover(**chosen), *calls(**chosen)]
    jobs = jobs_of(cases)
    print(f"{len(jobs)} kernels, Triton {triton.__version__}, {assembler.choose(90)}", flush=True)
    print(
        "kernel       target  dtype  D  tile (queries x keys)             "
        " regs.  shared  spill      s  case"
    )
    began, failed, rows = time.perf_counter(), 0, []
    for result in run_jobs(jobs, args["processes"]):
        failed += bool(result.problem)
        print(row(result), flush=True)
        rows += [csv_row(result)] if result.compiled else []
    if args["out"]:
        write_csv(args["out"], rows)
    print(f"{len(jobs)} kernels, {failed} failed, {time.perf_counter() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
