"""Helpers shared by the formulas of surrogates and KL estimates: elementwise PyTorch on `[N]`, in nats.

Every formula states its derivative explicitly, because autograd would be wrong in two cases. At a tie it may
take the other branch. For an inactive token it would compute 0 * inf, although the gradient is exactly 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """The loss of each token and its derivatives, `[N]` each. None stands for zero.

    At token level the log-ratio is the token's own, so its derivative adds to that of the log-probability. At
    the other levels the log-ratio is the sequence's.
    """

    value: Tensor
    dlogp: Tensor | None  # with respect to the log-probability
    dlog_ratio: Tensor | None  # with respect to the log-ratio


class TokenTerms(NamedTuple):
    """Inputs of a surrogate's formula, `[N]` each."""

    log_ratio: Tensor
    advantages: Tensor
    token_weights: Tensor | None
    dlog_ratio: Tensor | None = None
    """If the log-ratio is the sequence's, its derivative with respect to the token's own; otherwise None."""


def log_ratio_to(logp: Tensor, anchor: Tensor | None) -> Tensor:
    """Return `logp - anchor`, or 0 without an anchor, even for a `logp` of -inf. NaN stays NaN."""
    return torch.where(logp.isnan(), logp, 0.0) if anchor is None else logp - anchor


def clamped_ratio(log_ratio: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """Return `exp` of the clamped log-ratio, and its derivative with respect to the log-ratio."""
    if clamp == math.inf:
        ratio = torch.exp(log_ratio)
        return ratio, ratio
    ratio = torch.exp(log_ratio.clamp(-clamp, clamp))
    return ratio, ratio.masked_fill(log_ratio.abs() > clamp, 0.0)


def weighted_logp(logp: Tensor, weight: Tensor) -> TokenLoss:
    """Return `weight * logp` for a constant weight. It is 0 if the weight is 0, even for a `logp` of -inf."""
    return TokenLoss((weight * logp).masked_fill_(weight == 0, 0.0), weight, None)


def select(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """Choose between two numbers, as `torch.where` does, but in the dtype of `like` instead of fp32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def sigmoid(x: Tensor) -> Tensor:
    """Compute `torch.sigmoid(x)` with bits that depend only on the entry, not on its position.

    On a CPU `torch.sigmoid` computes the last few entries of a tensor with a different `exp`, so a
    token's gradient would depend on its position in the batch.
    """
    # The exponential of a negative number cannot overflow.
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (1 + e)


def unbounded(bound: float | None) -> float:
    """Return a bound as a float, infinity for None."""
    return math.inf if bound is None else float(bound)
