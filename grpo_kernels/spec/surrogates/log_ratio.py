"""The reward-weighted log-ratio to the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formula import TokenLoss
from .base import Surrogate


@dataclass(frozen=True)
class LogRatio(Surrogate):
    """`-A * (logp - ref_logp)`: the reward-weighted log-ratio to the reference. Needs a reference.

    Examples:
        >>> import torch
        >>> from grpo_kernels import LogRatio, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> ref_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(LogRatio())
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, ref_logps=ref_logps)
        >>> round(out.loss.item(), 4)  # -(log 1.4 + log 0.6) / 2
        0.0872
    """

    anchor = "ref"
    kernel = "log_ratio"

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        return TokenLoss(-advantage * log_ratio, None, -advantage)
