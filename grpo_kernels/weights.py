"""Values for `token_weights`, where the sampler is not the policy that is trained: in precision or in age.

An inference engine's log-probabilities differ from the trainer's by its kernels, and by the steps taken
since. The importance ratio between the two corrects the loss; bounding it bounds the variance.
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
    """`exp(logps - sampler_logps)`, bounded: truncated or masked importance weights between trainer and
    sampler.

    Truncation: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025);
    masking: IcePop (2025). TRL's `vllm_importance_sampling_mode` is `f"{level}_{mode}"`.

    Args:
        logps: `[B, T]`, nats: the trainer's log-probabilities of the policy that the sampler ran
            (`old_logps`).
        sampler_logps: `[B, T]`, nats: the sampler's. NaN where it gave none: that token counts as if they
            agreed.
        mask: `[B, T]`, bool, int or float; 0: not a completion token.
        level: "token", or "sequence": the ratio of the whole sequence, the product of its tokens'.
        mode: "truncate" holds the ratio to `[low, high]`, "mask" makes it 0 outside.
        low, high: bounds on the ratio; None: none.

    Returns:
        Detached `[B, T]`, or `[B, 1]` of sequences, in the dtype of `logps`: `token_weights` of a loss. 1 at
        masked tokens.

    Raises:
        ValueError: shapes that differ, a bad level, mode or bound; TypeError: a bound that is not a number.
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
    return ratio.to(logps.dtype)  # the sampler's may be wider


def off_policy_sequence_mask(
    advantages: Tensor, logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """0 where a sequence of negative advantage has drifted too far from its sampler, else 1 (DeepSeek-V3.2,
    arXiv:2512.02556).

    Args:
        advantages: `[B]`, `[B, 1]` or `[B, T]`.
        logps: `[B, T]`, nats: the current policy's.
        sampler_logps: `[B, T]`, nats; NaN where the sampler gave none: no evidence of drift.
        mask: `[B, T]`; 0: not a completion token.
        threshold: on the mean of `sampler_logps - logps` over the sequence, in nats.

    Returns:
        Detached `[B, 1]`, for advantages `[B, T]` `[B, T]`: a factor of `token_weights`.

    Raises:
        ValueError: shapes that differ, a threshold that is not finite.
    """
    threshold = check_number("threshold", threshold, low=-math.inf, strict=True)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    if advantages.shape[0] != logps.shape[0] or advantages.shape[1] not in (1, logps.shape[1]):
        raise ValueError(f"advantages must be [B], [B, 1] or [B, T], got {tuple(advantages.shape)}")
    drift = -_difference(logps, sampler_logps, mask).sum(-1, keepdim=True)
    drift = drift / (mask != 0).sum(-1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (drift <= threshold)).to(logps.dtype)


def _difference(logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
    """`logps - sampler_logps` of unmasked tokens that have both, else 0."""
    if not logps.shape == sampler_logps.shape == mask.shape or logps.dim() != 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logps, sampler_logps, mask))
        raise ValueError(f"logps, sampler_logps and mask must all be [B, T], got {shapes}")
    if debug.enabled():
        debug.check_mask_values("mask", mask)
    known = (mask != 0) & ~sampler_logps.isnan()
    return torch.where(known, logps.detach() - sampler_logps.detach(), 0.0)
