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


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """Of everything that is computed from the logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


MASKED = -1
"""In `targets`: a position that takes no part. Its logits are not read and its gradient is zero."""


class RowStats(NamedTuple):
    """What the loss knows of each row of logits, `[N]` each; absent where it was not asked for.

    `sum_exp` is the sum of the exponentials relative to the row's maximum `shift`, which is in the units that
    a backend exponentiates in and of use to that backend only. Two numbers and not their logsumexp, which in
    fp32 would lose the digits of a row that sits far from zero.
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


def may_be_active(spec: LossSpec, inputs: TokenInputs) -> Tensor:
    """Rows that can have a gradient, `[N]` bool: what is known before the policy is."""
    if spec.uses_callable or spec.sampled_kl or spec.exact_kl or spec.entropy_coef:
        return inputs.mask
    active = inputs.mask & (inputs.advantages != 0)
    return active if inputs.token_weights is None else active & (inputs.token_weights != 0)


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

    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        dlogp, (_, value) = torch.func.grad_and_value(total, has_aux=True)(logps)
    else:
        # Identity hooks, because the innermost win: checkpointing and offloading must not see this small
        # graph.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            leaf = logps.detach().requires_grad_()
            summed, value = total(leaf)
            dlogp = torch.zeros_like(leaf)
            if summed.requires_grad:
                (dlogp,) = torch.autograd.grad(summed, leaf, allow_unused=True, materialize_grads=True)
        value = value.detach()
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
