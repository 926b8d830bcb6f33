"""The statistics as differentiable functions of the logits, and the loss fused with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from ..tokens.differentiation import apply, first_order, graph_is_kept, outside_graphs
from ..tokens.loss import BatchLoss
from ..tokens.statistics import RowStats
from . import dispatch
from .rows import FusedOutput, Rows
from .token_ids import without_padding
from .want import Want


def fusible(spec: LossSpec, dtype: torch.dtype) -> bool:
    """Return whether the forward can compute the loss together with its gradient.

    fp16 gradients would underflow, because a GradScaler's factor arrives only in the backward. fp64 is for
    gradcheck and has no such kernel.
    """
    return spec.has_kernel and dtype in (torch.bfloat16, torch.float32)


def differentiable_stats(rows: Rows, want: Want) -> RowStats:
    """Compute the statistics of every row.

    Log-probabilities, entropy and exact KL are differentiable with respect to the logits.
    """
    call = apply if want.shard is None else outside_graphs(apply)
    found = call(RowStatsFunction, (rows.logits,), rows.detach(), want)
    return without_padding(RowStats(**dict(zip(want.outputs, found))), rows.ids)


def fused_loss(rows: Rows, loss: BatchLoss, want: Want) -> tuple[Tensor, Tensor, RowStats]:
    """Compute a loss that does not couple tokens, together with its gradient.

    Returns the value, 0-dim and differentiable, `dlogp` `[B * T]`, and detached statistics.
    """
    value, dlogp, *found = apply(FusedLossFunction, (rows.logits,), rows.detach(), loss, want)
    return value, dlogp, RowStats(**dict(zip(want.outputs, found)))


def new_gradient(logits: Tensor) -> Tensor:
    """Allocate the gradient of the logits `[B, T, V]`."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class RowStatsFunction(torch.autograd.Function):
    """Computes `want.outputs`. Each is a tensor, because torch.compile would miscount if one were None."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, want: Want, origin: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        stats = want.empty_stats(rows.num_rows, rows.dtype, logits.device, for_backward=True)
        dispatch.row_stats(rows, stats)
        stats = want.merged(stats, rows)
        ctx.want, ctx.settings, ctx.origin = want, (rows.transform, rows.backend), origin
        ref_logits = rows.ref_logits if want.kl_gradient else None
        ctx.save_for_backward(*rows._replace(logits=logits, ref_logits=ref_logits).tensors, *stats)
        ctx.set_materialize_grads(False)
        outputs = {name: getattr(stats, name) for name in want.outputs}
        ctx.mark_non_differentiable(*(outputs[name] for name in want.constants if name in outputs))
        return tuple(outputs.values())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        want: Want = ctx.want
        coefficients = want.coefficients(grads)
        if coefficients is None:
            return (None,) * 4
        # Read once, because each read runs the hooks of checkpointing and offloading on all of them.
        saved = ctx.saved_tensors
        stats = RowStats(*saved[-len(RowStats._fields) :])
        rows = Rows(*saved[: -len(stats)], *ctx.settings)
        logits = rows.logits
        out = logits.detach() if want.inplace else new_gradient(logits)
        dispatch.dlogits(rows, stats, coefficients, out)
        if want.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 3


class FusedLossFunction(torch.autograd.Function):
    """A loss whose forward computes the gradient: over the logits if `want.inplace`, else in a new tensor."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, loss: BatchLoss, want: Want, origin: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        stats = want.empty_stats(rows.num_rows, rows.dtype, logits.device, for_backward=False)
        gradient = rows.logits if want.inplace else new_gradient(rows.logits)
        out = FusedOutput(gradient, torch.empty_like(stats.logps), torch.empty_like(stats.logps), stats)
        dispatch.fused_loss(rows, loss, out)
        if want.inplace:
            # The version makes an operation that saved the old logits raise an error, as any in-place
            # operation does.
            torch.autograd.graph.increment_version(logits)
        ctx.inplace, ctx.backend, ctx.origin = want.inplace, rows.backend, origin
        ctx.save_for_backward(logits if want.inplace else gradient)
        constants = [out.dlogp, *(getattr(stats, name) for name in want.outputs)]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return out.value.sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        (gradient,) = ctx.saved_tensors
        if graph_is_kept() and not ctx.inplace:
            gradient = gradient.clone()
        dispatch.scale_rows(gradient, grad, ctx.backend)
        # The buffer now belongs to autograd. In place, the version makes a second backward raise an error.
        torch.autograd.graph.increment_version(gradient)
        return gradient.detach(), *(None,) * 4
