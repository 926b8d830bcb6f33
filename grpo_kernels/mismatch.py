"""Metrics of the mismatch between trainer and sampler, to log with each step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .checks.choices import WEIGHT_LEVELS, WeightLevel
from .checks.scalars import check_bounds, check_choice, check_number
from .tokens.mismatch import Mismatch
from .tokens.sequences import widened


def mismatch_metrics(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    seq_lens: Tensor | None = None,
    weights: Tensor | None = None,
    level: WeightLevel = "token",
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Tensor]:
    """Compute metrics of the mismatch between trainer and sampler. It needs no device sync.

    With `d = logps - sampler_logps` and `ratio = exp(d)`:

    - `k1`, `k3`: means of `-d` and of `exp(d) - 1 - d` over tokens, two estimates of KL(sampler || trainer).
    - `ppl_ratio`: the mean over sequences of `exp(mean of -d)`: the trainer's perplexity over the sampler's.
      Absent for a packed batch without `seq_lens`.
    - `abs_max`: the largest `|d|`.
    - `ess`: the effective sample size of the tokens' ratios, unbounded, as a share of the tokens:
      `mean(ratio)^2 / mean(ratio^2)`, 1 if all ratios are equal.
    - `clip_fraction_low`, `clip_fraction_high`, `clip_fraction`: if `low` or `high` is given, the share of
      tokens whose ratio at `level` is below `low`, above `high`, or either.
    - `weight_mean`, `weight_ess`, `reject_fraction`: if `weights` are given, their mean over tokens, their
      effective sample size as above, and the share of tokens with a weight of 0.

    The first four are over the unmasked tokens for which the sampler returned a value, and over the sequences
    that have one. The others are over all unmasked tokens. Sources: verl 0.9.1's `compute_offpolicy_metrics`
    and `compute_is_metrics`.

    Args:
        logps: as in `importance_weights`.
        sampler_logps: as in `importance_weights`.
        mask: as in `importance_weights`.
        seq_lens: as in `importance_weights`.
        weights: `[B, T]`, `[B, 1]` or `[B]`; packed: `[N]` or `[S]`. Those that the loss uses: weights, a
            rejection mask, or their product.
        level: the level of the ratio that `low` and `high` bound, as in `importance_weights`.
        low: lower bound on the ratio; None: no bound.
        high: upper bound on the ratio; None: no bound.

    Returns:
        0-dim tensors by name, fp32 (fp64 for fp64 `logps`), on the device and without a gradient. They are 0
        if there is no token to average over.

    Raises:
        ValueError: a shape, dtype or device is wrong; `level` or a bound has a wrong value; a packed batch
            has no `seq_lens`, and `level` is not "token".
        TypeError: a bound is not a number, or a tensor is not a tensor.

    Examples:
        >>> import torch
        >>> from grpo_kernels import mismatch_metrics
        >>> logps = torch.tensor([[0.9, 0.3]]).log()
        >>> sampler_logps = torch.tensor([[0.9, 0.1]]).log()  # the ratios are 1 and 3
        >>> metrics = mismatch_metrics(logps, sampler_logps, torch.ones(1, 2), high=2.0)
        >>> {name: round(metrics[name].item(), 3) for name in ("abs_max", "ess", "clip_fraction")}
        {'abs_max': 1.099, 'ess': 0.8, 'clip_fraction': 0.5}
    """
    check_choice("level", level, WEIGHT_LEVELS)
    low = check_number("low", low, optional=True)
    high = check_number("high", high, strict=True, optional=True)
    floor, ceiling = check_bounds(low, high)
    mismatch = Mismatch.of(logps, sampler_logps, mask, seq_lens)
    batch, sequences, known = mismatch.batch, mismatch.sequences, mismatch.known
    d = mismatch.log_ratio
    found = {"k1": _mean(-d, known), "k3": _mean(mismatch.statistic("k3"), known)}
    if batch.num_sequences is not None:
        counts = sequences.sums(known.to(batch.dtype))
        ppl_ratio = torch.exp(-widened(sequences.sums(d)) / counts.clamp(min=1))
        found["ppl_ratio"] = _mean(ppl_ratio, counts > 0)
    found["abs_max"] = _largest(d.abs())
    # The largest ratio becomes 1, so that no square overflows. The quotient does not depend on it.
    largest = _largest(torch.where(known, d, -torch.inf), default=-torch.inf)
    found["ess"] = _effective_share(torch.exp(widened(d) - largest), known)
    if low is not None or high is not None:
        ratio = mismatch.ratio(level)
        ratio = ratio if level == "token" else sequences.spread(ratio)
        below, above = ratio < floor, ratio > ceiling
        found["clip_fraction_low"] = _mean(below, batch.mask)
        found["clip_fraction_high"] = _mean(above, batch.mask)
        found["clip_fraction"] = _mean(below | above, batch.mask)
    if weights is not None:
        given = batch.per_token("weights", weights, per_sequence=True)
        found["weight_mean"] = _mean(given, batch.mask)
        found["weight_ess"] = _effective_share(given, batch.mask)
        found["reject_fraction"] = _mean(given == 0, batch.mask)
    return {name: x.to(batch.dtype) for name, x in found.items()}


def _mean(x: Tensor, among: Tensor) -> Tensor:
    """Return the mean of the entries that `among` marks, 0-dim, 0 without any."""
    return widened(torch.where(among, x, 0)).sum() / among.sum().clamp(min=1)


def _effective_share(x: Tensor, among: Tensor) -> Tensor:
    """Return the effective sample size of weights that `among` marks, as a share of their number, 0-dim."""
    squares = _mean(widened(x).square(), among)
    return _mean(x, among).square() / torch.where(squares == 0, 1, squares)


def _largest(x: Tensor, default: float = 0.0) -> Tensor:
    """Return the largest entry of `x` `[N]`, or `default` if that is larger or there is none, 0-dim."""
    return functional.pad(x, (0, 1), value=default).amax()
