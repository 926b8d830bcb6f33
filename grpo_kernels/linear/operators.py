"""Rows that are computed from hidden states, as arguments of custom operators."""

from __future__ import annotations

from typing import Any

from ..checks.scalars import field_values
from ..spec import LogitTransform
from .config import LinearConfig
from .head import Head
from .rows import LinearRows

LINEAR_ROWS = (
    "Tensor?[] heads, Tensor targets, Tensor? temperatures, Tensor? sampling_mask, Tensor? ids, "
    "SymInt vocab_size, float[] numbers, str backend, ScalarType dtype, ScalarType logits_dtype, "
    "ScalarType ref_dtype, ScalarType ref_logits_dtype, SymInt? chunk_tokens, bool compact"
)
"""The last arguments of an operator's schema: what `flatten_rows` returns."""


def flatten_rows(rows: LinearRows) -> tuple[object, ...]:
    heads, transform = [*rows.head, *(rows.ref or (None, None, None))], rows.transform
    flat = heads, *rows.token_tensors, transform.vocab_size, transform.numbers, rows.backend
    return *flat, *field_values(rows.config)


def unflatten_rows(heads: Any, *flat: Any) -> LinearRows:
    """Rebuild the rows from the result of `flatten_rows`."""
    *tensors, vocab_size, numbers, backend = flat[:7]
    ref = None if heads[3] is None else Head(*heads[3:])
    transform, config = LogitTransform.from_numbers(vocab_size, numbers), LinearConfig(*flat[7:])
    return LinearRows._make((Head(*heads[:3]), ref, *tensors, transform, backend, config))
