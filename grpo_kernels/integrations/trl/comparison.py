"""Compares our loss and its gradient with TRL's, for the same log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .step import Step

# Tolerance relative to the size of the loss. Rounding makes TRL's loss and ours differ by 1e-6.
TOLERANCE = 1e-3


class Difference(NamedTuple):
    """The result of `compare_losses`, on the device.

    Attributes:
        too_large: 0-dim bool: the losses or their gradients differ by more than `TOLERANCE`.
        gradients: 0-dim: L1 distance of the gradients relative to the norm of TRL's; None if not compared.
        norm: 0-dim: L1 norm of TRL's gradient; None if not compared.
    """

    too_large: Tensor
    gradients: Tensor | None = None
    norm: Tensor | None = None


def compare_losses(
    step: Step,
    ours: Tensor,
    theirs: Tensor,
    *,
    size: float,
    divisor: int,
    with_gradients: bool,
) -> Difference:
    """Compare `ours` with `theirs`, two values of the loss of one micro-batch.

    A loss of TRL that is not finite counts as equal: TRL multiplies a ratio that overflowed by an advantage
    of 0. A call with other tokens than the batch's counts as a difference.

    Args:
        step: the micro-batch.
        ours: 0-dim, without a graph.
        theirs: 0-dim, a function of `step.logps` and `step.entropy`.
        size: the loss of tokens that all have an advantage of 1 and a ratio of 1.
        divisor: the divisor of `ours`, see `micro_batch_divisor`.
        with_gradients: compare the gradients with respect to log-probabilities and entropies, too.
    """
    too_large = ~((ours - theirs).abs() <= TOLERANCE * (size + theirs.abs())) & theirs.isfinite()
    too_large |= step.other_tokens
    if not with_gradients:
        return Difference(too_large)
    wanted = step.gradient(theirs)
    error = (step.gradient(step.loss_of_logps() / divisor) - wanted).abs().sum()
    norm = wanted.abs().sum()
    too_large = too_large | (~(error <= TOLERANCE * (size + norm)) & norm.isfinite())
    return Difference(too_large, error / norm, norm)
