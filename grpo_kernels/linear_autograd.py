"""The autograd functions of the linear form, over `N` tokens, `V` words and `H` hidden dimensions.

`LinearLoss` makes loss and gradient in the forward: three matrix products, 6 N V H operations.
`LinearRowStatistics` makes statistics in the forward, for losses whose derivatives come later, and each chunk
of logits once more in the backward: 8 N V H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, linear_passes
from .autograd import RowConfig, apply, first_order, outside_graphs
from .linear import Chunk, Chunks, Gradients, Head, HeadGradients, LinearConfig, RowPlan
from .linear_passes import LinearRows
from .objective import RowStats, TokenInputs, arithmetic_dtype
from .spec import LossSpec


def linear_loss(
    head: Head,
    ref: Head | None,
    targets: Tensor,  # [N]
    temperatures: Tensor | None,  # [N]
    inputs: TokenInputs,
    needed: Tensor,  # [N] bool: the rows to run
    active: Tensor,  # [N] bool: those of them that may have a gradient
    spec: LossSpec,
    config: LinearConfig,
    rows: RowConfig,
) -> tuple[Tensor, Tensor, RowStats]:
    """A token-local loss: its value, 0-dim and differentiable, `dlogp` `[N]`, and constant statistics."""
    plan = RowPlan.of(needed, active, compact=config.compact)
    loss, dlogp, *found = apply(
        LinearLoss, head, ref, targets, temperatures, inputs, spec, plan, config, rows
    )
    return loss, dlogp, RowStats(**dict(zip(rows.outputs, found, strict=True)))


def linear_row_statistics(
    head: Head,
    ref: Head | None,
    targets: Tensor,  # [N]
    temperatures: Tensor | None,  # [N]
    config: LinearConfig,
    rows: RowConfig,
) -> RowStats:
    """Statistics of every row. Log-probability, entropy and exact KL are differentiable by the head."""
    call = apply if rows.shard is None else outside_graphs(apply)
    found = call(LinearRowStatistics, head, ref, targets, temperatures, config, rows)
    return RowStats(**dict(zip(rows.outputs, found, strict=True)))


class LinearLoss(torch.autograd.Function):
    """Returns the loss, `dlogp`, `rows.outputs`; the backward scales the gradient that the forward made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        ref: Head | None,
        targets: Tensor,
        temperatures: Tensor | None,
        inputs: TokenInputs,
        spec: LossSpec,
        plan: RowPlan,
        config: LinearConfig,
        rows: RowConfig,
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        head, ref = linear_passes.cast(Head(hidden, weight, bias), ref, config, rows.transform.vocab_size)
        targets, temperatures, inputs = map(plan.pick, (targets, temperatures, inputs))
        device, split = hidden.device, rows.shard is not None
        stats = rows.empty_stats(plan.running, arithmetic_dtype(hidden), device, for_backward=split)
        # Rows without a gradient have no loss either.
        value, dlogp = torch.zeros_like(stats.logps), torch.zeros_like(stats.logps)
        out = HeadGradients.empty(Head(hidden, weight, bias), ctx.needs_input_grad[:3])
        gradients = Gradients(head, out, plan.selected)
        chunks = Chunks(head, ref, plan, config, rows.shard)
        for chunk in chunks(0, plan.active):
            place = chunk.place
            own = None if temperatures is None else temperatures[place]
            of = chunk, targets[place], own, inputs.rows(place), spec, rows
            chunk_loss(*of, stats.rows(place), value[place], dlogp[place])
            gradients.add(chunk)
        gradients.finish()
        rest = slice(plan.active, plan.running)
        linear_passes.write_stats(chunks(rest.start, rest.stop), targets, stats, temperatures, rows)
        if rows.shard is not None:
            own = None if temperatures is None else temperatures[rest]
            stats.rows(rest).copy_(rows.merged(stats.rows(rest), targets[rest], own))
            rows.shard.sum_over_ranks(out.dhidden)
        ctx.origin = origin
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*out)
        constants = [plan.spread(x) for x in (dlogp, *(getattr(stats, name) for name in rows.outputs))]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return value.sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        found = (
            None if x is None else torch.mul(x, grad, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, *(None,) * 9


def chunk_loss(
    chunk: Chunk,
    targets: Tensor,
    temperatures: Tensor | None,
    inputs: TokenInputs,
    spec: LossSpec,
    rows: RowConfig,
    stats: RowStats,
    value: Tensor,
    dlogp: Tensor,
) -> None:
    """Fills the statistics, each row's share of the loss, its derivative, and `chunk.dlogits`."""
    if rows.shard is None:
        backend.fused_loss(
            chunk.dlogits,
            chunk.logits,
            targets,
            stats,
            value,
            dlogp,
            inputs,
            chunk.ref_logits,
            temperatures,
            rows.transform,
            spec,
            rows.backend,
        )
        return
    # The parts of the vocabulary meet between the statistics and the loss.
    of, how = (chunk.logits, targets, stats), (rows.transform, rows.backend)
    backend.row_stats(*of, chunk.ref_logits, temperatures, *how)
    stats.copy_(rows.merged(stats, targets, temperatures))
    shares, coefficients = backend.row_loss(spec, stats, inputs, None, rows.backend)
    assert coefficients.dlogp is not None
    value.copy_(shares)
    dlogp.copy_(coefficients.dlogp)
    ref_logits = chunk.ref_logits if rows.kl_gradient else None
    backend.dlogits(chunk.dlogits, *of, coefficients, ref_logits, temperatures, *how)


class LinearRowStatistics(torch.autograd.Function):
    """Returns `rows.outputs`; the backward makes the logits of the rows that have a gradient once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        ref: Head | None,
        targets: Tensor,
        temperatures: Tensor | None,
        config: LinearConfig,
        rows: RowConfig,
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        stats = rows.empty_stats(targets.numel(), arithmetic_dtype(hidden), hidden.device, for_backward=True)
        of = LinearRows(Head(hidden, weight, bias), ref, targets, temperatures)
        linear_passes.row_stats(of, stats, config, rows)
        stats = rows.merged(stats, targets, temperatures)
        ctx.config, ctx.rows, ctx.origin = config, rows, origin
        kept = ref if ref is not None and rows.kl_gradient else (None, None, None)
        ctx.save_for_backward(hidden, weight, bias, *kept, targets, temperatures, *stats)
        ctx.set_materialize_grads(False)
        outputs = {name: getattr(stats, name) for name in rows.outputs}
        ctx.mark_non_differentiable(*(outputs[name] for name in rows.constants if name in outputs))
        return tuple(outputs.values())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config, rows = ctx.config, ctx.rows
        coefficients = rows.coefficients(grads)
        if coefficients is None:
            return (None,) * 9
        # Once only: checkpoints and offloading hooks fetch all of them each time.
        hidden, weight, bias, *saved = ctx.saved_tensors
        head, ref = Head(hidden, weight, bias), None if saved[0] is None else Head(*saved[:3])
        of, stats = LinearRows(head, ref, *saved[3:5]), RowStats(*saved[5:])
        out = HeadGradients.empty(head, ctx.needs_input_grad[:3])
        linear_passes.gradients(of, stats, coefficients, out, config, rows)
        if rows.shard is not None:
            rows.shard.sum_over_ranks(out.dhidden)
        found = (
            None if x is None or like is None else x.to(like.dtype) for x, like in zip(out, head, strict=True)
        )
        return *found, *(None,) * 6
