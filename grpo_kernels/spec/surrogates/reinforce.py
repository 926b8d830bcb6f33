"""The score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formula import TokenLoss
from .base import Surrogate


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """`-A * logp`: the score-function estimator (Williams, 1992)."""

    kernel = "reinforce"

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        return TokenLoss(-advantage * logp, -advantage, None)
