"""The emulator's loads, stores, moves of vectors, and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import Fault
from programs import launch, numbers, zeros

VECTORS = [
    (2, "b8", torch.uint8, "%rs"),
    (2, "b16", torch.int16, "%rs"),
    (4, "b16", torch.int16, "%rs"),
    (2, "b32", torch.int32, "%r"),
    (4, "b32", torch.int32, "%r"),
    (2, "b64", torch.int64, "%rd"),
]


@pytest.mark.parametrize(("size", "kind", "dtype", "register"), VECTORS)
def test_vectors(size: int, kind: str, dtype: torch.dtype, register: str) -> None:
    names = [f"{register}{i}" for i in range(size)]
    nbytes = size * dtype.itemsize
    body = f"""
        mad.wide.u32 %rd8, %number0, {nbytes}, %base0;
        mad.wide.u32 %rd9, %number0, {nbytes}, %base1;
        mad.lo.s32 %r9, %thread0, {nbytes}, global_smem;
        ld.global.v{size}.{kind} {{ {", ".join(names)} }}, [ %rd8 + 0 ];
        st.shared.v{size}.{kind} [%r9], {{ {", ".join(names[::-1])} }};
        ld.shared.v{size}.{kind} {{ {", ".join(names)} }}, [%r9];
        st.global.v{size}.{kind} [%rd9], {{ {", ".join(names)} }};"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256 if kind == "b8" else 32767, (64, size), generator=generator).to(dtype)
    out = torch.zeros_like(x)
    launch(body, x, out, blocks=2, shared_bytes=32 * nbytes)
    assert torch.equal(out, x.flip(1))


def test_offsets_and_sinks() -> None:
    body = """
        mad.wide.u32 %rd0, %thread0, 8, %base0;
        ld.global.v2.b32 {_, %r0}, [%rd0];
        ld.global.b32 %r1, [%rd0+8];
        add.s64 %rd1, %rd0, 16;
        ld.global.b32 %r2, [%rd1+-16];
        add.s32 %r0, %r0, %r1;
        sub.s32 %r0, %r0, %r2;
        st.global.b32 [%own1], %r0;"""
    out = zeros(32)
    launch(body, numbers(66) ** 2, out)
    assert out.tolist() == [(2 * n + 1) ** 2 + (2 * n + 2) ** 2 - (2 * n) ** 2 for n in range(32)]


def test_a_byte_is_extended_with_zeros_and_cut() -> None:
    body = """
        ld.global.b8 %rs0, [%own0];
        st.global.b16 [%own1], %rs0;
        add.s16 %rs0, %rs0, 1;
        st.global.b8 [%own0], %rs0;"""
    body = body.replace("add.s16 %rs0, %rs0, 1", "or.b16 %rs0, %rs0, 0x1280")
    x, wide = torch.arange(224, 256, dtype=torch.uint8), torch.zeros(32, dtype=torch.int16)
    launch(body, x, wide)
    assert wide.tolist() == list(range(224, 256))
    assert x.tolist() == [n | 0x80 for n in range(224, 256)]


def test_moves_join_and_split_registers() -> None:
    body = """
        mov.b64 %rd0, 0x1111222233334444;
        mov.b64 {%r0, %r1}, %rd0;
        mov.b32 {%rs0, %rs1}, %r1;
        mov.b32 {_, %rs2}, %r0;
        mov.b64 {%rs3, %rs4, %rs5, %rs6}, %rd0;
        mov.b32 %r2, {%rs2, %rs0};
        mov.b64 %rd1, {%r2, %r0};
        mov.b64 %rd2, {%rs6, 7, %rs4, %rs3};
        st.global.v2.b64 [%rd3], {%rd1, %rd2};"""
    out = torch.zeros(32, 2, dtype=torch.int64)
    launch("mad.wide.u32 %rd3, %thread0, 16, %base0;" + body, out)
    assert out.tolist() == [[0x3333444422223333, 0x4444333300071111]] * 32


PARAMETERS = [
    ("i8", -3, "ld.param.b8 %rs0", 0xFD),
    ("i8", -3, "ld.param.s8 %rs0", 0xFFFD),
    ("u8", 200, "ld.param.u8 %r0", 200),
    ("i32", -3, "ld.param.b32 %r0", 0xFFFFFFFD),
    ("i32", -3, "ld.param.s32 %rd0", -3),
    ("i32", -3, "ld.param.u32 %rd0", 0xFFFFFFFD),
    ("u32", 4_000_000_000, "ld.param.b32 %rd0", 4_000_000_000),
    ("i64", -(1 << 40), "ld.param.b64 %rd0", -(1 << 40)),
    ("u64", 1 << 63, "ld.param.u64 %rd0", -(1 << 63)),
    ("fp32", 1.5, "ld.param.f32 %r0", 0x3FC00000),
    ("fp64", -2.0, "ld.param.b64 %rd0", -(1 << 62)),
]


@pytest.mark.parametrize(("kind", "value", "load", "expected"), PARAMETERS)
def test_parameters(kind: str, value: Any, load: str, expected: int) -> None:
    widen = {"%rs": "cvt.u64.u16 %rd0, %rs0;", "%r": "cvt.u64.u32 %rd0, %r0;", "%rd": ""}
    out = torch.zeros(32, dtype=torch.int64)
    body = f"{load}, [kernel_param_1]; {widen[load.split()[1][:-1]]} st.global.b64 [%own0], %rd0;"
    launch(body, out, (kind, value))
    assert out.tolist() == [expected] * 32


def test_a_thread_chooses_a_parameter() -> None:
    """LLVM turns a choice between two arguments into a choice between their addresses."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """
        mov.b64 %rd0, kernel_param_1;
        mov.b64 %rd1, kernel_param_3;
        setp.lt.u32 %p0, %thread0, 7;
        selp.b64 %rd2, %rd0, %rd1, %p0;
        ld.param.b32 %r0, [%rd2];
        st.global.b32 [%own0], %r0;
    """
    launch(body, out, ("i32", 5), ("i64", 6), ("i32", -8))
    assert out.tolist() == [5] * 7 + [-8] * 25


@pytest.mark.parametrize(
    "load", ["ld.param.b32 %r0, [kernel_param_1];", "ld.param.b64 %rd0, [kernel_param_1+4];"]
)
def test_a_part_of_a_parameter(load: str) -> None:
    with pytest.raises(Fault, match="no argument"):
        launch(load, torch.zeros(32), ("i64", 6))
