"""Runs the launches of the package's kernels in the emulator."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.machine_code.no_gpu import TARGETS, NoDevice, active

from .contraction import contracted
from .errors import Fault, Unsupported
from .machine import Machine, Mode
from .memory import UNWRITTEN, GlobalMemory
from .parser import parse
from .races import race

BLOCKS = 8  # at once: more would take more memory and hardly less time
FORMATS = dict(i1="b", i8="b", u8="B", i32="i", u32="I", i64="q", u64="Q", fp32="f", fp64="d")  # of `struct`
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
SCRATCH = bytes(8)  # null pointer to the scratch memory of Triton's last two parameters, which is unused


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    variant: str  # the key of the compiled code
    ptx: str
    blocks: int


@contextlib.contextmanager
def emulated(
    target: str = "sm_90", mode: Mode | None = None, *, edit: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[list[Launch]]:
    """Run the kernels of calls on CPU tensors as a GPU would run them.

    Inside, Triton compiles each launch for `target`, and the emulator executes the PTX. The grid must have
    one dimension. Public functions need `backend="triton"`. TRITON_INTERPRET must be unset.

        with emulated("sm_90") as launches:
            out = grpo_loss(logits, ids, advantages, backend="triton")
            out.loss.backward()

    Args:
        target: "sm_80" or "sm_90".
        mode: What to do if the PTX ISA leaves a choice. The default is `Mode()`.
        edit: Changes the PTX before it runs. It is for tests that break a kernel.

    Yields:
        A list that receives each launch.

    Raises:
        Fault: A GPU would abort the launch, or its result is undefined: an access out of bounds, a race, a
            read of memory that was never written, or unwritten elements in a floating-point tensor that was
            allocated inside.
        Unsupported: The PTX has an instruction, a modifier or an operand that the emulator does not know.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: Triton's interpreter runs the kernels, and nothing compiles"
        )
    if target not in ("sm_80", "sm_90"):
        raise ValueError(f'target must be "sm_80" or "sm_90", got {target!r}')
    if Recorder.running:
        raise RuntimeError("kernels are emulated already: each launch would run twice")
    device = device_of(target)
    launches: list[Launch] = []
    run = JITFunction.run

    def run_emulated(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        compiled = run(kernel, *args, **kwargs)  # binds the arguments, and compiles
        ptx = edit(compiled.asm["ptx"])
        launches.append(Launch(kernel.__name__, compiled.hash, ptx, device.grid[0]))
        try:
            execute(ptx, device.grid, device.arguments, compiled.metadata.shared, mode or Mode())
        except Fault as fault:
            raise Fault(f"{kernel.__name__}: {fault}") from None
        return compiled

    with contextlib.ExitStack() as patches:
        patches.enter_context(active(device))
        patches.enter_context(mock.patch.object(Recorder, "running", True))
        patches.enter_context(mock.patch.object(JITFunction, "run", run_emulated))
        # With this the package accepts CPU tensors for its kernels.
        patches.enter_context(mock.patch("grpo_kernels.kernels.launch.INTERPRETED", True))
        for owner, name in ALLOCATORS:
            patches.enter_context(mock.patch.object(owner, name, marking(getattr(owner, name))))
        yield launches


class Recorder(NoDevice):
    """A device that keeps the arguments of the last launch."""

    running = False  # inside `emulated`

    def __init__(self, target: str) -> None:
        super().__init__(TARGETS[target])
        self.grid = (0, 0, 0)
        self.arguments: list[tuple[str, str, Any]] = []  # name, Triton's type, value

        def launcher(source: Any, metadata: Any) -> Callable[..., None]:
            def launch(x: int, y: int, z: int, *rest: Any) -> None:
                self.grid = (x, y, z)
                values = rest[len(rest) - len(source.signature) :]
                names, types = zip(*source.signature.items(), strict=True)
                self.arguments = list(flattened(names, types, values))

            return launch

        self.launcher_cls = launcher


@functools.cache
def device_of(target: str) -> Recorder:
    """Return the device of a target, always the same one, so that Triton reuses compiled kernels."""
    return Recorder(target)


def flattened(names: Any, types: Any, values: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the arguments that are parameters of the compiled kernel: not constants, and no tuples."""
    for name, kind, value in zip(names, types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flattened([f"{name}[{i}]" for i in range(len(kind))], kind, value)
        elif kind != "constexpr":
            yield name, kind, value


def execute(
    ptx: str, grid: tuple[int, int, int], arguments: list[tuple[str, str, Any]], shared_bytes: int, mode: Mode
) -> None:
    """Run a kernel. Tensors among the arguments receive what it stores.

    Args:
        ptx: The module.
        grid: Number of blocks. Only the first dimension may be larger than 1.
        arguments: Name, Triton's type and value of each parameter, without Triton's scratch memory.
        shared_bytes: Size of a block's shared memory.
        mode: See `Mode`.
    """
    if grid[1:] != (1, 1):
        raise Unsupported(f"a grid of {grid}")
    program = parse(ptx)
    if mode.contract:
        program = contracted(program)
    memory = GlobalMemory([(name, value) for name, kind, value in arguments if kind.startswith("*")])
    packed = [pack(kind, value) for _, kind, value in arguments] + [SCRATCH, SCRATCH]
    named = dict(zip(program.parameters, packed, strict=True))
    blocks = max(1, min(BLOCKS, grid[0]))
    machine = Machine(program, named, memory, shared_bytes, blocks, mode)
    for first in range(0, grid[0], blocks):
        machine.run(first, min(blocks, grid[0] - first))
        fail_if(race(machine.shared, program.threads))
    fail_if(race(memory, program.threads))
    memory.write_back()
    fail_if(memory.unwritten())


def fail_if(fault: str | None) -> None:
    if fault:
        raise Fault(fault)


def pack(kind: str, value: Any) -> bytes:
    """Return the bytes of an argument. A tensor is its address."""
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(f"<{FORMATS[kind]}", value)


def marking(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an allocator whose floating-point tensors hold UNWRITTEN."""

    def allocate_marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        new = allocate(*args, **kwargs)
        if new.is_floating_point() and new.device.type == "cpu":
            size = new.element_size()
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
            new.detach().view(integer).fill_(UNWRITTEN[size])
        return new

    return allocate_marked
