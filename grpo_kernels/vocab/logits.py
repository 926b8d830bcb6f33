"""Checks of logits: shape, dtype, strides, and whether the gradient may overwrite them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.tensors import check_device, check_dtype, check_tensor, is_dtensor, squeeze_hint


def check_logits(logits: Tensor) -> None:
    """Raise an error unless `logits` are `[B, T, V]` or `[N, V]`."""
    check_numbers("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be [B, T, V] or packed [N, V], got shape {tuple(logits.shape)}")
    check_row_stride("logits", logits)


def check_ref_logits(
    ref_logits: Tensor, logits: Tensor, width: int, *, padded: bool, name: str = "ref_logits"
) -> None:
    """Raise an error unless device, shape and dtype of the argument `name` fit those of the policy's logits.

    The vocabulary has `width` columns. `padded` means that the caller gave `vocab_size`, so the numbers of
    columns may differ.
    """
    check_numbers(name, ref_logits)
    check_device(name, ref_logits, logits.device, "logits")
    shapes = f"shaped as logits {tuple(logits.shape)}, got {tuple(ref_logits.shape)}"
    if ref_logits.shape[:-1] != logits.shape[:-1]:
        hint = squeeze_hint(ref_logits.shape[:-1], logits.shape[:-1])
        raise ValueError(f"{name} must be {shapes}{hint}")
    if not padded and ref_logits.shape != logits.shape:
        raise ValueError(
            f"{name} must be {shapes}: give vocab_size, the number of columns that both have in common, "
            "to ignore the rest as padding"
        )
    if (ref_logits.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise ValueError(f"{name} is {ref_logits.dtype}, logits {logits.dtype}: fp64 goes with fp64 only")
    if ref_logits.shape[-1] < width:
        raise ValueError(
            f"{name} has {ref_logits.shape[-1]} columns, fewer than the {width} of the vocabulary"
        )
    check_row_stride(name, ref_logits)


def check_numbers(name: str, logits: Tensor) -> None:
    """Raise an error unless `logits` are a plain floating-point tensor."""
    check_tensor(name, logits)
    if is_dtensor(logits):
        raise ValueError(f"{name} is a DTensor: pass shard=VocabShard.of(logits, dim=-1), or full_tensor()")
    check_dtype(name, logits)


def check_row_stride(name: str, logits: Tensor) -> None:
    """Raise ValueError unless a row's elements are adjacent."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {logits.stride()}")


def check_writable(
    logits: Tensor, given: Tensor, ref_logits: Tensor | None, name: str = "ref_logits"
) -> None:
    """Raise an error if the gradient cannot overwrite the logits `[B, T, V]`, a part of argument `given`.

    `name` is the name of the argument `ref_logits`.
    """
    owners = (given,) if given._base is None else (given, given._base)
    if torch.is_grad_enabled() and any(x.is_leaf and x.requires_grad for x in owners):
        raise RuntimeError(
            "inplace=True would overwrite a leaf that requires grad. As for any in-place operation, logits "
            "must be the result of an operation"
        )
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"inplace=True needs rows that do not overlap: logits {tuple(logits.shape)} have strides "
                f"{logits.stride()}"
            )
        extent = max(extent, stride * size)
    if ref_logits is not None and overlaps_other_rows(logits, ref_logits):
        raise ValueError(
            f"inplace=True would overwrite {name}, which share memory with logits of other tokens"
        )


def overlaps_other_rows(x: Tensor, y: Tensor) -> bool:
    """Return whether rows of `x` `[B, T, V]` and `y` `[B, T, W]` at different positions share memory.

    Rows with the same address and dtype count as the same row.
    """
    storages = {z.untyped_storage().data_ptr() for z in (x, y)}
    if len(storages) == 2 or 0 in storages:  # 0: an empty tensor, or one on "meta"
        return False

    def first_bytes(z: Tensor) -> Tensor:
        # Computed on the CPU, even if the default device is another, so that nothing syncs.
        batch, time = (torch.arange(z.shape[dim], device="cpu") * z.stride(dim) for dim in (0, 1))
        return (z.data_ptr() + z.element_size() * (batch[:, None] + time)).view(-1)

    ours, theirs = first_bytes(x), first_bytes(y)
    ordered = theirs.sort().values
    below = torch.searchsorted(ordered, ours - y.shape[2] * y.element_size(), right=True)
    touched = torch.searchsorted(ordered, ours + x.shape[2] * x.element_size()) - below
    return bool((touched > (ours == theirs) * (x.dtype == y.dtype)).any())
