"""What a loss reports beside its value."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import (
    Coefficients,
    RowStats,
    TokenInputs,
    clamped_ratio,
    reference_logps,
    sampled_kl,
    unbounded,
)
from .spec import ImportanceRatio, LossSpec, PPOClip, Surrogate


def metrics(
    spec: LossSpec,
    stats: RowStats,
    inputs: TokenInputs,
    derivatives: Coefficients,
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
        ratio = clamped_ratio(stats.logps, anchor, unbounded(spec.log_ratio_clamp)).value
        found["log_ratio"] = torch.zeros_like(ratio) if anchor is None else stats.logps - anchor
        found["ratio"] = ratio
        if isinstance(surrogate, PPOClip):
            low = (ratio < 1 - surrogate.eps_low) & (inputs.advantages < 0)
            high = (ratio > 1 + surrogate.eps_high) & (inputs.advantages > 0)
            found["clip_fraction"] = low | high
            found["clip_fraction_low"] = low
            found["clip_fraction_high"] = high
        elif isinstance(surrogate, ImportanceRatio) and surrogate.max_ratio is not None:
            found["clip_fraction"] = (ratio > surrogate.max_ratio) & (inputs.advantages != 0)
    if spec.sampled_kl is not None:
        found["kl"] = sampled_kl(spec, stats.logps, inputs.old_logps, ref_logps).value
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
