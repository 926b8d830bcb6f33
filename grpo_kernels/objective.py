"""The loss on per-token numbers in plain PyTorch: log-probabilities in, loss values and their derivatives
out.

Every function here works elementwise on tensors of one shape and carries its derivative explicitly, because
the derivative decides more than autograd can know: which branch a tie takes, and that an inactive token's
gradient is exactly zero where autograd would form 0 * inf. `kernels/device.py` states the same functions
under the same names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import ImportanceRatio, LogRatio, LossSpec, PPOClip, Reinforce, Surrogate


class TokenLoss(NamedTuple):
    value: Tensor  # [N] loss of each token, before aggregation
    dlogp: Tensor  # [N] its derivative with respect to the token's log-probability


def clamped_ratio(logp: Tensor, anchor: Tensor | None, clamp: float) -> TokenLoss:
    """`exp(logp - anchor)` and its derivative; the log-ratio is held to ±clamp. No anchor: exactly 1."""
    if anchor is None:
        # Not 1 + 0 * logp: a taken token at -inf has ratio 1, while a NaN stays one.
        ratio = torch.where(logp.isnan(), logp, 1.0)
        return TokenLoss(ratio, ratio)
    log_ratio = logp - anchor
    ratio = torch.exp(log_ratio.clamp(-clamp, clamp))
    return TokenLoss(ratio, torch.where(log_ratio.abs() > clamp, 0.0, ratio))


def log_ratio(logp: Tensor, anchor: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
    return TokenLoss(-advantage * (logp - anchor), -advantage)


def reinforce(logp: Tensor, anchor: Tensor | None, advantage: Tensor, clamp: float) -> TokenLoss:
    return TokenLoss(-advantage * logp, -advantage)


def importance_ratio(
    logp: Tensor, anchor: Tensor | None, advantage: Tensor, clamp: float, max_ratio: float
) -> TokenLoss:
    ratio, dratio = clamped_ratio(logp, anchor, clamp)
    return TokenLoss(
        -advantage * ratio.clamp(max=max_ratio), torch.where(ratio > max_ratio, 0.0, -advantage * dratio)
    )


def ppo_clip(
    logp: Tensor,
    anchor: Tensor | None,
    advantage: Tensor,
    clamp: float,
    eps_low: float,
    eps_high: float,
    delta: float,
    dual_clip: float,
) -> TokenLoss:
    ratio, dratio = clamped_ratio(logp, anchor, clamp)
    low, high = 1 - eps_low, 1 + eps_high
    unclipped = ratio.clamp(max=delta) * advantage
    clipped = ratio.clamp(low, high) * advantage
    value = -torch.minimum(unclipped, clipped)
    # A tie counts as unclipped. With delta below the band the clipped branch can be taken where it is not
    # flat.
    flat = torch.where(unclipped > clipped, (ratio < low) | (ratio > high), ratio > delta)
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (value > bound)
    return TokenLoss(torch.where(beyond, bound, value), torch.where(flat | beyond, 0.0, -advantage * dratio))


SURROGATES: dict[type[Surrogate], Callable[..., TokenLoss]] = {
    LogRatio: log_ratio,
    Reinforce: reinforce,
    ImportanceRatio: importance_ratio,
    PPOClip: ppo_clip,
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
    old_logp: Tensor | None,
    ref_logp: Tensor,
    estimator: Callable[[Tensor], TokenLoss],
    clamp: float,
    output_clamp: float,
    straight_through: bool,
    ratio_corrected: bool,
    log_ratio_clamp: float,
) -> TokenLoss:
    x = ref_logp - logp
    value, slope = estimator(x.clamp(-clamp, clamp))
    if straight_through:
        slope = -x
    else:
        slope = torch.where((x.abs() > clamp) | (value.abs() > output_clamp), 0.0, slope)
    value = value.clamp(-output_clamp, output_clamp)
    if ratio_corrected:
        ratio, dratio = clamped_ratio(logp, old_logp, log_ratio_clamp)
        value, slope = ratio * value, dratio * value + ratio * slope
    return TokenLoss(value, slope)


def unbounded(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


MASKED = -1
"""In `targets`: a position that takes no part. Its logits are not read and its gradient is zero."""


class RowStats(NamedTuple):
    """What the loss knows of each row of logits, `[N]` each; absent where it was not asked for.

    With `y` the softcapped logits and `k = scale / temperature`: `row_max = max y` and
    `sum_exp = sum exp(k * (y - row_max))`. Two numbers and not their logsumexp, which in fp32 would lose the
    digits of a row that sits far from zero.
    """

    logps: Tensor
    row_max: Tensor | None = None
    sum_exp: Tensor | None = None
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_row_max: Tensor | None = None
    ref_sum_exp: Tensor | None = None
    kl: Tensor | None = None  # KL(policy || reference)
    kl_forward: Tensor | None = None  # KL(reference || policy)

    def detach(self) -> RowStats:
        return RowStats(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def rows(self, index: Tensor | slice) -> RowStats:
        return RowStats(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


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


def row_loss(
    spec: LossSpec, stats: RowStats, inputs: TokenInputs, shape: tuple[int, ...]
) -> tuple[Tensor, Coefficients]:
    """Each row's share of the loss, weighted, and its derivatives; `shape` is `[B, T]` or `[N]`, for
    callables.

    Built-in losses are token-local: `row_loss` of some of the rows is those rows of `row_loss`.
    """
    ref_logps = reference_logps(stats, inputs)
    if spec.uses_callable:
        value, dlogp = callable_loss(spec, stats.logps, ref_logps, inputs, shape)
    else:
        value, dlogp = surrogate_loss(spec, stats.logps, ref_logps, inputs)
    if spec.sampled_kl is not None:
        weight = spec.sampled_kl.beta * inputs.row_weights
        kl = sampled_kl(spec, stats.logps, inputs.old_logps, ref_logps)
        value, dlogp = value + weight * kl.value, dlogp + weight * kl.dlogp
    found = coefficients(spec, inputs, dlogp)
    for weights, statistic in zip(found[1:], (stats.entropy, stats.kl, stats.kl_forward), strict=True):
        if weights is not None and statistic is not None:
            value = value + weights * statistic
    return value, found


def reference_logps(stats: RowStats, inputs: TokenInputs) -> Tensor | None:
    return inputs.ref_logps if stats.ref_logps is None else stats.ref_logps


def coefficients(spec: LossSpec, inputs: TokenInputs, dlogp: Tensor) -> Coefficients:
    """`dlogp` beside the derivatives that are constants of the batch: entropy and exact KL enter linearly."""
    found = Coefficients(dlogp, inputs.entropy_weights)
    if spec.exact_kl is None:
        return found
    weight = spec.exact_kl.beta * inputs.row_weights
    return found._replace(**{"dkl" if spec.exact_kl.kind == "exact" else "dkl_forward": weight})


def surrogate_loss(spec: LossSpec, logps: Tensor, ref_logps: Tensor | None, inputs: TokenInputs) -> TokenLoss:
    """A built-in surrogate, weighted, and its derivative by `logps`."""
    surrogate = spec.surrogate
    if surrogate is None:
        return TokenLoss(torch.zeros_like(logps), torch.zeros_like(logps))
    assert isinstance(surrogate, Surrogate)
    anchor = ref_logps if surrogate.anchor == "ref" else inputs.old_logps
    value, dlogp = SURROGATES[type(surrogate)](
        logps, anchor, inputs.advantages, unbounded(spec.log_ratio_clamp), *surrogate.params
    )
    # A select, never a product: a zero advantage beside an infinite ratio would be 0 * inf = NaN.
    inactive = inputs.advantages == 0
    if inputs.token_weights is not None:
        value, dlogp = value * inputs.token_weights, dlogp * inputs.token_weights
        inactive = inactive | (inputs.token_weights == 0)
    return TokenLoss(
        torch.where(inactive, 0.0, value * inputs.row_weights),
        torch.where(inactive, 0.0, dlogp * inputs.row_weights),
    )


def callable_loss(
    spec: LossSpec, logps: Tensor, ref_logps: Tensor | None, inputs: TokenInputs, shape: tuple[int, ...]
) -> TokenLoss:
    """A user's surrogate: weighted value per row, and the derivative of their sum by autograd.

    Weights go in before the derivative is taken, because such a loss may couple the tokens of a sequence.
    """
    weights = (
        inputs.row_weights if inputs.token_weights is None else inputs.row_weights * inputs.token_weights
    )

    def shaped(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.view(shape)

    def total(logps: Tensor) -> tuple[Tensor, Tensor]:
        values = spec.surrogate(  # type: ignore[operator,misc]
            logps.view(shape),
            shaped(inputs.old_logps),
            shaped(ref_logps),
            shaped(inputs.advantages),
            shaped(inputs.mask),
        )
        if not isinstance(values, Tensor) or values.shape != torch.Size(shape):
            got = tuple(values.shape) if isinstance(values, Tensor) else values
            raise ValueError(
                f"the callable surrogate must return a tensor of shape {tuple(shape)}, got {got}"
            )
        value = torch.where(weights != 0, weights * values.reshape(-1), 0.0)
        return value.sum(), value

    dlogp, (_, value) = torch.func.grad_and_value(total, has_aux=True)(logps)
    return TokenLoss(value, torch.where(inputs.mask, dlogp, 0.0))


def sampled_kl(
    spec: LossSpec, logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None
) -> TokenLoss:
    kl = spec.sampled_kl
    assert kl is not None and ref_logps is not None
    return kl_estimate(
        logps,
        old_logps,
        ref_logps,
        KL_ESTIMATORS[kl.kind],
        unbounded(kl.clamp),
        unbounded(kl.output_clamp),
        kl.straight_through,
        kl.ratio_corrected,
        unbounded(spec.log_ratio_clamp),
    )


def safe_divide(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is: an empty batch has loss 0."""
    if isinstance(denominator, Tensor):
        return torch.where(denominator == 0, 0.0, numerator / denominator)
    return numerator / denominator if denominator else torch.zeros_like(numerator)


def aggregation_weights(
    spec: LossSpec,
    mask: Tensor,  # [B, T], or [N] packed; bool
    sequence_ids: Tensor | None,  # [N], packed: the sequence each token belongs to
    num_sequences: int | None,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of every token, `[N]`, such that the aggregated loss is `sum(weights * token losses)`."""
    weights = mask.to(dtype)
    if spec.aggregation == "token-mean":
        denominator = weights.sum() if normalizer is None else normalizer
    elif spec.aggregation == "token-sum":
        denominator = 1.0 if normalizer is None else normalizer
    else:
        denominator = normalizer if normalizer is not None else float(num_sequences or 0)
    if spec.aggregation == "seq-mean-token-mean":
        weights = safe_divide(weights, sequence_lengths(weights, sequence_ids, num_sequences))
    elif spec.aggregation == "seq-mean-token-sum-norm":
        denominator = denominator * (mask.shape[-1] if spec.max_tokens is None else spec.max_tokens)
    return safe_divide(weights, denominator).reshape(-1)


def sequence_lengths(weights: Tensor, sequence_ids: Tensor | None, num_sequences: int | None) -> Tensor:
    """Unmasked tokens of the sequence of each token, shaped to divide `weights`."""
    if sequence_ids is None:
        return weights.sum(-1, keepdim=True)
    assert num_sequences is not None
    lengths = weights.new_zeros(num_sequences).index_add(0, sequence_ids, weights)
    return lengths[sequence_ids]


def metrics(
    spec: LossSpec, stats: RowStats, inputs: TokenInputs, derivatives: Coefficients
) -> dict[str, Tensor]:
    """Means over the unmasked tokens, 0-dim, on the device. A key that does not apply is absent."""
    count = inputs.mask.sum()

    def mean(values: Tensor) -> Tensor:
        values = values.to(stats.logps.dtype)
        return safe_divide(torch.where(inputs.mask, values, 0.0).sum(), count)

    found: dict[str, Tensor] = {}
    surrogate = spec.surrogate if isinstance(spec.surrogate, Surrogate) else None
    ref_logps = reference_logps(stats, inputs)
    anchor = ref_logps if surrogate is not None and surrogate.anchor == "ref" else inputs.old_logps
    if anchor is not None or (surrogate is not None and surrogate.uses_ratio):
        ratio = clamped_ratio(stats.logps, anchor, unbounded(spec.log_ratio_clamp)).value
        found["log_ratio"] = mean(torch.zeros_like(ratio) if anchor is None else stats.logps - anchor)
        found["ratio"] = mean(ratio)
        if isinstance(surrogate, PPOClip):
            low = (ratio < 1 - surrogate.eps_low) & (inputs.advantages < 0)
            high = (ratio > 1 + surrogate.eps_high) & (inputs.advantages > 0)
            found["clip_fraction"] = mean(low | high)
            found["clip_fraction_low"] = mean(low)
            found["clip_fraction_high"] = mean(high)
        elif isinstance(surrogate, ImportanceRatio) and surrogate.max_ratio is not None:
            found["clip_fraction"] = mean((ratio > surrogate.max_ratio) & (inputs.advantages != 0))
    if spec.sampled_kl is not None:
        found["kl"] = mean(sampled_kl(spec, stats.logps, inputs.old_logps, ref_logps).value)
    elif spec.exact_kl is not None:
        divergence = stats.kl if spec.exact_kl.kind == "exact" else stats.kl_forward
        assert divergence is not None
        found["kl"] = mean(divergence)
    if stats.kl is not None:
        found["kl_exact"] = mean(stats.kl)
    if stats.entropy is not None:
        found["entropy"] = mean(stats.entropy)
    found["active_fraction"] = mean(derivatives.active())
    return found
