"""The loss as a differentiable function of the statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .differentiation import apply, first_order
from .dispatch import token_losses
from .loss import BatchLoss
from .statistics import Coefficients, RowStats


def loss_of_statistics(
    stats: RowStats, loss: BatchLoss, backend: str
) -> tuple[Tensor, RowStats, Coefficients]:
    """Return the loss, 0-dim and differentiable, and detached statistics and derivatives."""
    constants = stats.detach()
    values, derivatives = token_losses(loss, constants, backend)
    differentiable = stats.logps, stats.entropy, stats.kl, stats.kl_forward
    return apply(KnownGradient, differentiable, values, derivatives), constants, derivatives


class KnownGradient(torch.autograd.Function):
    """A sum of values whose derivatives with respect to the statistics are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        kl_forward: Tensor | None,
        values: Tensor,  # [N]
        coefficients: Coefficients,
        origin: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.origin = origin
        ctx.save_for_backward(*coefficients)
        return values.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if c is None else grad * c for c in ctx.saved_tensors), None, None, None
