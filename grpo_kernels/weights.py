"""Token weights that correct for a sampler whose policy is not exactly the trained one.

The log-probabilities of an inference engine differ from the trainer's, because it runs other kernels and
often older weights. The importance ratio of the two corrects the loss. A bound on the ratio limits the
variance, and a rejection mask drops tokens or sequences that are too far off. docs/mismatch.md maps the
options of other trainers to these functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks.choices import (
    MISMATCH_STATISTICS,
    STATISTIC_OVERS,
    WEIGHT_LEVELS,
    WEIGHT_MODES,
    MismatchStatistic,
    StatisticOver,
    WeightLevel,
    WeightMode,
)
from .checks.scalars import check_bounds, check_choice, check_flag, check_number
from .tokens.mismatch import Mismatch


def importance_weights(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    seq_lens: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Compute bounded importance weights between trainer and sampler: `exp(logps - sampler_logps)`.

    Sources: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), for
    `mode="truncate"`; IcePop (2025) for `mode="mask"`; verl 0.9.1 for `normalize`. TRL's
    `vllm_importance_sampling_mode` is `f"{level}_{mode}"`.

    Args:
        logps: `[B, T]` or packed `[N]`, nats: the trainer's log-probabilities under the policy that the
            sampler ran (`old_logps`).
        sampler_logps: shaped as `logps`, nats: the sampler's log-probabilities. A token with NaN, for which
            the sampler returned none, has a ratio of 1.
        mask: shaped as `logps`, bool, int or float. 0: not a completion token. Nothing else is read there.
        level: "token" for one ratio per token; "sequence" for the product of the ratios of a sequence;
            "geometric" for their geometric mean, `exp` of the mean log-ratio.
        mode: "truncate" clamps the ratio to `[low, high]`; "mask" sets it to 0 outside of this interval.
        low: lower bound on the ratio; None: no bound.
        high: upper bound on the ratio; None: no bound.
        seq_lens: packed only: `[S]`, integers that sum to `N`. Levels other than "token" need it.
        normalize: divide the bounded weights by their mean over the unmasked tokens of this batch. At the
            other levels the mean is over the sequences that have an unmasked token. A mean of at most 1e-8
            does not divide.

    Returns:
        `[B, T]`, or `[B, 1]` for a level other than "token"; packed `[N]`, where all tokens of a sequence
        have its weight. In the dtype of `logps` and without a gradient: the `token_weights` of a loss.
        Masked tokens and sequences without unmasked tokens have a ratio of 1 before the bounds apply.

    Raises:
        ValueError: a shape, dtype or device is wrong; `level`, `mode` or a bound has a wrong value; a packed
            batch has no `seq_lens` but needs them.
        TypeError: a bound is not a number, `normalize` is not a bool, or a tensor is not a tensor.

    Examples:
        >>> import torch
        >>> from grpo_kernels import importance_weights
        >>> logps = torch.tensor([[0.9, 0.9, 0.3]]).log()
        >>> sampler_logps = torch.tensor([[0.9, 0.3, 0.6]]).log()  # the ratios are 1, 3 and 0.5
        >>> importance_weights(logps, sampler_logps, torch.ones(1, 3))
        tensor([[1.0000, 2.0000, 0.5000]])
        >>> importance_weights(logps, sampler_logps, torch.ones(1, 3), mode="mask")
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    check_choice("level", level, WEIGHT_LEVELS)
    check_choice("mode", mode, WEIGHT_MODES)
    check_flag("normalize", normalize)
    low = check_number("low", low, optional=True)
    high = check_number("high", high, strict=True, optional=True)
    floor, ceiling = check_bounds(low, high)
    mismatch = Mismatch.of(logps, sampler_logps, mask, seq_lens)
    weights = mismatch.ratio(level)
    if mode == "truncate":
        weights = weights.clamp(floor, ceiling)
    else:
        weights = torch.where((weights < floor) | (weights > ceiling), 0.0, weights)
    if normalize:
        counted = mismatch.batch.mask if level == "token" else mismatch.counts > 0
        mean = torch.where(counted, weights, 0.0).sum() / counted.sum().clamp(min=1)
        weights = weights / torch.where(mean <= 1e-8, 1.0, mean)
    return mismatch.shaped(weights, level != "token").to(logps.dtype)


def rejection_mask(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    statistic: MismatchStatistic = "k1",
    over: StatisticOver = "token",
    low: float | None = None,
    high: float | None = None,
    seq_lens: Tensor | None = None,
) -> Tensor:
    """Mask tokens or sequences for which a statistic of trainer and sampler leaves `[low, high]`.

    With `d = logps - sampler_logps` the statistic of a token is, by its name:

    - "k1": `-d`, whose mean estimates KL(sampler || trainer).
    - "k2": `d^2 / 2`.
    - "k3": `exp(d) - 1 - d`.
    - "abs": `|d|`.
    - "tv": `|exp(logps) - exp(sampler_logps)|`, the change of the token's probability.

    Sources: verl 0.9.1's `rollout_rs`; Schulman, "Approximating KL divergence" (2020), for k1 to k3.

    A bound on the ratio itself is a bound on k1: the ratio is in `[a, b]` if k1 is in `[-log b, -log a]`. A
    veto, which drops a sequence with a single token of a ratio below `a`, is `statistic="k1",
    over="sequence-max", high=-math.log(a)`.

    Args:
        logps: as in `importance_weights`.
        sampler_logps: as in `importance_weights`. A token with NaN has a statistic of 0.
        mask: as in `importance_weights`.
        seq_lens: as in `importance_weights`.
        statistic: one of the names above.
        over: "token" to mask tokens one by one; "sequence-mean", "sequence-sum" or "sequence-max" to mask
            whole sequences by the mean, sum or maximum over their unmasked tokens.
        low: lower bound on the statistic, which is kept itself; None: no bound.
        high: upper bound on the statistic, which is kept itself; None: no bound.

    Returns:
        0 for what is masked, else 1: a factor of `token_weights`, in the dtype of `logps` and without a
        gradient. `[B, T]`, or `[B, 1]` if `over` is not "token"; packed `[N]`. Masks multiply with each other
        and with `importance_weights`: a mask only selects, so no ratio is counted twice. Masked tokens and
        sequences without unmasked tokens are kept. So is a statistic of NaN, which comes from a NaN in
        `logps`, so that the loss shows it.

    Raises:
        ValueError: a shape, dtype or device is wrong; `statistic`, `over` or a bound has a wrong value; a
            packed batch has no `seq_lens` but needs them.
        TypeError: a bound is not a number, or a tensor is not a tensor.

    Examples:
        >>> import torch
        >>> from grpo_kernels import rejection_mask
        >>> logps = torch.tensor([[0.9, 0.9], [0.3, 0.3]]).log()
        >>> sampler_logps = torch.tensor([[0.9, 0.1], [0.3, 0.2]]).log()  # the ratios are 1, 9, 1 and 1.5
        >>> bound = {"statistic": "abs", "high": 1.0}
        >>> rejection_mask(logps, sampler_logps, torch.ones(2, 2), **bound)
        tensor([[1., 0.],
                [1., 1.]])
        >>> rejection_mask(logps, sampler_logps, torch.ones(2, 2), **bound, over="sequence-max")
        tensor([[0.],
                [1.]])
    """
    check_choice("statistic", statistic, MISMATCH_STATISTICS)
    check_choice("over", over, STATISTIC_OVERS)
    low = check_number("low", low, low=-math.inf, strict=True, optional=True)
    high = check_number("high", high, low=-math.inf, strict=True, optional=True)
    floor, ceiling = check_bounds(low, high)
    mismatch = Mismatch.of(logps, sampler_logps, mask, seq_lens)
    found, empty = mismatch.statistic(statistic), ~mismatch.batch.mask
    if over != "token":
        found, empty = mismatch.over_sequences(found, over), mismatch.counts == 0
    kept = empty | ~((found < floor) | (found > ceiling))
    return mismatch.shaped(kept, over != "token").to(logps.dtype)


def off_policy_sequence_mask(
    advantages: Tensor,
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    seq_lens: Tensor | None = None,
) -> Tensor:
    """Mask sequences with a negative advantage whose policy has drifted too far from the sampler.

    Source: DeepSeek-V3.2, arXiv:2512.02556.

    Args:
        advantages: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`; `[N]` if S = N.
        logps: `[B, T]` or packed `[N]`, nats: log-probabilities of the current policy.
        sampler_logps: shaped as `logps`, nats. A token with NaN, for which the sampler returned none, counts
            as one without drift.
        mask: shaped as `logps`. 0: not a completion token. Nothing else is read there.
        threshold: the largest allowed mean of `sampler_logps - logps` over a sequence, in nats.
        seq_lens: packed only, and needed there: `[S]`, integers that sum to `N`.

    Returns:
        0 for a sequence that is masked, else 1: a factor of `token_weights`, in the dtype of `logps` and
        without a gradient. `[B, 1]`, or `[B, T]` if `advantages` are `[B, T]`; packed `[N]`. In `[B, T]` and
        `[N]`, masked tokens are kept. A NaN is kept too, so that the loss shows it.

    Raises:
        ValueError: a shape is wrong, `threshold` is not finite, or a packed batch has no `seq_lens`.
        TypeError: `threshold` is not a number, or a tensor is not a tensor.

    Examples:
        >>> import torch
        >>> from grpo_kernels.weights import off_policy_sequence_mask
        >>> advantages = torch.tensor([-1.0, -1.0, 1.0])
        >>> logps, sampler_logps = torch.tensor([[-2.0], [-5.0], [-5.0]]), torch.full((3, 1), -2.0)
        >>> off_policy_sequence_mask(advantages, logps, sampler_logps, torch.ones(3, 1), threshold=1.0)
        tensor([[1.],
                [0.],
                [1.]])
    """
    threshold = check_number("threshold", threshold, low=-math.inf, strict=True)
    mismatch = Mismatch.of(logps, sampler_logps, mask, seq_lens)
    batch = mismatch.batch
    batch.require_sequences("off_policy_sequence_mask")
    by_token = batch.per_token("advantages", advantages, per_sequence=True)
    drifted = mismatch.means(-mismatch.log_ratio) > threshold
    if batch.packed or tuple(advantages.shape) == batch.shape:
        dropped = batch.unflatten((by_token < 0) & mismatch.sequences.spread(drifted))
    else:
        dropped = (advantages.detach().reshape(-1, 1) < 0) & drifted
    return (~dropped).to(logps.dtype)
