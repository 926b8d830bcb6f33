"""The passes of the linear form over all chunks: statistics, and the gradients of known coefficients.

If a call is `traced`, a pass is one opaque operator, because the number of chunks depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .autograd import RowConfig
from .checks import values
from .linear import Chunk, Chunks, Gradients, Head, HeadGradients, LinearConfig, RowPlan
from .objective import MASKED, Coefficients, RowStats
from .spec import LogitTransform


class LinearRows(NamedTuple):
    """What both passes know of the rows."""

    head: Head
    ref: Head | None
    targets: Tensor  # [N]
    temperatures: Tensor | None  # [N]


def row_stats(of: LinearRows, out: RowStats, config: LinearConfig, rows: RowConfig) -> None:
    """Fills `out` with the statistics of every row; masked rows are not run and get zeros."""
    run(of, out, (), config, rows)


def gradients(
    of: LinearRows,
    stats: RowStats,
    coefficients: Coefficients,
    out: HeadGradients,
    config: LinearConfig,
    rows: RowConfig,
) -> None:
    """Fills `out`; rows whose coefficients are all zero are not run."""
    run(of, out, (stats, coefficients), config, rows)


def run(
    of: LinearRows, out: NamedTuple, known: tuple[NamedTuple, ...], config: LinearConfig, rows: RowConfig
) -> None:
    """Flat, as an operator takes it: the tensors that are there, and their names."""
    traced = backend.traced(of.targets)
    call: Callable[..., None] = torch.ops.grpo_kernels.linear_pass if traced else _linear_pass
    factors = [*of.head, *(of.ref or (None, None, None))]
    call(
        *present(out), *present(*known), factors, of.targets, of.temperatures,
        *values(config), *values(rows.transform), rows.backend,
    )  # fmt: skip


def present(*tuples: Any) -> tuple[list[Tensor], str]:
    found = [(n, x) for each in tuples for n, x in each._asdict().items() if x is not None]
    return [x for _, x in found], " ".join(name for name, _ in found)


def _linear_pass(
    out: Sequence[Tensor],
    out_names: str,
    known: Sequence[Tensor],
    known_names: str,
    factors: Sequence[Tensor | None],
    targets: Tensor,
    temperatures: Tensor | None,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    ref_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    compact: bool,
    vocab_size: int,
    scale: float,
    softcap: float | None,
    ref_scale: float,
    ref_softcap: float | None,
    temperature: float,
    backend: str,
) -> None:
    config = LinearConfig(dtype, logits_dtype, ref_dtype, ref_logits_dtype, chunk_tokens, compact)
    transform = LogitTransform(vocab_size, scale, softcap, ref_scale, ref_softcap, temperature)
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = factors
    assert hidden is not None and weight is not None
    head, ref = Head(hidden, weight, bias), None
    if ref_hidden is not None and ref_weight is not None:
        ref = Head(ref_hidden, ref_weight, ref_bias)
    of = LinearRows(*cast(head, ref, config, vocab_size), targets, temperatures)
    to = dict(zip(out_names.split(), out, strict=True))
    if not known:
        write_all_stats(of, RowStats(**to), config, RowConfig(transform, backend))
        return
    given = dict(zip(known_names.split(), known, strict=True))
    stats = RowStats(**{name: x for name, x in given.items() if name in RowStats._fields})
    coefficients = Coefficients(**{name: given.get(name) for name in Coefficients._fields})
    write_gradients(of, stats, coefficients, HeadGradients(**to), config, RowConfig(transform, backend))


torch.library.custom_op("grpo_kernels::linear_pass", _linear_pass, mutates_args=("out",))


def write_all_stats(of: LinearRows, out: RowStats, config: LinearConfig, rows: RowConfig) -> None:
    needed = of.targets != MASKED
    plan = RowPlan.of(needed, torch.zeros_like(needed), compact=config.compact)._replace(active=0)
    found = RowStats(*(None if x is None else plan.empty_like(x) for x in out))  # type: ignore[arg-type]
    chunks = Chunks(of.head, of.ref, plan, config)(0, plan.running)
    write_stats(chunks, plan.pick(of.targets), found, plan.pick(of.temperatures), rows)
    for to, x in zip(out, found, strict=True):
        if to is not None and x is not None:
            plan.spread(x, out=to)


def write_gradients(
    of: LinearRows,
    stats: RowStats,
    coefficients: Coefficients,
    out: HeadGradients,
    config: LinearConfig,
    rows: RowConfig,
) -> None:
    active = coefficients.active() & (of.targets != MASKED)
    plan = RowPlan.of(active, active, compact=config.compact)
    targets, temperatures, stats, coefficients = map(
        plan.pick, (of.targets, of.temperatures, stats, coefficients)
    )
    gradients = Gradients(of.head, out, plan.selected)
    for chunk in Chunks(of.head, of.ref, plan, config)(0, plan.active):
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
    gradients.finish()


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


def cast(head: Head, ref: Head | None, config: LinearConfig, vocab_size: int) -> tuple[Head, Head | None]:
    return head.to(config.dtype, vocab_size), None if ref is None else ref.to(config.ref_dtype, vocab_size)
