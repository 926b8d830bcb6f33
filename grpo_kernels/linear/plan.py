"""Which rows of the linear form are run, and in what order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowPlan(NamedTuple):
    """The rows to run, those with a gradient first."""

    total: int
    running: int  # rows that are run
    active: int  # of these, rows that have a gradient
    order: Tensor | None = None  # [running] int64; None: all rows in their own order
    selected: Tensor | None = None  # [total] bool: rows with a gradient; None: the first `active`

    @classmethod
    def of(cls, needed: Tensor, active: Tensor, *, compact: bool) -> RowPlan:
        """Plan which rows to run: those `needed`, `[N]` bool. Those that are `active` have a gradient.

        Unless `compact`, all rows are run as if they had a gradient.
        """
        total = needed.numel()
        if not compact:
            return cls(total, total, total, selected=active)
        # The only sync of a pass reads how many rows to multiply. compact=False avoids it.
        with_gradient, running = torch.stack([active.sum(), needed.sum()]).tolist()
        if running == total and with_gradient in (0, total):
            return cls(total, running, with_gradient)
        order = (needed.to(torch.int8) + active).sort(descending=True, stable=True).indices[:running]
        return cls(total, running, with_gradient, order)

    def take(self, x: Any) -> Any:
        """Return `x` `[N]` in the plan's order: a tensor, a tuple with a method `rows`, or None."""
        if x is None or self.order is None:
            return x
        return x[self.order] if isinstance(x, Tensor) else x.rows(self.order)

    def empty_like(self, x: Tensor) -> Tensor:
        """Return an empty tensor `[running, ...]` for values in the plan's order. If `order` is None, `x`."""
        return x if self.order is None else x.new_empty(self.running, *x.shape[1:])

    def restore(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `x` `[running, ...]` in the original order, `[N, ...]`, with 0 for rows that are not run."""
        if self.order is None:
            return x
        out = x.new_empty(self.total, *x.shape[1:]) if out is None else out
        return out.zero_().index_copy_(0, self.order, x)
