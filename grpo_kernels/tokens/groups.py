"""Groups of completions by id, such as those of one prompt, and sums over them, without a device sync."""

from __future__ import annotations

import torch
from torch import Tensor


def number_groups(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each id's group, `[B]` from 0 on, and how many groups there are, 0-dim.

    `torch.unique` would sync, because its shape depends on values.
    """
    ordered, order = ids.to(torch.int64).sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    numbers = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    return numbers, first.sum()


def group_sum(x: Tensor, groups: Tensor) -> Tensor:
    """Return for each element of `x` `[B]` the sum over its group, `[B]`.

    `groups` are numbers below `B`. On a GPU, floats are summed in an undefined order.
    """
    return torch.zeros_like(x).index_add(0, groups, x)[groups]


def group_extreme(x: Tensor, groups: Tensor, which: str) -> Tensor:
    """Return for each element of `x` `[B]` the maximum ("amax") or minimum ("amin") of its group, `[B]`."""
    return torch.zeros_like(x).scatter_reduce(0, groups, x, which, include_self=False)[groups]
