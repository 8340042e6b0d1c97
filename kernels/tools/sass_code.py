"""Parses machine code of an NVIDIA GPU (SASS) into instructions with the registers they use.

`disassemble` turns a cubin into text with NVIDIA's nvdisasm, `parse` turns the text into
`Instruction`s in address order. The register sets for `kernels.tools.sass` are

* `reads`: registers that an instruction certainly reads. An unknown width counts as one register.
* `writes`: registers that it certainly writes.

Registers are named as in the text: R7 (of a thread), UR7 (uniform: one for a warp), P0 and UP0
(their predicates). RZ, URZ, PT and UPT are constants and appear in no set. NVIDIA publishes the
names of the instructions, not their operands; the rules below were compared, instruction by
instruction, with the live ranges that `nvdisasm --print-life-ranges` prints for our kernels.
"""

import re
import subprocess
import tempfile
from functools import lru_cache
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)\b((?:\.\w+)*)")
FORM = {"64": 2, "128": 4, "WIDE": 2}  # number of registers of a value, by modifier
PREDICATES = re.compile(r"!?U?P(\d+|T)")
# instructions whose first register is a source: stores, barriers, tensor memory and the like
NO_RESULT = (
    "ST", "STG", "STS", "STL", "STSM", "STT", "STTM", "RED", "REDG", "REDS", "LDGSTS", "BAR", "BRA",
    "BRX", "JMP", "CALL", "RET", "EXIT", "NOP", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC", "BSYNC",
    "DEPBAR", "LDGDEPBAR", "CCTL", "CCTLL", "ERRBAR", "UTMALDG", "UTMASTG", "UTMAPF", "UTMACCTL",
    "UTMACMDFLUSH", "UBLKCP", "UBLKPF", "UBLKRED", "UTMAREDG", "UTCBAR", "UTCHMMA", "UTCQMMA",
    "UTCIMMA", "UTCOMMA", "UTCCP", "UTCSHIFT", "USETMAXREG", "ARRIVES", "NANOSLEEP", "UCGABAR_ARV",
    "UCGABAR_WAIT", "ACQBULK", "UTCATOMSWS", "PREEXIT", "KILL", "BPT", "R2P", "UR2UP", "PMTRIG",
)  # fmt: skip


class Instruction(NamedTuple):
    """One line of the listing."""

    address: int  # bytes from the kernel's first instruction
    guard: str  # the predicate that must hold, "" for always; "!P0" is a predicate that must not
    opcode: str  # with its modifiers, as in HGMMA.64x64x16.F32.BF16
    operands: tuple[str, ...]
    labels: tuple[str, ...]  # labels directly before it

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:04x}: {guard}{self.opcode} {', '.join(self.operands)}".rstrip()


class Registers(NamedTuple):
    """The registers that an instruction reads and writes."""

    reads: frozenset[str]
    writes: frozenset[str]


def disassemble(cubin: bytes, nvdisasm: str) -> str:
    """The listing of a cubin's code. RuntimeError if nvdisasm cannot read it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm, "--print-code", "--no-dataflow", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not result.stdout:
        raise RuntimeError(f"{nvdisasm}: {result.stderr.strip()[:200]}")
    return result.stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing, in address order."""
    code, labels = [], []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels.append(label[1])
        elif found := LINE.search(line):
            address, negated, guard, opcode, operands = found.groups()
            operands = tuple(x.strip() for x in operands.split(",")) if operands else ()
            guard = (negated or "") + (guard or "")
            code.append(Instruction(int(address, 16), guard, opcode, operands, tuple(labels)))
            labels = []
    return code


def results(instruction: Instruction) -> int:
    """How many operands are written; these come first."""
    name, operands = instruction.name, instruction.operands
    if name in NO_RESULT and "FIND_AND_SET" not in instruction.opcode:
        return 0
    if name in ("VOTE", "VOTEU", "ELECT"):
        return len(operands) - 1  # the last one is the predicate that is voted on
    if name.endswith(("SETP", "PLOP3")):
        return 2
    count = 0
    while count < len(operands) and PREDICATES.fullmatch(operands[count]):
        count += 1
    if count < len(operands) and re.fullmatch(r"U?R(\d+|Z)", operands[count]):
        count += 1
        # a carry out comes after the sum and before the terms
        while count < len(operands) and re.fullmatch(r"U?P(\d+|T)", operands[count]):
            count += 1
    return count


def span(kind: str, first: int, count: int) -> set[str]:
    return {f"{kind}{n}" for n in range(first, first + count)}


def width(instruction: Instruction) -> int:
    """The number of registers of the result."""
    name, *modifiers = instruction.opcode.split(".")
    if name == "HGMMA":
        return int(modifiers[0].split("x")[1]) // (2 if modifiers[1] == "F32" else 4)
    if name in ("HMMA", "IMMA"):
        return 2 if modifiers[1] == "F16" else 4
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if name == "LDTM":
        return int(next((m[1:] for m in modifiers if re.fullmatch(r"x\d+", m)), 1))
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if name in ("FMUL2", "FADD2", "FFMA2", "DADD", "DMUL", "DFMA"):
        return 2
    if name in ("F2I", "I2F", "F2F"):
        return 2 if modifiers and modifiers[0] in ("U64", "S64", "F64") and name != "I2F" else 1
    return max((FORM.get(modifier, 1) for modifier in modifiers), default=1)


@lru_cache(maxsize=1 << 14)
def registers(instruction: Instruction) -> Registers:
    """The registers that an instruction reads and writes."""
    reads, writes = set(), set()
    operands, count = instruction.operands, results(instruction)
    for kind, number, _ in REGISTER.findall(instruction.guard):
        reads.add(kind + number)
    for operand in operands[:count]:
        for kind, number, _ in REGISTER.findall(operand):
            many = width(instruction) if kind in ("R", "UR") else 1
            writes |= span(kind, int(number), many)
    if instruction.name == "R2P":
        writes |= span("P", 0, 7)
    for place, operand in enumerate(operands[count:]):
        reads |= _read(instruction, place, operand)
    return Registers(frozenset(reads), frozenset(writes))


def _read(instruction: Instruction, place: int, operand: str) -> set[str]:
    """The registers of one operand that is read."""
    reads = set()
    pairs = instruction.name.startswith("U") and "64" in instruction.opcode.split(".")
    for kind, number, modifiers in REGISTER.findall(operand):
        first, many = int(number), 1
        if operand.startswith("gdesc["):
            if instruction.name == "HGMMA":  # of four: the first two are A's, the others B's
                first, many = (first, 4) if place == 0 else (first + 2, 2)
            else:
                many = 2
        elif instruction.name == "HGMMA" and kind == "R":
            many = 4 if place == 0 and "gdesc" in instruction.operands[2] else width(instruction)
        elif kind in ("R", "UR"):
            addend = "WIDE" in instruction.opcode.split(".") and place == 2
            wide = pairs or addend or ".64" in modifiers
            many = 2 if wide or operand.startswith(f"desc[{kind}{number}]") else 1
        reads |= span(kind, first, many)
    return reads
