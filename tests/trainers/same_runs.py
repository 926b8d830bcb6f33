"""Compares two runs of a trainer: with its own loss and with ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

TOLERANCE = 1e-5  # of the largest value of a run. Both sides are fp32: 1e-6 per step


def assert_close(what: str, got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == wanted.shape and got.numel()
    error = float((got - wanted).abs().max())
    bound = tolerance * float(wanted.abs().max().clamp(min=0.1))  # the terms of a loss cancel
    assert error <= bound, f"{what}: {error:.3g} apart, {bound:.3g} allowed"


def assert_same_parameters(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    assert got.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert_close(name, got[name], parameter, tolerance)
