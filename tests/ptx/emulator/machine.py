"""Executes a kernel: registers, branches, barriers, shuffles and accesses to memory.

All threads of several blocks run at once. A register is an array with an element per thread, and one NumPy
call executes one instruction for every thread that is at it. Threads are numbered with the warps outside
and the blocks inside, so that the same warp of all blocks is one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from .arithmetic import perturbed
from .errors import Fault, Unsupported
from .instructions import APPROXIMATIONS, INSTRUCTIONS
from .memory import ALIGNMENT, Access, GlobalMemory, Parameters, SharedMemory
from .parser import Address, Immediate, Name, Operand, Program, Statement, Vector
from .types import BITS, DTYPES

WARP = 32
EXITED = np.iinfo(np.int64).max  # the position of a thread that has returned
POISON = 0xDEADBEEFDEADBEEF  # in registers that nothing has written
MATRICES = {f"stmatrix.sync.aligned.m8n8.x{n}.shared.b16": n for n in (1, 2, 4)}

Threads = slice | np.ndarray  # the threads that execute an instruction
Step = Callable[[Threads], None]


@dataclass(frozen=True)
class Mode:
    """The choices that the PTX ISA leaves open.

    Attributes:
        order: "lockstep": all warps at once. "forward" or "backward": one warp after the other, each until it
            waits at a barrier. An int: the seed of a random order, which changes at every access to memory.
        perturb: Whether results of approximations such as `ex2.approx` have pseudo-random errors within the
            bounds of the ISA. By default they are rounded to the nearest number.
        contract: Whether products and sums are fused, as the assembler may.
    """

    order: str | int = "lockstep"
    perturb: bool = False
    contract: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) or self.order in ("lockstep", "forward", "backward")):
            raise ValueError(f'order must be "lockstep", "forward", "backward" or an int, got {self.order!r}')


def place(statement: Statement) -> str:
    """Return the statement and its place in the kernel's Python, for messages."""
    return f"{statement.text} ({statement.source})"


class Machine:
    """Runs blocks of a kernel.

    Args:
        program: The kernel.
        arguments: The bytes of each parameter, by name.
        memory: The tensors.
        shared_bytes: Size of a block's shared memory.
        blocks: How many blocks run at once.
        mode: See `Mode`.
    """

    def __init__(
        self,
        program: Program,
        arguments: Mapping[str, bytes],
        memory: GlobalMemory,
        shared_bytes: int,
        blocks: int,
        mode: Mode,
    ) -> None:
        self.program = program
        self.parameters = Parameters(arguments)
        self.memory = memory
        self.blocks = blocks
        self.mode = mode
        self.shared = SharedMemory(shared_bytes, blocks)
        self.size = blocks * program.threads
        self.all = np.arange(self.size)
        warp, self.block, lane = self.all // (blocks * WARP), self.all // WARP % blocks, self.all % WARP
        self.thread = warp * WARP + lane  # in its block
        self.ctaid = np.zeros(self.size, np.uint32)
        self.number = np.zeros(self.size, np.int64)  # of the thread in the launch
        self.position = np.zeros(self.size, np.int64)  # index of the thread's next statement
        self.waiting = np.zeros(self.size, bool)  # at a barrier
        self.epoch = np.zeros(self.size, np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.steps = [self.bind(statement) for statement in program.statements]
        # Whether the lanes of a warp wait for each other there.
        self.meets = [s.opcode.startswith(("shfl.sync", "stmatrix.sync")) for s in program.statements]
        self.stops = self.ends_of_stretches()

    def run(self, first: int, count: int) -> None:
        """Run the blocks `first` to `first + count - 1`, at most `blocks` of them."""
        self.ctaid[:] = first + self.block
        self.number = self.ctaid.astype(np.int64) * self.program.threads + self.thread
        self.position[:] = np.where(self.block < count, 0, EXITED)
        self.shared.forget()
        for bits in self.registers.values():
            bits[:] = POISON & (1 << 8 * bits.itemsize) - 1
        columns = [slice(at, at + self.blocks * WARP) for at in range(0, self.size, self.blocks * WARP)]
        with np.errstate(all="ignore"):
            if self.mode.order == "lockstep":
                self.run_in_turn([slice(0, self.size)])
            elif isinstance(self.mode.order, int):
                self.run_at_random(columns, np.random.default_rng(self.mode.order))
            else:
                self.run_in_turn(columns[:: 1 if self.mode.order == "forward" else -1])

    # --- Order ---

    def run_in_turn(self, groups: list[slice]) -> None:
        """Run each group of warps until all its threads wait or have exited, then release the barrier."""
        while True:
            for group in groups:
                while self.advance(group):
                    pass
            if not self.release():
                return

    def run_at_random(self, groups: list[slice], random: np.random.Generator) -> None:
        """Run one stretch of one group at a time."""
        while True:
            ready = [group for group in groups if self.ready(group).any()]
            if ready:
                self.advance(ready[random.integers(len(ready))])
            elif not self.release():
                return

    def ready(self, group: slice) -> np.ndarray:
        """Return which threads of a group can run."""
        return (self.position[group] != EXITED) & ~self.waiting[group]

    def advance(self, group: slice) -> bool:
        """Run one stretch of statements for the threads of the group that are furthest behind.

        Threads that are ahead, because they took another side of a branch, wait until these have caught up.
        Return whether a thread could run.
        """
        ready = self.ready(group)
        if not ready.any():
            return False
        positions = self.position[group]
        start = int(positions[ready].min())
        now = ready & (positions == start)
        while self.meets[start]:
            now &= np.repeat(now.reshape(-1, WARP).all(1), WARP)
            if now.any():
                break
            behind = ready & (positions > start)
            if not behind.any():
                raise Fault(
                    f"{place(self.program.statements[start])}: some lanes of the warp never come here"
                )
            start = int(positions[behind].min())
            now = ready & (positions == start)
        threads = group if now.all() else self.all[group][now]
        stop = self.stops[start]
        self.position[threads] = stop
        for step in self.steps[start:stop]:
            step(threads)
        return True

    def ends_of_stretches(self) -> list[int]:
        """Return, for each statement, the end (exclusive) of the stretch that starts with it.

        It ends after a statement that moves or stops threads, before a label, and before a statement of a
        whole warp. In a random order it also ends after each access to memory.
        """
        ends = ["bra", "bra.uni", "ret", "bar.sync"]
        memory = ("ld.global", "st.global", "ld.shared", "st.shared", "stmatrix")
        stops_at_memory = isinstance(self.mode.order, int)
        statements, targets = self.program.statements, self.program.targets
        stops = [len(statements)] * len(statements)
        for index in range(len(statements) - 2, -1, -1):
            opcode = statements[index].opcode
            ends_here = opcode in ends or index + 1 in targets or self.meets[index + 1]
            ends_here = ends_here or (stops_at_memory and opcode.startswith(memory))
            stops[index] = index + 1 if ends_here else stops[index + 1]
        return stops

    def release(self) -> bool:
        """Release the barriers. Return False if no thread waits, i.e. if all have exited.

        PTX ISA, "bar.sync": a barrier completes when all threads of the block have arrived.
        """
        if not self.waiting.any():
            return False
        for block in np.unique(self.block[self.waiting]):
            threads = self.block == block
            if not self.waiting[threads].all() or len(np.unique(self.position[threads])) > 1:
                barrier = self.program.statements[self.position[threads & self.waiting].min() - 1]
                program = self.ctaid[threads][0]
                raise Fault(
                    f"{place(barrier)}: some threads of program {program} wait here, others at another "
                    "barrier, or they have exited"
                )
        self.epoch[self.waiting] += 1
        self.waiting[:] = False
        return True

    # --- Operands ---

    def register(self, name: str) -> np.ndarray:
        """Return the bits of a register, `[threads]`."""
        if name not in self.registers:
            declared = self.program.registers
            kind = declared.get(name.lstrip("%").rstrip("0123456789")) or declared.get(name)
            if kind is None:
                raise Unsupported(f"register {name}")
            self.registers[name] = np.empty(self.size, DTYPES[bits_of(kind)])
        return self.registers[name]

    def typed(self, name: str, kind: str) -> np.ndarray:
        """Return a register as numbers of a type with as many bits."""
        bits = self.register(name)
        if bits.dtype.itemsize != DTYPES[kind].itemsize or (bits.dtype == bool) != (kind == "pred"):
            raise Unsupported(f"register {name} as {kind}")
        return bits.view(DTYPES[kind])

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the values of an operand, `[threads]`."""
        if isinstance(operand, Immediate):
            if operand.kind != "int" and BITS[operand.kind] != BITS[kind]:
                raise Unsupported(f"a constant of type {operand.kind} as {kind}")
            if operand.kind == "int" and kind.startswith("f"):
                raise Unsupported(f"an integer as {kind}")
            bits = np.array([operand.value & (1 << BITS[kind]) - 1], DTYPES[bits_of(kind)])
            return np.broadcast_to(bits.view(DTYPES[kind]), self.size)
        if not isinstance(operand, Name):
            raise Unsupported(f"{operand} as {kind}")
        special = {"%tid.x": self.thread.astype(np.uint32), "%ctaid.x": self.ctaid}
        if operand.name in special and BITS[kind] == 32:
            return special[operand.name].view(DTYPES[kind])
        if operand.name in self.parameters.addresses and BITS[kind] == 64:
            return np.full(self.size, self.parameters.addresses[operand.name], DTYPES[kind])
        if operand.name in self.program.shared_symbols:
            return np.full(self.size, SharedMemory.BASE, DTYPES[kind])
        return self.typed(operand.name, kind)

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the array that an instruction writes its result to. `_` discards it."""
        if not isinstance(operand, Name):
            raise Unsupported(f"{operand} as a result")
        if operand.name == "_":
            return np.empty(self.size, DTYPES[kind])
        return self.typed(operand.name, kind)

    # --- Instructions ---

    def bind(self, statement: Statement) -> Step:
        """Return a function that executes the statement in given threads."""
        where = place(statement)
        try:
            step = self.bind_opcode(statement, where)
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None
        if statement.predicate is None:
            return step
        predicate = self.typed(statement.predicate, "pred")

        def predicated(threads: Threads) -> None:
            active = predicate[threads] != statement.negated
            if active.all():
                step(threads)
            elif active.any():
                step(self.all[threads][active])

        return predicated

    def bind_opcode(self, statement: Statement, where: str) -> Step:
        opcode, operands = statement.opcode, statement.operands
        name, *modifiers = opcode.split(".")
        if name == "mov" and any(isinstance(operand, Vector) for operand in operands):
            return self.bind_vector_move(modifiers, operands)
        if opcode in INSTRUCTIONS:
            return self.bind_computation(opcode, operands)
        if opcode in ("bra", "bra.uni") and operands[0].name in self.program.labels:
            return partial(self.jump, self.program.labels[operands[0].name])
        if opcode == "ret":
            return partial(self.jump, EXITED)
        if opcode == "bar.sync" and operands == (Immediate(0, "int"),):
            return self.wait
        if opcode == "shfl.sync.bfly.b32" and statement.predicate is None:
            return self.bind_shuffle(operands)
        if name == "ld" and modifiers[:1] == ["param"]:
            return self.bind_parameter(modifiers[1:], operands, where)
        if name in ("ld", "st") and modifiers[:1] in (["global"], ["shared"]):
            return self.bind_access(name == "st", modifiers, operands, where)
        if opcode in MATRICES and statement.predicate is None:
            return self.bind_matrices(MATRICES[opcode], operands, where)
        raise Unsupported("unknown instruction")

    def bind_computation(self, opcode: str, operands: tuple[Operand, ...]) -> Step:
        """Bind an instruction that computes its result from its operands alone."""
        instruction = INSTRUCTIONS[opcode]
        compute = instruction.compute
        if len(operands) != 1 + len(instruction.sources):
            raise Unsupported(f"{len(operands)} operands")
        target = self.target(operands[0], instruction.result)
        sources = [self.source(x, kind) for x, kind in zip(operands[1:], instruction.sources, strict=True)]
        bound = APPROXIMATIONS.get(opcode) if self.mode.perturb else None

        def step(threads: Threads) -> None:
            values = [source[threads] for source in sources]
            result = compute(*values)
            target[threads] = result if bound is None else perturbed(result, values, bound)

        return step

    def bind_vector_move(self, modifiers: list[str], operands: tuple[Operand, ...]) -> Step:
        """Bind a move that joins or splits registers. PTX ISA, "mov"."""
        kind, (result, source) = ".".join(modifiers), operands
        split = isinstance(result, Vector)
        parts = result.elements if isinstance(result, Vector) else source.elements
        if (kind, len(parts)) not in (("b32", 2), ("b64", 2), ("b64", 4)):
            raise Unsupported(f"{len(parts)} parts")
        bits = BITS[kind] // len(parts)
        if split:
            whole = self.source(source, kind)
            targets = [self.target(part, f"b{bits}") for part in parts]
        else:
            whole = self.target(result, kind)
            sources = [self.source(part, f"b{bits}") for part in parts]
        pieces = whole.view(DTYPES[f"b{bits}"]).reshape(self.size, len(parts))

        def divide(threads: Threads) -> None:
            for i, target in enumerate(targets):
                target[threads] = pieces[threads, i]

        def join(threads: Threads) -> None:
            for i, part in enumerate(sources):
                pieces[threads, i] = part[threads]

        return divide if split else join

    def jump(self, position: int, threads: Threads) -> None:
        """PTX ISA, "bra" and "ret"."""
        self.position[threads] = position

    def wait(self, threads: Threads) -> None:
        """PTX ISA, "bar.sync"."""
        self.waiting[threads] = True

    def bind_shuffle(self, operands: tuple[Operand, ...]) -> Step:
        """Bind an exchange between the lanes of a warp. All lanes are here. PTX ISA, "shfl.sync", bfly."""
        result, source, *constants = operands
        if len(constants) != 3 or not all(isinstance(constant, Immediate) for constant in constants):
            raise Unsupported("a shuffle with variable lanes")
        flip, clamp, members = (constant.value for constant in constants)
        if members & 0xFFFFFFFF != 0xFFFFFFFF:
            raise Unsupported("a shuffle of a part of a warp")
        target, values = self.target(result, "b32"), self.source(source, "b32")
        lane = self.all % WARP
        segment = clamp >> 8 & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        other = lane ^ (flip & 31)
        partner = self.all - lane + np.where(other <= last, other, lane)

        def step(threads: Threads) -> None:
            target[threads] = values[partner[threads]]

        return step

    def bind_matrices(self, count: int, operands: tuple[Operand, ...], where: str) -> Step:
        """Bind a store of matrices of 8 rows of 16 bytes. All lanes are here. PTX ISA, "stmatrix".

        Lane 4 r + p holds the four bytes p of row r, one register for each matrix. Lane 8 m + r has the
        address of row r of matrix m.
        """
        address, registers = operands
        if not (isinstance(address, Address) and isinstance(registers, Vector)):
            raise Unsupported("unknown operands")
        if len(registers.elements) != count:
            raise Unsupported(f"{len(registers.elements)} registers")
        values = [self.source(element, "b32") for element in registers.elements]
        base, lane = self.source(address.base, "u32"), self.all % WARP

        def step(threads: Threads) -> None:
            for matrix, value in enumerate(values):
                holder = (self.all - lane + 8 * matrix + lane // 4)[threads]
                rows = base[holder].astype(np.int64) + address.offset
                offsets = self.shared.locate(rows, 16, where, self.block[threads]) + 4 * (lane[threads] % 4)
                who = self.number[threads], self.epoch[threads].copy()
                self.shared.store(Access(offsets, 4, *who, True, where), value[threads][:, None])

        return step

    def bind_parameter(self, modifiers: list[str], operands: tuple[Operand, ...], where: str) -> Step:
        """Bind a load of an argument. PTX ISA, "ld": a signed one is extended to the register's width."""
        kind, (result, address) = ".".join(modifiers), operands
        if kind not in DTYPES or not isinstance(result, Name):
            raise Unsupported("unknown modifiers")
        if not isinstance(address, Address):
            raise Unsupported(f"address {address}")
        base = self.source(address.base, "s64")
        width = 8 * self.register(result.name).itemsize
        if width < BITS[kind] or (width > BITS[kind] and kind.startswith("f")):
            raise Unsupported(f"{kind} in a register of {width} bits")
        target = self.target(result, f"{kind[0]}{width}")

        def step(threads: Threads) -> None:
            target[threads] = self.parameters.load(base[threads] + address.offset, DTYPES[kind], where)

        return step

    def bind_access(
        self, store: bool, modifiers: list[str], operands: tuple[Operand, ...], where: str
    ) -> Step:
        """Bind a load or store. PTX ISA, "ld" and "st"."""
        space, *vector, kind = modifiers
        if vector not in ([], ["v2"], ["v4"]) or kind not in ("b8", "b16", "b32", "b64"):
            raise Unsupported("unknown modifiers")
        address, registers = operands if store else operands[::-1]
        if not isinstance(address, Address):
            raise Unsupported(f"address {address}")
        elements = registers.elements if isinstance(registers, Vector) else (registers,)
        if len(elements) != (int(vector[0][1:]) if vector else 1):
            raise Unsupported(f"{len(elements)} registers")
        # A byte is in a register of 16 bits. A load fills the other half with zeros.
        held = "b16" if kind == "b8" else kind
        values = [(self.source if store else self.target)(element, held) for element in elements]
        dtype = DTYPES[kind]
        nbytes = dtype.itemsize * len(elements)
        if nbytes > ALIGNMENT:
            raise Unsupported(f"an access of {nbytes} bytes")
        base = self.source(address.base, "u64" if space == "global" else "u32")
        memory = self.memory if space == "global" else self.shared

        def access(threads: Threads) -> Access:
            addresses = base[threads].astype(np.int64) + address.offset
            if space == "global":
                offsets = self.memory.locate(addresses, nbytes, where)
            else:
                offsets = self.shared.locate(addresses, nbytes, where, self.block[threads])
            return Access(offsets, nbytes, self.number[threads], self.epoch[threads].copy(), store, where)

        def load(threads: Threads) -> None:
            loaded = memory.load(access(threads), dtype)
            for value, column in zip(values, loaded.T, strict=True):
                value[threads] = column

        def save(threads: Threads) -> None:
            memory.store(access(threads), np.stack([value[threads].astype(dtype) for value in values], 1))

        return save if store else load


def bits_of(kind: str) -> str:
    """Return the type that holds the bits of a type."""
    return "pred" if kind == "pred" else f"b{BITS[kind]}"
