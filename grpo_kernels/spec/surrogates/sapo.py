"""The soft gate of SAPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks.choices import LEVELS
from ...checks.scalars import number_field
from ..formula import TokenLoss, clamped_ratio, select, sigmoid
from .base import Surrogate


@dataclass(frozen=True)
class SAPO(Surrogate):
    """`-A * sigmoid(tau * (ratio - 1)) * 4 / tau` (arXiv:2511.20347).

    Attributes:
        tau_pos: `tau` for `A > 0`.
        tau_neg: `tau` for all other advantages.

    Examples:
        >>> import torch
        >>> from grpo_kernels import SAPO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(SAPO())
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> round(out.loss.item(), 4)  # sigmoid(0.4) + sigmoid(-0.4) is 1
        -2.0
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    anchor = "old"
    kernel = "sapo"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "tau_pos", strict=True)
        number_field(self, "tau_neg", strict=True)

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        ratio, dratio = clamped_ratio(log_ratio, clamp)
        tau = select(advantage > 0, self.tau_pos, self.tau_neg, like=advantage)
        gate = sigmoid(tau * (ratio - 1))
        # sigmoid(-x) instead of 1 - sigmoid(x), which loses all digits if the ratio is large.
        steepness = gate * sigmoid(-tau * (ratio - 1))
        # If the steepness is 0, the ratio may be infinite.
        slope = torch.where(steepness == 0, 0.0, -4 * steepness * advantage * dratio)
        return TokenLoss(-advantage * gate * 4 / tau, None, slope)
