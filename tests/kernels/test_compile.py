"""Every kernel variant in use compiles for seven GPUs without spills, and for sm_90 within a budget.

No GPU is needed: the tests call the public functions on "meta" tensors, compile their launches without
running them, and read the machine code. An instruction that only some iterations run counts as if all did.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks.machine_code.cases import CASES  # noqa: E402
from benchmarks.machine_code.figures import PASSES, Figures, compiled  # noqa: E402
from benchmarks.machine_code.no_gpu import MAX_THREADS, TARGETS, launches_for  # noqa: E402
from benchmarks.machine_code.resources import resources  # noqa: E402
from benchmarks.machine_code.sass import Sass  # noqa: E402

SHARED_BYTES = 48 * 1024  # every GPU gives a block this much by default

BUDGETED = "sm_90"
# Instructions per element of a row.
PLAIN_STATISTICS, FULL_STATISTICS, GRADIENT = 8, 12, 8
# Two variants take one more, because an exponent that is exact at the maximum takes two instructions.
FORWARD_KL_STATISTICS, ENTROPY_GRADIENT = 13, 9
# A sampling mask takes a test and a selection per element, and a load, a shift and an address per 16 bytes.
SAMPLING_MASK = 3
# One exponential per element, and one per thread and block of the row, which rescales the sums to a new
# maximum. A thread holds 16 elements or more.
EXPONENTIALS = 1 + 1 / 16
# Registers per thread, for every alignment of the rows. Six blocks of 128 threads fit a multiprocessor.
REGISTERS = 80


class Divergence(NamedTuple):
    """Budgets of the two kernels of a divergence."""

    values: int  # instructions per element of a row
    gradient: int
    exponentials: tuple[float, float]  # per element, of the same kernels
    registers: int


# The kernels of the divergences evaluate series and logarithms. An exponential per column is a half per
# element, because both rows are read: one of each row, and in a JSD two of the log-ratio, or one for the
# gradient.
DIVERGENCES = {
    "reverse_kl": Divergence(18, 11, (1, 0.5), 80),
    "forward_kl": Divergence(20, 17, (1, 1), 80),
    "jsd": Divergence(70, 40, (2, 1), 96),
}

Farm = dict[tuple[str, str], "Future[list[Figures]]"]


@pytest.fixture(scope="module")
def farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    """Compile on all cores what the selected tests need."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = [(p.params["case"], p.params["target"]) for p in params if p is not None and "case" in p.params]
    # The threads of a compiler do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(mp_context=context)
    found = {
        (case, target): pool.submit(compiled, CASES[case], target, read=target == BUDGETED)
        for case, target in dict.fromkeys(wanted)
    }
    yield found
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case: str, target: str, farm: Farm) -> None:
    for k in farm[case, target].result():
        # fp64 is for gradcheck and may be slow. There ptxas spills a register or two for occupancy.
        assert k.resources.spills == 0 or k.variant.startswith("fp64"), k
        assert k.resources.shared_bytes <= SHARED_BYTES, k
        assert k.resources.threads <= MAX_THREADS, k


def divergence_of(k: Figures) -> Divergence | None:
    """Return the budgets of a divergence's kernel, or None for other kernels."""
    if not k.kernel.startswith("divergence"):
        return None
    words = {*k.variant.split()}
    return DIVERGENCES["jsd" if "jsd" in words else "forward_kl" if "forward" in words else "reverse_kl"]


def budget(k: Figures, what: str) -> int | None:
    """Return the budget of instructions, or None."""
    words = {*k.variant.split()}
    if "sampling_mask" in words:
        plain = budget(replace(k, variant=k.variant.replace(" sampling_mask", "")), what)
        return None if plain is None else plain + SAMPLING_MASK
    # A softcap computes a tanh per element. Unaligned rows are read element by element.
    if words & {"capped", "ref_capped", "group=1"}:
        return None
    divergence = divergence_of(k)
    if divergence is not None:
        return divergence.gradient if what == "gradient" else divergence.values
    if what == "gradient":
        return ENTROPY_GRADIENT if "entropy" in words and "ref" not in words else GRADIENT
    if "kl_forward" in words:
        return FORWARD_KL_STATISTICS
    return FULL_STATISTICS if words & {"ref", "entropy"} else PLAIN_STATISTICS


@pytest.mark.parametrize("target", [BUDGETED])
@pytest.mark.parametrize("case", CASES)
def test_keeps_its_budget(case: str, target: str, farm: Farm) -> None:
    for k in farm[case, target].result():
        divergence = divergence_of(k)
        if not k.variant.startswith("fp64"):
            assert tuple(p.name for p in k.passes) == PASSES.get(k.kernel, ())
            assert k.resources.registers <= (REGISTERS if divergence is None else divergence.registers), k
        for p in k.passes:
            assert p.calls == 0, (k.kernel, k.variant, p)  # such as the slow path of a division: not counted
            limit = budget(k, p.name)
            if limit is not None:
                assert p.narrowest_bits == 128, (k.kernel, k.variant, p)
                assert p.instructions <= limit, (k.kernel, k.variant, p)
                most = EXPONENTIALS
                if divergence is not None:
                    most = divergence.exponentials[p.name == "gradient"]
                assert p.exponentials <= most, (k.kernel, k.variant, p)


@pytest.mark.parametrize(
    ("dropping", "plain"),
    [
        ("float32 sampling mask", "float32 policy only"),
        ("float32 fused sampling mask, exact KL, entropy", "float32 fused exact KL, entropy"),
        ("bfloat16 sampling mask, entropy", "bfloat16 entropy"),
        ("bfloat16 fused sampling mask, forward KL", "bfloat16 fused forward KL"),
        ("bfloat16 reverse_kl, sampling mask", "bfloat16 reverse_kl"),
        ("bfloat16 forward_kl, sampling mask", "bfloat16 forward_kl"),
        ("float32 jsd, sampling mask", "float32 jsd"),
    ],
)
def test_the_cost_of_a_sampling_mask(dropping: str, plain: str) -> None:
    """Compare with the same variants without a mask. The words are not among the elements."""
    found, before = (
        [k for k in compiled(CASES[name], BUDGETED) if k.kernel in PASSES and k.passes]
        for name in (dropping, plain)
    )
    masked = [k for k in found if "sampling_mask" in k.variant.split()]
    assert masked and len(found) == len(before)
    for k in masked:
        (same,) = (x for x in before if x.kernel == k.kernel)
        for p, q in zip(k.passes, same.passes, strict=True):
            assert p.elements == q.elements
            assert q.instructions < p.instructions <= q.instructions + SAMPLING_MASK, (k, same)


EX2 = re.compile(r"ex2\.approx\.(?:ftz\.)?f32\s+%\w+, (%\w+);")
FMA = re.compile(r"fma\.rn\.(?:ftz\.)?f32\s+(%\w+), [^,]+, [^,]+, ([^;]+);")


@pytest.mark.parametrize(
    "name", ["float32 exact KL, entropy", "bfloat16 fused forward KL", "float32 reverse_kl", "bfloat16 jsd"]
)
def test_no_exponent_is_the_rounding_error_of_a_product(name: str) -> None:
    """Each exponent is a product with a difference, because `fma(k, y, -k * max)` is not 0 at the maximum.

    For a mask of -1e10 it would be 2^9. Only the PTX shows this, because the interpreter does not contract.
    """
    with launches_for(TARGETS[BUDGETED]) as kernels:
        CASES[name]()
    passes = PASSES.keys() - {"scale_rows"}  # which has no exponentials
    over_rows = [k for k in kernels if k.name.removesuffix("_kernel") in passes]
    assert over_rows
    for kernel in over_rows:
        assert kernel.metadata.enable_fp_fusion  # set explicitly, because Triton's default changes
        ptx = kernel.asm["ptx"]
        contracted = {register for register, addend in FMA.findall(ptx) if addend != "0f00000000"}
        exponents = {*EX2.findall(ptx)}
        assert exponents and not contracted & exponents, kernel.name


@triton.jit
def hoarder(x_ptr, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    x = tl.load(x_ptr + columns)
    tl.debug_barrier()  # load everything before any store
    tl.store(x_ptr + columns, x + 1)


@pytest.mark.parametrize(("target", "size"), [("sm_90", 32 * 512), ("gfx942", 64 * 1024)])
def test_a_spill_is_detected(target: str, size: int) -> None:
    """The kernel holds more values per thread than there are registers."""
    with launches_for(TARGETS[target]) as kernels:
        hoarder[(1,)](torch.empty(size, device="meta"), size, num_warps=1)
    assert resources(kernels[0]).spills > 0


@triton.jit
def two_loops(out_ptr, x_ptr, n, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    top = tl.full([SIZE], float("-inf"), tl.float32)
    for start in range(0, n, SIZE):
        x = tl.load(x_ptr + start + columns)
        if start == 4 * SIZE:
            x = tl.exp2(x)
        top = tl.maximum(top, x)
    for start in range(0, n, SIZE):
        tl.store(out_ptr + start + columns, tl.exp2(tl.load(x_ptr + start + columns) - top))


def test_the_reader_finds_the_loops() -> None:
    """A thread has 4 elements per iteration. Only one loop has exponentials in every iteration."""
    with launches_for(TARGETS[BUDGETED]) as kernels:
        x = torch.empty(4096, device="meta")
        two_loops[(1,)](x, x, 4096, 128, num_warps=1)
    sass = Sass(kernels[0].asm["cubin"])
    reading, writing = sass.main_loop(stores=False), sass.main_loop(stores=True)
    assert reading is not None and writing is not None
    turns = reading.loaded_bytes // 16  # iterations of the source loop in one iteration of the unrolled loop
    assert reading.count("MUFU.EX2") == 4 * turns
    assert not any(i.opcode.startswith("MUFU") and i.predicate is None for i in reading.every_time)
    assert reading.count("FMNMX") == 4 * turns
    assert reading.narrowest_bits == writing.narrowest_bits == 128
    assert writing.count("MUFU.EX2") == writing.loaded_bytes // 4


@triton.jit
def one_block(out_ptr, x_ptr, mask_ptr, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    if tl.load(mask_ptr) == 0:
        tl.store(out_ptr + columns, tl.zeros([SIZE], tl.float32))
        return
    tl.store(out_ptr + columns, tl.exp2(tl.load(x_ptr + columns)))


def test_the_reader_finds_the_path_through() -> None:
    """The path has the loads of 32 elements per thread, and not the branch that stores zeros."""
    with launches_for(TARGETS[BUDGETED]) as kernels:
        x = torch.empty(1024, device="meta")
        one_block[(1,)](x, x, x, 1024, num_warps=1)
    sass = Sass(kernels[0].asm["cubin"])
    opcodes = [i.opcode for i in sass.way_through()]
    assert [i.opcode for i in sass.instructions].count("STG.E.128") == 2 * 8
    assert opcodes.count("STG.E.128") == opcodes.count("LDG.E.128") == 8
    assert opcodes.count("MUFU.EX2") == 32
