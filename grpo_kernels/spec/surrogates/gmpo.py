"""GMPO: the geometric mean of a sequence's clipped ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks.choices import Level
from ...checks.scalars import number_field
from ..formula import TokenLoss, TokenTerms, clamped_ratio, select
from .base import Clip, Surrogate

if TYPE_CHECKING:
    from ...tokens.sequences import Sequences


@dataclass(frozen=True)
class GMPO(Surrogate):
    """`-A * exp(mean of the clipped log-ratios)`: a sequence's geometric mean ratio (arXiv:2507.20673).

    This is "geo_mean" of verl 0.9.1. `A` is the mean advantage of the sequence. Token weights enter as their
    geometric mean, so exclude a token by the mask, not by a weight of 0. With the aggregation
    "seq-mean-token-mean" the loss is the mean over sequences.

    Attributes:
        eps_high: upper bound on the log-ratio of a token with `A > 0`.
        eps_low: the lower bound is `-eps_low` for a token with `A < 0`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import GMPO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(GMPO(), aggregation="seq-mean-token-mean")
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> round(out.loss.item(), 4)  # -(1.4 * 0.6) ** 0.5
        -0.9165
    """

    eps_low: float = 0.4
    eps_high: float = 0.4
    anchor = "old"
    uses_ratio = True
    couples_tokens = True
    zero_without_weight = False

    def __post_init__(self) -> None:
        number_field(self, "eps_low")
        number_field(self, "eps_high")

    @property
    def clip(self) -> Clip:
        return Clip("log band", -self.eps_low, self.eps_high)

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        ratio, dratio = clamped_ratio(log_ratio, clamp)
        return TokenLoss(-advantage * ratio, None, -advantage * dratio)

    def couple(self, terms: TokenTerms, level: Level, clamp: float, sequences: Sequences) -> TokenTerms:
        log_ratio, advantages, weights, _ = terms
        count = sequences.lengths
        high = select(advantages > 0, self.eps_high, math.inf, like=advantages)
        low = select(advantages < 0, -self.eps_low, -math.inf, like=advantages)
        no_slope = (log_ratio > high) | (log_ratio < low) | (advantages == 0)
        bounded = torch.where(advantages == 0, 0.0, torch.minimum(torch.maximum(log_ratio, low), high))
        if weights is not None:
            mean = torch.exp(sequences.total(torch.log(weights + 1e-10)) / count)
            weights = torch.where(sequences.total(weights) == 0, 0.0, mean)
        return TokenTerms(
            sequences.total(bounded) / count,
            sequences.total(advantages) / count,
            weights,
            torch.where(no_slope, 0.0, 1 / count),
        )
