"""The losses of a token in plain PyTorch: log-probabilities in, values and their derivatives out.

Every function here works elementwise on tensors of one shape and carries its derivative explicitly, because
the derivative decides more than autograd can know: which branch a tie takes, and that an inactive token's
gradient is exactly zero where autograd would form 0 * inf. `kernels/device.py` states the same functions
under the same names. What is made of them stands in `row_loss.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    value: Tensor  # [N] loss of each token, before aggregation
    dlogp: Tensor  # [N] its derivative with respect to the token's log-probability


class Statement(NamedTuple):
    """A loss as a function of the log-probability and the log-ratio, `[N]` each; None is zero.

    At token level both move alike, and the derivatives add up; at others the log-ratio is the sequence's.
    """

    value: Tensor
    by_logp: Tensor | None
    by_log_ratio: Tensor | None


def log_ratio_to(logp: Tensor, anchor: Tensor | None) -> Tensor:
    # No anchor: not logp - logp, for a taken token at -inf has ratio 1, while a NaN stays one.
    return torch.where(logp.isnan(), logp, 0.0) if anchor is None else logp - anchor


def clamped_ratio(log_ratio: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """`exp(log_ratio)`, the log-ratio held to ±clamp, and its derivative."""
    ratio = torch.exp(log_ratio.clamp(-clamp, clamp))
    return ratio, torch.where(log_ratio.abs() > clamp, 0.0, ratio)


def either(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """Numbers in the dtype of `like`: `torch.where` would make fp32 of them."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def log_ratio(logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> Statement:
    return Statement(-advantage * log_ratio, None, -advantage)


def reinforce(logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> Statement:
    return Statement(-advantage * logp, -advantage, None)


def importance_ratio(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float, max_ratio: float
) -> Statement:
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    value = -advantage * ratio.clamp(max=max_ratio)
    return Statement(value, None, torch.where(ratio > max_ratio, 0.0, -advantage * dratio))


def ppo_clip(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    clamp: float,
    eps_low: float,
    eps_high: float,
    delta: float,
    dual_clip: float,
) -> Statement:
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    low, high = 1 - eps_low, 1 + eps_high
    unclipped = ratio.clamp(max=delta) * advantage
    clipped = ratio.clamp(low, high) * advantage
    value = -torch.minimum(unclipped, clipped)
    # A tie counts as unclipped. With delta below the band the clipped branch can be taken where it is not
    # flat.
    flat = torch.where(unclipped > clipped, (ratio < low) | (ratio > high), ratio > delta)
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (value > bound)
    slope = torch.where(flat | beyond, 0.0, -advantage * dratio)
    return Statement(torch.where(beyond, bound, value), None, slope)


def cispo(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float, ratio_max: float, ratio_min: float
) -> Statement:
    ratio, _ = clamped_ratio(log_ratio, clamp)
    return weighted_logp(logp, -advantage * ratio.clamp(ratio_min, ratio_max))


def sigmoid(x: Tensor) -> Tensor:
    """As `torch.sigmoid`, but with bits that depend on `x` alone.

    On a CPU `torch.sigmoid` computes the last few entries of a tensor with another `exp` than the rest, so a
    token's gradient would depend on its position in the batch.
    """
    # The exponential of a negative number only: it cannot overflow.
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (1 + e)


def sapo(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float, tau_pos: float, tau_neg: float
) -> Statement:
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    tau = either(advantage > 0, tau_pos, tau_neg, like=advantage)
    gate = sigmoid(tau * (ratio - 1))
    # sigmoid(-x) and not 1 - sigmoid(x), which has no digits left where the ratio is large.
    steepness = gate * sigmoid(-tau * (ratio - 1))
    # Where it has vanished the ratio may be infinite.
    slope = torch.where(steepness == 0, 0.0, -4 * steepness * advantage * dratio)
    return Statement(-advantage * gate * 4 / tau, None, slope)


def dro(logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float, beta: float) -> Statement:
    held = log_ratio.clamp(-clamp, clamp)
    slope = torch.where(log_ratio.abs() > clamp, 0.0, beta * held)
    value, by_logp, _ = weighted_logp(logp, -advantage)
    return Statement(beta / 2 * held * held + value, by_logp, slope)


def dppo_tv(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    clamp: float,
    low: float,
    high: float,
    ratio_cap: float,
) -> Statement:
    change = torch.exp(logp) - torch.exp(logp - log_ratio)
    inside = torch.where(advantage > 0, change <= high, change >= -low)
    return within_region(logp, log_ratio, advantage, clamp, ratio_cap, inside)


def dppo_kl(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    clamp: float,
    low: float,
    high: float,
    ratio_cap: float,
) -> Statement:
    p, old_p = torch.exp(logp), torch.exp(logp - log_ratio)
    # Rounding may have left a probability above 1; and 0 * inf is not the 0 that is meant.
    others, old_others = (1 - p).clamp(min=0), (1 - old_p).clamp(min=0)
    divergence = old_others * torch.log((old_others + 1e-8) / (others + 1e-8))
    divergence = divergence - torch.where(old_p == 0, 0.0, old_p * log_ratio)
    inside = torch.where(
        advantage > 0, (divergence <= high) | (p <= old_p), (divergence <= low) | (p >= old_p)
    )
    return within_region(logp, log_ratio, advantage, clamp, ratio_cap, inside)


def within_region(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float, ratio_cap: float, inside: Tensor
) -> Statement:
    ratio, _ = clamped_ratio(log_ratio, clamp)
    weight = torch.where(inside | ratio.isnan(), -advantage * ratio.clamp(max=ratio_cap), 0.0)
    return weighted_logp(logp, weight)


def weighted_logp(logp: Tensor, weight: Tensor) -> Statement:
    # A weight of 0 beside a taken token at -inf would be 0 * inf.
    return Statement(torch.where(weight == 0, 0.0, weight * logp), weight, None)


SURROGATES: dict[str, Callable[..., Statement]] = {
    "log_ratio": log_ratio,
    "reinforce": reinforce,
    "importance_ratio": importance_ratio,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "sapo": sapo,
    "dro": dro,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
}


def k1(x: Tensor) -> TokenLoss:
    return TokenLoss(-x, torch.ones_like(x))


def absolute(x: Tensor) -> TokenLoss:
    return TokenLoss(x.abs(), -x.sign())


def k2(x: Tensor) -> TokenLoss:
    return TokenLoss(x * x / 2, -x)


def k3(x: Tensor) -> TokenLoss:
    # expm1(x) - x keeps the digits that exp(x) - x - 1 cancels: at x = 1e-4 the value is 5e-9.
    growth = torch.expm1(x)
    return TokenLoss(growth - x, -growth)


KL_ESTIMATORS: dict[str, Callable[[Tensor], TokenLoss]] = {"k1": k1, "abs": absolute, "k2": k2, "k3": k3}


def kl_estimate(
    logp: Tensor,
    log_ratio: Tensor | None,  # where ratio-corrected
    ref_logp: Tensor,
    estimator: Callable[[Tensor], TokenLoss],
    clamp: float,
    output_clamp: float,
    straight_through: bool,
    ratio_corrected: bool,
    log_ratio_clamp: float,
    own_ratio: bool = True,  # the ratio is the token's: one derivative of the product
) -> Statement:
    x = ref_logp - logp
    held = x.clamp(-clamp, clamp)
    value, slope = estimator(held)
    over = value.abs() > output_clamp
    flat = (x.abs() > clamp) | over
    slope = -x if straight_through else torch.where(flat, 0.0, slope)
    value = value.clamp(-output_clamp, output_clamp)
    if not ratio_corrected:
        return Statement(value, slope, None)
    assert log_ratio is not None
    ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
    value, slope = ratio * value, ratio * slope
    if estimator is k3:
        # exp(x) may be inf beside a ratio of 0, where exp(log_ratio + x) is a number.
        grown = torch.exp(log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp) + held)
        large = (held > 1) & ~over
        value = torch.where(large, grown - ratio * (1 + held), value)
        if not straight_through:
            slope = torch.where(large & ~flat, ratio - grown, slope)
    still = log_ratio.abs() > log_ratio_clamp
    by_log_ratio = torch.where(still, 0.0, value)
    if not own_ratio:
        return Statement(value, slope, by_log_ratio)
    total = slope + by_log_ratio
    if estimator is k3 and not straight_through:
        # d(r k3)/dlogp = r (exp(x) - 1 - x) - r (exp(x) - 1) = -r x; the difference has few digits of it.
        total = torch.where(flat | still, total, -ratio * held)
    return Statement(value, total, None)


def unbounded(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """Of everything that is computed from the logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


MASKED = -1
"""In `targets`: a position that takes no part. Its logits are not read and its gradient is zero."""


class RowStats(NamedTuple):
    """What the loss knows of each row of logits, `[N]` each; absent where it was not asked for.

    `shift` is the row's largest logit, softcapped but not yet multiplied by scale or temperature. `sum_exp`
    is the sum of the exponentials relative to it. A logsumexp alone would lose, in fp32, the digits of a row
    far from zero.
    """

    logps: Tensor
    shift: Tensor | None = None
    sum_exp: Tensor | None = None
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_shift: Tensor | None = None
    ref_sum_exp: Tensor | None = None
    kl: Tensor | None = None  # KL(policy || reference)
    kl_forward: Tensor | None = None  # KL(reference || policy)
    top1: Tensor | None = None  # 1 where no token is likelier than the taken one, else 0

    def detach(self) -> RowStats:
        return RowStats(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def rows(self, index: Tensor | slice) -> RowStats:
        return RowStats(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]

    def copy_(self, other: RowStats) -> None:
        for to, x in zip(self, other, strict=True):
            if to is not None and x is not None:
                to.copy_(x)


class TokenInputs(NamedTuple):
    """The constants of the loss, `[N]` each, fp32 (fp64 for fp64 logits); masked positions hold zeros."""

    mask: Tensor  # bool
    advantages: Tensor
    row_weights: Tensor  # loss = sum(row_weights * token losses); 0 where masked
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None  # where they were given; else they come with the statistics
    token_weights: Tensor | None = None
    entropy_weights: Tensor | None = None  # of the entropy bonus, sign and coefficient included

    def rows(self, index: Tensor | slice) -> TokenInputs:
        return TokenInputs(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


class Coefficients(NamedTuple):
    """Derivatives of the loss by each row's statistics, `[N]` each; None is zero."""

    dlogp: Tensor | None
    dentropy: Tensor | None = None
    dkl: Tensor | None = None
    dkl_forward: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Coefficients:
        return Coefficients(*(None if x is None else x[index] for x in self))

    def active(self) -> Tensor:
        """Rows that have a gradient, `[N]` bool."""
        nonzero = [x != 0 for x in self if x is not None]
        return functools.reduce(torch.logical_or, nonzero)
