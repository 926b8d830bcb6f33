"""Checks of tensors, and helpers that every layer uses: dtype, device, tracing, DTensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value`, or raise TypeError if it is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def check_device(name: str, value: Tensor, device: torch.device, source: str) -> None:
    """Raise ValueError unless `value` is on `device`, the device of the argument `source`."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, {source} on {device}")


def check_dtype(name: str, value: Tensor) -> None:
    """Raise ValueError unless `value` is fp16, bf16, fp32 or fp64."""
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype}")


def check_integers(name: str, value: Tensor, length: int | None) -> None:
    """Raise ValueError unless `value` has one dimension, of `length` integers. None: of any number."""
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if value.dim() != 1 or length not in (None, value.shape[0]) or not whole:
        shape = "one dimension" if length is None else f"shape ({length},)"
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{name} must be integers of {shape}, got {got}")


def squeeze_hint(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return a hint for an error if the shape is `[1, N]`, as in Hugging Face's padding-free batches."""
    return "; squeeze(0) removes its first dimension" if tuple(shape) == (1, *expected) else ""


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything computed from `x`: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_data(x: Tensor) -> bool:
    """Return whether `x` has values. Fake and meta tensors have none: calls on them compute only shapes.

    Without data, code must not read values or addresses, probe the device, or launch a kernel.
    """
    # A plain tensor is recognized by its type, because `is_fake` takes some microseconds.
    return not (x.is_meta if type(x) in (Tensor, nn.Parameter) else x.is_meta or is_fake(x))


def traced(x: Tensor) -> bool:
    """Return whether a call on `x` must use only opaque operators: when compiling, or `x` has no data.

    Without data the operators do nothing, and the results have only shapes. A tracer that uses fake tensors
    records the operators.
    """
    return torch.compiler.is_compiling() or not has_data(x)


def scalar_on(device: torch.device, x: Tensor) -> Tensor:
    """Return a 0-dim tensor detached, moved to `device` if it is on the CPU.

    The move adds its value to a zero on `device`, because a copy from the CPU to a GPU would sync.
    """
    x = x.detach()
    return torch.zeros_like(x, device=device) + x if x.device.type == "cpu" != device.type else x


def is_dtensor(x: Tensor) -> bool:
    """Return whether `x` is a DTensor."""
    if type(x) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
