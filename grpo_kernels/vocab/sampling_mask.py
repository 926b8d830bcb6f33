"""Sampling masks: which columns of each row the sampler kept, a bit per column."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..checks import debug
from ..checks.tensors import check_device, check_tensor
from ..tokens.batch import Batch

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
    dropped = dropped_columns(mask.flatten(0, 1), logits.shape[-1])
    return logits.detach().masked_fill(dropped.view(logits.shape), -torch.inf)


@functools.cache
def dropped_bytes(device: torch.device) -> Tensor:
    """Return for each byte of a mask 8 bools, whether its columns were dropped, in the memory of an int64."""
    bits = torch.arange(256, device=device).unsqueeze(-1) >> torch.arange(8, device=device)
    return (bits & 1 == 0).view(torch.int64).squeeze(-1)


def dropped_columns(mask: Tensor, width: int) -> Tensor:
    """Return whether each column was dropped, `[n, width]` bool, from the words `[n, W]`."""
    found = dropped_bytes(mask.device)[mask.view(torch.uint8).to(torch.int64)]
    return found.view(torch.bool)[:, :width]
