"""The passes over all chunks: statistics of every row, and the gradients for known coefficients.

If a call is `traced`, a pass is one opaque operator, because the number of chunks depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..checks.scalars import field_values
from ..checks.tensors import OptionalInt, OptionalTensor, traced
from ..spec import LogitTransform
from ..tokens.statistics import Coefficients, RowStats
from ..vocab import dispatch
from ..vocab.rows import MASKED
from .chunks import Chunks
from .config import LinearConfig
from .gradients import GradientSums, HeadGradients
from .head import Head
from .plan import RowPlan
from .rows import LinearRows


def row_stats(rows: LinearRows, out: RowStats) -> None:
    """Fill `out` with the statistics of every row. Masked rows are not run and get zeros."""
    if not traced(rows.targets):
        fill_row_stats(rows, out)
        return
    names, tensors = dispatch.pack_fields(out)
    ops.linear_row_stats(tensors, names, *flatten_rows(rows))


def gradients(
    rows: LinearRows,
    stats: RowStats,
    coefficients: Coefficients,
    out: HeadGradients,
    *,
    add_weight: bool = False,
) -> None:
    """Fill `out` with the gradients. Rows whose coefficients are all zero are not run.

    With `add_weight`, the weight's gradient is added to what `out.dweight` holds.
    """
    if not traced(rows.targets):
        fill_gradients(rows, stats, coefficients, out, add_weight=add_weight)
        return
    out_names, tensors = dispatch.pack_fields(out)
    names, known = dispatch.pack_fields(stats, coefficients)
    flat = flatten_rows(rows)
    ops.linear_gradients(tensors, out_names, add_weight, known, names, *flat)


def fill_row_stats(rows: LinearRows, out: RowStats) -> None:
    rows = rows.cast()
    needed = rows.targets != MASKED
    plan = RowPlan.of(needed, torch.zeros_like(needed), compact=rows.config.compact)._replace(active=0)
    found = RowStats(*(None if x is None else plan.empty_like(x) for x in out))  # type: ignore[arg-type]
    for chunk in Chunks(rows, plan)(0, plan.running):
        dispatch.row_stats(chunk.rows, found.rows(chunk.place))
    for target, x in zip(out, found):
        if target is not None and x is not None:
            plan.restore(x, out=target)


def fill_gradients(
    rows: LinearRows,
    stats: RowStats,
    coefficients: Coefficients,
    out: HeadGradients,
    *,
    add_weight: bool,
) -> None:
    rows = rows.cast()
    active = coefficients.active() & (rows.targets != MASKED)
    plan = RowPlan.of(active, active, compact=rows.config.compact)
    stats, coefficients = plan.take(stats), plan.take(coefficients)
    sums = GradientSums(rows.head, out, plan.selected, add_weight=add_weight)
    for chunk in Chunks(rows, plan)(0, plan.active):
        place = chunk.place
        dispatch.dlogits(chunk.rows, stats.rows(place), coefficients.rows(place), chunk.dlogits)
        sums.add(chunk)
    sums.finish()


# --- Custom operators. They take flat lists, which these functions pack and unpack. ---


def flatten_rows(rows: LinearRows) -> tuple[object, ...]:
    """Return the rows as the last arguments of a custom operator."""
    heads = [*rows.head, *(rows.ref or (None, None, None))]
    transform = rows.transform
    return (
        *(heads, *rows.token_tensors, transform.vocab_size, transform.numbers, rows.backend),
        *field_values(rows.config),
    )


def unflatten(
    heads: Sequence[Tensor | None],
    targets: Tensor,
    temperatures: Tensor | None,
    sampling_mask: Tensor | None,
    ids: Tensor | None,
    vocab_size: int,
    numbers: Sequence[float],
    backend: str,
    config: LinearConfig,
) -> LinearRows:
    """Rebuild the rows from the result of `flatten_rows`."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    assert hidden is not None and weight is not None
    ref = None
    if ref_hidden is not None and ref_weight is not None:
        ref = Head(ref_hidden, ref_weight, ref_bias)
    transform = LogitTransform.from_numbers(vocab_size, numbers)
    head, tensors = Head(hidden, weight, bias), (targets, temperatures, sampling_mask, ids)
    return LinearRows(head, ref, *tensors, transform, backend, config)


def row_stats_operator(
    out: Sequence[Tensor],
    names: str,
    heads: Sequence[OptionalTensor],
    targets: Tensor,
    temperatures: OptionalTensor,
    sampling_mask: OptionalTensor,
    ids: OptionalTensor,
    vocab_size: int,
    numbers: Sequence[float],
    backend: str,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    ref_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk_tokens: OptionalInt,
    compact: bool,
) -> None:
    config = LinearConfig(dtype, logits_dtype, ref_dtype, ref_logits_dtype, chunk_tokens, compact)
    tensors = heads, targets, temperatures, sampling_mask, ids
    rows = unflatten(*tensors, vocab_size, numbers, backend, config)
    fill_row_stats(rows, dispatch.unpack_fields(names, out)[0])


def gradients_operator(
    out: Sequence[Tensor],
    out_names: str,
    add_weight: bool,
    known: Sequence[Tensor],
    names: str,
    heads: Sequence[OptionalTensor],
    targets: Tensor,
    temperatures: OptionalTensor,
    sampling_mask: OptionalTensor,
    ids: OptionalTensor,
    vocab_size: int,
    numbers: Sequence[float],
    backend: str,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    ref_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk_tokens: OptionalInt,
    compact: bool,
) -> None:
    config = LinearConfig(dtype, logits_dtype, ref_dtype, ref_logits_dtype, chunk_tokens, compact)
    tensors = heads, targets, temperatures, sampling_mask, ids
    rows = unflatten(*tensors, vocab_size, numbers, backend, config)
    head_gradients = HeadGradients(**dict(zip(out_names.split(), out)))
    fill_gradients(rows, *dispatch.unpack_fields(names, known), head_gradients, add_weight=add_weight)


torch.library.custom_op(
    add_op_namespace_prefix("linear_row_stats"), row_stats_operator, mutates_args=("out",)
)
torch.library.custom_op(
    add_op_namespace_prefix("linear_gradients"), gradients_operator, mutates_args=("out",)
)
