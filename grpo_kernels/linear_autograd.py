"""The autograd functions of the linear form, over `N` tokens, `V` words and `H` hidden dimensions.

`LinearLoss` makes loss and gradient in the forward: three matrix products, 6 N V H operations.
`LinearRowStatistics` makes statistics in the forward, for losses whose derivatives come later, and each chunk
of logits once more in the backward: 8 N V H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backend
from .autograd import RowConfig, first_order
from .linear import Chunk, Chunks, Gradients, Head, LinearConfig, RowPlan
from .objective import MASKED, RowStats, TokenInputs, arithmetic_dtype
from .spec import LossSpec

T = TypeVar("T")


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compile` breaks its graph here: how many chunks there are depends on the data.

    `torch.compiler.disable` would import the compiler, and Triton with it, beside this package.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> T:
        call = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return call(*args)

    return wrapper


@outside_graphs
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
    loss, dlogp, *found = LinearLoss.apply(
        *head, ref, targets, temperatures, inputs, spec, plan, config, rows
    )
    return loss, dlogp, RowStats(**dict(zip(rows.outputs, found, strict=True)))


@outside_graphs
def linear_row_statistics(
    head: Head,
    ref: Head | None,
    targets: Tensor,  # [N]
    temperatures: Tensor | None,  # [N]
    needed: Tensor,  # [N] bool: the rows to run
    config: LinearConfig,
    rows: RowConfig,
) -> RowStats:
    """Statistics of every row. Log-probability, entropy and exact KL are differentiable by the head."""
    plan = RowPlan.of(needed, torch.zeros_like(needed), compact=config.compact)._replace(active=0)
    found = LinearRowStatistics.apply(*head, ref, targets, temperatures, plan, config, rows)
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
    ) -> tuple[Tensor, ...]:
        head, ref = cast(Head(hidden, weight, bias), ref, config, rows)
        targets, temperatures, inputs = map(plan.pick, (targets, temperatures, inputs))
        stats = rows.empty_stats(plan.running, arithmetic_dtype(hidden), hidden.device, for_backward=False)
        # Rows without a gradient have no loss either.
        value, dlogp = torch.zeros_like(stats.logps), torch.zeros_like(stats.logps)
        gradients = Gradients(head, wanted(ctx, hidden, weight, bias), plan.selected)
        chunks = Chunks(head, ref, plan, config)
        for chunk in chunks(0, plan.active):
            place = chunk.place
            backend.fused_loss(
                chunk.dlogits,
                chunk.logits,
                targets[place],
                stats.rows(place),
                value[place],
                dlogp[place],
                inputs.rows(place),
                chunk.ref_logits,
                None if temperatures is None else temperatures[place],
                rows.transform,
                spec,
                rows.backend,
            )
            gradients.add(chunk)
        write_stats(chunks(plan.active, plan.running), targets, stats, temperatures, rows)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients.finish())
        constants = [plan.spread(x) for x in (dlogp, *(getattr(stats, name) for name in rows.outputs))]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return value.sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        found = (
            None if x is None else torch.mul(x, grad, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, *(None,) * 8


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
        plan: RowPlan,
        config: LinearConfig,
        rows: RowConfig,
    ) -> tuple[Tensor, ...]:
        head, ref = cast(Head(hidden, weight, bias), ref, config, rows)
        ordered = rows.empty_stats(plan.running, arithmetic_dtype(hidden), hidden.device, for_backward=True)
        chunks = Chunks(head, ref, plan, config)
        write_stats(chunks(0, plan.running), plan.pick(targets), ordered, plan.pick(temperatures), rows)
        stats = RowStats(*(None if x is None else plan.spread(x) for x in ordered))  # type: ignore[arg-type]
        ctx.config, ctx.rows = config, rows
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
        ref, (targets, temperatures), stats = saved[:3], saved[3:5], RowStats(*saved[5:])
        active = coefficients.active() & (targets != MASKED)
        plan = RowPlan.of(active, active, compact=config.compact)
        targets, temperatures, stats, coefficients = map(
            plan.pick, (targets, temperatures, stats, coefficients)
        )
        reference = None if ref[0] is None else Head(*ref)
        head, reference = cast(Head(hidden, weight, bias), reference, config, rows)
        gradients = Gradients(head, wanted(ctx, hidden, weight, bias), plan.selected)
        chunks = Chunks(head, reference, plan, config)
        for chunk in chunks(0, plan.active):
            place = chunk.place
            backend.dlogits(
                chunk.dlogits,
                chunk.logits,
                targets[place],
                stats.rows(place),
                coefficients.rows(place),
                chunk.ref_logits,
                None if temperatures is None else temperatures[place],
                rows.transform,
                rows.backend,
            )
            gradients.add(chunk)
        found = (
            None if x is None else x.to(like.dtype)
            for x, like in zip(gradients.finish(), (hidden, weight, bias), strict=True)
        )
        return *found, *(None,) * 6


def cast(head: Head, ref: Head | None, config: LinearConfig, rows: RowConfig) -> tuple[Head, Head | None]:
    vocab_size = rows.transform.vocab_size
    return head.to(config.dtype, vocab_size), None if ref is None else ref.to(config.ref_dtype, vocab_size)


def wanted(ctx: Any, *tensors: Tensor | None) -> list[torch.Size | None]:
    """Shapes of the first inputs, where their gradient is wanted."""
    needs = zip(tensors, ctx.needs_input_grad, strict=False)
    return [x.shape if x is not None and needed else None for x, needed in needs]


def write_stats(
    chunks: Iterator[Chunk], targets: Tensor, out: RowStats, temperatures: Tensor | None, rows: RowConfig
) -> None:
    for chunk in chunks:
        backend.row_stats(
            chunk.logits,
            targets[chunk.place],
            out.rows(chunk.place),
            chunk.ref_logits,
            None if temperatures is None else temperatures[chunk.place],
            rows.transform,
            rows.backend,
        )
