"""CISPO: the log-probability weighted by the clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...checks.choices import LEVELS
from ...checks.scalars import number_field
from ..formula import TokenLoss, clamped_ratio, weighted_logp
from .base import Clip, Surrogate


@dataclass(frozen=True)
class CISPO(Surrogate):
    """`-sg(clip(ratio, ratio_min, ratio_max)) * A * logp` (MiniMax-M1, arXiv:2506.13585).

    Clipped tokens keep their gradient.

    Attributes:
        ratio_max: upper bound on the ratio itself, not an offset from 1: 1.28, not 0.28.
        ratio_min: lower bound on the ratio.

    Examples:
        >>> import torch
        >>> from grpo_kernels import CISPO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(CISPO(ratio_max=1.2))
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> out.loss.backward()
        >>> logps.grad  # the ratios, the first one bounded, divided by the number of tokens
        tensor([[-0.6000, -0.3000]])
    """

    ratio_max: float
    ratio_min: float = 0.0
    anchor = "old"
    kernel = "cispo"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "ratio_min")
        number_field(self, "ratio_max", low=self.ratio_min, strict=True)

    @property
    def clip(self) -> Clip:
        return Clip("band", float(self.ratio_min), float(self.ratio_max))

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        ratio, _ = clamped_ratio(log_ratio, clamp)
        return weighted_logp(logp, -advantage * ratio.clamp(self.ratio_min, self.ratio_max))
