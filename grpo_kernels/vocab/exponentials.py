"""The exponentials of a chunk of rows in PyTorch, and sums over them.

The column of the taken token is left out of every sum over a row. Its term is added afterwards. So the
other tokens are summed by themselves, and keep their digits if the taken token has nearly all the
probability.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import arithmetic_dtype
from .row_chunks import Index, Scratch
from .sampling_mask import KeptColumns

LEFT_OUT = -1e4
"""Stands for the logarithm of the taken token's exponential in a row. Its exponential is 0."""


class Taken(NamedTuple):
    """The columns of the taken tokens."""

    column: Tensor  # [n, 1]; that of another token if it is not in these columns
    valid: Tensor | None  # [n]; whether it is; None if it always is

    @classmethod
    def of(cls, targets: Tensor, width: int, needed: Tensor) -> Taken:
        """Return the columns of all rows of a pass. Only the `needed` ones will be used."""
        column = targets.clamp(0, width - 1)
        valid = column == targets
        if targets.device.type == "cpu" and bool((valid | ~needed).all()):  # on the CPU, so it does not sync
            return cls(column.unsqueeze(-1), None)
        return cls(column.unsqueeze(-1), valid)

    def rows(self, index: Index) -> Taken:
        return Taken(self.column[index], None if self.valid is None else self.valid[index])

    def read(self, x: Tensor) -> Tensor:
        """Return the entries `[n]` of `x` `[n, V]`, NaN for a token that is not in these columns."""
        found = x.gather(-1, self.column).squeeze(-1)
        return found if self.valid is None else torch.where(self.valid, found, torch.nan)

    def write(self, x: Tensor, value: Tensor | float) -> None:
        """Write `value`, a number or `[n]`, to the entries of `x` `[n, V]`."""
        if self.valid is not None:
            value = torch.where(self.valid, value, x.gather(-1, self.column).squeeze(-1))
        if isinstance(value, Tensor):
            x.scatter_(-1, self.column, value.unsqueeze(-1))
        else:
            x.scatter_(-1, self.column, value)


class Exponentials(NamedTuple):
    """A chunk of one distribution: `d = k * (y - row_max)`, `e = exp(d)`.

    At the taken token `d` is LEFT_OUT, and `e` is 0. `e` is 0 at a column that was not kept, too.
    """

    d: Tensor  # [n, V]; the same tensor as `e` if only `e` is wanted
    e: Tensor  # [n, V]
    row_max: Tensor  # [n]
    taken_d: Tensor  # [n], of the taken token; NaN if it is not in these columns
    taken_e: Tensor  # [n]; 0 if it is not in these columns
    slope: Tensor | float  # dd/dz, without the factor of the softcap; [n, 1] or a number
    capped: Tensor | None  # [n, V]: y / softcap, if there is a softcap
    kept: KeptColumns | None  # if there is a sampling mask

    def normalizer(self) -> tuple[Tensor, Tensor]:
        """Return the sum of the exponentials, `[n]`, and its logarithm.

        If the taken token is the likeliest, the logarithm is log1p of the sum of the others.
        """
        others = row_sum(self.e)
        total = others + self.taken_e
        return total, torch.where(self.taken_d == 0, torch.log1p(others), total.log())

    def sum_of(self, x: Tensor, taken_x: Tensor, scratch: Scratch, out: Tensor) -> Tensor:
        """Sum `e * x` over each row. `x` is `[n, V]`, and `taken_x` `[n]` its value at the taken token.

        If `e` is 0, the product counts as 0, although `x` may be infinite. `out` `[n, V]` is overwritten.
        """
        torch.mul(self.e, x, out=out)
        if not scratch.has_infinities:
            total = row_sum(out) + self.taken_e * taken_x
            if not total.isnan().any():  # only on the CPU (see `Pass`), so it does not sync
                return total
            scratch.has_infinities = True
        out.masked_fill_(self.e == 0, 0.0)
        return row_sum(out) + torch.where(self.taken_e > 0, self.taken_e * taken_x, 0.0)

    def times_softcap_slope(self, grad: Tensor) -> Tensor:
        """Multiply `grad` by the derivative of the softcap, `1 - (y / softcap)^2`, and return it."""
        if self.capped is None:
            return grad
        return grad.mul_(self.capped.mul_(self.capped).neg_().add_(1.0))


class Distribution(NamedTuple):
    """How one model's raw logits become a distribution."""

    name: str  # of its buffers
    scale: float
    softcap: float | None
    temperature: Tensor | float  # [n, 1], or a number for all rows

    def exponentials(
        self,
        z: Tensor,
        row_max: Tensor | None,
        taken: Taken,
        scratch: Scratch,
        kept: KeptColumns | None = None,
        *,
        keep_d: bool = False,
        out: Tensor | None = None,
        reference: Exponentials | None = None,
    ) -> Exponentials:
        """Return the exponentials of raw logits `z` `[n, V]`. The row maxima are computed if None.

        `e` is in `out`, which may be `z`, or in a buffer of `scratch`. Other tensors are in buffers. If
        `reference` is given, its `d` becomes this `d` minus it.
        """
        dtype = arithmetic_dtype(z)
        e = scratch.like(f"{self.name} e", z, dtype) if out is None else out
        y, capped = z if z.dtype == dtype else e.copy_(z), None
        k: Tensor | float = self.scale / self.temperature
        slope = k
        if self.softcap is not None:
            capped = torch.mul(
                y, self.scale / self.softcap, out=scratch.like(f"{self.name} capped", z, dtype)
            ).tanh_()
            y = torch.mul(capped, self.softcap, out=e)
            k = 1.0 / self.temperature
        d = scratch.like(f"{self.name} d", z, dtype) if keep_d else e
        if kept is not None:
            y = kept.keep(y, out=d)
        if row_max is None:
            # Finite, so that a part of the vocabulary with only -inf sums to 0 instead of NaN.
            row_max = y.amax(-1) if kept is None else kept.amax(y)
            row_max = row_max.clamp_(min=torch.finfo(dtype).min)
        torch.sub(y, row_max.unsqueeze(-1), out=d)
        if isinstance(k, Tensor) or k != 1.0:
            d *= k
        taken_d = taken.read(d)
        if kept is not None:
            taken_d = torch.where(kept.has(taken.column), taken_d, -torch.inf)
        taken_e = taken_d.exp() if taken.valid is None else torch.where(taken.valid, taken_d.exp(), 0.0)
        taken.write(d, LEFT_OUT)
        if reference is not None:
            torch.sub(d, reference.d, out=reference.d)
        e = torch.exp(d, out=e)
        if kept is not None:
            kept.keep(e, out=e)
        return Exponentials(d, e, row_max, taken_d, taken_e, slope, capped, kept)


def row_sum(x: Tensor) -> Tensor:
    """Sum `[n, V]` to `[n]`, so that the bits of a row's sum do not depend on the other rows.

    PyTorch would divide a single long row among its threads, and add in another order. So a single row is
    summed twice, as two rows.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)
