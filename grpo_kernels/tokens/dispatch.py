"""Chooses between the Triton kernels over tokens and PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks.tensors import traced
from ..spec import LossSpec
from ..spec.formula import unbounded
from ..spec.surrogates import Surrogate
from ..spec.surrogates.base import Clip
from .loss import BatchLoss
from .statistics import Coefficients, RowStats

if TYPE_CHECKING:
    from ..kernels.token_loss import KernelLoss


def has_token_kernels(spec: LossSpec, logps: Tensor, backend: str) -> bool:
    """Return whether one kernel can compute the loss, and another the metrics."""
    return (
        backend == "triton"
        and spec.has_kernel
        and logps.dtype == torch.float32
        and logps.numel() > 0
        and not traced(logps)
    )


def token_losses(loss: BatchLoss, stats: RowStats, backend: str) -> tuple[Tensor, Coefficients]:
    """Compute `loss.values(stats)`, with one kernel if possible."""
    if not has_token_kernels(loss.spec, stats.logps, backend):
        return loss.values(stats)
    from ..kernels import token_loss

    value, dlogp = torch.empty_like(stats.logps), torch.empty_like(stats.logps)
    stats = stats._replace(ref_logps=loss.ref_logps(stats))
    token_loss.token_losses(value, dlogp, stats, loss.inputs, kernel_loss(loss.spec))
    return value, loss.coefficients(dlogp)


def token_metrics(
    loss: BatchLoss,
    stats: RowStats,
    derivatives: Coefficients,
    known: Tensor,
    *,
    ratio: bool,
    clip: Clip | None,
) -> dict[str, Tensor]:
    """Compute every metric of metrics.py with one kernel. Those that do not apply are undefined."""
    from ..kernels import token_loss

    stats = stats._replace(ref_logps=loss.ref_logps(stats))
    return token_loss.token_metrics(
        known, stats, loss.inputs, derivatives, kernel_loss(loss.spec), ratio=ratio, clip=clip
    )


def kernel_loss(spec: LossSpec) -> KernelLoss:
    """Convert the spec of a loss that `has_kernel` to the arguments of the kernels."""
    from ..kernels.token_loss import KernelLoss

    surrogate, kl = spec.surrogate, spec.sampled_kl or spec.exact_kl
    assert surrogate is None or isinstance(surrogate, Surrogate)
    return KernelLoss(
        surrogate=None if surrogate is None else surrogate.kernel,
        zero_without_advantage=surrogate is None or surrogate.zero_without_advantage,
        anchor=None if surrogate is None else surrogate.anchor,
        params=() if surrogate is None else surrogate.params,
        log_ratio_clamp=unbounded(spec.log_ratio_clamp),
        kl_kind=None if kl is None else kl.kind,
        kl_beta=0.0 if kl is None else float(kl.beta),
        kl_clamp=unbounded(None if kl is None else kl.clamp),
        kl_output_clamp=unbounded(None if kl is None else kl.output_clamp),
        straight_through=kl is not None and kl.straight_through,
        ratio_corrected=kl is not None and kl.ratio_corrected,
    )
