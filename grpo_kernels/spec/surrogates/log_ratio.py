"""The reward-weighted log-ratio to the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formula import TokenLoss
from .base import Surrogate


@dataclass(frozen=True)
class LogRatio(Surrogate):
    """`-A * (logp - ref_logp)`: the reward-weighted log-ratio to the reference. Needs a reference."""

    anchor = "ref"
    kernel = "log_ratio"

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        return TokenLoss(-advantage * log_ratio, None, -advantage)
