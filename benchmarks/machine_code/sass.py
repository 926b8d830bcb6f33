"""Reads machine code of NVIDIA GPUs (SASS): instructions, loops, and the widths of memory accesses."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton

# "        /*04b0*/              @!P1 LDG.E.128 R4, desc[UR14][R2.64] ;"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_GLOBAL = re.compile(r"^(?:LDG|LDGSTS|STG)\.E\.?(?:\w+\.)*?([SU]?\d+)?(?:\.\w+)*$")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch goes to; None for other instructions.

        A call counts as a branch, because on sm_80 some loops end with one. A subroutine never branches back.
        """
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands)
        if self.opcode.split(".")[0] not in ("BRA", "CALL") or not addresses:
            return None
        return int(addresses[-1], 16)

    @property
    def leaves(self) -> bool:
        """Whether the next instruction is never reached from this one."""
        kind = self.opcode.split(".")[0]
        if self.predicate is not None or kind not in ("BRA", "EXIT", "RET"):
            return False
        return kind != "BRA" or re.fullmatch(r"0x[0-9a-f]+", self.operands) is not None  # BRA.U UP0, 0x10

    @property
    def bits(self) -> int:
        """Width of a global memory access: 128 for LDG.E.128, 32 for LDG.E, 16 for LDG.E.U16; else 0."""
        match = _GLOBAL.match(self.opcode)
        if match is None:
            return 0
        return 32 if match[1] is None else int(match[1].lstrip("SU"))

    @property
    def loaded_bits(self) -> int:
        return self.bits if self.opcode.startswith("LDG") else 0


@dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks from which control can return to the loop's head."""

    head: int
    instructions: tuple[Instruction, ...]  # of the whole loop
    every_time: tuple[Instruction, ...]  # those that every iteration executes

    def count(self, opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in self.instructions)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that a thread loads in an iteration. Conditional loads do not count."""
        return sum(i.loaded_bits for i in self.every_time) // 8

    @property
    def stores(self) -> bool:
        return self.count("STG") > 0

    @property
    def narrowest_bits(self) -> int:
        """Width of the narrowest global memory access."""
        return min((i.bits for i in self.instructions if i.bits), default=0)

    def without_loads(self, bits: int) -> Loop:
        """The loop without the loads of this width."""
        parts = (self.instructions, self.every_time)
        return Loop(self.head, *(tuple(i for i in part if i.loaded_bits != bits) for part in parts))

    def contains(self, other: Loop) -> bool:
        return set(other.instructions) < set(self.instructions)


class Sass:
    """The instructions of a kernel for an NVIDIA GPU. Triton's wheel contains the disassembler."""

    def __init__(self, cubin: bytes) -> None:
        found = cuobjdump("-sass", cubin, _INSTRUCTION, every=True)
        self.instructions = [Instruction(int(address, 16), *rest) for address, *rest in found]

    def main_loop(self, *, stores: bool) -> Loop | None:
        """The innermost loop over a row that stores (gradient) or does not store (statistics).

        If there are several, the one that loads most per iteration: an unrolled loop, not its remainder.
        """
        loading = [loop for loop in self.loops if loop.loaded_bytes]
        innermost = [a for a in loading if not any(a.contains(b) for b in loading)]
        wanted = [loop for loop in innermost if loop.stores == stores]
        return max(wanted, key=lambda loop: loop.loaded_bytes, default=None)

    def way_through(self) -> list[Instruction]:
        """The instructions on the paths through the widest load, in a kernel without a loop.

        The path of a masked row, which loads nothing, is not included.
        """
        blocks, successors = self._blocks()
        widest = max(range(len(blocks)), key=lambda b: max(i.loaded_bits for i in blocks[b]))
        after = [_reachable(b, successors) for b in range(len(blocks))]
        passed = [b for b in range(len(blocks)) if b in after[widest] or widest in after[b]]
        return [i for b in passed for i in blocks[b] if i.opcode != "NOP"]

    @cached_property
    def loops(self) -> list[Loop]:
        blocks, successors = self._blocks()
        dominators = _dominators(successors)
        tails: dict[int, list[int]] = defaultdict(list)
        for block, following in enumerate(successors):
            for head in following:
                if head in dominators[block]:
                    tails[head].append(block)
        loops = []
        for head, ends in tails.items():
            body = set().union(*(_reaching(end, head, successors) for end in ends))
            every_time = body.intersection(*(dominators[end] for end in ends))
            both = (
                tuple(i for b in sorted(part) for i in blocks[b] if i.opcode != "NOP")
                for part in (body, every_time)
            )
            loops.append(Loop(blocks[head][0].address, *both))
        return loops

    def _blocks(self) -> tuple[list[list[Instruction]], list[list[int]]]:
        """The basic blocks, and for each the indices of its possible successors."""
        starts = {self.instructions[0].address}
        for here, after in itertools.pairwise(self.instructions):
            if here.target is not None:
                starts |= {here.target, after.address}
            elif here.leaves:
                starts.add(after.address)
        blocks: list[list[Instruction]] = []
        for instruction in self.instructions:
            if instruction.address in starts:
                blocks.append([])
            blocks[-1].append(instruction)
        at = {block[0].address: number for number, block in enumerate(blocks)}
        successors: list[list[int]] = []
        for number, block in enumerate(blocks):
            last = block[-1]
            following = [] if last.leaves or number + 1 == len(blocks) else [number + 1]
            if last.target is not None:
                following.append(at[last.target])
            successors.append(following)
        return blocks, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks on every path from the entry to it, including itself."""
    everything = set(range(len(successors)))
    before: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for after in following:
            before[after].append(block)
    dominators = [{0}] + [everything] * (len(successors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            common = everything.intersection(*(dominators[b] for b in before[block])) | {block}
            if common != dominators[block]:
                dominators[block] = common
                changed = True
    return dominators


def _reachable(start: int, successors: list[list[int]]) -> set[int]:
    """The blocks that can be reached from `start`, including itself."""
    found: set[int] = set()
    todo = [start]
    while todo:
        block = todo.pop()
        if block not in found:
            found.add(block)
            todo += successors[block]
    return found


def _reaching(tail: int, head: int, successors: list[list[int]]) -> set[int]:
    """`head`, `tail`, and the blocks from which `tail` is reached without passing `head`."""
    body, todo = {head}, [tail]
    while todo:
        block = todo.pop()
        if block not in body:
            body.add(block)
            todo += [b for b, following in enumerate(successors) if block in following]
    return body


def cuobjdump(option: str, cubin: bytes, pattern: re.Pattern[str], *, every: bool = False) -> list[Any]:
    """The groups of the first match of `pattern` in the output of cuobjdump, or of every match."""
    # The tool in Triton's wheel knows every architecture that its compiler supports; one on PATH may not.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
    found = [match.groups() for match in pattern.finditer(said)]
    if not found:
        raise ValueError(f"cuobjdump {option} has no match in its output:\n{said[:2000]}")
    return found if every else list(found[0])
