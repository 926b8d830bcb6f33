"""The score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formula import TokenLoss
from .base import Surrogate


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """`-A * logp`: the score-function estimator (Williams, 1992).

    Examples:
        >>> import torch
        >>> from grpo_kernels import LossSpec, Reinforce, policy_loss
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=LossSpec(Reinforce()))
        >>> out.loss.backward()
        >>> round(out.loss.item(), 4), logps.grad
        (1.5, tensor([[-0.5000, -0.5000]]))
    """

    kernel = "reinforce"

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        return TokenLoss(-advantage * logp, -advantage, None)
