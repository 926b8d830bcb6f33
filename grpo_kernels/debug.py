"""GRPO_KERNELS_DEBUG=1: what would show as a NaN later is named at once. Each check makes the host wait."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from .checks import has_data

logger = logging.getLogger("grpo_kernels")


def enabled() -> bool:
    """Never inside a graph, which could not branch on what it finds."""
    return not torch.compiler.is_compiling() and os.environ.get("GRPO_KERNELS_DEBUG", "0") not in ("", "0")


def check_ids(name: str, ids: Tensor, unmasked: Tensor, vocab_size: int | None) -> None:
    """Raises ValueError at the first unmasked id outside of the vocabulary."""
    assert vocab_size is not None
    at = first(unmasked & ((ids < 0) | (ids >= vocab_size)))
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {int(ids[at])}, outside [0, {vocab_size})")


def check_mask(name: str, unmasked: Tensor) -> None:
    """Warns where no token is left."""
    # The host waits, under GRPO_KERNELS_DEBUG only, to know whether to warn.
    if unmasked.numel() and has_data(unmasked) and not bool(unmasked.any()):
        logger.warning("%s masks all of %s: the loss and its gradient are 0", name, tuple(unmasked.shape))


def check_numbers(name: str, x: Tensor, unmasked: Tensor) -> None:
    """Raises ValueError at the first NaN of `x` `[B, T]`, `[B, T, V]` or packed, where not masked.

    And at the first +inf of a row `[V]`: no softmax is left of it.
    """
    if x.dim() > unmasked.dim():
        at = first((x.isnan() | (x == torch.inf)) & unmasked.unsqueeze(-1))
    else:
        at = first(x.isnan() & unmasked)
    if at is not None:
        raise ValueError(f"{name}{list(at)} is {float(x[at])}, and not masked")


def first(wrong: Tensor) -> tuple[int, ...] | None:
    """The position of the first True; None without data, of which nothing is known."""
    # The host waits, under GRPO_KERNELS_DEBUG only: an error has to be raised here.
    return tuple(wrong.nonzero()[0].tolist()) if has_data(wrong) and bool(wrong.any()) else None
