"""The autograd functions: statistics of the logits, a loss of known derivatives, and both fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend
from .objective import Coefficients, RowStats, TokenInputs
from .spec import LogitTransform, LossSpec


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """For a backward that has no derivative: whoever differentiates its result gets an error.

    `torch.autograd.function.once_differentiable` gives one only where the incoming gradient requires grad,
    which that of a loss does not: a penalty on the gradient would silently drop out.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        error = torch._C._functions.DelayedError("the losses of grpo_kernels are differentiable once", 1)
        return tuple(None if x is None else error(x.detach().requires_grad_()) for x in found)

    return wrapper


@dataclass(frozen=True)
class RowConfig:
    """What the statistics and their gradient depend on besides tensors."""

    transform: LogitTransform
    backend: str
    entropy: bool = False
    kl_forward: bool = False
    kl_gradient: bool = False  # the exact KL is part of the loss: the backward reads the reference's logits
    inplace: bool = False

    def empty_stats(self, logits: Tensor, ref_logits: Tensor | None, *, for_backward: bool) -> RowStats:
        """Unfilled statistics of `[B, T, V]` logits; maxima and sums only where a backward will want them."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.shape[0] * logits.shape[1]

        def new(wanted: bool) -> Tensor | None:
            return torch.empty(rows, dtype=dtype, device=logits.device) if wanted else None

        ref = ref_logits is not None
        return RowStats(
            logps=new(True),  # type: ignore[arg-type]
            row_max=new(for_backward),  # type: ignore[arg-type]
            sum_exp=new(for_backward),  # type: ignore[arg-type]
            entropy=new(self.entropy),
            ref_logps=new(ref),
            ref_row_max=new(ref and for_backward),
            ref_sum_exp=new(ref and for_backward),
            kl=new(ref),
            kl_forward=new(ref and self.kl_forward),
        )


class RowStatistics(torch.autograd.Function):
    """Log-probability, entropy and exact KL of every row, differentiable with respect to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, V]
        ref_logits: Tensor | None,
        targets: Tensor,  # [B * T]
        temperatures: Tensor | None,  # [B * T]
        config: RowConfig,
    ) -> tuple[Tensor | None, ...]:
        """Returns `RowStats` in its order."""
        stats = config.empty_stats(logits, ref_logits, for_backward=True)
        backend.row_stats(logits, targets, stats, ref_logits, temperatures, config.transform, config.backend)
        ctx.config = config
        ctx.save_for_backward(
            logits, ref_logits if config.kl_gradient else None, targets, temperatures, *stats
        )
        constant = [stats.row_max, stats.sum_exp, stats.ref_logps, stats.ref_row_max, stats.ref_sum_exp]
        if not config.kl_gradient:
            constant += [stats.kl, stats.kl_forward]
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: RowConfig = ctx.config
        by = RowStats(*(None if g is None else g.contiguous() for g in grads))  # type: ignore[arg-type]
        coefficients = Coefficients(by.logps, by.entropy)
        if config.kl_gradient:
            coefficients = coefficients._replace(dkl=by.kl, dkl_forward=by.kl_forward)
        if all(x is None for x in coefficients):
            return None, None, None, None, None
        logits, ref_logits, targets, temperatures, *saved = ctx.saved_tensors
        out = (
            logits.detach()
            if config.inplace
            else torch.empty_like(logits, memory_format=torch.contiguous_format)
        )
        backend.dlogits(
            out,
            logits,
            targets,
            RowStats(*saved),
            coefficients,
            ref_logits,
            temperatures,
            config.transform,
            config.backend,
        )
        if config.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None


class KnownGradient(torch.autograd.Function):
    """The loss: a value whose derivatives by the statistics have been computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,  # 0-dim
        coefficients: Coefficients,
        logps: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        kl_forward: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*coefficients)
        return value.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if c is None else grad * c for c in ctx.saved_tensors)


class FusedLoss(torch.autograd.Function):
    """A token-local loss whose forward overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, V]
        ref_logits: Tensor | None,
        targets: Tensor,  # [B * T]
        temperatures: Tensor | None,  # [B * T]
        inputs: TokenInputs,
        spec: LossSpec,
        config: RowConfig,
    ) -> tuple[Tensor | None, ...]:
        """Returns the loss, `dlogp` `[B * T]`, and `RowStats` in its order."""
        stats = config.empty_stats(logits, ref_logits, for_backward=False)
        value, dlogp = torch.empty_like(stats.logps), torch.empty_like(stats.logps)
        backend.fused_loss(
            logits,
            targets,
            stats,
            value,
            dlogp,
            inputs,
            ref_logits,
            temperatures,
            config.transform,
            spec,
            config.backend,
        )
        # What the logits were is gone: whoever saved them finds out by their version, as after any in-place
        # operation.
        torch.autograd.graph.increment_version(logits)
        ctx.backend = config.backend
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(dlogp, *(x for x in stats if x is not None))
        ctx.set_materialize_grads(False)
        return value.sum(), dlogp, *stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        (gradient,) = ctx.saved_tensors
        backend.scale_rows(gradient, grad, ctx.backend)
        # Once handed out the buffer is autograd's: a second backward must not take it for the gradient again.
        torch.autograd.graph.increment_version(gradient)
        return gradient.detach(), None, None, None, None, None, None
