"""The autograd functions of the linear form. `N` tokens, `V` vocabulary entries, `H` hidden dimensions.

`LinearLossFunction` computes loss and gradient in the forward: three matrix products, 6 N V H FLOPs.
`LinearRowStatsFunction` computes statistics in the forward, for losses whose derivatives are known later, and
computes each chunk of logits again in the backward: 8 N V H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens import dispatch as tokens
from ..tokens.differentiation import apply, first_order, graph_is_kept, outside_graphs
from ..tokens.loss import BatchLoss
from ..tokens.statistics import RowStats
from ..vocab import dispatch
from ..vocab.rows import FusedOutput, Rows
from ..vocab.token_ids import without_padding
from ..vocab.want import Want
from . import passes
from .chunks import Chunks
from .gradients import GradientSums, HeadGradients
from .head import Head
from .plan import RowPlan
from .rows import LinearRows


def linear_loss(
    rows: LinearRows, loss: BatchLoss, plan: RowPlan, want: Want
) -> tuple[Tensor, Tensor, RowStats]:
    """Compute a loss that does not couple tokens, together with its gradient, in the forward.

    Returns the value, 0-dim and differentiable, `dlogp` `[N]`, and detached statistics.
    """
    value, dlogp, *found = apply(LinearLossFunction, rows.head, rows.detach(), loss, plan, want)
    return value, dlogp, RowStats(**dict(zip(want.outputs, found)))


def differentiable_stats(rows: LinearRows, want: Want, accumulate_into: Tensor | None = None) -> RowStats:
    """Compute the statistics of every row.

    Log-probabilities, entropy and exact KL are differentiable with respect to the head. If
    `accumulate_into` is given, the backward adds the weight's gradient to it, and autograd gets none.
    """
    plain = want.shard is None and accumulate_into is None
    call = apply if plain else outside_graphs(apply)
    found = call(LinearRowStatsFunction, rows.head, rows.detach(), want, accumulate_into)
    return without_padding(RowStats(**dict(zip(want.outputs, found))), rows.ids)


class LinearLossFunction(torch.autograd.Function):
    """Returns the loss, `dlogp` and `want.outputs`. The forward computes the gradient too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        rows: LinearRows,
        loss: BatchLoss,
        plan: RowPlan,
        want: Want,
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        head, rows = rows.head, rows.cast()
        inputs = plan.take(loss.inputs)
        shard = want.shard
        stats = want.empty_stats(plan.running, rows.dtype, hidden.device, for_backward=shard is not None)
        # Rows without a gradient have no loss either.
        value, dlogp = torch.zeros_like(stats.logps), torch.zeros_like(stats.logps)
        needed = ctx.needs_input_grad[:3]
        chunks = Chunks(rows, plan, shard, reserved=4 * weight.numel() if needed[1] else 0)
        # A single chunk's gradient is no sum over chunks: it is computed in the dtype that is returned.
        single = plan.active <= chunks.size and rows.config.dtype == weight.dtype
        out = HeadGradients.empty(head, needed, weight.dtype if single else None)
        sums = GradientSums(rows.head, out, plan.selected)
        for chunk in chunks(0, plan.active):
            place = chunk.place
            chunk_out = FusedOutput(chunk.dlogits, value[place], dlogp[place], stats.rows(place))
            chunk_loss(chunk.rows, BatchLoss(loss.spec, inputs.rows(place)), chunk_out, want)
            sums.add(chunk)
        sums.finish()
        for chunk in chunks(plan.active, plan.running):
            chunk_stats = stats.rows(chunk.place)
            dispatch.row_stats(chunk.rows, chunk_stats)
            if shard is not None:
                chunk_stats.copy_(want.merged(chunk_stats, chunk.rows))
        if shard is not None:
            shard.sum_over_ranks(out.dhidden)
        ctx.origin, ctx.backend = origin, rows.backend
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*out)
        constants = [plan.restore(x) for x in (dlogp, *(getattr(stats, name) for name in want.outputs))]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return value.sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        found = (
            None if x is None else scaled(x, grad, dtype, ctx.backend)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *found, *(None,) * 5


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return `factor * x` in `dtype`, if possible in the memory of `x`, which was saved for the backward."""
    if x.dtype != dtype or graph_is_kept():
        return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
    dispatch.scale_rows(torch.atleast_2d(x).unsqueeze(0), factor, backend)
    return x


def chunk_loss(rows: Rows, loss: BatchLoss, out: FusedOutput, want: Want) -> None:
    """Compute statistics, loss and gradient of a chunk into `out`."""
    if want.shard is None:
        dispatch.fused_loss(rows, loss, out)
        return
    # Between the statistics and the loss, the ranks merge their parts of the vocabulary.
    dispatch.row_stats(rows, out.stats)
    out.stats.copy_(want.merged(out.stats, rows))
    values, coefficients = tokens.token_losses(loss, out.stats, rows.backend)
    assert coefficients.dlogp is not None
    out.value.copy_(values)
    out.dlogp.copy_(coefficients.dlogp)
    rows = rows if want.kl_gradient else rows._replace(ref_logits=None)
    dispatch.dlogits(rows, out.stats, coefficients, out.dlogits)


class LinearRowStatsFunction(torch.autograd.Function):
    """Returns `want.outputs`. The backward computes the logits of the rows that have a gradient again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        rows: LinearRows,
        want: Want,
        accumulate_into: Tensor | None,  # [V, H]
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        stats = want.empty_stats(rows.num_rows, rows.dtype, hidden.device, for_backward=True)
        passes.row_stats(rows, stats)
        if want.shard is not None:
            stats = want.merged(stats, rows)
        ctx.want, ctx.origin = want, origin
        # Not a saved tensor, because another micro-batch may write it before this one's backward.
        ctx.accumulate_into = accumulate_into
        ctx.settings = rows.transform, rows.backend, rows.config
        ref = rows.ref if rows.ref is not None and want.kl_gradient else (None, None, None)
        ctx.save_for_backward(hidden, weight, bias, *ref, *rows.token_tensors, *stats)
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
            return (None,) * 7
        # Read once, because each read runs the hooks of checkpointing and offloading on all of them.
        hidden, weight, bias, *saved = ctx.saved_tensors
        head, ref = Head(hidden, weight, bias), None if saved[0] is None else Head(*saved[:3])
        stats = RowStats(*saved[-len(RowStats._fields) :])
        rows = LinearRows(head, ref, *saved[3 : -len(stats)], *ctx.settings)
        total, needed = ctx.accumulate_into, ctx.needs_input_grad[:3]
        if total is None:
            out = HeadGradients.empty(head, needed)
        else:
            out = HeadGradients.empty(head, (needed[0], False, needed[2]))._replace(dweight=total)
        passes.gradients(rows, stats, coefficients, out, add_weight=total is not None)
        if want.shard is not None:
            want.shard.sum_over_ranks(out.dhidden)
        if total is not None:
            out = out._replace(dweight=None)
        found = (None if x is None or source is None else x.to(source.dtype) for x, source in zip(out, head))
        return *found, *(None,) * 4
