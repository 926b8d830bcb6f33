"""Builds and runs small PTX programs for the tests of the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from emulator import Mode, execute

ORDERS = ("lockstep", "forward", "backward", *range(10))
"""Orders of the warps that a test tries. An int is the seed of a random order."""

TYPES = {"*": "u64", "i8": "u8", "i32": "u32", "i64": "u64", "fp32": "f32", "fp64": "f64"}
"""PTX's type of a parameter by Triton's, if they differ."""

MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %rs<99>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
.reg .b32 %thread<1>;
.reg .b32 %block<1>;
.reg .b32 %number<1>;
.reg .b64 %base<9>;
.reg .b64 %own<9>;
{body}
}}
"""


def module(body: str, parameters: Sequence[str] = (), *, threads: int = 32) -> str:
    """Return a module. Parameter `i`, of the type `parameters[i]`, is `kernel_param_i`.

    Triton's two pointers to scratch memory follow.
    """
    types = [*parameters, "u64", "u64"]
    lines = [f".param .{kind} kernel_param_{i}" for i, kind in enumerate(types)]
    return MODULE.format(parameters=",\n".join(lines), threads=threads, body=body)


def start(arguments: Sequence[Any], threads: int) -> str:
    """Return statements that set the registers that `launch` promises."""
    lines = [
        "mov.u32 %thread0, %tid.x;",
        "mov.u32 %block0, %ctaid.x;",
        f"mad.lo.s32 %number0, %block0, {threads}, %thread0;",
    ]
    for i, tensor in enumerate(arguments):
        if isinstance(tensor, torch.Tensor):
            lines.append(f"ld.param.b64 %base{i}, [kernel_param_{i}];")
            lines.append(f"mad.wide.u32 %own{i}, %number0, {tensor.element_size()}, %base{i};")
    return "\n".join(lines)


def launch(
    body: str,
    *arguments: torch.Tensor | tuple[str, Any],
    blocks: int = 1,
    threads: int = 32,
    shared_bytes: int = 0,
    mode: Mode | str | int = "lockstep",
) -> None:
    """Run a kernel, which returns at the end of its body.

    It starts with these registers: `%thread0`, the number of the thread in its block, `%block0`, that of the
    block, and `%number0`, that of the thread in the launch. If argument `i` is a tensor, `%base{i}` is its
    address, and `%own{i}` the address of its element `%number0`.

    Args:
        body: The statements.
        *arguments: Tensors, and pairs of Triton's type and a number.
        blocks: Number of blocks.
        threads: Number of threads of a block.
        shared_bytes: Size of a block's shared memory, `global_smem`.
        mode: A Mode, or only its order.
    """
    typed = [("*", x) if isinstance(x, torch.Tensor) else x for x in arguments]
    text = module(
        f"{start(arguments, threads)}\n{body}\nret;",
        [TYPES.get(kind, kind) for kind, _ in typed],
        threads=threads,
    )
    named = [(f"argument{i}", kind, value) for i, (kind, value) in enumerate(typed)]
    mode = mode if isinstance(mode, Mode) else Mode(order=mode)
    execute(text, (blocks, 1, 1), named, shared_bytes, mode)


def numbers(count: int) -> torch.Tensor:
    """Return 0, 1, 2, ... as int32."""
    return torch.arange(count, dtype=torch.int32)


def zeros(count: int) -> torch.Tensor:
    """Return zeros as int32, which count as written."""
    return torch.zeros(count, dtype=torch.int32)
