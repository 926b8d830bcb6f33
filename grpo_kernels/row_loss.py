"""From the statistics of all rows to the weighted loss, and its derivatives by the statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import (
    KL_ESTIMATORS,
    SURROGATES,
    Coefficients,
    RowStats,
    Statement,
    TokenInputs,
    TokenLoss,
    kl_estimate,
    log_ratio_to,
    unbounded,
)
from .sequences import COUPLINGS, Layout, Terms, couple, sequence_log_ratio
from .spec import LossSpec
from .surrogates import Surrogate


def row_loss(
    spec: LossSpec, stats: RowStats, inputs: TokenInputs, layout: Layout | None = None
) -> tuple[Tensor, Coefficients]:
    """Each row's share of the loss, weighted, and its derivatives.

    Without a `layout` for losses only whose tokens are not coupled: `row_loss` of some of the rows is then
    those rows of `row_loss`.
    """
    ref_logps = reference_logps(stats, inputs)
    if spec.uses_callable:
        assert layout is not None
        value, dlogp = callable_loss(spec, stats.logps, ref_logps, inputs, layout.shape)
    else:
        value, dlogp = surrogate_loss(spec, stats.logps, ref_logps, inputs, layout)
    if spec.sampled_kl is not None:
        statement, share = sampled_kl(spec, stats.logps, ref_logps, inputs, layout)
        weight = spec.sampled_kl.beta * inputs.row_weights
        parts = (None if x is None else torch.where(inputs.mask, weight * x, 0.0) for x in statement)
        kl = collected(Statement(*parts), share, layout)  # type: ignore[arg-type]
        value, dlogp = value + kl.value, dlogp + kl.dlogp
    found = coefficients(spec, inputs, dlogp)
    for weights, statistic in zip(found[1:], (stats.entropy, stats.kl, stats.kl_forward), strict=True):
        if weights is not None and statistic is not None:
            value = value + weights * statistic
    return value, found


def may_be_active(spec: LossSpec, inputs: TokenInputs, layout: Layout) -> Tensor:
    """Rows that can have a gradient, `[N]` bool: what is known before the policy is."""
    surrogate = spec.surrogate
    if not isinstance(surrogate, Surrogate) or spec.sampled_kl or spec.exact_kl or spec.entropy_coef:
        return inputs.mask
    active = inputs.mask
    if surrogate.rests_at_zero:
        active = active & (inputs.advantages != 0)
    if inputs.token_weights is not None and type(surrogate) not in COUPLINGS:
        active = active & (inputs.token_weights != 0)
    if spec.couples_tokens:
        active = inputs.mask & (layout.total(active.to(layout.dtype)) > 0)
    return active


def reference_logps(stats: RowStats, inputs: TokenInputs) -> Tensor | None:
    return inputs.ref_logps if stats.ref_logps is None else stats.ref_logps


def coefficients(spec: LossSpec, inputs: TokenInputs, dlogp: Tensor) -> Coefficients:
    """`dlogp` beside the derivatives that are constants of the batch: entropy and exact KL enter linearly."""
    found = Coefficients(dlogp, inputs.entropy_weights)
    if spec.exact_kl is None:
        return found
    weight = spec.exact_kl.beta * inputs.row_weights
    return found._replace(**{"dkl" if spec.exact_kl.kind == "exact" else "dkl_forward": weight})


def surrogate_loss(
    spec: LossSpec, logps: Tensor, ref_logps: Tensor | None, inputs: TokenInputs, layout: Layout | None
) -> TokenLoss:
    """A built-in surrogate, weighted, and its derivative by `logps`."""
    surrogate = spec.surrogate
    if surrogate is None:
        return TokenLoss(torch.zeros_like(logps), torch.zeros_like(logps))
    assert isinstance(surrogate, Surrogate)
    anchor = ref_logps if surrogate.anchor == "ref" else inputs.old_logps
    terms = Terms(log_ratio_to(logps, anchor), inputs.advantages, inputs.token_weights)
    if spec.couples_tokens:
        assert layout is not None
        terms = couple(spec, terms, layout)
    log_ratio, advantages, token_weights, share = terms
    statement = SURROGATES[surrogate.statement](
        logps, log_ratio, advantages, unbounded(spec.log_ratio_clamp), *surrogate.params
    )
    # A select, never a product: a zero advantage beside an infinite ratio would be 0 * inf = NaN.
    inactive = ~inputs.mask
    if surrogate.rests_at_zero:
        inactive = inactive | (advantages == 0)
    weights = inputs.row_weights
    if token_weights is not None:
        weights = weights * token_weights
        inactive = inactive | (token_weights == 0)
    weighted = (None if x is None else torch.where(inactive, 0.0, x * weights) for x in statement)
    return collected(Statement(*weighted), share, layout)  # type: ignore[arg-type]


def collected(statement: Statement, share: Tensor | None, layout: Layout | None) -> TokenLoss:
    """A weighted statement with its derivative by each token's own log-probability.

    `share`: the log-ratio is the sequence's, and so all its tokens' losses depend on each token.
    """
    value, by_logp, by_log_ratio = statement
    if by_log_ratio is not None and share is not None:
        assert layout is not None
        moves = layout.mask & (share != 0)
        by_log_ratio = torch.where(moves, layout.total(by_log_ratio) * share, 0.0)
    if by_logp is None or by_log_ratio is None:
        dlogp = by_logp if by_log_ratio is None else by_log_ratio
        assert dlogp is not None
        return TokenLoss(value, dlogp)
    return TokenLoss(value, by_logp + by_log_ratio)


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
    spec: LossSpec, logps: Tensor, ref_logps: Tensor | None, inputs: TokenInputs, layout: Layout | None
) -> tuple[Statement, Tensor | None]:
    """The estimate of each token, and the share of a token in the log-ratio that corrects it."""
    kl = spec.sampled_kl
    assert kl is not None and ref_logps is not None
    log_ratio, share = None, None
    if kl.ratio_corrected:
        log_ratio = log_ratio_to(logps, inputs.old_logps)
        if spec.level != "token":
            assert layout is not None
            log_ratio, share = sequence_log_ratio(spec.level, log_ratio, layout)
    statement = kl_estimate(
        logps,
        log_ratio,
        ref_logps,
        KL_ESTIMATORS[kl.kind],
        unbounded(kl.clamp),
        unbounded(kl.output_clamp),
        kl.straight_through,
        kl.ratio_corrected,
        unbounded(spec.log_ratio_clamp),
        own_ratio=share is None,
    )
    return statement, share
