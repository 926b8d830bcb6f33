"""The importance-weighted policy gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks.choices import ANCHORS, LEVELS, Anchor
from ...checks.scalars import check_choice, number_field
from ..formula import TokenLoss, clamped_ratio, unbounded
from .base import Clip, Surrogate


@dataclass(frozen=True)
class ImportanceRatio(Surrogate):
    """`-A * min(ratio, max_ratio)` with `ratio = exp(logp - anchor)`.

    Above `max_ratio` a token has no gradient.

    Attributes:
        anchor: "old" if the samples came from the behaviour policy. "ref" if they came from the reference
            model, as in an off-policy estimate from a fixed data set.
        max_ratio: bound on the ratio, or None.

    Examples:
        >>> import torch
        >>> from grpo_kernels import ImportanceRatio, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(ImportanceRatio(max_ratio=1.2))
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> round(out.loss.item(), 4)  # -(1.2 + 0.6) / 2
        -0.9
    """

    anchor: Anchor = "old"
    max_ratio: float | None = None
    kernel = "importance_ratio"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        check_choice("ImportanceRatio.anchor", self.anchor, ANCHORS)
        number_field(self, "max_ratio", strict=True, optional=True)

    @property
    def clip(self) -> Clip | None:
        return None if self.max_ratio is None else Clip("cap", high=float(self.max_ratio))

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        ratio, dratio = clamped_ratio(log_ratio, clamp)
        bound = unbounded(self.max_ratio)
        value = -advantage * ratio.clamp(max=bound)
        return TokenLoss(value, None, torch.where(ratio > bound, 0.0, -advantage * dratio))
