"""Checks of arguments that are no tensors: each names the argument and shows what it held. And `has_data`."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake


def has_data(x: Tensor) -> bool:
    """Whether `x` has values. Tensors on "meta" and fake tensors have none: only shapes come out of a call.

    Nothing may then read values, look at addresses, try the device or launch a kernel.
    """
    # A plain tensor is recognised by its type, because `is_fake` takes some microseconds.
    return not (x.is_meta if type(x) in (Tensor, nn.Parameter) else x.is_meta or is_fake(x))


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_number(
    name: str, value: Any, *, low: float = 0.0, strict: bool = False, optional: bool = False
) -> None:
    """`value` is a finite number of at least `low` (above `low` if `strict`), or None if `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {value!r}")
    # Comparisons only, which torch.compile can trace on symbolic floats; a NaN fails them.
    if not (low <= value < math.inf) or (strict and value == low):
        raise ValueError(f"{name} must be finite and {'>' if strict else '>='} {low:g}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any, *, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def values(config: Any) -> tuple[Any, ...]:
    """The fields of a dataclass, as `astuple` but without its copies, which torch.compile cannot trace."""
    return tuple(getattr(config, field.name) for field in fields(config))
