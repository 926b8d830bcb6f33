"""Rows of logits and statistics as arguments of custom operators, whose schemas have no NamedTuples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..spec import LogitTransform
from ..tokens.statistics import Coefficients, RowStats
from .rows import Rows

ROWS = (
    "Tensor logits, Tensor? ref_logits, Tensor targets, Tensor? temperatures, Tensor? sampling_mask, "
    "Tensor? ids, SymInt vocab_size, float[] numbers, str backend"
)
"""The last arguments of an operator's schema: what `flatten_rows` returns."""


def register(name: str, function: Callable[..., None], arguments: str) -> None:
    """Register an operator without a result. It writes those of its `arguments` that are marked with `!`."""
    written = re.findall(r"!\)\S* (\w+)", arguments)
    full_name, schema = add_op_namespace_prefix(name), f"({arguments}) -> ()"
    torch.library.custom_op(full_name, function, mutates_args=written, schema=schema)


def flatten_rows(rows: Rows) -> tuple[object, ...]:
    return *rows.tensors, rows.transform.vocab_size, rows.transform.numbers, rows.backend


def unflatten_rows(*flat: Any) -> Rows:
    """Rebuild the rows from the result of `flatten_rows`."""
    *tensors, vocab_size, numbers, backend = flat
    return Rows._make((*tensors, LogitTransform.from_numbers(vocab_size, numbers), backend))


def pack_fields(*tuples: Any) -> tuple[str, list[Tensor]]:
    """Return the names and tensors of those fields of NamedTuples that are not None."""
    found = [(name, x) for each in tuples for name, x in each._asdict().items() if x is not None]
    return " ".join(name for name, _ in found), [x for _, x in found]


def unpack_fields(names: str, tensors: Sequence[Tensor]) -> tuple[RowStats, Coefficients]:
    """Rebuild the tuples from the result of `pack_fields`."""
    given = dict(zip(names.split(), tensors))
    stats = RowStats(**{name: x for name, x in given.items() if name in RowStats._fields})
    return stats, Coefficients(**{name: given.get(name) for name in Coefficients._fields})
