"""The emulator's machine: branches, barriers, shuffles, blocks, and orders of the warps."""

from __future__ import annotations

import pytest
import torch
from emulator import Fault
from emulator.launches import BLOCKS
from emulator.memory import GlobalMemory
from programs import ORDERS, launch, numbers, zeros

OUT = "st.global.b32 [%own0], %r0;"


# --- Branches ---


@pytest.mark.parametrize("order", ORDERS)
def test_threads_take_their_own_side_of_a_branch(order: str | int) -> None:
    body = f"""
        setp.lt.s32 %p0, %thread0, 10;
        @%p0 bra SMALL;
        mov.b32 %r0, 2;
        bra.uni END;
        SMALL:
        mov.b32 %r0, 1;
        END:
        {OUT}"""
    out = zeros(32)
    launch(body, out, mode=order)
    assert out.tolist() == [1] * 10 + [2] * 22


@pytest.mark.parametrize("order", ORDERS)
def test_threads_repeat_a_loop_as_often_as_each_needs(order: str | int) -> None:
    body = f"""
        mov.b32 %r0, 0;
        mov.b32 %r1, 0;
        LOOP:
        setp.ge.s32 %p0, %r1, %number0;
        @%p0 bra END;
        add.s32 %r0, %r0, %r1;
        add.s32 %r1, %r1, 1;
        bra LOOP;
        END:
        {OUT}"""
    out = zeros(3 * 64)
    launch(body, out, blocks=3, threads=64, mode=order)
    assert out.tolist() == [n * (n - 1) // 2 for n in range(3 * 64)]


def test_lanes_meet_again_after_a_loop() -> None:
    body = f"""
        mov.b32 %r1, %thread0;
        LOOP:
        setp.eq.s32 %p0, %r1, 0;
        @%p0 bra END;
        sub.s32 %r1, %r1, 1;
        bra.uni LOOP;
        END:
        shfl.sync.bfly.b32 %r0, %thread0, 1, 31, -1;
        {OUT}"""
    out = zeros(32)
    launch(body, out)
    assert out.tolist() == [lane ^ 1 for lane in range(32)]


@pytest.mark.parametrize("order", ["lockstep", "forward", "backward", 0])
def test_lanes_meet_again_before_a_side_of_the_branch(order: str | int) -> None:
    body = f"""
        setp.eq.s32 %p0, %number0, 40;
        mov.b32 %r0, %number0;
        @%p0 bra DETOUR;
        MEET:
        add.s32 %r0, %r0, 100;
        shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;
        {OUT}
        ret;
        DETOUR:
        mov.b32 %r0, 7;
        bra.uni MEET;"""
    out = zeros(96)
    launch(body, out, threads=96, mode=order)
    assert out.tolist() == [107 if n == 41 else 100 + (n ^ 1) for n in range(96)]


def test_predicates() -> None:
    body = """
        setp.lt.s32 %p0, %thread0, 10;
        mov.pred %p1, -1;
        mov.pred %p2, 0;
        mov.b32 %r0, 1;
        @%p0 mov.b32 %r0, 2;
        @!%p0 add.s32 %r0, %r0, 10;
        @%p1 add.s32 %r0, %r0, 100;
        @%p2 add.s32 %r0, %r0, 1000;
        @!%p0 st.global.b32 [%own0], %r0;"""
    out = zeros(32)
    launch(body, out)
    assert out.tolist() == [0] * 10 + [111] * 22
    launch(body.replace("@!%p0 st", "@%p0 st"), out)
    assert out.tolist() == [102] * 10 + [111] * 22


def test_threads_that_return_do_nothing_more() -> None:
    body = f"""
        mov.b32 %r0, 1;
        setp.lt.s32 %p0, %thread0, 10;
        @%p0 ret;
        {OUT}
        setp.lt.s32 %p0, %thread0, 20;
        @!%p0 bra MORE;
        ret;
        MORE:
        mov.b32 %r0, 2;
        {OUT}"""
    out = zeros(32)
    launch(body, out)
    assert out.tolist() == [0] * 10 + [1] * 10 + [2] * 12


# --- Barriers ---

EXCHANGE = f"""
    mad.lo.s32 %r9, %thread0, 4, global_smem;
    add.s32 %r1, %thread0, 37;
    and.b32 %r1, %r1, 127;
    mad.lo.s32 %r2, %r1, 4, global_smem;
    st.shared.b32 [%r9], %number0;
    bar.sync 0;
    ld.shared.b32 %r0, [%r2];
    bar.sync 0;
    add.s32 %r0, %r0, 1000;
    st.shared.b32 [%r9], %r0;
    bar.sync 0;
    ld.shared.b32 %r0, [%r2];
    {OUT}"""
"""Each thread receives, through a second, the number of the thread 74 further on in its block."""


@pytest.mark.parametrize("order", ORDERS)
def test_warps_exchange_through_shared_memory(order: str | int) -> None:
    out = zeros(3 * 128)
    launch(EXCHANGE, out, blocks=3, threads=128, shared_bytes=512, mode=order)
    expected = [[1000 + 128 * block + (thread + 74) % 128 for thread in range(128)] for block in range(3)]
    assert out.view(3, 128).tolist() == expected


@pytest.mark.parametrize("order", ["lockstep", "forward", "backward", 0])
@pytest.mark.parametrize("thread", [0, 32, 63])
@pytest.mark.parametrize(
    "body",
    ["@%p0 ret; bar.sync 0;", "@!%p0 bar.sync 0;", "@%p0 bra OTHER; bar.sync 0; ret;\nOTHER:\nbar.sync 0;"],
)
def test_a_barrier_that_one_thread_does_not_reach(body: str, thread: int, order: str | int) -> None:
    with pytest.raises(Fault, match="barrier"):
        launch(f"setp.eq.s32 %p0, %thread0, {thread};\n{body}", threads=64, mode=order)


def test_blocks_need_not_reach_the_same_barrier() -> None:
    body = f"setp.eq.s32 %p0, %block0, 1;\n@%p0 ret;\nbar.sync 0;\nmov.b32 %r0, 1;\n{OUT}"
    out = zeros(96)
    launch(body, out, blocks=3)
    assert out.tolist() == [1] * 32 + [0] * 32 + [1] * 32


# --- Shuffles ---


def partner(lane: int, flip: int, c: int) -> int:
    """Return the lane that `shfl.sync.bfly` reads, by the pseudocode of the ISA."""
    clamp, segment = c % 32, c // 256 % 32
    last = (lane & segment) | (clamp & (31 - segment))
    return lane ^ flip if lane ^ flip <= last else lane


@pytest.mark.parametrize("c", [0x1F, 0x0F, 0x1E1F, 0x181F, 0x1003])
@pytest.mark.parametrize("flip", [0, 1, 2, 4, 8, 16, 31, 5])
def test_shuffle(flip: int, c: int) -> None:
    out = zeros(5 * 64)
    launch(f"shfl.sync.bfly.b32 %r0, %number0, {flip}, {c}, -1; {OUT}", out, blocks=5, threads=64)
    assert out.tolist() == [n - n % 32 + partner(n % 32, flip, c) for n in range(5 * 64)]


def test_shuffle_of_a_register_into_itself() -> None:
    out = zeros(32)
    launch(f"mov.b32 %r0, %thread0; shfl.sync.bfly.b32 %r0, %r0, 16, 31, 0xffffffff; {OUT}", out)
    assert out.tolist() == [lane ^ 16 for lane in range(32)]


def test_shuffle_in_some_warps() -> None:
    body = f"""
        mov.b32 %r0, 7;
        setp.lt.s32 %p0, %thread0, 32;
        @%p0 bra END;
        shfl.sync.bfly.b32 %r0, %thread0, 1, 31, -1;
        END:
        {OUT}"""
    out = zeros(64)
    launch(body, out, threads=64)
    assert out.tolist() == [7] * 32 + [n ^ 1 for n in range(32, 64)]
    with pytest.raises(Fault, match="some lanes"):
        launch(body.replace("%thread0, 32", "%thread0, 33"), out, threads=64)


# --- Stores of matrices ---

# Lane n gives row (5 n + 3) mod 32 of 16 bytes, and holds 4 n + m for matrix m.
STORE_MATRICES = """
    mov.u32 %r10, global_smem;
    mad.lo.s32 %r11, %thread0, 16, %r10;
    mov.b32 %r0, 0;
    st.shared.v4.b32 [%r11], {{%r0, %r0, %r0, %r0}};
    bar.sync 0;
    mad.lo.s32 %r12, %thread0, 5, 3;
    and.b32 %r12, %r12, 31;
    mad.lo.s32 %r12, %r12, 16, %r10;
    mad.lo.s32 %r1, %thread0, 4, 0;
    add.s32 %r2, %r1, 1;
    add.s32 %r3, %r1, 2;
    add.s32 %r4, %r1, 3;
    stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r12], {{{registers}}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r11];
    mad.wide.u32 %rd0, %thread0, 16, %base0;
    st.global.v4.b32 [%rd0], {{%r5, %r6, %r7, %r8}};"""


def store_matrices(count: int) -> str:
    registers = ", ".join(f"%r{n}" for n in range(1, count + 1))
    return STORE_MATRICES.format(count=count, registers=registers)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_store_of_matrices(count: int, order: str | int) -> None:
    out = torch.zeros(32, 4, dtype=torch.int32)
    launch(store_matrices(count), out, shared_bytes=512, mode=order)
    expected = torch.zeros(32, 4, dtype=torch.int32)
    for matrix in range(count):
        for row in range(8):
            place = (5 * (8 * matrix + row) + 3) % 32
            expected[place] = torch.tensor([4 * (4 * row + part) + matrix for part in range(4)])
    assert torch.equal(out, expected)


def test_stores_of_matrices_are_checked() -> None:
    """The lanes of a warp meet there. Rows are aligned and in bounds. Other lanes need a barrier."""
    right = store_matrices(4).split("mad.wide")[0]
    launch(right, shared_bytes=512)
    late = right.replace("stmatrix", "setp.lt.s32 %p0, %thread0, 3;\n@%p0 ret;\nstmatrix")
    for body, message in (
        (late, "some lanes"),
        (right.replace("[%r12]", "[%r12+8]"), "multiple of 16 bytes"),
        (right.replace("[%r12]", "[%r12+16]"), "beyond the 512 bytes"),
        (right.replace("};\n    bar.sync 0;\n    ld", "};\n    ld"), "race in shared memory"),
    ):
        with pytest.raises(Fault, match=message):
            launch(body, shared_bytes=512)


# --- Blocks and orders ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("blocks", [1, BLOCKS, 2 * BLOCKS + 3])
def test_every_block_runs_once(blocks: int, order: str | int) -> None:
    body = """
        ld.global.b32 %r0, [%own0];
        add.s32 %r0, %r0, %number0;
        st.global.b32 [%own0], %r0;"""
    out = torch.full((blocks * 64,), 7, dtype=torch.int32)
    launch(body, out, blocks=blocks, threads=64, mode=order)
    assert torch.equal(out, 7 + numbers(blocks * 64))


def test_registers_start_with_poison_in_every_block() -> None:
    count = (BLOCKS + 1) * 32
    out = zeros(count)
    launch(f"{OUT} mov.b32 %r0, 1;", out, blocks=BLOCKS + 1)
    assert out.unique().tolist() == [0xDEADBEEF - (1 << 32)]


def test_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[list[int]] = []  # threads that store at once

    def stored(order: str | int) -> list[list[int]]:
        stores.clear()
        launch(f"{OUT} {OUT}", zeros(2 * 96), blocks=2, threads=96, mode=order)
        return stores.copy()

    monkeypatch.setattr(
        GlobalMemory, "store", lambda _, access, values: stores.append(access.threads.tolist())
    )
    first, second, third = ([n for n in range(2 * 96) if n % 96 // 32 == warp] for warp in range(3))
    assert stored("lockstep") == [first + second + third] * 2
    assert stored("forward") == [first, first, second, second, third, third]
    assert stored("backward") == [third, third, second, second, first, first]
    orders = [stored(seed) for seed in range(10)]
    assert all(sorted(order) == [first, first, second, second, third, third] for order in orders)
    assert len({str(order) for order in orders}) > 6
    assert stored(7) == orders[7]
