"""What the formulas of surrogates and KL estimates share. Elementwise PyTorch on tensors `[N]`, in nats.

Every formula states its derivative explicitly, because autograd would decide two things wrongly: which
branch a tie takes, and that an inactive token has a gradient of exactly zero, where autograd would compute
0 * inf.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """The loss of each token and its derivatives, `[N]` each. None is zero.

    At token level the log-ratio is the token's own, so its derivative adds to that of the log-probability. At
    the other levels the log-ratio is the sequence's.
    """

    value: Tensor
    dlogp: Tensor | None  # with respect to the log-probability
    dlog_ratio: Tensor | None  # with respect to the log-ratio


class TokenTerms(NamedTuple):
    """What a surrogate is computed from, `[N]` each."""

    log_ratio: Tensor
    advantages: Tensor
    token_weights: Tensor | None
    dlog_ratio: Tensor | None = None
    """If the log-ratio is the sequence's, its derivative with respect to the token's own. Else None."""


def log_ratio_to(logp: Tensor, anchor: Tensor | None) -> Tensor:
    """`logp - anchor`. Without an anchor 0, also for a `logp` of -inf; a NaN stays NaN."""
    return torch.where(logp.isnan(), logp, 0.0) if anchor is None else logp - anchor


def clamped_ratio(log_ratio: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """`exp` of the log-ratio clamped to ±`clamp`, and its derivative with respect to the log-ratio."""
    ratio = torch.exp(log_ratio.clamp(-clamp, clamp))
    return ratio, torch.where(log_ratio.abs() > clamp, 0.0, ratio)


def weighted_logp(logp: Tensor, weight: Tensor) -> TokenLoss:
    """`weight * logp`, the weight held constant. 0 if the weight is 0, also for a `logp` of -inf."""
    return TokenLoss(torch.where(weight == 0, 0.0, weight * logp), weight, None)


def select(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """`torch.where` of two numbers, in the dtype of `like`. `torch.where` itself would return fp32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def sigmoid(x: Tensor) -> Tensor:
    """As `torch.sigmoid`, but with bits that depend on `x` alone.

    On a CPU `torch.sigmoid` computes the last few entries of a tensor with another `exp` than the rest, so a
    token's gradient would depend on its position in the batch.
    """
    # The exponential of a negative number cannot overflow.
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (1 + e)


def unbounded(bound: float | None) -> float:
    """A bound as a float: None is infinity."""
    return math.inf if bound is None else float(bound)
