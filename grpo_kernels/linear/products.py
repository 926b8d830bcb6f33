"""Matrix products whose result may have a wider dtype than the operands."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ..checks.tensors import has_data

logger = logging.getLogger("grpo_kernels")

BLOCK_ELEMENTS = 1 << 20  # of a product that is added to a narrower tensor


def product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """Compute `out = a @ b`, or `out += a @ b`, with sums in the dtype of `out`, not of the operands."""
    options: dict[str, Any] = {}
    if a.dtype != out.dtype:
        if multiplies_mixed(a):
            options["out_dtype"] = out.dtype
        else:
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        return torch.addmm(out, a, b, out=out, **options)
    return torch.mm(a, b, out=out, **options)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute `out += a @ b`, rounded to the dtype of `out` once.

    If `out` is too narrow for the sum of a product, some rows at a time are multiplied into fp32 (fp64 for
    fp64), so that nothing of the size of `out` is allocated.
    """
    if torch.promote_types(a.dtype, out.dtype) == out.dtype:
        product(a, b, out=out, add=True)
        return
    step = max(1, BLOCK_ELEMENTS // max(1, b.shape[1]))
    part = b.new_empty(min(step, len(a)), b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    for start in range(0, len(a), step):
        rows = a[start : start + step]
        out[start : start + step].add_(product(rows, b, out=part[: len(rows)]))


def multiplies_mixed(x: Tensor) -> bool:
    """Return whether the device of `x` multiplies 16-bit operands into fp32. False if `x` has no data."""
    return x.device.type != "cpu" and has_data(x) and device_multiplies_mixed(x.device)


@functools.cache
def device_multiplies_mixed(device: torch.device) -> bool:
    """Try whether a device multiplies 16-bit operands into fp32. CUDA does, and ROCm with recent PyTorch."""
    operand = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:
        logger.warning("%s cannot multiply 16-bit operands into fp32, so they are cast (%s)", device, error)
        return False
    return True


def autocasts(x: Tensor) -> bool:
    """Return whether autocast applies to `x`."""
    kind = x.device.type
    # Autocast does not support "meta". Before torch 2.9, Dynamo cannot trace a check for support.
    return x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the operands in a linear layer."""
    return torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden) else hidden.dtype
