"""Checks of tensor values under GRPO_KERNELS_DEBUG=1. An error shows the bad value. Each check syncs."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from .tensors import has_data

logger = logging.getLogger("grpo_kernels")


def enabled() -> bool:
    """Return whether GRPO_KERNELS_DEBUG is set, but False under `torch.compile`, whose graph cannot raise."""
    return not torch.compiler.is_compiling() and os.environ.get("GRPO_KERNELS_DEBUG", "0") not in ("", "0")


def check_ids(name: str, ids: Tensor, unmasked: Tensor, vocab_size: int | None) -> None:
    """Raise ValueError at the first unmasked id outside the vocabulary."""
    assert vocab_size is not None
    at = first_true(unmasked & ((ids < 0) | (ids >= vocab_size)))
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {int(ids[at])}, outside [0, {vocab_size})")


def check_mask(name: str, unmasked: Tensor) -> None:
    """Log a warning if every token is masked."""
    # Syncs with the device, under GRPO_KERNELS_DEBUG only, to know whether to warn.
    if unmasked.numel() and has_data(unmasked) and not bool(unmasked.any()):
        logger.warning("%s masks all of %s: the loss and its gradient are 0", name, tuple(unmasked.shape))


def check_mask_values(name: str, mask: Tensor) -> None:
    """Raise ValueError at the first value of a float mask other than 0 and 1, because it would count as 1."""
    at = first_true((mask != 0) & (mask != 1)) if mask.is_floating_point() else None
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {float(mask[at])}, but a mask holds only 0 and 1")


def check_numbers(name: str, x: Tensor, unmasked: Tensor) -> None:
    """Raise ValueError at the first unmasked value of `x` that the loss cannot use.

    `x` has the shape of the mask `unmasked`, or one more dimension. What is wrong depends on what `x` holds:
    logits and log-probabilities may be -inf (a probability of 0) but not +inf, temperatures must be positive,
    and everything else must be finite. NaN is always wrong.
    """
    if x.dim() > unmasked.dim():
        unmasked = unmasked.unsqueeze(-1)
    at = first_true(unusable(name, x) & unmasked)
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {float(x[at])}, and not masked")
    if name == "temperature":
        at = first_true((x <= 0) & unmasked)
        if at is not None:
            raise ValueError(f"{name}{list(at)} must be > 0, got {float(x[at])}")


def check_head(name: str, x: Tensor) -> None:
    """Raise ValueError at the first value that is NaN or infinite in a head's weight or bias.

    A bias of -inf is allowed, because it excludes a vocabulary entry as a logit of -inf does.
    """
    at = first_true(unusable(name, x))
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {float(x[at])}")


def check_scalar(name: str, x: Tensor) -> None:
    """Raise ValueError if a 0-dim tensor is negative or not finite."""
    at = first_true((x < 0) | ~x.isfinite())
    if at is not None:
        raise ValueError(f"{name} must be finite and >= 0, got {float(x)}")


def unusable(name: str, x: Tensor) -> Tensor:
    """Return which values are never allowed. `check_numbers` and `check_head` document the rules."""
    if name.endswith(("logits", "logps", "bias")):
        return x.isnan() | (x == torch.inf)
    return ~x.isfinite()


def first_true(wrong: Tensor) -> tuple[int, ...] | None:
    """Return the position of the first True; None if there is none or the tensor has no data."""
    # Syncs with the device, under GRPO_KERNELS_DEBUG only: an error has to be raised here.
    return tuple(wrong.nonzero()[0].tolist()) if has_data(wrong) and bool(wrong.any()) else None
