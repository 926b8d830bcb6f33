"""Deliberate faults in the kernels of the divergences: the emulator, or eager PyTorch, finds each of them.

As in test_emulated_faults.py, the first half changes the PTX, and the second half the kernels' Python. The
stores of the gradient are changed in its Python only, because many of them do not run in a small case.
"""

from __future__ import annotations

import functools
import os
import re

import pytest
import torch
from distillation_cases import Case, assert_parity, batch
from torch import Tensor

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
    pytest.mark.skipif("EMULATE" in os.environ, reason="EMULATE is set: every launch is emulated already"),
]
pytest.importorskip("triton")

from emulated_cases import CASES  # noqa: E402
from faults import Change, Check, changed, launches_of, message, unnoticed  # noqa: E402

from grpo_kernels.kernels import device, divergence, dlogits  # noqa: E402

BEYOND = "an access (to bytes|of)"  # of the tensor, or of the row of a padded tensor
WRONG = " errs |the error of row|at masked positions"
RACE = "race in global memory"
V = 1100  # a block of 1024 columns, or two of 512, and a part of one


def trimmed(x: Tensor) -> Tensor:
    return x[..., :-4]


def padded(x: Tensor, columns: int = 4) -> Tensor:
    """Return logits with more columns, which hold NaN, so that no row continues in the next."""
    return torch.nn.functional.pad(x, (0, columns), value=torch.nan)


@functools.cache
def case_of(kind: str) -> Case:
    """Return a case whose logits have five padding columns. Both models' are parts of wider tensors."""
    case = batch(kind=kind, vocab=V).with_options(vocab_size=V)
    return case._replace(logits=padded(case.logits, 9), teacher=trimmed(padded(case.teacher)))


def jsd() -> None:
    assert_parity(case_of("jsd"), trimmed, backend="triton", what="jsd")


def jsd_in_place() -> None:
    assert_parity(case_of("jsd"), trimmed, backend="triton", inplace=True, what="jsd")


def near() -> None:
    """Check a KL whose values are computed in the second pass, of rows that nearly agree."""
    CASES["reverse_kl, near"].check(approximate=False)
    CASES["forward_kl, near"].check(approximate=False)


def dropping() -> None:
    """Check a sampling mask, whose dropped columns are NaN."""
    CASES["jsd, rows not aligned, sampling mask"].check(approximate=False)
    CASES["jsd, sampling mask"].check(approximate=False)


def padding() -> None:
    CASES["jsd, vocabulary padded"].check(approximate=False)


# --- Changes of the PTX ---


@pytest.mark.parametrize("check", [jsd, jsd_in_place])
def test_there_is_no_other_fault(check: Check) -> None:
    assert [launch.kernel for launch in launches_of(check)] == [
        *("row_stats_kernel", "divergence_kernel", "divergence_gradient_kernel")
    ]


def test_each_barrier_removed() -> None:
    """None is redundant: each separates two uses of the same shared memory."""
    match = "race in shared memory"
    assert unnoticed("divergence_kernel", jsd, r"\n\tbar\.sync \t0;", "", match, step=1) == []


def test_a_shuffle_with_another_lane() -> None:
    for distance in (16, 8, 4, 2, 1):
        pattern, new = rf"(shfl\.sync\.bfly\.b32 \t%\w+, %\w+,) {distance}, 31", rf"\1 {distance // 2}, 31"
        assert unnoticed("divergence_kernel", jsd, pattern, new, WRONG) == []


def test_a_shared_store_dropped() -> None:
    match = f"{WRONG}|never written"
    assert unnoticed("divergence_kernel", jsd, r"\n[^\n]*\bst\.shared[^\n]*", "", match, step=1) == []


def test_a_store_dropped() -> None:
    assert (
        unnoticed("divergence_kernel", jsd, r"\n[^\n]*\bst\.global[^\n]*", "", f"{WRONG}|never written") == []
    )


def test_a_store_four_bytes_further() -> None:
    match = f"{WRONG}|never written|{BEYOND}|{RACE}|multiple of 16 bytes"
    assert unnoticed("divergence_kernel", jsd, r"(\bst\.global[^\n]*) \+ 0 \]", r"\1 + 4 ]", match) == []


def test_a_predicate_of_an_access_removed() -> None:
    """Loads beyond a row, stores beyond it or by all threads instead of one, in global and shared memory."""
    match = f"{BEYOND}|race in|never written|shared memory|{WRONG}"
    assert unnoticed("divergence_kernel", jsd, r"@!?%p\d+ ((ld|st)\.(global|shared))", r"\1", match) == []


# --- Changes of the source ---


LOAD_OF_BLOCK = 'mask=columns < V, other=float("-inf"), '
FAULTS: dict[str, tuple[Change, Check, str]] = {
    "a tail's mask forgotten": (Change(device.load_block, LOAD_OF_BLOCK, ""), jsd, BEYOND),
    "a tail's mask too narrow": (
        Change(device.load_block, LOAD_OF_BLOCK, LOAD_OF_BLOCK.replace("V", "V - 1")),
        jsd,
        WRONG,
    ),
    "a store's mask forgotten": (
        Change(divergence.divergence_gradient_kernel, ", mask=columns < V)", ")"),
        jsd,
        f"{BEYOND}|{RACE}",
    ),
    "a store beyond a row, in place": (
        Change(divergence.divergence_gradient_kernel, ", mask=columns < V)", ", mask=columns <= V)"),
        jsd_in_place,
        f"{BEYOND}|{RACE}",
    ),
    "no zeros beyond the vocabulary": (
        Change(divergence.divergence_gradient_kernel, "zero_columns(out_ptr, V, WIDTH, TAIL)", "pass"),
        padding,
        "never written",
    ),
    "zeros beyond a row": (
        Change(dlogits.zero_columns, ", mask=columns < stop", ""),
        jsd_in_place,
        BEYOND,
    ),
    "the sum of another row": (
        Change(
            divergence.divergence_gradient_kernel,
            "slope = tl.load(slope_ptr + row)",
            "slope = tl.load(slope_ptr + row // T * T)",
        ),
        jsd,
        WRONG,
    ),
    "rows without a value are not needed": (
        Change(divergence.divergence_kernel, "tl.load(needed_ptr + row) == 0", "row < 0"),
        jsd,
        f"{WRONG}|{BEYOND}",
    ),
    "a tail counted twice": (
        Change(divergence.divergence_kernel, "range(full, V, TAIL)", "range(full - TAIL, V, TAIL)"),
        jsd,
        WRONG,
    ),
    "a series without its last terms": (
        Change(divergence.excess, "n in tl.static_range(LAST - 2, 1, -1)", "n in tl.static_range(3, 1, -1)"),
        near,
        WRONG,
    ),
    "the mixture with equal weights": (
        Change(divergence.log_mixture, "rest + factor * exp", "0.5 + 0.5 * exp"),
        jsd,
        WRONG,
    ),
    "the next word of a sampling mask": (
        Change(device.are_kept, "index = start // WORD", "index = start // WORD + 1"),
        dropping,
        f"{BEYOND}|{WRONG}",
    ),
    "dropped columns of the teacher counted": (
        Change(divergence.compare, 'ref_y = tl.where(kept, ref_y, float("-inf"))', "ref_y = ref_y"),
        dropping,
        WRONG,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    change, check, match = FAULTS[name]
    with changed(change):
        found = message(check)
    assert re.search(match, found), found
