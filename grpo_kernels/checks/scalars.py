"""Checks of numbers, flags and names. An error names the argument and shows its value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, overload

import torch
from torch import Tensor


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the names in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def plain_number(value: Any) -> Any:
    """Convert a real scalar to a Python int or float; return None if `value` is not a real scalar.

    Real scalars are instances of `numbers.Real`, objects with `__index__`, and 0-dim arrays and CPU tensors
    of such numbers. A bool is not a number.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return None  # reading it would sync with the device
    # NumPy's scalars and arrays, and tensors. torch.compile cannot ask a symbolic number for attributes.
    if not isinstance(value, (int, float)) and hasattr(value, "ndim"):
        if value.ndim != 0:
            return None
        value = value.item()
    # The type is compared exactly, because np.float64 is a subclass of float. torch.compile traces symbolic
    # numbers as int and float. Other tracers pass SymInt and SymFloat, which must stay symbolic.
    if type(value) in (int, float) or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, bool):
        return None
    if hasattr(value, "__index__"):
        return int(operator.index(value))
    return float(value) if isinstance(value, numbers.Real) else None


def describe(value: Any) -> str:
    """Return `repr(value)`, or shape, dtype and device of a tensor, because reading its values could sync."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"


@overload
def check_number(
    name: str, value: Any, *, low: float = ..., strict: bool = ..., optional: Literal[False] = ...
) -> float: ...
@overload
def check_number(
    name: str, value: Any, *, low: float = ..., strict: bool = ..., optional: bool
) -> float | None: ...
def check_number(
    name: str, value: Any, *, low: float = 0.0, strict: bool = False, optional: bool = False
) -> float | None:
    """Return `value` as a Python number, or None if it is None and `optional`.

    Raises TypeError if it is not a real scalar, ValueError unless it is finite and at least `low` (above
    `low` if `strict`).
    """
    if value is None and optional:
        return None
    number = plain_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {describe(value)}")
    # torch.compile can trace comparisons of symbolic floats. NaN fails them.
    if not (low <= number < math.inf) or (strict and number == low):
        raise ValueError(f"{name} must be finite and {'>' if strict else '>='} {low:g}, got {number!r}")
    return number


def check_bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Return `low` and `high`, infinite for None. Raises ValueError unless `low` is at most `high`."""
    floor, ceiling = -math.inf if low is None else low, math.inf if high is None else high
    if floor > ceiling:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return floor, ceiling


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@overload
def check_integer(name: str, value: Any, *, low: int = ..., optional: Literal[False] = ...) -> int: ...
@overload
def check_integer(name: str, value: Any, *, low: int = ..., optional: bool) -> int | None: ...
def check_integer(name: str, value: Any, *, low: int = 1, optional: bool = False) -> int | None:
    """Return `value` as a Python int, or None if it is None and `optional`.

    Raises TypeError if it is not an integer scalar, ValueError if it is below `low`.
    """
    if value is None and optional:
        return None
    number = plain_number(value)
    if not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if number < low:
        raise ValueError(f"{name} must be >= {low}, got {number}")
    return number  # type: ignore[return-value]


def number_field(
    config: Any,
    field: str,
    *,
    name: str | None = None,
    check: Callable[..., Any] = check_number,
    **bounds: Any,
) -> None:
    """Check a number in a frozen dataclass, and replace it with the Python number that it equals.

    Equality, hashes, torch.compile and the kernels' arguments then do not depend on the type that was given.
    """
    value = getattr(config, field)
    number = check(name or f"{type(config).__name__}.{field}", value, **bounds)
    if type(number) is not type(value):
        object.__setattr__(config, field, number)


def integer_field(config: Any, field: str, **options: Any) -> None:
    """Check an integer in a frozen dataclass, as `number_field` does."""
    number_field(config, field, check=check_integer, **options)


def field_values(config: Any) -> tuple[Any, ...]:
    """Return the field values of a dataclass. `astuple` would copy them, which torch.compile cannot trace."""
    return tuple(getattr(config, field.name) for field in fields(config))
