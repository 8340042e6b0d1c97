"""Data-flow analysis of SASS: the state before each instruction that holds on all paths to it.

`solve` follows the control flow with any kind of state. There are two kinds: the values of uniform
registers, as far as they are constants (`VALUES`), and the wgmma instructions that may still be
running (`IN_FLIGHT`). `kernels.tools.sass` judges them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kernels.tools.sass_code import Instruction, registers, results

UNKNOWN = "unknown"  # a register that was written with a value that is not tracked
ADDRESS = "address"  # a value that is computed from an address in shared memory
WORD = 0xFFFFFFFF
ENDS = ("BRA", "BRX", "JMP", "EXIT", "CALL", "RET", "BSYNC", "KILL")


class Flow(NamedTuple):
    """A kind of state: `start` at the entry, `step` over an instruction, `join` of two paths.
    `step` returns a new state."""

    start: Any
    step: Callable[[Any, Instruction], Any]
    join: Callable[[Any, Any], Any]


def blocks(code: list[Instruction]) -> dict[int, tuple[int, list[int]]]:
    """Basic blocks of the code: first instruction -> (end, first instructions of the successors).

    A jump through a register and a return have no successors. Their targets have labels, and get
    their state from the other paths.
    """
    starts = [0]
    for n in range(1, len(code)):
        if code[n].labels or code[n - 1].name in ENDS:
            starts.append(n)
    place = {label: n for n, instruction in enumerate(code) for label in instruction.labels}
    after = {}
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last, follow = code[end - 1], []
        if last.name == "BRA":
            target = place.get(last.operands[-1].strip("`()"))
            follow += [] if target is None else [target]
        always = last.name in ("EXIT", "RET", "BRX", "JMP", "KILL")
        always = always or (last.name == "BRA" and len(last.operands) == 1)  # BRA.U has a predicate
        if (last.guard or not always) and end < len(code):
            follow.append(end)
        after[start] = end, follow
    return after


def solve(code: list[Instruction], flow: Flow) -> list[Any]:
    """The state before each instruction; None if it cannot be reached."""
    if not code:
        return []
    after = blocks(code)
    entry: dict[int, Any] = {0: flow.start}
    work = [0]
    while work:
        start = work.pop()
        state, (end, follow) = entry[start], after[start]
        for instruction in code[start:end]:
            state = flow.step(state, instruction)
        for target in follow:
            known = target in entry
            joined = flow.join(entry[target], state) if known else state
            if not known or joined != entry[target]:
                entry[target] = joined
                work.append(target)
    before: list[Any] = [None] * len(code)
    for start, state in entry.items():
        for n in range(start, after[start][0]):
            before[n] = state
            state = flow.step(state, code[n])
    return before


def join_values(one: dict, other: dict) -> dict:
    """The values that hold on both paths. A register counts as written if one path writes it."""
    joined = one | other
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            joined[name] = UNKNOWN
    return joined


def step_values(values: dict[str, int | str], instruction: Instruction) -> dict[str, int | str]:
    """The written registers, each with its constant, ADDRESS, "address + N" or UNKNOWN.

    Addresses start from the base of the block's shared memory (S2UR), are divided by 16 (USHF) and
    truncated to 14 bits (USGXT).
    """
    writes = registers(instruction).writes
    new: dict[str, int | str] = dict.fromkeys(writes, UNKNOWN)
    if instruction.name == "CALL":
        new = {f"{kind}{n}": UNKNOWN for kind in ("R", "UR", "P", "UP") for n in range(256)}
    operands = instruction.operands[results(instruction) :]
    first = instruction.operands[0] if writes else ""
    if first in new and instruction.opcode == "UMOV":
        new[first] = value(values, operands[0])
    elif first in new and instruction.opcode in ("UIADD3", "UIADD3.X"):
        new[first] = total([value(values, x) for x in operands[:3]])
    elif first in new and instruction.opcode == "UIADD3.64":
        low, high = zip(*(pair(values, x) for x in operands[:3]), strict=True)
        new |= {first: total(low), f"UR{int(first[2:]) + 1}": total(high)}
    elif first in new and (
        instruction.name in ("S2UR", "USGXT") or instruction.opcode == "USHF.R.U32.HI"
    ):
        new[first] = ADDRESS
    if instruction.guard:  # it may not be executed
        new = {x: y if values.get(x, y) == y else UNKNOWN for x, y in new.items()}
    return values | new


def value(values: dict[str, int | str], operand: str) -> int | str:
    """A term of a sum: its constant modulo 2^32, or another known value."""
    if operand == "URZ":
        return 0
    if found := re.fullmatch(r"([-~]?)(UR\d+)", operand):
        known = values.get(found[2], UNKNOWN)
        if not found[1] or known == UNKNOWN:
            return known
        return UNKNOWN if isinstance(known, str) else (-known if found[1] == "-" else ~known) & WORD
    try:
        return int(operand, 16) & WORD
    except ValueError:
        return UNKNOWN


def pair(values: dict[str, int | str], operand: str) -> tuple[int | str, int | str]:
    """A 64-bit term: its low and its high word.

    Addresses are small, so their sums carry nothing into the high word. Subtracting a term from an
    address borrows 1 if the low word of the term is a large constant.
    """
    if not (found := re.fullmatch(r"(-?)UR(\d+)", operand)):
        return value(values, operand), 0
    low, high = (values.get(f"UR{int(found[2]) + n}", UNKNOWN) for n in (0, 1))
    if not found[1]:
        return low, high
    if isinstance(low, str) or isinstance(high, str):
        return UNKNOWN, UNKNOWN
    return -low & WORD, -high - (low > WORD // 2) & WORD


def total(terms: Sequence[Any]) -> int | str:
    """A sum, as far as it is constant."""
    if not any(isinstance(term, str) for term in terms):
        return sum(terms) & WORD
    words = [term for term in terms if isinstance(term, str)]
    if words != [ADDRESS]:
        return UNKNOWN
    constant = sum(term for term in terms if not isinstance(term, str)) & WORD
    return f"{ADDRESS} + {constant:#x}" if constant else ADDRESS


VALUES = Flow({}, step_values, join_values)


def step_in_flight(running: frozenset, instruction: Instruction) -> frozenset:
    """The wgmma that may still run: (instruction, number of groups closed since it, counting its
    own; 0 while its own is open)."""
    if instruction.name == "HGMMA":
        running |= {(instruction, 0)}
        if "gsb0" in instruction.operands:  # closes a group
            running = frozenset((one, min(age + 1, 9)) for one, age in running)
    elif instruction.opcode == "WARPGROUP.DEPBAR.LE":  # waits until at most N groups run
        allowed = int(instruction.operands[1], 16)
        running = frozenset((one, age) for one, age in running if age <= allowed)
    return running


IN_FLIGHT = Flow(frozenset(), step_in_flight, frozenset.union)
