"""Divergences of rows and their gradient in PyTorch, a few rows at a time, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.divergence import Divergence, slope_terms, value_terms
from .exponentials import Distribution, row_sum
from .row_chunks import Index, RowChunk
from .rows import MASKED, Rows
from .torch_backend import Pass, clear_masked, zero_rows


class Sums(NamedTuple):
    """What turns the logits of both models into probabilities, `[N]` each: fields of `RowStats`."""

    shift: Tensor
    sum_exp: Tensor
    ref_shift: Tensor
    ref_sum_exp: Tensor

    def rows(self, index: Index) -> Sums:
        return Sums(*(x[index] for x in self))


class Scaled(NamedTuple):
    """A chunk of one model's logits. The distribution is softmax(k * y)."""

    y: Tensor  # [n, V]
    k: Tensor | float  # [n, 1] or a number
    slope: Tensor | float  # of k * y by the raw logit, without the factor of the softcap
    capped: Tensor | None  # [n, V]: y / softcap, if there is a softcap

    @classmethod
    def of(cls, z: Tensor, model: Distribution, dropped: Tensor | None, dtype: torch.dtype) -> Scaled:
        y, capped = z.to(dtype), None
        k = slope = model.scale / model.temperature
        if model.softcap is not None:
            capped = torch.tanh(y * (model.scale / model.softcap))
            y, k = capped * model.softcap, 1.0 / model.temperature
        if dropped is not None:
            y = torch.where(dropped, -torch.inf, y)
        return cls(y, k, slope, capped)

    def d(self, shift: Tensor) -> Tensor:
        return (self.y - shift) * self.k


class Compared(NamedTuple):
    """A chunk of both distributions, `[n, V]` each."""

    p: Tensor  # of the student
    q: Tensor  # of the teacher
    x: Tensor  # log(p / q); NaN if both are 0
    student: Scaled


def compare(over: Pass, chunk: RowChunk, sums: Sums) -> Compared:
    """Read a chunk of rows, and return the probabilities of both models and their log-ratio."""
    rows, dtype = over.read(chunk), over.rows.dtype
    shift, sum_exp, ref_shift, ref_sum = (x.unsqueeze(-1) for x in sums.rows(chunk.rows))
    assert rows.ref_z is not None
    dropped = None if rows.kept is None else rows.kept.ones == 0
    p = Scaled.of(rows.z, rows.policy, dropped, dtype)
    q = Scaled.of(rows.ref_z, rows.reference, dropped, dtype)
    if over.rows.transform.same_factor:
        # The difference of two nearly equal logits is exact. If the models' logits differ by a constant,
        # their maxima are subtracted before.
        near = (shift - ref_shift).abs() < 1
        start, ref_start = (torch.where(near, 0.0, s) for s in (shift, ref_shift))
        x = (p.y - start).sub_(q.y - ref_start).sub_(torch.where(near, shift - ref_shift, 0.0)).mul_(p.k)
    else:
        x = p.d(shift) - q.d(ref_shift)
    x.sub_((sum_exp / ref_sum).log())
    return Compared(p.d(shift).exp_() / sum_exp, q.d(ref_shift).exp_() / ref_sum, x, p)


def divergence(
    rows: Rows, sums: Sums, needed: Tensor, spec: Divergence, value: Tensor, slope: Tensor
) -> None:
    """Fill `value` and `slope` with the sums of the terms over these columns."""
    over = Pass(rows, needed)
    for chunk in over.chunks:
        p, q, x, _ = compare(over, chunk, sums)
        value[chunk.rows] = row_sum(value_terms(p, q, x, spec))
        slope[chunk.rows] = row_sum(slope_terms(p, q, x, spec))
    clear_masked((value, slope), needed)


def gradient(
    rows: Rows, sums: Sums, slope: Tensor, coefficient: Tensor, spec: Divergence, out: Tensor
) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with `coefficient` times the gradient."""
    needed = (coefficient != 0) & (rows.targets != MASKED)
    over = Pass(rows, needed)
    for chunk in over.chunks:
        p, q, x, student = compare(over, chunk, sums)
        grad = slope_terms(p, q, x, spec).sub_(p * slope[chunk.rows].unsqueeze(-1))
        grad *= coefficient[chunk.rows].unsqueeze(-1) * student.slope
        if student.capped is not None:
            grad *= 1 - student.capped * student.capped
            # The raw logit of a dropped column may be NaN.
            grad.masked_fill_((p == 0) & (q == 0), 0.0)
        chunk.write(out, grad, needed)
    zero_rows(out, needed)
