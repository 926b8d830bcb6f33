"""DPPO: the log-probability weighted by the ratio, inside a trust region on probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks.choices import DPPO_KINDS, DPPOKind
from ...checks.scalars import check_choice, number_field
from ..formula import TokenLoss, clamped_ratio, unbounded, weighted_logp
from .base import Clip, Surrogate


@dataclass(frozen=True)
class DPPO(Surrogate):
    """`-sg(min(ratio, ratio_cap)) * A * logp` inside a trust region of the taken token (arXiv:2602.04879).

    The region bounds the divergence of old and new policy over two outcomes: the taken token or any other.

    Attributes:
        kind: "tv", the change of the token's probability, or "kl", KL(old || new).
        low: bound on steps that lower the probability of a token with negative advantage.
        high: bound on steps that raise the probability of a token with positive advantage.
        ratio_cap: bound on the ratio, or None.

    Examples:
        >>> import torch
        >>> from grpo_kernels import DPPO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(DPPO(high=0.1))
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> out.loss.backward()
        >>> logps.grad  # the first probability rose by 0.2, more than allowed
        tensor([[ 0.0000, -0.3000]])
    """

    kind: DPPOKind = "tv"
    low: float = 0.2
    high: float = 0.2
    ratio_cap: float | None = 20.0
    anchor = "old"
    uses_ratio = True

    def __post_init__(self) -> None:
        check_choice("DPPO.kind", self.kind, DPPO_KINDS)
        number_field(self, "low")
        number_field(self, "high")
        number_field(self, "ratio_cap", strict=True, optional=True)

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return f"dppo_{self.kind}"

    @property
    def clip(self) -> Clip:
        return Clip("region")

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        region = self.inside_tv if self.kind == "tv" else self.inside_kl
        inside = region(logp, log_ratio, advantage)
        ratio, _ = clamped_ratio(log_ratio, clamp)
        # A NaN ratio stays NaN, although it is not inside.
        capped = ratio.clamp(max=unbounded(self.ratio_cap))
        weight = torch.where(inside | ratio.isnan(), -advantage * capped, 0.0)
        return weighted_logp(logp, weight)

    def inside_tv(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return whether each token is inside the region of kind "tv"."""
        change = torch.exp(logp) - torch.exp(logp - log_ratio)
        return torch.where(advantage > 0, change <= self.high, change >= -self.low)

    def inside_kl(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return whether each token is inside the region of kind "kl"."""
        p, old_p = torch.exp(logp), torch.exp(logp - log_ratio)
        # A probability may be rounded to more than 1. `where` avoids 0 * inf.
        others, old_others = (1 - p).clamp(min=0), (1 - old_p).clamp(min=0)
        divergence = old_others * torch.log((old_others + 1e-8) / (others + 1e-8))
        divergence = divergence - torch.where(old_p == 0, 0.0, old_p * log_ratio)
        raised = (divergence <= self.high) | (p <= old_p)
        lowered = (divergence <= self.low) | (p >= old_p)
        return torch.where(advantage > 0, raised, lowered)
