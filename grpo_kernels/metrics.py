"""What a loss reports beside its value."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import SURROGATES, Coefficients, RowStats, TokenInputs, clamped_ratio, log_ratio_to, unbounded
from .row_loss import reference_logps, sampled_kl
from .sequences import Layout, sequence_log_ratio
from .spec import LossSpec
from .surrogates import CISPO, DPPO, GMPO, ImportanceRatio, PPOClip, Surrogate


def metrics(
    spec: LossSpec,
    stats: RowStats,
    inputs: TokenInputs,
    derivatives: Coefficients,
    layout: Layout,
    ran: Tensor | None = None,  # [N] bool: the tokens whose statistics are known; None: all unmasked ones
) -> dict[str, Tensor]:
    """Means over the unmasked tokens that ran, 0-dim, on the device. A key that does not apply is absent.

    `active_fraction` is one over all unmasked tokens.
    """
    found: dict[str, Tensor] = {}
    surrogate = spec.surrogate if isinstance(spec.surrogate, Surrogate) else None
    ref_logps = reference_logps(stats, inputs)
    anchor = ref_logps if surrogate is not None and surrogate.anchor == "ref" else inputs.old_logps
    if anchor is not None or (surrogate is not None and surrogate.uses_ratio):
        log_ratio = log_ratio_to(stats.logps, anchor)
        if spec.level != "token":
            log_ratio, _ = sequence_log_ratio(spec.level, log_ratio, layout)
        ratio, _ = clamped_ratio(log_ratio, unbounded(spec.log_ratio_clamp))
        found |= {"log_ratio": log_ratio, "ratio": ratio}
        if surrogate is not None:
            found |= clip_fractions(surrogate, stats.logps, log_ratio, ratio, inputs.advantages)
    if spec.sampled_kl is not None:
        found["kl"] = sampled_kl(spec, stats.logps, ref_logps, inputs, layout)[0].value
    elif spec.exact_kl is not None:
        divergence = stats.kl if spec.exact_kl.kind == "exact" else stats.kl_forward
        assert divergence is not None
        found["kl"] = divergence
    if stats.kl is not None:
        found["kl_exact"] = stats.kl
    if stats.entropy is not None:
        found["entropy"] = stats.entropy
    # One reduction for all: on a GPU it is launches, not elements, that small tensors cost.
    mask = inputs.mask if ran is None else ran
    weights = torch.stack([mask] * len(found) + [inputs.mask])
    found["active_fraction"] = derivatives.active()
    values = torch.stack([x.to(stats.logps.dtype) for x in found.values()])
    means = torch.where(weights, values, 0.0).sum(1) / weights.sum(1).clamp(min=1)
    return dict(zip(found, means.unbind(), strict=True))


def clip_fractions(
    surrogate: Surrogate, logps: Tensor, log_ratio: Tensor, ratio: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """Tokens whose ratio is beyond a bound, on the side to which their advantage pushes it."""
    pushed_up, pushed_down, active = advantages > 0, advantages < 0, advantages != 0
    if isinstance(surrogate, PPOClip):
        low = (ratio < 1 - surrogate.eps_low) & pushed_down
        high = (ratio > 1 + surrogate.eps_high) & pushed_up
    elif isinstance(surrogate, CISPO):
        low, high = (ratio < surrogate.ratio_min) & pushed_down, (ratio > surrogate.ratio_max) & pushed_up
    elif isinstance(surrogate, ImportanceRatio) and surrogate.max_ratio is not None:
        return {"clip_fraction": (ratio > surrogate.max_ratio) & active}
    elif isinstance(surrogate, GMPO):
        high, low = log_ratio > surrogate.eps_high, log_ratio < -surrogate.eps_low
        return {"clip_fraction": (high & pushed_up) | (low & pushed_down)}
    elif isinstance(surrogate, DPPO):
        statement = SURROGATES[surrogate.statement]
        # Clamped, lest a ratio that vanishes pass for one outside of the region.
        _, weight, _ = statement(logps, log_ratio, advantages, 20.0, *surrogate.params)
        return {"clip_fraction": (weight == 0) & active}
    else:
        return {}
    return {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
