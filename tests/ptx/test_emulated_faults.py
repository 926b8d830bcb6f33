"""Deliberate faults in the kernels: the emulator, or the comparison with eager PyTorch, finds each of them.

The first half changes the PTX, one statement at a time, and the second half the kernels' Python. Two kinds
of changes are left out, because they cannot change a result: of a constant for subnormal sums, and of the
bound of any shuffle but the first. The loss of a maximum shows only if an exponential overflows, so some
rows have logits of 200.
"""

from __future__ import annotations

import functools
import os
import re
from unittest import mock

import pytest
import torch
from finite_masks import masked
from parity import KLS, Case, Oracle, assert_parity, assert_rows_no_worse, every_branch, oracle, run
from torch import Tensor

from grpo_kernels import LossSpec, PPOClip, grpo_loss

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
    pytest.mark.skipif("EMULATE" in os.environ, reason="EMULATE is set: every launch is emulated already"),
]
pytest.importorskip("triton")

from emulated_cases import CASES  # noqa: E402
from emulator import emulated  # noqa: E402
from faults import Change, Check, changed, launches_of, message, unnoticed  # noqa: E402

from grpo_kernels.kernels import device, dlogits, fused, row_stats  # noqa: E402
from grpo_kernels.kernels.token_loss import METRICS  # noqa: E402

BEYOND = "an access (to bytes|of)"  # of the tensor, or of the row of a padded tensor
WRONG = " errs |the error of row|at masked positions"  # in the messages of assert_parity
MASKED = -100

# --- Calls that reach every statement of the kernels ---

V = 600  # a block of 512 columns and a part of one
EVERYTHING = LossSpec(PPOClip(), KLS["exact"], entropy_coef=0.1)
PLAIN = LossSpec(PPOClip())
# Both in the block and behind it. In column 508, it is the last thread that has the taken token.
IDS = torch.tensor([[508, 596, 0, 340], [72, MASKED, 512, 404]])
# These rows overflow unless the largest logit is found. It is that of the taken token's neighbor, because the
# taken token is not among those that are reduced.
PEAKS = torch.tensor([[200.0, 3.0, 3.0, 3.0], [200.0, 3.0, 200.0, 200.0]])
# One token of the first sequence is above the bounds, and all of the second are below. No sum that loses some
# lanes, and counts others twice, is right by chance.
LOG_RATIOS = torch.tensor([[0.0, 0.1, 0.5, -0.1], [-0.5, 0.0, -0.4, -0.3]])


def padded(x: Tensor, columns: int = 4) -> Tensor:
    """Return logits with more columns, which hold NaN, so that no row continues in the next."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + columns), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide


def trimmed(x: Tensor) -> Tensor:
    return x[..., :-4]


@functools.cache
def expected(spec: LossSpec, size: int = V, padding: int = 0, softcap: float | None = None) -> Oracle:
    """Return a batch with a masked token, and what is right for it.

    In a loss without KL and entropy, the second sequence has no gradient. The logits have `padding` columns
    beyond the vocabulary. They and the reference are parts of wider tensors. With a softcap there are no
    peaks, because its rounding errors grow with the logits.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*IDS.shape, size, generator=generator)
    reference = logits + 0.3 * torch.randn(*IDS.shape, size, generator=generator)
    peaks = PEAKS if softcap is None else PEAKS.clamp(max=3.0)
    for z in (logits, reference):
        for neighbor in (0, 1):
            z.scatter_add_(-1, (IDS.clamp(min=0) + neighbor)[..., None], (peaks * (1 + neighbor))[..., None])
        z[0, 3, IDS[0, 3]] += 8.0  # a sure token, whose gradient is computed from its log-probability
    options = {
        "completion_mask": IDS != MASKED,
        "old_logps": logits.log_softmax(-1).gather(-1, IDS.clamp(min=0)[..., None])[..., 0] - LOG_RATIOS,
        "logit_softcap": softcap,
        "vocab_size": size,
    }
    if spec.kl is not None:
        options["ref_logits"] = trimmed(padded(reference.masked_fill((IDS == MASKED)[..., None], torch.nan)))
    logits = logits.masked_fill((IDS == MASKED)[..., None], torch.nan)
    advantages = torch.tensor([1.3, -0.7 if spec.kl is not None else 0.0])
    return oracle(Case(spec, padded(logits, padding + 4), IDS, advantages, options), trimmed)


def two_kernels() -> None:
    assert_parity(expected(EVERYTHING), view=trimmed, backend="triton", return_entropy=True)


def in_place(spec: LossSpec = EVERYTHING) -> None:
    assert_parity(expected(spec), view=trimmed, backend="triton", return_entropy=True, inplace=True)


def scaled() -> None:
    """Check the gradient of twice the loss, which is in memory already when the factor is known."""
    case, truth, eager = expected(PLAIN)
    got = run(grpo_loss, case, trimmed, upstream=2.0, backend="triton", inplace=True)
    rows = [trimmed(grad) for grad in (got.grad / 2, eager.grad, truth.grad)]
    assert_rows_no_worse(*rows, ids=IDS, logps=truth.out.logps, what="scaled")


def outside(inplace: bool, spec: LossSpec) -> None:
    """Check a batch with an id outside of the vocabulary, which has no log-probability."""
    case = expected(spec).case
    ids = IDS.masked_fill(IDS == 404, V)
    how = {"backend": "triton", "return_entropy": True, "inplace": inplace}
    out = run(grpo_loss, case._replace(completion_ids=ids), trimmed, **how).out
    assert torch.equal(out.logps.isnan(), ids == V), "the error of row 7"


def two_kernels_and_outside() -> None:
    two_kernels()
    outside(False, EVERYTHING)


def plain_in_place() -> None:
    in_place(PLAIN)
    outside(True, PLAIN)


def dropping() -> None:
    """Check a sampling mask, whose dropped columns are NaN, infinities and large numbers."""
    CASES["sampling mask, rows not aligned, two kernels"].check(approximate=False)
    CASES["sampling mask, in place"].check(approximate=False)


def wide() -> None:
    """Check two blocks and a part of one, with a softcap and with columns beyond the vocabulary."""
    given = expected(EVERYTHING, 2100, 5, 300.0)
    assert_parity(given, view=trimmed, backend="triton", return_entropy=True)


# --- Changes of the PTX ---


@pytest.mark.parametrize("check", [two_kernels_and_outside, in_place, plain_in_place, scaled, wide])
def test_there_is_no_other_fault(check: Check) -> None:
    assert launches_of(check)


@pytest.mark.parametrize(
    ("kernel", "check"),
    [("row_stats_kernel", two_kernels), ("fused_loss_kernel", in_place), ("token_metrics_kernel", in_place)],
)
def test_each_barrier_removed(kernel: str, check: Check) -> None:
    """None is redundant: each separates two uses of the same shared memory."""
    assert unnoticed(kernel, check, r"\n\tbar\.sync \t0;", "", "race in shared memory", step=1) == []


@pytest.mark.parametrize(
    ("kernel", "check"), [("row_stats_kernel", two_kernels), ("token_metrics_kernel", in_place)]
)
def test_a_shuffle_with_another_lane(kernel: str, check: Check) -> None:
    for distance in (16, 8, 4, 2, 1):
        pattern, new = rf"(shfl\.sync\.bfly\.b32 \t%\w+, %\w+,) {distance}, 31", rf"\1 {distance // 2}, 31"
        assert unnoticed(kernel, check, pattern, new, WRONG) == []


def test_a_shuffle_of_half_a_warp() -> None:
    """After the first exchange all sums are in the lower half, and the bound does not matter there."""
    pattern = r"(shfl\.sync\.bfly\.b32 [^;]*, 16), 31"
    assert unnoticed("row_stats_kernel", two_kernels, pattern, r"\1, 15", WRONG) == []


def many_tokens() -> None:
    CASES["many tokens, two kernels"].check(approximate=False)


@pytest.mark.parametrize(
    ("kernel", "check"),
    [
        ("row_stats_kernel", two_kernels),
        ("fused_loss_kernel", in_place),
        ("token_metrics_kernel", many_tokens),
    ],
)
def test_a_shared_store_dropped(kernel: str, check: Check) -> None:
    """A sum over warps then has a value of the sum before it, which the emulator cannot know to be wrong."""
    match = f"{WRONG}|never written"
    assert unnoticed(kernel, check, r"\n[^\n]*\bst\.shared[^\n]*", "", match, step=1) == []


GLOBAL_STORES = {
    "row_stats_kernel": (two_kernels, 0),
    "dlogits_kernel": (two_kernels, 0),
    "token_loss_kernel": (two_kernels, 0),
    "fused_loss_kernel": (plain_in_place, 0),
    # Its first stores are zeros, for metrics that do not apply. Here all do, and sums overwrite the zeros.
    "token_metrics_kernel": (two_kernels, len(METRICS) + 2),
    "scale_rows_kernel": (scaled, 0),
}


@pytest.mark.parametrize("kernel", GLOBAL_STORES)
def test_a_store_dropped(kernel: str) -> None:
    check, skip = GLOBAL_STORES[kernel]
    match = f"{WRONG}|never written"
    assert unnoticed(kernel, check, r"\n[^\n]*\bst\.global[^\n]*", "", match, skip=skip) == []


@pytest.mark.parametrize("kernel", GLOBAL_STORES)
def test_a_store_four_bytes_further(kernel: str) -> None:
    check, skip = GLOBAL_STORES[kernel]
    match = f"{WRONG}|never written|{BEYOND}|race in global memory|multiple of 16 bytes"
    assert unnoticed(kernel, check, r"(\bst\.global[^\n]*) \+ 0 \]", r"\1 + 4 ]", match, skip=skip) == []


@pytest.mark.parametrize(
    ("kernel", "check"),
    [
        ("row_stats_kernel", two_kernels_and_outside),
        ("dlogits_kernel", two_kernels),
        ("token_loss_kernel", two_kernels),
        ("fused_loss_kernel", plain_in_place),
        ("token_metrics_kernel", in_place),
        ("scale_rows_kernel", scaled),
    ],
)
def test_a_predicate_of_an_access_removed(kernel: str, check: Check) -> None:
    """Loads beyond a row, stores beyond it or by all threads instead of one, in global and shared memory."""
    match = f"{BEYOND}|race in|never written|shared memory"
    pattern = r"@!?%p\d+ ((ld|st)\.(global|shared))"
    assert unnoticed(kernel, check, pattern, r"\1", match) == []


@pytest.mark.parametrize("kernel", ["row_stats_kernel", "dlogits_kernel"])
def test_a_logarithm_to_another_base(kernel: str) -> None:
    """log2(e) and log(2), as 1.4426 and 0.6931 with a relative error of 2^-9."""
    constants = {"3FB8AA3B": "3FB8EA3B", "3F317218": "3F31B218"}
    for constant, other in constants.items():
        assert unnoticed(kernel, two_kernels, rf"0f{constant}", f"0f{other}", WRONG) == []


# --- Changes of the source ---


LOAD_OF_BLOCK = 'mask=columns < V, other=float("-inf"), '
STORE_OF_GRADIENT = "mask=columns < WIDTH,"
ROW = "(row // T) * batch_stride + (row % T) * time_stride"
RACE = "race in global memory"
FAULTS: dict[str, tuple[Change, Check, str]] = {
    "a tail's mask forgotten": (Change(device.load_block, LOAD_OF_BLOCK, ""), two_kernels, BEYOND),
    "a tail's mask forgotten, in place": (Change(device.load_block, LOAD_OF_BLOCK, ""), in_place, BEYOND),
    "a tail's mask too wide": (
        Change(device.load_block, LOAD_OF_BLOCK, LOAD_OF_BLOCK.replace("V", "V + 1")),
        two_kernels,
        BEYOND,
    ),
    "a tail's mask too narrow": (
        Change(device.load_block, LOAD_OF_BLOCK, LOAD_OF_BLOCK.replace("V", "V - 1")),
        two_kernels,
        WRONG,
    ),
    "a store's mask forgotten": (
        Change(dlogits.gradient_block, STORE_OF_GRADIENT, ""),
        two_kernels,
        f"{BEYOND}|{RACE}",
    ),
    "a store's mask forgotten, in place": (
        Change(dlogits.gradient_block, STORE_OF_GRADIENT, ""),
        in_place,
        BEYOND,
    ),
    "a store beyond a row": (
        Change(dlogits.gradient_block, STORE_OF_GRADIENT, "mask=columns <= WIDTH,"),
        two_kernels,
        f"{BEYOND}|{RACE}",
    ),
    "no zeros beyond the vocabulary": (
        Change(dlogits.gradient_block, STORE_OF_GRADIENT, "mask=columns < V,"),
        wide,
        "never written",
    ),
    "NaN beyond the vocabulary": (
        Change(dlogits.gradient_block, "grad = tl.where(columns < V, grad, 0.0)", "grad = grad"),
        wide,
        WRONG,
    ),
    "zeros beyond a row": (
        Change(dlogits.zero_columns, ", mask=columns < stop", ""),
        two_kernels,
        f"{BEYOND}|{RACE}",
    ),
    "zeros beyond a row, in place": (
        Change(dlogits.zero_columns, ", mask=columns < stop", ""),
        in_place,
        BEYOND,
    ),
    "an id outside of the vocabulary is read": (
        Change(row_stats.taken_logit, ', mask=(target >= 0) & (target < V), other=float("nan")', ""),
        two_kernels_and_outside,
        BEYOND,
    ),
    "rows of other sequences": (
        Change(device.row_pointer, ROW, "(row // T) * time_stride + (row % T) * time_stride"),
        two_kernels,
        f"{RACE}|never written|{WRONG}",
    ),
    "rows of other sequences, in place": (
        Change(device.row_pointer, ROW, "(row // T) * time_stride + (row % T) * time_stride"),
        in_place,
        RACE,
    ),
    "the next row": (
        Change(device.row_pointer, ROW, ROW.replace("row % T", "row % T + 1")),
        two_kernels,
        f"{RACE}|{BEYOND}",
    ),
    "a block twice": (
        Change(dlogits.row_gradient, "start + tl.where(start >= own, BLOCK, 0)", "start"),
        wide,
        "never written",
    ),
    "a sampling mask's tail forgotten": (
        Change(device.are_kept, "mask=index * WORD < V, other=0", ""),
        dropping,
        BEYOND,
    ),
    "the next word of a sampling mask": (
        Change(device.are_kept, "index = start // WORD", "index = start // WORD + 1"),
        dropping,
        f"{BEYOND}|{WRONG}",
    ),
    "the neighbor's bit of a sampling mask": (
        Change(device.are_kept, "(-(own % WORD) + (WORD - GROUP))", "(-(own % WORD) + (WORD - 1 - GROUP))"),
        dropping,
        WRONG,
    ),
    "dropped columns of the reference counted": (
        Change(row_stats.fold_rows, 'ref_y = tl.where(kept, ref_y, float("-inf"))', "ref_y = ref_y"),
        dropping,
        WRONG,
    ),
    "a gradient of dropped columns": (
        Change(dlogits.gradient_block, "grad = tl.where(kept, grad, zero)", "grad = grad"),
        dropping,
        "gradient of dropped columns",
    ),
    "the taken logit read when others store to its row": (
        Change(
            fused.fused_loss_kernel,
            "    if ref_ptr is None:\n        ref_logp",
            "    logp += 0 * tl.load(logits_ptr + target)\n    if ref_ptr is None:\n        ref_logp",
        ),
        in_place,
        RACE,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    change, check, match = FAULTS[name]
    with changed(change):
        found = message(check)
    assert re.search(match, found), found


CONTRACTED = Change(
    device.exponent, "tl.fma(y - shift, tl.zeros_like(y) + k, tl.zeros_like(y))", "k * y - k * shift"
)


@pytest.mark.parametrize(("value", "temperature"), [(-1e10, 1.0), (-1e9, 0.3)])
@pytest.mark.parametrize("inplace", [False, True], ids=["two kernels", "in place"])
def test_the_exponent_of_version_8ed1816(value: float, temperature: float, inplace: bool) -> None:
    """The compiler makes an FMA of the difference, which is not 0 at the maximum: a masked row became NaN.

    The interpreter does not show it. Without a mask, the two forms are equal up to rounding.
    """
    case = every_branch(EVERYTHING, 512, torch.float32).with_options(temperature=temperature)
    case = case._replace(logits=case.logits * temperature)
    case = case.with_options(ref_logits=case.options["ref_logits"] * temperature)
    ordinary, hard = oracle(case), oracle(masked(case, value, "the front", "policy", "reference"))

    def check(given: Oracle) -> None:
        assert_parity(given, backend="triton", return_entropy=True, inplace=inplace)

    assert message(lambda: check(hard)) == ""
    with changed(CONTRACTED):
        assert message(lambda: check(ordinary)) == ""
        assert re.search(r"errs (nan|inf)", message(lambda: check(hard)))


def test_a_load_of_16_bytes_in_rows_that_are_not_aligned() -> None:
    given = expected(PLAIN, V + 1)
    with mock.patch("grpo_kernels.kernels.launch.rows_aligned", return_value=True):
        found = message(lambda: assert_parity(given, view=trimmed, backend="triton", inplace=True))
    assert "not a multiple of 16 bytes" in found


def test_a_change_is_taken_back() -> None:
    change = FAULTS["an id outside of the vocabulary is read"][0]
    with emulated() as before:
        two_kernels()
    with changed(change), emulated() as meanwhile:
        two_kernels()
    with emulated() as after:
        two_kernels()
    texts = [[launch.ptx for launch in launches] for launches in (before, meanwhile, after)]
    assert texts[0] == texts[2] != texts[1]
