"""What a loss reports beside its value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .objective import SURROGATES, Coefficients, RowStats, TokenInputs, log_ratio_to, unbounded
from .row_loss import reference_logps, sampled_kl
from .sequences import Layout, sequence_log_ratio
from .spec import LossSpec
from .surrogates import CISPO, DPPO, GMPO, ImportanceRatio, PPOClip, Surrogate


class Clip(NamedTuple):
    """Which tokens count as clipped: those whose ratio is beyond a bound to which their advantage pushes it.

    "band": below `low` or above `high`; "log band": their log-ratio is; "cap": above `high`, whatever the
    sign of the advantage; "region": the surrogate gives them no weight.
    """

    kind: str | None = None
    low: float = 0.0
    high: float = math.inf

    @classmethod
    def of(cls, surrogate: Surrogate | None) -> Clip:
        if isinstance(surrogate, PPOClip):
            return cls("band", 1.0 - surrogate.eps_low, 1.0 + surrogate.eps_high)
        if isinstance(surrogate, CISPO):
            return cls("band", float(surrogate.ratio_min), float(surrogate.ratio_max))
        if isinstance(surrogate, GMPO):
            return cls("log band", -surrogate.eps_low, surrogate.eps_high)
        if isinstance(surrogate, ImportanceRatio) and surrogate.max_ratio is not None:
            return cls("cap", high=float(surrogate.max_ratio))
        return cls("region") if isinstance(surrogate, DPPO) else cls()


def metrics(
    spec: LossSpec,
    stats: RowStats,
    inputs: TokenInputs,
    derivatives: Coefficients,
    layout: Layout,
    backend_name: str,
    ran: Tensor | None = None,  # [N] bool: the tokens whose statistics are known; None: all unmasked ones
) -> dict[str, Tensor]:
    """Means over the unmasked tokens that ran, 0-dim, on the device. A key that does not apply is absent.

    `active_fraction` is one over all unmasked tokens.
    """
    surrogate = spec.surrogate if isinstance(spec.surrogate, Surrogate) else None
    ran, clip = inputs.mask if ran is None else ran, Clip.of(surrogate)
    anchor = inputs.old_logps
    if surrogate is not None and surrogate.anchor == "ref":
        anchor = reference_logps(stats, inputs)
    names = []
    if anchor is not None or (surrogate is not None and surrogate.uses_ratio):
        names += ["log_ratio", "ratio"]
        names += ["clip_fraction"] if clip.kind is not None else []
        names += ["clip_fraction_low", "clip_fraction_high"] if clip.kind == "band" else []
    names += ["kl"] if spec.sampled_kl or spec.exact_kl else []
    names += ["kl_exact"] if stats.kl is not None else []
    names += ["entropy"] if stats.entropy is not None else []
    names += ["active_fraction"]
    if backend.has_token_kernels(spec, stats.logps, backend_name):
        every = backend.token_metrics(
            spec, stats, inputs, derivatives, ran, ratio="ratio" in names, clip=clip
        )
        return {name: every[name] for name in names}

    found: dict[str, Tensor | None] = {"kl_exact": stats.kl, "entropy": stats.entropy}
    found["active_fraction"] = derivatives.active()
    if "ratio" in names:
        log_ratio = log_ratio_to(stats.logps, anchor)
        if spec.level != "token":
            log_ratio, _ = sequence_log_ratio(spec.level, log_ratio, layout)
        clamp = unbounded(spec.log_ratio_clamp)
        ratio = torch.exp(log_ratio.clamp(-clamp, clamp))
        found |= {"log_ratio": log_ratio, "ratio": ratio}
        if surrogate is not None and clip.kind is not None:
            found |= clip_fractions(surrogate, clip, stats.logps, log_ratio, ratio, inputs.advantages)
    if spec.sampled_kl is not None:
        found["kl"] = sampled_kl(spec, stats.logps, reference_logps(stats, inputs), inputs, layout)[0].value
    elif spec.exact_kl is not None:
        found["kl"] = stats.kl if spec.exact_kl.kind == "exact" else stats.kl_forward
    values = torch.stack([found[name].to(stats.logps.dtype) for name in names])  # type: ignore[union-attr]
    weights = torch.stack([ran] * (len(names) - 1) + [inputs.mask])
    means = torch.where(weights, values, 0.0).sum(1) / weights.sum(1).clamp(min=1)
    return dict(zip(names, means.unbind(), strict=True))


def clip_fractions(
    surrogate: Surrogate, clip: Clip, logps: Tensor, log_ratio: Tensor, ratio: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    if clip.kind == "cap":
        return {"clip_fraction": (ratio > clip.high) & (advantages != 0)}
    if clip.kind == "region":
        statement = SURROGATES[surrogate.statement]
        # Clamped, lest a ratio that vanishes pass for one outside of the region.
        _, weight, _ = statement(logps, log_ratio, advantages, 20.0, *surrogate.params)
        return {"clip_fraction": (weight == 0) & (advantages != 0)}
    bounded = log_ratio if clip.kind == "log band" else ratio
    low, high = (bounded < clip.low) & (advantages < 0), (bounded > clip.high) & (advantages > 0)
    return {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
