"""`emulated` itself: what it refuses, and what its messages name."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from emulator import Fault, emulated  # noqa: E402

COMPILES = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"
)


@triton.jit
def copy(x_ptr, out_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    if MASKED:
        x = tl.load(x_ptr + i, mask=mask)
    else:
        x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x, mask=mask)


def run(count: int, *, written: int | None = None, masked: bool = True) -> torch.Tensor:
    x = torch.arange(count, dtype=torch.float32)
    out = torch.empty(count)
    copy[(triton.cdiv(count, 128),)](x, out, written or count, 128, masked)
    assert torch.equal(out, x)
    return out


@COMPILES
@pytest.mark.ptx
def test_a_kernel_that_is_not_of_the_package() -> None:
    with emulated() as launches:
        run(300)
    assert [(launch.kernel, launch.blocks) for launch in launches] == [("copy", 3)]


@COMPILES
@pytest.mark.ptx
def test_a_fault_names_kernel_line_and_tensor() -> None:
    with (
        emulated(),
        pytest.raises(
            Fault, match=r"^copy: ld\..*test_ptx_launches\.py:\d+:\d+.*x_ptr, which has 1200 bytes"
        ),
    ):
        run(300, masked=False)


@COMPILES
@pytest.mark.ptx
def test_unwritten_elements_are_counted() -> None:
    with (
        emulated(),
        pytest.raises(
            Fault, match=r"^copy: elements of out_ptr were never written: 40 of 1200 bytes .* 1160$"
        ),
    ):
        run(300, written=290)


def test_emulation_inside_of_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch would run twice."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with emulated(), pytest.raises(RuntimeError, match="already"), emulated("sm_80"):
        pass


@pytest.mark.parametrize("target", ["sm_75", "gfx942"])
def test_a_target_that_is_not_executed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=target), emulated(target):
        pass


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), emulated():
        pass
