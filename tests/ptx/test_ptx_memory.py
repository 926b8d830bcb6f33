"""The emulator's memory: bounds, alignment, aliases, what was never written."""

from __future__ import annotations

import math

import pytest
import torch
from emulator import Fault
from emulator.launches import BLOCKS, marking
from emulator.memory import UNWRITTEN
from programs import launch, numbers, zeros

DTYPES = [
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip
REGISTERS = {1: "%rs0", 2: "%rs0", 4: "%r0", 8: "%rd0"}  # by size in bytes

new = marking(torch.empty)
"""Allocates tensors that nobody has written."""


OUTSIDE = "of a contiguous part of argument0, which has"


def touch(x: torch.Tensor, offset: int, *, count: int = 1, instruction: str = "ld", more: tuple = ()) -> None:
    """Load or store `count` elements, at once, from `offset` elements after the first one of `x`."""
    size = x.element_size()
    register, vector = REGISTERS[size], f".v{count}" if count > 1 else ""
    registers = "{" + ", ".join([register] * count) + "}"
    place = f"[%base0+{offset * size}]"
    operands = f"{registers}, {place}" if instruction == "ld" else f"{place}, {registers}"
    body = f"setp.eq.s32 %p0, %thread0, 5;\n@%p0 {instruction}.global{vector}.b{8 * size} {operands};"
    launch(body, x, *more)


# --- Bounds ---


@pytest.mark.parametrize("instruction", ["ld", "st"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_beyond_a_tensor(dtype: torch.dtype, instruction: str) -> None:
    x = torch.zeros(24).to(dtype)[8:16]  # inside of memory that exists
    for offset in range(8):
        touch(x, offset, instruction=instruction)
    for offset in (-1, 8, -1000, 1000):
        with pytest.raises(Fault, match=OUTSIDE):
            touch(x, offset, instruction=instruction)


def test_between_and_beyond_the_rows_of_a_view() -> None:
    x = torch.zeros(4, 16)[:3, 2:11]  # rows of 9 elements
    inside = {16 * row + column for row in range(3) for column in range(9)}
    for offset in range(-3, 50):
        if offset in inside:
            touch(x, offset)
        else:
            with pytest.raises(Fault, match=OUTSIDE):
                touch(x, offset)
    touch(x, 2, count=4)
    touch(x, 6, count=2)
    with pytest.raises(Fault, match=OUTSIDE):
        touch(x, 6, count=4)  # the last element is not in the row


@pytest.mark.parametrize("count", [2, 4])
def test_misaligned_vectors(count: int) -> None:
    x = torch.zeros(64)
    for offset in range(12):
        if offset % count == 0:
            touch(x, offset, count=count)
        else:
            with pytest.raises(Fault, match="not a multiple"):
                touch(x, offset, count=count)


def test_a_misaligned_word() -> None:
    with pytest.raises(Fault, match="not a multiple"):
        launch("ld.global.b32 %r0, [%base0+2];", zeros(32))
    with pytest.raises(Fault, match="not a multiple"):
        launch("mov.b32 %r1, global_smem; st.shared.b32 [%r1+2], %r0;", shared_bytes=64)


def test_the_end_of_one_tensor_is_not_the_start_of_the_next() -> None:
    memory = torch.zeros(64)
    first, second = memory[:34], memory[34:]
    touch(first, 32, count=2, more=(second,))
    with pytest.raises(Fault, match=OUTSIDE):
        touch(first, 32, count=4, more=(second,))


def test_no_tensors() -> None:
    for argument in (("u64", zeros(1).data_ptr()), ("u64", 0)):
        with pytest.raises(Fault):
            launch("ld.param.b64 %rd0, [kernel_param_0]; ld.global.b32 %r0, [%rd0];", argument)
    with pytest.raises(Fault):
        touch(torch.zeros(0), 0)


def test_bounds_of_shared_memory() -> None:
    body = "setp.eq.s32 %p0, %thread0, 0; mov.b32 %r1, global_smem; @%p0 st.shared.b32 [%r1+{}], 0;"
    for offset in (0, 56):
        launch(body.format(offset), shared_bytes=60, blocks=2)
    for offset in (60, 64, -4, -1024):
        with pytest.raises(Fault, match="beyond the 60 bytes of shared memory"):
            launch(body.format(offset), shared_bytes=60, blocks=2)


# --- Views and dtypes ---

COPY = "ld.global.bN REGISTER, [%own0];\nst.global.bN [%own1], REGISTER;"


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)  # none of these numbers is UNWRITTEN
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(high, (5 * 32 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    x = bits.view(dtype)
    before, out = bits.clone(), torch.zeros_like(x)
    copy = COPY.replace("N", str(8 * x.element_size())).replace("REGISTER", REGISTERS[x.element_size()])
    launch(copy, x, out, blocks=5)
    assert torch.equal(x.view(torch.uint8), before)
    assert torch.equal(out.view(torch.uint8), before)


def test_a_wide_load_in_a_tensor_with_an_odd_start() -> None:
    memory, out = numbers(36), zeros(64)
    body = (
        "mad.wide.u32 %rd1, %thread0, 8, %base1; ld.global.b64 %rd0, [%base0+4]; st.global.b64 [%rd1], %rd0;"
    )
    launch(body, memory[1:35], out)
    assert out.tolist() == [2, 3] * 32


def test_the_same_tensor_as_input_and_output() -> None:
    x = numbers(96)
    launch("ld.global.b32 %r0, [%own0]; add.s32 %r0, %r0, 1; st.global.b32 [%own1], %r0;", x, x, blocks=3)
    assert torch.equal(x, numbers(96) + 1)


@pytest.mark.parametrize("start", [17, 32, 47, 48])
def test_overlapping_views(start: int) -> None:
    """What is stored through one view is read through the other, and the memory around them stays."""
    memory = numbers(128)
    body = """
        st.global.b32 [%own0], 7;
        bar.sync 0;
        ld.global.b32 %r0, [%own1];
        bar.sync 0;
        st.global.b32 [%own1], 9;
        st.global.b32 [%own2], %r0;"""
    out = zeros(32)
    launch(body, memory[16:48], memory[start : start + 32], out)
    assert out.tolist() == [7] * (48 - start) + list(range(48, start + 32))
    assert memory.tolist() == [*range(16), *[7] * (start - 16), *[9] * 32, *range(start + 32, 128)]


def test_expanded_and_transposed_tensors() -> None:
    column = numbers(32)[:, None].expand(32, 5)
    transposed = torch.zeros(4, 8, dtype=torch.int32).t()
    out = zeros(32)
    launch(
        "ld.global.b32 %r0, [%own0]; st.global.b32 [%own1], %r0; st.global.b32 [%own2], %r0;",
        column,
        transposed,
        out,
    )
    assert out.tolist() == list(range(32))
    assert torch.equal(transposed, numbers(32).view(4, 8).t())
    for x in (column, transposed):
        with pytest.raises(Fault, match=OUTSIDE):
            touch(x, 32)


# --- What was never written ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reads_of_what_was_never_written(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 16, dtype=dtype)[:3, 2:12]
    size = dtype.itemsize
    x[1, 4].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).fill_(UNWRITTEN[size])
    with pytest.raises(Fault, match=r"reads global memory that was never written, .* argument0"):
        touch(x, 20)
    with pytest.raises(Fault, match="elements of argument0 were never written"):
        touch(x, 19)  # the launch leaves it unwritten
    touch(x, 20, instruction="st")
    touch(x, 20)


@pytest.mark.parametrize("shape", [(32,), (31,), ()])
def test_outputs(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    store = "setp.lt.s32 %p0, %thread0, {};\n@%p0 st.global.b32 [%own0], %thread0;"
    out = new(shape)
    launch(store.format(count), out)
    assert out.view(torch.int32).flatten().tolist() == list(range(count))
    with pytest.raises(Fault, match="elements of argument0 were never written"):
        launch(store.format(count - 1), new(shape))
    with pytest.raises(Fault, match="never written"):
        launch(f"{store.format(count)} ld.global.b32 %r0, [%base1];", new(shape), new(shape))


def test_nan_is_not_taken_for_unwritten() -> None:
    touch(torch.tensor([math.nan, -math.nan, math.inf]), 0)


def test_shared_memory_that_was_never_written() -> None:
    body = """
        mad.lo.s32 %r1, %thread0, 4, global_smem;
        setp.lt.s32 %p0, %number0, {};
        @%p0 st.shared.b32 [%r1], %thread0;
        bar.sync 0;
        ld.shared.b32 %r0, [%r1];"""
    blocks = BLOCKS + 1  # the last one runs where the first one stored
    launch(body.format(blocks * 32), blocks=blocks, shared_bytes=128)
    for count in (31, 32 * BLOCKS, 32 * blocks - 1):
        with pytest.raises(Fault, match="reads shared memory that was never written"):
            launch(body.format(count), blocks=blocks, shared_bytes=128)
    with pytest.raises(Fault, match="reads shared memory that was never written"):
        launch("mov.b32 %r1, global_smem; st.shared.b16 [%r1], 0; ld.shared.b32 %r0, [%r1];", shared_bytes=64)
