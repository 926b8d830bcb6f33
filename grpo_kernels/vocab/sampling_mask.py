"""Sampling masks: which columns of each row the sampler kept, a bit per column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import debug
from ..checks.tensors import check_device, check_tensor
from ..tokens.batch import Batch
from .row_chunks import Scratch

WORD = 32
"""Columns per word. Bit `v % WORD` of word `v // WORD` is that of column v."""


def check_sampling_mask(mask: Tensor | None, batch: Batch, width: int) -> Tensor | None:
    """Return the mask as `[B, T, W]` with stride 1 along W, or raise an error. A packed batch has B = 1."""
    if mask is None:
        return None
    check_tensor("sampling_mask", mask)
    check_device("sampling_mask", mask, batch.device, batch.source)
    if mask.dtype != torch.int32:
        raise ValueError(
            f"sampling_mask must be int32, got {mask.dtype}; pack_sampling_mask makes it of bools"
        )
    expected = (*batch.shape, -(-width // WORD))
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"sampling_mask must have shape {expected}, a bit for each of {width} columns, got "
            f"{tuple(mask.shape)}"
        )
    mask = mask.detach()
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.unsqueeze(0) if batch.packed else mask


def is_kept(mask: Tensor, columns: Tensor) -> Tensor:
    """Return whether the mask `[N, W]` keeps each of `columns` `[N, K]`."""
    return (mask.gather(-1, columns // WORD) >> (columns % WORD)) & 1 != 0


def kept_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits `[B, T, V]` or `[N, V]` to check under GRPO_KERNELS_DEBUG: dropped ones are -inf."""
    if mask is None or not debug.enabled():
        return logits
    columns = torch.arange(logits.shape[-1], device=mask.device).expand(mask.shape[0] * mask.shape[1], -1)
    kept = is_kept(mask.flatten(0, 1), columns)
    return logits.detach().masked_fill(~kept.view(logits.shape), -torch.inf)


class KeptColumns(NamedTuple):
    """The kept columns of a chunk of rows.

    On a CPU, `torch.where` and `masked_fill_` take three times as long as an exponential if the mask varies.
    Operations on bits take a tenth of one.
    """

    ones: Tensor  # [n, V] integers of the arithmetic's size: -1 (all bits are 1) for a kept column, else 0

    @classmethod
    def of(cls, mask: Tensor, width: int, dtype: torch.dtype, scratch: Scratch) -> KeptColumns:
        """Unpack the words `[n, W]` for numbers of `dtype`, fp32 or fp64."""
        bits = torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=mask.device)
        ones = scratch.empty("kept", len(mask), mask.shape[1] * WORD, torch.int32, mask.device)
        torch.bitwise_left_shift(mask.unsqueeze(-1), bits, out=ones.view(*mask.shape, WORD))
        ones.bitwise_right_shift_(WORD - 1)  # copies the sign, which is the column's bit
        return cls((ones.to(torch.int64) if dtype == torch.float64 else ones)[:, :width])

    def has(self, column: Tensor) -> Tensor:
        """Return whether each row's `column` `[n, 1]` was kept, `[n]` bool."""
        return self.ones.gather(-1, column).squeeze(-1) != 0

    def keep(self, x: Tensor, out: Tensor) -> Tensor:
        """Write `x` `[n, V]` to `out`, with 0 in the other columns, where `x` may be NaN. Return `out`."""
        torch.bitwise_and(x.view(self.ones.dtype), self.ones, out=out.view(self.ones.dtype))
        return out

    def amax(self, x: Tensor) -> Tensor:
        """Return the largest kept number of each row of the result of `keep`, -inf if there is none."""
        found = x.amax(-1)
        if x.device.type == "cpu" and not bool((found <= 0).any()):  # on the CPU, so it does not sync
            return found
        mantissa = 52 if x.dtype == torch.float64 else 23
        infinity = self.ones.bitwise_not().bitwise_left_shift_(mantissa)  # the bits of 0.0 or of -inf
        return infinity.bitwise_or_(x.view(infinity.dtype)).view(x.dtype).amax(-1)
