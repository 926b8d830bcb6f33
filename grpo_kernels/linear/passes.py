"""The passes over all chunks: statistics of every row, and the gradients for known coefficients.

If a call is `traced`, a pass is one opaque operator, because the number of chunks depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..checks.tensors import traced
from ..tokens.statistics import Coefficients, RowStats
from ..vocab import dispatch
from ..vocab.operators import pack_fields, register, unpack_fields
from ..vocab.rows import MASKED
from .chunks import Chunks
from .gradients import GradientSums, HeadGradients
from .operators import LINEAR_ROWS, flatten_rows, unflatten_rows
from .plan import RowPlan
from .rows import LinearRows


def row_stats(rows: LinearRows, out: RowStats) -> None:
    """Fill `out` with the statistics of every row. Masked rows are not run and get zeros."""
    if not traced(rows.targets):
        fill_row_stats(rows, out)
        return
    names, tensors = pack_fields(out)
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
    out_names, tensors = pack_fields(out)
    names, known = pack_fields(stats, coefficients)
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


# --- Operators, which `row_stats` and `gradients` call if a call is traced. ---


def row_stats_operator(out: Sequence[Tensor], names: str, *rows: Any) -> None:
    fill_row_stats(unflatten_rows(*rows), unpack_fields(names, out)[0])


def gradients_operator(
    out: Sequence[Tensor], out_names: str, add_weight: bool, known: Sequence[Tensor], names: str, *rows: Any
) -> None:
    gradients = HeadGradients(**dict(zip(out_names.split(), out)))
    fill_gradients(unflatten_rows(*rows), *unpack_fields(names, known), gradients, add_weight=add_weight)


register("linear_row_stats", row_stats_operator, f"Tensor(a!)[] out, str names, {LINEAR_ROWS}")
register(
    "linear_gradients",
    gradients_operator,
    f"Tensor(a!)[] out, str out_names, bool add_weight, Tensor[] known, str names, {LINEAR_ROWS}",
)
