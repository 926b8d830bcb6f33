"""DRO: the score-function estimator with a squared log-ratio as regulariser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks.choices import ANCHORS, Anchor, Level
from ...checks.scalars import check_choice, number_field
from ..formula import TokenLoss, TokenTerms, weighted_logp
from .base import Surrogate, sequence_log_ratio

if TYPE_CHECKING:
    from ...tokens.sequences import Sequences


@dataclass(frozen=True)
class DRO(Surrogate):
    """`-(A * logp - beta / 2 * (logp - anchor)^2)` (arXiv:2405.19107).

    At `level="sequence"`, the squared sum of a sequence's log-ratios is divided equally among its tokens.
    This is Kimi k1.5 (arXiv:2501.12599), and OPMD with `anchor="ref"`. The square has a gradient even at
    zero advantage.

    Attributes:
        beta: weight of the square.
        anchor: "old" or "ref".

    Examples:
        >>> import torch
        >>> from grpo_kernels import DRO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()
        >>> spec = LossSpec(DRO(beta=0.1))
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> round(out.loss.item(), 4)
        0.7897
    """

    beta: float
    anchor: Anchor = "old"
    kernel = "dro"
    levels = ("token", "sequence")
    clamped_levels = ("token",)
    zero_without_advantage = False

    def __post_init__(self) -> None:
        check_choice("DRO.anchor", self.anchor, ANCHORS)
        number_field(self, "beta", strict=True)

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        clamped = log_ratio.clamp(-clamp, clamp)
        slope = torch.where(log_ratio.abs() > clamp, 0.0, self.beta * clamped)
        value, dlogp, _ = weighted_logp(logp, -advantage)
        return TokenLoss(self.beta / 2 * clamped * clamped + value, dlogp, slope)

    def couple(self, terms: TokenTerms, level: Level, clamp: float, sequences: Sequences) -> TokenTerms:
        # For the sum s over n tokens, give each token the log-ratio s / sqrt(n). The squares then sum to s^2.
        mean, _ = sequence_log_ratio(level, terms.log_ratio, sequences)
        root = sequences.lengths.sqrt()
        return terms._replace(log_ratio=mean * root, dlog_ratio=1 / root)
