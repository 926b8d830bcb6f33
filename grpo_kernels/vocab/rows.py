"""Inputs and outputs of a pass over rows of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import arithmetic_dtype
from ..spec import LogitTransform
from ..tokens.statistics import RowStats

MASKED = -1
"""In `Rows.targets`: a masked row. Its logits are not read and its gradient is zero."""


class Rows(NamedTuple):
    """Input of a pass over logits: `B * T` rows of `V` columns.

    All functions on rows take this object, down to the launchers of the kernels.
    """

    logits: Tensor  # [B, T, V], any batch and time stride
    ref_logits: Tensor | None  # [B, T, W], W at least the vocabulary size
    targets: Tensor  # [B * T] int64: the column of the taken token, MASKED, or one outside the vocabulary
    temperatures: Tensor | None  # [B * T], if there is one per token
    sampling_mask: Tensor | None  # [B, T, ceil(V / 32)] int32: a bit per column, 0 if it was dropped
    ids: Tensor | None  # [B * T, K] int64: several tokens per row, as `targets`; `TokenIds` has their meaning
    transform: LogitTransform
    backend: str  # "triton" or "torch"

    @property
    def num_rows(self) -> int:
        return self.targets.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the statistics."""
        return arithmetic_dtype(self.logits)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields before `transform`."""
        return self[:-2]

    @property
    def all_logits(self) -> list[Tensor]:
        """The logits of policy and reference."""
        return [self.logits] if self.ref_logits is None else [self.logits, self.ref_logits]

    def detach(self) -> Rows:
        return self._replace(logits=self.logits.detach())


class FusedOutput(NamedTuple):
    """The outputs of a fused loss."""

    dlogits: Tensor  # [B, T, V]: the gradient of sum(value); may be the logits themselves
    value: Tensor  # [B * T]: each row's weighted loss
    dlogp: Tensor  # [B * T]
    stats: RowStats


def as_rows(x: Tensor) -> Tensor:
    """View logits as `[B, T, V]`. A packed batch becomes one sequence."""
    return x if x.dim() == 3 else x.unsqueeze(0)
