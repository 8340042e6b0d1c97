"""Read the machine code of our kernels for signs of a miscompiled matrix product.

    python -m kernels.tools.sass --quick           heads of 64 in bf16 on sm_90: some minutes
    python -m kernels.tools.sass --ptxas PATH      all sizes and tiles, by any assembler

compiles the calls of training and decoding (`kernels.tools.cases.calls`) and prints each kernel
that shows a sign or does not compile. The last line has their number and the assembler; the exit
code is 1 if there are any. No GPU is needed. `signs` judges the code of one kernel.

A wgmma of Hopper (HGMMA in SASS) and a tcgen05.mma of Blackwell (UTCHMMA) address a matrix in
shared memory by a descriptor of 64 bits in two uniform registers: address / 16 in the low word;
stride and swizzle, which are constants of the layout, in the high word. PTX adds the constant to
the address. ptxas 12.8 and earlier turns that into

    UIADD3   URa, UP0, URx, 0x20           low word
    UIADD3.X URb, URx, 0xc0000010, UP0     high word: URx again, which should be 0 here

so that the high word is wrong, or both words are, if URx has not been written yet (similar to
triton-lang/triton#7196, #11366, #10486). The signs are

* `unset`: a uniform register or a predicate is read although no path, or no instruction at a
  smaller address, has written it. Registers of a thread are not checked, because byte permutations
  read some without using them. Applies to every architecture.
* `twice`: the pair above, in which one register is a term of both words of a sum.
* `descriptor`: the high word of a descriptor is a constant that no layout has, or the sum of a
  layout's constant and an address. A high word from another source, such as a register of the
  thread, is not judged.
* `running`: a register that an asynchronous wgmma may still read or add to is used before the wait.
  ptxas before 13.3 can do this to an operand in registers (triton-lang/triton#9433, #11781), but
  none of our kernels has shown it. Only Hopper has such registers.
"""

import argparse
import functools
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from kernels import assembler
from kernels.tools.sass_code import Instruction, disassemble, parse, registers, results
from kernels.tools.sass_flow import IN_FLIGHT, VALUES, solve

# Swizzle (bits 30 and 31 of the high word): bytes between groups of 8 rows, over 16 (bits 0 to 13)
STRIDES = {1: 1024 // 16, 2: 512 // 16, 3: 256 // 16}  # rows of 128, 64 and 32 bytes
VERSION = {"HGMMA": 0, "UTCHMMA": 1 << 14}  # bit 46 of the descriptor: Blackwell's format


class Sign(NamedTuple):
    """A sign of a miscompiled kernel."""

    kind: str  # unset, twice, descriptor, running; fails: there is no code
    text: str  # the instruction, and its fault


def signs(cubin: bytes) -> list[Sign]:
    """The signs in the code of a kernel; usually none."""
    return signs_of(parse(disassemble(cubin, nvdisasm())))


@functools.cache
def nvdisasm() -> str:
    """The path of the newest nvdisasm. RuntimeError if there is none."""
    found = assembler.tools("nvdisasm")
    if not found:
        raise RuntimeError("nvdisasm was not found: it comes with Triton and with the CUDA toolkit")
    return max(found, key=lambda one: one.version).path


def signs_of(code: list[Instruction]) -> list[Sign]:
    """The signs in a listing, in address order."""
    found, written = twice(code), set()  # at smaller addresses
    states = zip(code, solve(code, VALUES), solve(code, IN_FLIGHT), strict=True)
    for instruction, values, running in states:
        if values is not None:  # the instruction can be reached
            found += unset(instruction, values.keys() & written)
            found += descriptor(instruction, values) + overtaken(instruction, running)
        written |= registers(instruction).writes
    return sorted(set(found), key=lambda sign: (sign.text, sign.kind))


def unset(instruction: Instruction, written: set[str]) -> list[Sign]:
    """Registers that are read but not written. A loop's own writes do not count, because they come
    after its first reads."""
    return [
        Sign("unset", f"{instruction.text}  ({name} was never written)")
        for name in sorted(registers(instruction).reads - written)
        if not name.startswith("R")
    ]


def twice(code: list[Instruction]) -> list[Sign]:
    """Sums whose two words have the same register as a term, without a write to it in between.

    Two words belong to one sum if the second adds the carry predicate of the first.
    """
    found, low = [], {}  # carry: (its instruction, terms that have not been written since)
    for instruction in code:
        operands, count = instruction.operands, results(instruction)
        terms = {x for x in operands[count:] if re.fullmatch(r"UR\d+", x)}
        if instruction.opcode == "UIADD3.X":
            for carry in set(operands[count:]) & low.keys():
                for name in sorted(terms & low[carry][1]):
                    text = f"{low[carry][0].text} / {instruction.text}  ({name} is in both words)"
                    found.append(Sign("twice", text))
        written = registers(instruction).writes
        low = {
            carry: (one, left - written)
            for carry, (one, left) in low.items()
            if carry not in written
        }
        if instruction.opcode == "UIADD3":
            carries = [x for x in operands[:count] if re.fullmatch(r"UP\d+", x)]
            low |= {carry: (instruction, terms) for carry in carries}
    return found


def descriptor(instruction: Instruction, values: dict) -> list[Sign]:
    """High words that are known and wrong."""
    if instruction.name not in VERSION:
        return []
    found = []
    for place, operand in enumerate(instruction.operands):
        if not (named := re.match(r"gdesc\[UR(\d+)\]", operand)):
            continue
        first = int(named[1])
        high = [first + 1]
        if instruction.name == "HGMMA":  # of operands A and B; none for A if it is in registers
            high = [first + 1, first + 3] if place == 1 else [first + 3]
        for word in (values.get(f"UR{n}") for n in high):
            constant = (
                int(word.split(" + ")[1], 16) if isinstance(word, str) and "+" in word else word
            )
            legal = isinstance(constant, int) and is_layout(constant, VERSION[instruction.name])
            if isinstance(word, int) and not legal:
                found.append(Sign("descriptor", f"{instruction.text}  (high word {word:#x})"))
            elif isinstance(word, str) and legal:
                found.append(Sign("descriptor", f"{instruction.text}  (high word {word})"))
    return found


def is_layout(word: int, version: int) -> bool:
    """Whether a descriptor can have this high word: a swizzle, and its stride. A matrix of one
    group of 8 rows has no stride."""
    swizzle, stride = word >> 30, word & 0x3FFF
    rest = word & 0x3FFFC000
    return rest == version and swizzle in STRIDES and stride in (0, STRIDES[swizzle])


def overtaken(instruction: Instruction, running: frozenset) -> list[Sign]:
    """Uses of registers that a wgmma, which may still be running, reads or adds to.

    wgmma instructions run in order, so a later one may add to the same sums.
    """
    touched, found = registers(instruction), []
    for wgmma, _ in running:
        used = registers(wgmma)
        if instruction.name == "HGMMA":
            clash = touched.writes & used.reads - used.writes
        else:
            clash = touched.writes & used.reads | (touched.reads | touched.writes) & used.writes
        clash = sorted(name for name in clash if name.startswith("R"))
        if clash:
            text = f"{instruction.text}  ({', '.join(clash[:4])}: in use by {wgmma.text})"
            found.append(Sign("running", text))
    return found


def check(job, ptxas: str | None) -> tuple[str, list[Sign]]:
    """Compile a job of `kernels.tools.compile_offline` and judge it; runs in any process."""
    from kernels.tools.cases import launches_of
    from kernels.tools.compile_offline import compile_launch

    case = job.case
    also = [x for x in ("prefix_index", "kv_lens", "q_offset") if getattr(case, x)]
    also += ["fp32 prefix"] if case.prefix_dtype == "fp32" != case.dtype else []
    also += ["B=1"] if case.batch_size == 1 else []
    also += ["dprefix only"] if case.op == "backward" and case.need == "prefix" else []
    row = f"{job.name:11} {case.target:6} {case.dtype} D={case.head_dim:<3} {job.tile:31} "
    row += f"H={case.n_head} T={case.seq_len:<4} P={case.prefix_len:<3} {' '.join(also)}"
    try:
        found = signs(compile_launch(launches_of(case)[job.n], case.target, ptxas).binary)
    except Exception as error:  # any failure of the compiler is the result of this job
        found = [Sign("fails", f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}")]
    return row.rstrip(), found


def main() -> None:
    from kernels.tools.cases import GPU_TARGETS, calls
    from kernels.tools.compile_offline import jobs_of

    parser = argparse.ArgumentParser(description="Look for miscompiled matrix products.")
    parser.add_argument(
        "--quick", action="store_true", help="heads of 64 in bf16, default tiles only"
    )
    parser.add_argument("--ptxas", help="an assembler to check (default: the one that is used)")
    targets = [name for name in GPU_TARGETS if name.startswith("sm_")]
    parser.add_argument("--target", choices=targets, default="sm_90", help="(default: sm_90)")
    parser.add_argument("--processes", type=int, default=2, help="compile in this many (default 2)")
    args = parser.parse_args()
    arch = GPU_TARGETS[args.target].arch
    used = assembler.choose(arch)
    if args.ptxas:
        used = assembler.Assembler(args.ptxas, assembler.version_of(args.ptxas), "--ptxas")
    elif reason := assembler.refusal(arch):
        sys.exit(reason)
    if used is None or used.version is None:
        sys.exit(f"{used}")
    chosen = {"head_dim": (64,)} if args.quick else {"dtype": ("bf16", "fp16", "fp32")}
    jobs = jobs_of(calls(target=(args.target,), **chosen))
    jobs = [job for job in jobs if job.default or not args.quick]
    began, flagged = time.perf_counter(), 0
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for row, found in pool.map(functools.partial(check, ptxas=args.ptxas), jobs):
            if found:
                flagged += 1
                print(
                    row, *(f"    {kind}: {text}" for kind, text in found[:4]), sep="\n", flush=True
                )
    seconds = time.perf_counter() - began
    print(f"{len(jobs)} kernels, {flagged} flagged, {used}, {seconds:.0f} s")
    sys.exit(1 if flagged else 0)


if __name__ == "__main__":
    main()
