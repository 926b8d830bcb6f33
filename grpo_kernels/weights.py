"""Token weights that correct for a sampler whose policy is not exactly the trained one.

The log-probabilities of an inference engine differ from the trainer's, because it runs other kernels and
often older weights. The importance ratio of the two corrects the loss. A bound on the ratio limits the
variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import debug
from .checks.choices import WEIGHT_LEVELS, WEIGHT_MODES, WeightLevel, WeightMode
from .checks.scalars import check_choice, check_number


def importance_weights(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
) -> Tensor:
    """Compute bounded importance weights between trainer and sampler: `exp(logps - sampler_logps)`.

    Sources: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), for
    `mode="truncate"`; IcePop (2025) for `mode="mask"`. TRL's `vllm_importance_sampling_mode` is
    `f"{level}_{mode}"`.

    Args:
        logps: `[B, T]`, nats: the trainer's log-probabilities under the policy that the sampler ran
            (`old_logps`).
        sampler_logps: `[B, T]`, nats: the sampler's log-probabilities. A token with NaN, for which the
            sampler returned none, has a ratio of 1.
        mask: `[B, T]`, bool, int or float. 0: not a completion token.
        level: "token" for one ratio per token; "sequence" for the product of the ratios of a sequence.
        mode: "truncate" clamps the ratio to `[low, high]`; "mask" sets it to 0 outside of this interval.
        low: lower bound on the ratio; None: no bound.
        high: upper bound on the ratio; None: no bound.

    Returns:
        `[B, T]`, or `[B, 1]` with `level="sequence"`, in the dtype of `logps` and without a gradient: the
        `token_weights` of a loss. Masked tokens have a ratio of 1 before the bounds apply.

    Raises:
        ValueError: the shapes differ, or `level`, `mode` or a bound has a wrong value.
        TypeError: a bound is not a number.
    """
    check_choice("level", level, WEIGHT_LEVELS)
    check_choice("mode", mode, WEIGHT_MODES)
    low = check_number("low", low, optional=True)
    high = check_number("high", high, strict=True, optional=True)
    floor, ceiling = 0.0 if low is None else low, math.inf if high is None else high
    if floor > ceiling:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    log_ratio = _difference(logps, sampler_logps, mask)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = torch.exp(log_ratio)
    if mode == "truncate":
        ratio = ratio.clamp(floor, ceiling)
    else:
        ratio = torch.where((ratio < floor) | (ratio > ceiling), 0.0, ratio)
    return ratio.to(logps.dtype)  # sampler_logps may have a wider dtype


def off_policy_sequence_mask(
    advantages: Tensor, logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Mask sequences with a negative advantage whose policy has drifted too far from the sampler.

    Source: DeepSeek-V3.2, arXiv:2512.02556.

    Args:
        advantages: `[B]`, `[B, 1]` or `[B, T]`.
        logps: `[B, T]`, nats: log-probabilities of the current policy.
        sampler_logps: `[B, T]`, nats. A token with NaN, for which the sampler returned none, counts as one
            without drift.
        mask: `[B, T]`. 0: not a completion token.
        threshold: the largest allowed mean of `sampler_logps - logps` over a sequence, in nats.

    Returns:
        0 for a sequence that is masked, else 1: a factor of `token_weights`, in the dtype of `logps` and
        without a gradient. `[B, 1]`, or `[B, T]` if `advantages` are `[B, T]`.

    Raises:
        ValueError: the shapes differ, or `threshold` is not finite.
        TypeError: `threshold` is not a number.
    """
    threshold = check_number("threshold", threshold, low=-math.inf, strict=True)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    if advantages.shape[0] != logps.shape[0] or advantages.shape[1] not in (1, logps.shape[1]):
        raise ValueError(
            f"advantages must be [B], [B, 1] or [B, T] for logps {tuple(logps.shape)}, got "
            f"{tuple(advantages.shape)}"
        )
    drift = -_difference(logps, sampler_logps, mask).sum(-1, keepdim=True)
    drift = drift / (mask != 0).sum(-1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (drift <= threshold)).to(logps.dtype)


def _difference(logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
    """Return `logps - sampler_logps`, and 0 for masked tokens and tokens without a sampler's value."""
    if not logps.shape == sampler_logps.shape == mask.shape or logps.dim() != 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logps, sampler_logps, mask))
        raise ValueError(f"logps, sampler_logps and mask must all be [B, T], got {shapes}")
    if debug.enabled():
        debug.check_mask_values("mask", mask)
    known = (mask != 0) & ~sampler_logps.isnan()
    return torch.where(known, logps.detach() - sampler_logps.detach(), 0.0)
