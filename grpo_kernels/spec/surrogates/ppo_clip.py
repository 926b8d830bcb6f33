"""PPO's clipped surrogate, with additional bounds from later papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks.choices import LEVELS
from ...checks.scalars import number_field
from ..formula import TokenLoss, clamped_ratio
from .base import Clip, Surrogate


@dataclass(frozen=True)
class PPOClip(Surrogate):
    """`-min(min(ratio, delta) * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)` (PPO, arXiv:1707.06347).

    Attributes:
        eps_low: offset of the lower end of the clip range from 1.
        eps_high: offset of its upper end.
        delta: bound on the unclipped ratio, which matters for negative advantages (two-sided clipping,
            INTELLECT-2, arXiv:2505.07291).
        dual_clip: for negative advantages, bounds the loss at `-dual_clip * A` (arXiv:1912.09729).

    Examples:
        >>> import torch
        >>> from grpo_kernels import LossSpec, PPOClip, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(PPOClip(0.2, 0.2))
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> round(out.loss.item(), 4)  # -(1.2 + 0.6) / 2
        -0.9
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    anchor = "old"
    kernel = "ppo_clip"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "eps_low")
        number_field(self, "eps_high")
        number_field(self, "delta", strict=True, optional=True)
        number_field(self, "dual_clip", low=1.0, strict=True, optional=True)

    @property
    def clip(self) -> Clip:
        return Clip("band", 1.0 - self.eps_low, 1.0 + self.eps_high)

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        ratio, dratio = clamped_ratio(log_ratio, clamp)
        bounded = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        unclipped = (ratio if self.delta is None else ratio.clamp(max=self.delta)) * advantage
        clipped = bounded * advantage
        value = -torch.minimum(unclipped, clipped)
        # A tie counts as unclipped. If delta is below the clip range, the minimum can be the clipped term
        # at a ratio inside the range, where that term has a slope.
        no_slope = unclipped > clipped
        if self.delta is not None:
            no_slope = torch.where(no_slope, bounded != ratio, ratio > self.delta)
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantage
            beyond = (advantage < 0) & (value > bound)
            value, no_slope = torch.where(beyond, bound, value), no_slope | beyond
        return TokenLoss(value, None, (-advantage * dratio).masked_fill_(no_slope, 0.0))
