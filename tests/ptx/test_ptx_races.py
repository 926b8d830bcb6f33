"""The emulator finds races, and orders of the warps do not change a program without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulator import Fault, Mode
from emulator.launches import BLOCKS
from programs import ORDERS, launch, zeros

SOME_ORDERS = ORDERS[:4]  # with a random one
RACES = {  # what one thread does, and what another one does
    "two stores": ("st.SPACE.b32 [PLACE], 1;", "st.SPACE.b32 [PLACE], 1;"),
    "load and store": ("ld.SPACE.b32 %r2, [PLACE];", "st.SPACE.b32 [PLACE], 1;"),
    "store and load": ("st.SPACE.b32 [PLACE], 1;", "ld.SPACE.b32 %r2, [PLACE];"),
    "word and double word": ("st.SPACE.b32 [PLACE+4], 1;", "ld.SPACE.b64 %rd2, [PLACE];"),
    "vector and byte": ("st.SPACE.v4.b32 [PLACE], {1, 2, 3, 4};", "ld.SPACE.b8 %rs2, [PLACE+15];"),
}
CALM = {
    "two loads": ("ld.SPACE.b32 %r2, [PLACE];", "ld.SPACE.b32 %r2, [PLACE];"),
    "neighbours": ("st.SPACE.b32 [PLACE], 1;", "st.SPACE.b32 [PLACE+4], 1;"),
    "bytes of one word": ("st.SPACE.b8 [PLACE], 1;", "ld.SPACE.b8 %rs2, [PLACE+1];"),
    "different widths": ("st.SPACE.b64 [PLACE], 1;", "ld.SPACE.b32 %r2, [PLACE+8];"),
}
BARRIER = "bar.sync 0;"


def run(
    space: str,
    statements: tuple[str, str],
    first: int,
    second: int,
    order: str | int = "lockstep",
    *,
    between: str = "",
    blocks: int = 1,
) -> None:
    """Run the one statement in the thread `first` of the launch, and the other one in `second`."""
    place = {"shared": "%r1", "global": "%base0"}[space]
    one, other = (statement.replace("SPACE", space).replace("PLACE", place) for statement in statements)
    body = f"""
        mov.b32 %r1, global_smem;
        setp.eq.s32 %p0, %thread0, 0;
        setp.eq.s32 %p1, %number0, {first};
        setp.eq.s32 %p2, %number0, {second};
        @%p0 st.shared.v4.b32 [%r1], {{0, 0, 0, 0}};
        bar.sync 0;
        @%p1 {one}
        {between}
        @%p2 {other}"""
    launch(body, zeros(4), shared_bytes=16, threads=96, blocks=blocks, mode=order)


@pytest.mark.parametrize("order", SOME_ORDERS)
@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("race", RACES)
def test_races(race: str, space: str, order: str | int) -> None:
    for first, second in ((3, 40), (70, 3), (3, 4)):  # two warps, in both directions, and two lanes
        with pytest.raises(Fault, match=f"race in {space} memory") as error:
            run(space, RACES[race], first, second, order)
        assert f"thread {first}," in str(error.value) and f"thread {second}," in str(error.value)
        run(space, RACES[race], first, second, order, between=BARRIER)
    run(space, RACES[race], 40, 40, order)


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("case", CALM)
def test_accesses_that_do_not_race(case: str, space: str) -> None:
    run(space, CALM[case], 3, 40)


@pytest.mark.parametrize("order", SOME_ORDERS)
@pytest.mark.parametrize("race", RACES)
def test_races_between_blocks(race: str, order: str | int) -> None:
    for second in (96, 96 * BLOCKS):  # of the second block, and of one that runs later than the first
        for between in ("", BARRIER):
            with pytest.raises(Fault, match="race in global memory"):
                run("global", RACES[race], 0, second, order, between=between, blocks=BLOCKS + 1)
    run("shared", RACES[race], 0, 96, order, blocks=2)  # each block has its own
    run("shared", RACES[race], 0, 96 * BLOCKS, order, blocks=BLOCKS + 1)


@pytest.mark.parametrize("block", [0, 1, BLOCKS])
def test_a_race_in_one_of_many_blocks(block: int) -> None:
    with pytest.raises(Fault, match="race in shared memory"):
        run("shared", RACES["two stores"], 96 * block + 3, 96 * block + 40, blocks=BLOCKS + 1)


def test_a_race_through_two_views() -> None:
    memory = zeros(96)
    body = "st.global.b32 [%own0], 1;\nbar.sync 0;\nld.global.b32 %r0, [%own1];"
    launch(body, memory[:64], memory[:64], blocks=2)
    with pytest.raises(Fault, match="race in global memory"):
        launch(body, memory[:64], memory[32:], blocks=2)


def test_a_race_between_two_turns_of_a_loop() -> None:
    body = """
        mad.lo.s32 %r1, %thread0, 4, global_smem;
        xor.b32 %r2, %thread0, 32;
        mad.lo.s32 %r2, %r2, 4, global_smem;
        mov.b32 %r3, 0;
        LOOP:
        st.shared.b32 [%r1], %r3;
        bar.sync 0;
        ld.shared.b32 %r4, [%r2];
        BARRIER
        add.s32 %r3, %r3, 1;
        setp.lt.s32 %p0, %r3, 3;
        @%p0 bra LOOP;"""
    launch(body.replace("BARRIER", BARRIER), threads=64, shared_bytes=256)
    for order in SOME_ORDERS:
        with pytest.raises(Fault, match="race in shared memory"):
            launch(body.replace("BARRIER", ""), threads=64, shared_bytes=256, mode=order)


# --- A program without races ---

THREADS, GRID = 128, BLOCKS + 3
SHUFFLES = "".join(
    f"shfl.sync.bfly.b32 %r9, %r1, {flip}, 31, -1; add.f32 %r1, %r1, %r9;\n" for flip in (16, 8, 4, 2, 1)
)
REDUCTION = f"""
    mov.b32 %r20, global_smem;
    ld.global.b32 %r0, [%own0];
    mul.f32 %r1, %r0, %r0;
    add.f32 %r1, %r1, %r0;
    {SHUFFLES}
    shr.u32 %r2, %thread0, 5;
    mad.lo.s32 %r3, %r2, 4, %r20;
    and.b32 %r4, %thread0, 31;
    setp.eq.s32 %p0, %r4, 0;
    @%p0 st.shared.b32 [%r3], %r1;
    bar.sync 0;
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r20];
    add.f32 %r5, %r5, %r6;
    add.f32 %r5, %r5, %r7;
    add.f32 %r5, %r5, %r8;
    ex2.approx.f32 %r6, %r5;
    setp.eq.s32 %p1, %thread0, 0;
    mad.wide.u32 %rd0, %block0, 8, %base1;
    @%p1 st.global.v2.b32 [%rd0], {{%r5, %r6}};"""
"""The sum over a block of `x * x + x`, and 2 to its power."""


def reduced(mode: Mode) -> torch.Tensor:
    x = torch.randn(GRID * THREADS, generator=torch.Generator().manual_seed(0)) * 0.2
    out = torch.zeros(GRID, 2)
    launch(REDUCTION, x, out, blocks=GRID, threads=THREADS, shared_bytes=16, mode=mode)
    sums = (x.double() * x.double() + x.double()).view(GRID, THREADS).sum(1)
    torch.testing.assert_close(out[:, 0].double(), sums, rtol=1e-5, atol=1e-5)
    return out


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("contract", [False, True])
def test_a_reduction_in_every_order(contract: bool, perturb: bool) -> None:
    mode = Mode(contract=contract, perturb=perturb)
    expected = reduced(mode)
    for order in ORDERS:
        assert torch.equal(reduced(replace(mode, order=order)), expected), order


def test_modes_of_a_reduction() -> None:
    plain, contracted, perturbed = reduced(Mode()), reduced(Mode(contract=True)), reduced(Mode(perturb=True))
    assert torch.equal(plain[:, 1], plain[:, 0].double().exp2().float())
    assert not torch.equal(plain[:, 0], contracted[:, 0])
    assert torch.equal(plain[:, 0], perturbed[:, 0])
    ulps = perturbed[:, 1].view(torch.int32) - plain[:, 1].view(torch.int32)
    assert 1 <= ulps.abs().max() <= 2  # PTX ISA, "ex2"
