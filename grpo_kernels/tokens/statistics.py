"""Statistics of rows of logits, and the derivatives of the loss with respect to them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of each row of logits, `[N]` unless said otherwise. None if they were not requested.

    Log-probabilities, entropy and KL are in nats. With a softcap, `shift` is the row's largest
    softcapped logit before the temperature. Without one, it is the row's largest raw logit. `sum_exp` is the
    sum of the exponentials relative to `shift`. In fp32, a single logsumexp would lose digits if the row is
    far from zero.
    """

    logps: Tensor
    shift: Tensor | None = None
    sum_exp: Tensor | None = None
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_shift: Tensor | None = None
    ref_sum_exp: Tensor | None = None
    kl: Tensor | None = None  # KL(policy || reference)
    kl_forward: Tensor | None = None  # KL(reference || policy)
    top1: Tensor | None = None  # 1 if no token is likelier than the taken one, else 0
    id_logps: Tensor | None = None  # [N, K], of several tokens per row; `logps` are then of the likeliest

    def detach(self) -> RowStats:
        return RowStats(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def rows(self, index: Tensor | slice) -> RowStats:
        return RowStats(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]

    def copy_(self, other: RowStats) -> None:
        """Copy the fields of `other` into those of `self`. A field that is None in either is skipped."""
        for target, x in zip(self, other):
            if target is not None and x is not None:
                target.copy_(x)


class Coefficients(NamedTuple):
    """Derivatives of the loss with respect to each row's statistics, `[N]` each. None stands for zero."""

    dlogp: Tensor | None  # or [N, K], by `id_logps`
    dentropy: Tensor | None = None
    dkl: Tensor | None = None
    dkl_forward: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Coefficients:
        return Coefficients(*(None if x is None else x[index] for x in self))

    def active(self) -> Tensor:
        """Return whether each row has a gradient, `[N]` bool."""
        nonzero = [x != 0 if x.dim() == 1 else (x != 0).any(-1) for x in self if x is not None]
        return functools.reduce(torch.logical_or, nonzero)
