"""PTX that the emulator refuses, because it does not know its meaning."""

from __future__ import annotations

import pytest
from emulator import Mode, Unsupported, execute
from emulator.parser import operand, parse
from programs import launch, module, zeros


@pytest.mark.parametrize(
    "text",
    [
        "0f3F8", "0d3F800000", "0f3FF0000000000000", "010", "-%r1", "!%p1", "%p1|%p2", "[%r1-4]", "[%r1+%r2]",
        "[%r1+4+4]", "{%r1, {%r2, %r3}}", "[{%r1, %r2}]", "1+1", "~1", '"text"',
    ],
)  # fmt: skip
def test_operands_that_are_refused(text: str) -> None:
    with pytest.raises(Unsupported, match="operand"):
        operand(text)


FORMS = {
    "a second kernel": ("ret;\n}", "ret;\n}\n.visible .entry other(\n)\n.reqntid 32\n{\nret;\n}"),
    "a kernel with another linkage": (".visible .entry kernel(", ".entry kernel("),
    "a function": (".version 8.7", ".version 8.7\n.visible .func helper()"),
    "memory of the module": (".version 8.7", ".version 8.7\n.global .align 4 .b32 counter;"),
    "constant memory": (".version 8.7", ".version 8.7\n.const .align 4 .b32 table[4];"),
    "shared memory with a size": ("global_smem[];", "global_smem[64];"),
    "a directive of the module": (".version 8.7", '.version 8.7\n.pragma "nounroll";'),
    "a directive of the kernel": (".reqntid 32", ".reqntid 32\n.reqnctapercluster 2"),
    "an array of parameters": (".param .u64 kernel_param_0", ".param .align 8 .b8 kernel_param_0[16]"),
    "a parameter declared twice": ("kernel_param_1", "kernel_param_0"),
    "two dimensions": (".reqntid 32", ".reqntid 32, 2"),
    "no number of threads": (".reqntid 32", ""),
    "a part of a warp": (".reqntid 32", ".reqntid 48"),
    "two types": ("ret;", ".reg .b32 %rd<4>; ret;"),
    "an unknown type": ("ret;", ".reg .b128 %q<4>; ret;"),
    "local memory": ("ret;", ".local .align 4 .b8 stack[16];\nret;"),
    "a label twice": ("ret;", "HERE:\nHERE:\nret;"),
    "a statement after a label": ("ret;", "HERE: ret;"),
    "a scope of several lines": ("ret;", "{\nret;\n}"),
    "a comment in C": ("ret;", "/* comment */ ret;"),
    "a second predicate": ("ret;", "@%p0 @%p1 ret;"),
    "a call": ("ret;", "call.uni (%r0), helper, (%r1); ret;"),
    "no return": ("ret;", "mov.b32 %r0, 1;"),
    "a conditional return": ("ret;", "@%p0 ret;"),
    "no statements": ("ret;", ""),
    "no end": ("ret;\n}", "ret;"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_refused(form: str) -> None:
    text = module("ret;", ["u64"])
    parse(text)
    assert text.count(FORMS[form][0]) == 1
    with pytest.raises(Unsupported):
        parse(text.replace(*FORMS[form]))


def test_the_message_names_the_line() -> None:
    with pytest.raises(Unsupported, match=r"line 5: .*surprise"):
        parse(".version 8.7\n.target sm_90a\n.address_size 64\n\n.surprise\n")
    with pytest.raises(Unsupported, match="no kernel"):
        parse(".version 8.7\n")


STATEMENTS = [
    "add.sat.f32 %r0, %r1, %r2;",
    "atom.global.add.f32 %r0, [%own0], %r1;",
    "ld.global.L1::evict_last.b32 %r0, [%own0];",
    "ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%own0];",
    "ld.global.v2.b32 {%r0, %r1, %r2}, [%own0];",
    "ld.global.v4.b64 {%rd0, %rd1, %rd2, %rd3}, [%own0];",
    "ld.global.b128 %rd0, [%own0];",
    "ld.volatile.global.b32 %r0, [%own0];",
    "ld.global.u32 %r0, [%own0];",
    "ld.global.b32 %r0, %own0;",
    "ld.b32 %r0, [%own0];",
    "ld.const.b32 %r0, [%own0];",
    "ld.global.b32 %rd0, [%own0];",
    "ld.global.b32 %r0, [%r1];",
    "ld.param.v2.b32 %r0, [kernel_param_0];",
    "ld.param.b64 %r0, [kernel_param_0];",
    "ld.param.b64 %rd0, [kernel_param_9];",
    "st.global.wt.b32 [%own0], %r0;",
    "bar.sync 1;",
    "bar.sync 0, 32;",
    "bar.red.popc.u32 %r0, 0, %p0;",
    "bra NOWHERE;",
    "@%r0 bra END;",
    "shfl.sync.bfly.b32 %r0, %r1, %r2, 31, -1;",
    "shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xffff;",
    "shfl.sync.bfly.b32 %r0, %r1, 1, 31;",
    "shfl.sync.down.b32 %r0, %r1, 1, 31, -1;",
    "@%p0 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
    "@%p0 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], {%r1};",
    "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r0], {%r1};",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], %r1;",
    "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r0], {%r1};",
    "mov.u32 %r0, %clock;",
    "mov.u64 %rd0, %tid.x;",
    "mov.u32 %r0, %undeclared0;",
    "mov.b32 {%rs0, %rs1, %rs2}, %r0;",
    "mov.b128 %rd0, {%rd1, %rd2};",
    "mov.f32 %r0, 1;",
    "mov.f32 %r0, 0d3FF0000000000000;",
    "mov.b32 %rd0, 1;",
    "mov.b32 5, %r0;",
    "add.s32 %r0, %r1;",
    "add.s32 %r0, %r1, [%own0];",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_that_are_refused(statement: str) -> None:
    with pytest.raises(Unsupported):
        launch(f"{statement}\nEND:", zeros(32))


def test_grids_and_modes_that_are_refused() -> None:
    with pytest.raises(Unsupported, match="grid"):
        execute(module("ret;"), (1, 2, 1), [], 0, Mode())
    with pytest.raises(ValueError, match="order"):
        Mode(order="sideways")
