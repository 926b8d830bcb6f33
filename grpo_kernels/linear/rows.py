"""Input of a pass from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import arithmetic_dtype
from ..spec import LogitTransform
from .config import LinearConfig
from .head import Head


class LinearRows(NamedTuple):
    """Input of a pass: `N` rows, whose logits are computed from hidden states."""

    head: Head
    ref: Head | None
    targets: Tensor  # [N], as in vocab.rows.Rows
    temperatures: Tensor | None  # [N]
    sampling_mask: Tensor | None  # [N, ceil(V / 32)] int32
    ids: Tensor | None  # [N, K] int64
    transform: LogitTransform
    backend: str
    config: LinearConfig

    @property
    def num_rows(self) -> int:
        return self.targets.numel()

    @property
    def token_tensors(self) -> tuple[Tensor | None, ...]:
        """The fields with an entry per token: from `targets` to `ids`."""
        return self[2:6]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the statistics."""
        return arithmetic_dtype(self.head.hidden)

    def detach(self) -> LinearRows:
        return self._replace(head=self.head.detach())

    def cast(self) -> LinearRows:
        """Return the rows with both heads in the dtype of the products, without the vocabulary's padding."""
        size, ref = self.transform.vocab_size, self.ref
        return self._replace(
            head=self.head.to(self.config.dtype, size),
            ref=None if ref is None else ref.to(self.config.ref_dtype, size),
        )
