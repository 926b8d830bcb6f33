"""The KL penalty: its settings, and its estimates from the log-probabilities of the taken tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.choices import EXACT_KL, SAMPLED_KL, KLKind
from ..checks.scalars import check_choice, check_flag, number_field
from .formula import TokenLoss, clamped_ratio, unbounded


@dataclass(frozen=True)
class KL:
    """A penalty `beta * KL(policy, reference)` per token.

    `x = ref_logp - logp`, clamped to ±`clamp` if that is set.

    Attributes:
        kind: "k1" `-x`, "abs" `|x|`, "k2" `x^2 / 2`, "k3" `exp(x) - x - 1` (Schulman, "Approximating KL
            divergence"), or over the whole vocabulary "exact" `KL(policy || reference)` and "exact_forward"
            `KL(reference || policy)`, which need the reference's logits.
        beta: weight of the penalty. If it is 0, the loss needs no reference.
        ratio_corrected: multiply the estimate by the ratio `exp(logp - old_logp)`, at sequence level by the
            sequence's ratio. The gradient flows through both factors.
        straight_through: keep the value of `kind`, but use the gradient of "k2".
        clamp: bound on the absolute value of `x`. Beyond it the estimate has no gradient, unless
            `straight_through`.
        output_clamp: the same for the estimate.

    Raises:
        ValueError: a bad value, or an option of the sampled estimates with an exact kind.
        TypeError: a wrong type.

    Examples:
        >>> import torch
        >>> from grpo_kernels import KL, LossSpec, policy_loss
        >>> logps, ref_logps = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> penalty = LossSpec(None, kl=KL("k3", beta=0.5))  # without a surrogate
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=penalty, ref_logps=ref_logps)
        >>> round(out.metrics["kl"].item(), 4), round(out.loss.item(), 4)
        (0.1033, 0.0516)
    """

    kind: KLKind = "k3"
    beta: float = 0.04
    ratio_corrected: bool = False
    straight_through: bool = False
    clamp: float | None = None
    output_clamp: float | None = None

    def __post_init__(self) -> None:
        check_choice("KL.kind", self.kind, SAMPLED_KL + EXACT_KL)
        number_field(self, "beta")
        check_flag("KL.ratio_corrected", self.ratio_corrected)
        check_flag("KL.straight_through", self.straight_through)
        number_field(self, "clamp", strict=True, optional=True)
        number_field(self, "output_clamp", strict=True, optional=True)
        modified = self.ratio_corrected or self.straight_through or self.clamp or self.output_clamp
        if self.kind in EXACT_KL and modified:
            raise ValueError(
                f"KL({self.kind!r}) is not a sampled estimate: ratio_corrected, straight_through, clamp and "
                f"output_clamp do not apply, got {self}"
            )

    def estimate(
        self,
        logp: Tensor,
        ref_logp: Tensor,
        log_ratio: Tensor | None,
        log_ratio_clamp: float,
        *,
        own_ratio: bool = True,
    ) -> TokenLoss:
        """The estimate of each token, `[N]`, and its derivatives.

        Args:
            logp, ref_logp: `[N]`, nats: log-probabilities of the taken tokens.
            log_ratio: `[N]`, if `ratio_corrected`: the log-ratio to the behaviour policy.
            log_ratio_clamp: bound on its absolute value.
            own_ratio: whether the log-ratio is the token's own. Then the derivative with respect to it is
                part of `dlogp`, which keeps digits that the sum of the two would lose.
        """
        estimator = ESTIMATORS[self.kind]
        x = ref_logp - logp
        if self.clamp is None and self.output_clamp is None and not self.ratio_corrected:
            value, slope = estimator(x)
            return TokenLoss(value, -x if self.straight_through else slope, None)
        clamp, output_clamp = unbounded(self.clamp), unbounded(self.output_clamp)
        clamped = x.clamp(-clamp, clamp)
        value, slope = estimator(clamped)
        output_clamped = value.abs() > output_clamp
        no_slope = (x.abs() > clamp) | output_clamped
        slope = -x if self.straight_through else torch.where(no_slope, 0.0, slope)
        value = value.clamp(-output_clamp, output_clamp)
        if not self.ratio_corrected:
            return TokenLoss(value, slope, None)
        assert log_ratio is not None
        ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
        value, slope = ratio * value, ratio * slope
        if estimator is k3:
            # exp(x) may be infinite while the ratio is 0. exp(log_ratio + x) is finite then.
            exp_sum = torch.exp(log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp) + clamped)
            large = (clamped > 1) & ~output_clamped
            value = torch.where(large, exp_sum - ratio * (1 + clamped), value)
            if not self.straight_through:
                slope = torch.where(large & ~no_slope, ratio - exp_sum, slope)
        ratio_clamped = log_ratio.abs() > log_ratio_clamp
        dlog_ratio = torch.where(ratio_clamped, 0.0, value)
        if not own_ratio:
            return TokenLoss(value, slope, dlog_ratio)
        total = slope + dlog_ratio
        if estimator is k3 and not self.straight_through:
            # d(r k3)/dlogp = r (exp(x) - 1 - x) - r (exp(x) - 1) = -r x. Subtracting would cancel digits.
            total = torch.where(no_slope | ratio_clamped, total, -ratio * clamped)
        return TokenLoss(value, total, None)


class Estimate(NamedTuple):
    value: Tensor  # [N]
    dlogp: Tensor  # [N], its derivative with respect to the log-probability


def k1(x: Tensor) -> Estimate:
    return Estimate(-x, torch.ones_like(x))


def absolute(x: Tensor) -> Estimate:
    return Estimate(x.abs(), -x.sign())


def k2(x: Tensor) -> Estimate:
    return Estimate(x * x / 2, -x)


def k3(x: Tensor) -> Estimate:
    # expm1(x) - x keeps the digits that exp(x) - x - 1 cancels: at x = 1e-4 the value is 5e-9.
    growth = torch.expm1(x)
    return Estimate(growth - x, -growth)


ESTIMATORS: dict[str, Callable[[Tensor], Estimate]] = {"k1": k1, "abs": absolute, "k2": k2, "k3": k3}
