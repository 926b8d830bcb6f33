"""The metrics that a loss returns with its value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LossSpec
from ..spec.formula import clamped_ratio, log_ratio_to, unbounded
from ..spec.surrogates import Surrogate
from ..spec.surrogates.base import Clip, sequence_log_ratio
from . import dispatch
from .loss import BatchLoss
from .sequences import Sequences
from .statistics import Coefficients, RowStats


def metrics(
    loss: BatchLoss,
    stats: RowStats,
    derivatives: Coefficients,
    backend: str,
    known: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return 0-dim means over the unmasked tokens, on the device. A key that does not apply is absent.

    `known` `[N]` bool marks the tokens whose statistics were computed; None: all unmasked ones. The means are
    over these, except for `active_fraction`, a mean over all unmasked tokens.
    """
    spec, inputs = loss.spec, loss.inputs
    surrogate = spec.surrogate if isinstance(spec.surrogate, Surrogate) else None
    clip = None if surrogate is None else surrogate.clip
    known = inputs.mask if known is None else known
    anchor = loss.ref_logps(stats) if spec.anchored_to_reference else inputs.old_logps
    names = []
    if anchor is not None or (surrogate is not None and surrogate.uses_ratio):
        names += ["log_ratio", "ratio"]
        names += ["clip_fraction"] if clip is not None else []
        names += (
            ["clip_fraction_low", "clip_fraction_high"] if clip is not None and clip.kind == "band" else []
        )
    names += ["kl"] if spec.sampled_kl or spec.exact_kl else []
    names += ["kl_exact"] if stats.kl is not None else []
    names += ["entropy"] if stats.entropy is not None else []
    names += ["active_fraction"]
    sequences = loss.sequences
    assert sequences is not None
    if sequences.group is None and dispatch.has_token_kernels(spec, stats.logps, backend):
        every = dispatch.token_metrics(loss, stats, derivatives, known, ratio="ratio" in names, clip=clip)
        return {name: every[name] for name in names}

    found: dict[str, Tensor | None] = {"kl_exact": stats.kl, "entropy": stats.entropy}
    found["active_fraction"] = derivatives.active()
    if "ratio" in names:
        log_ratio, ratio = ratios(spec, stats.logps, anchor, sequences)
        found |= {"log_ratio": log_ratio, "ratio": ratio}
        if surrogate is not None and clip is not None:
            found |= clipped_tokens(surrogate, clip, stats.logps, log_ratio, ratio, inputs.advantages)
    if spec.sampled_kl is not None:
        found["kl"] = loss.sampled_kl(stats.logps, loss.ref_logps(stats))[0].value
    elif spec.exact_kl is not None:
        found["kl"] = stats.kl if spec.exact_kl.kind == "exact" else stats.kl_forward
    values = torch.stack([found[name].to(stats.logps.dtype) for name in names])  # type: ignore[union-attr]
    weights = torch.stack([known] * (len(names) - 1) + [inputs.mask])
    totals = values.masked_fill_(~weights, 0.0).sum(1), weights.sum(1, dtype=values.dtype)
    total, count = sequences.over_ranks(torch.stack(totals))
    means = total / count.clamp(min=1)
    return dict(zip(names, means.unbind()))


def ratios(
    spec: LossSpec, logps: Tensor, anchor: Tensor | None, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Return the log-ratio of each token, or of its sequence, and the bounded ratio, `[N]`."""
    log_ratio = log_ratio_to(logps, anchor)
    if spec.level != "token":
        log_ratio, _ = sequence_log_ratio(spec.level, log_ratio, sequences)
    return log_ratio, clamped_ratio(log_ratio, unbounded(spec.log_ratio_clamp))[0]


def clipped_tokens(
    surrogate: Surrogate, clip: Clip, logps: Tensor, log_ratio: Tensor, ratio: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """Return whether each token counts as clipped, `[N]` bool, by the surrogate's rule."""
    if clip.kind == "cap":
        return {"clip_fraction": (ratio > clip.high) & (advantages != 0)}
    if clip.kind == "region":
        # The clamp keeps a ratio that underflows to 0 from counting as outside the region.
        weight = surrogate.token_loss(logps, log_ratio, advantages, 20.0).dlogp
        return {"clip_fraction": (weight == 0) & (advantages != 0)}
    bounded = log_ratio if clip.kind == "log band" else ratio
    low, high = (bounded < clip.low) & (advantages < 0), (bounded > clip.high) & (advantages > 0)
    return {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
