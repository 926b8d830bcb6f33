"""Divergences of rows and their gradient in PyTorch, a few rows at a time, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.divergence import Divergence, terms
from .exponentials import Distribution, row_sum
from .row_chunks import Index, RowChunk
from .rows import MASKED, Rows
from .torch_backend import Pass, clear_masked, zero_rows

PARTS = 4  # measured: 1 MiB of fp32 per thread, times the buffers of `terms`


class Sums(NamedTuple):
    """What turns the logits of both models into probabilities, `[N]` each: fields of `RowStats`."""

    shift: Tensor
    sum_exp: Tensor
    ref_shift: Tensor
    ref_sum_exp: Tensor

    def rows(self, index: Index) -> Sums:
        return Sums(*(x[index] for x in self))


class Compared(NamedTuple):
    """A chunk of both distributions, `[n, V]` each."""

    p: Tensor  # of the student
    q: Tensor  # of the teacher
    x: Tensor  # log(p / q); finite if both are 0
    slope: Tensor | float  # of the student's scaled logit by the raw one, without the factor of the softcap
    capped: Tensor | None  # [n, V]: the student's y / softcap, if there is a softcap


class Scaled(NamedTuple):
    """A chunk of one model's logits. The distribution is softmax(k * y)."""

    y: Tensor  # [n, V]
    k: Tensor | float  # [n, 1] or a number
    slope: Tensor | float
    capped: Tensor | None

    @classmethod
    def of(cls, z: Tensor, model: Distribution, dtype: torch.dtype) -> Scaled:
        y, capped = z.to(dtype), None
        k = slope = model.scale / model.temperature
        if model.softcap is not None:
            capped = torch.tanh(y * (model.scale / model.softcap))
            y, k = capped * model.softcap, 1.0 / model.temperature
        return cls(y, k, slope, capped)

    def d(self, shift: Tensor, out: Tensor) -> Tensor:
        return torch.sub(self.y, shift, out=out).mul_(self.k)


def compare(over: Pass, chunk: RowChunk, sums: Sums) -> Compared:
    """Read a chunk of rows, and return the probabilities of both models and their log-ratio."""
    rows, dtype = over.read(chunk), over.rows.dtype
    shift, sum_exp, ref_shift, ref_sum = (x.unsqueeze(-1) for x in sums.rows(chunk.rows))
    assert rows.ref_z is not None
    student = Scaled.of(rows.z, rows.policy, dtype)
    teacher = Scaled.of(rows.ref_z, rows.reference, dtype)
    p, q, x = (over.scratch.like(name, rows.z, dtype) for name in ("p", "q", "x"))
    student.d(shift, p)
    teacher.d(ref_shift, q)
    if over.rows.transform.same_factor:
        # The difference of two nearly equal logits is exact. If the models' logits differ by a constant,
        # their maxima are subtracted before.
        near = (shift - ref_shift).abs() < 1
        torch.sub(student.y, teacher.y, out=x)
        if x.device.type == "cpu" and bool(near.all()):  # on the CPU, so it does not sync
            x.sub_(shift - ref_shift)
        else:
            start, ref_start = (torch.where(near, 0.0, s) for s in (shift, ref_shift))
            torch.sub(student.y - start, teacher.y - ref_start, out=x)
            x.sub_(torch.where(near, shift - ref_shift, 0.0))
        x.mul_(student.k)
    else:
        torch.sub(p, q, out=x)
    x.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # both logits are -inf
    x.sub_((sum_exp / ref_sum).log())
    p.exp_().div_(sum_exp)
    q.exp_().div_(ref_sum)
    if rows.kept is not None:
        for y in (p, q, x):
            rows.kept.keep(y, out=y)
    return Compared(p, q, x, student.slope, student.capped)


def spare(over: Pass, like: Tensor) -> list[Tensor]:
    """Return the buffers of `terms`."""
    return [over.scratch.like(name, like, like.dtype) for name in ("near", "a", "b")]


def divergence(
    rows: Rows, sums: Sums, needed: Tensor, spec: Divergence, value: Tensor, slope: Tensor
) -> None:
    """Fill `value` and `slope` with the sums of the terms over these columns."""
    over = Pass(rows, needed, parts=PARTS)
    for chunk in over.chunks:
        p, q, x, *_ = compare(over, chunk, sums)
        values, slopes = (over.scratch.like(name, p, p.dtype) for name in ("values", "slopes"))
        terms(p, q, x, spec, value=values, slope=slopes, spare=spare(over, p))
        value[chunk.rows], slope[chunk.rows] = row_sum(values), row_sum(slopes)
    clear_masked((value, slope), needed)


def gradient(
    rows: Rows, sums: Sums, slope: Tensor, coefficient: Tensor, spec: Divergence, out: Tensor
) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with `coefficient` times the gradient."""
    needed = (coefficient != 0) & (rows.targets != MASKED)
    over = Pass(rows, needed, parts=PARTS)
    for chunk in over.chunks:
        p, q, x, factor, capped = compare(over, chunk, sums)
        grad = over.scratch.like("slopes", p, p.dtype)
        terms(p, q, x, spec, value=None, slope=grad, spare=spare(over, p))
        grad.addcmul_(p, slope[chunk.rows].unsqueeze(-1), value=-1)
        grad.mul_(coefficient[chunk.rows].unsqueeze(-1) * factor)
        if capped is not None:
            grad.mul_(1 - capped * capped)
            # The raw logit of a dropped column may be NaN.
            grad.masked_fill_((p == 0) & (q == 0), 0.0)
        chunk.write(out, grad, needed)
    zero_rows(out, needed)
