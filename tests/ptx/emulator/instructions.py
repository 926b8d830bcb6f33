"""The instructions of PTX that compute a result from operands alone, as a table.

A key is the opcode with all its modifiers, as in the text of PTX. Whatever is not a key is refused, so no
modifier is ever ignored. The machine executes loads, stores, shuffles, barriers and branches itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np

from .arithmetic import (
    Array,
    Bound,
    div32,
    ex2,
    flush,
    fma32,
    fma64,
    from_bf16,
    lg2,
    maximum,
    minimum,
    rcp,
    rcp_approx_ftz_f64,
    to_bf16,
    to_f16,
)
from .errors import Fault
from .types import BITS, DTYPES


class Instruction(NamedTuple):
    """How to compute one opcode.

    Attributes:
        result: Type of the result, a key of `DTYPES`.
        sources: Types of the operands.
        compute: Function of one array per operand, each of its type's NumPy type. It returns the result's.
        section: Anchor of the section that specifies it, in the PTX ISA that NVIDIA has online.
    """

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Array]
    section: str


INSTRUCTIONS: dict[str, Instruction] = {}

function: Callable[..., Array]  # of every loop below

INTEGER = "integer-arithmetic-instructions"
FLOAT = "floating-point-instructions"
COMPARISON = "comparison-and-selection-instructions"
LOGIC = "logic-and-shift-instructions"
MOVEMENT = "data-movement-and-conversion-instructions"


def _define(chapter: str, opcode: str, result: str, sources: str, compute: Callable[..., Array]) -> None:
    """Add one opcode. `sources` has the operands' types, separated by spaces."""
    section = f"{chapter}-{opcode.split('.')[0]}"
    INSTRUCTIONS[opcode] = Instruction(result, tuple(sources.split()), compute, section)


# ---- Floating point. Every result is rounded to nearest even, once. NumPy's arithmetic is IEEE 754's.

for kind, (name, function), rounding in product(
    ("f32", "f64"), {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items(), ("", ".rn")
):
    # Without .rn, ptxas may fuse a mul and an add. `contraction.py` makes that change of the program.
    _define(FLOAT, f"{name}{rounding}.{kind}", kind, f"{kind} {kind}", function)

for kind in ("f32", "f64"):
    _define(FLOAT, f"neg.{kind}", kind, kind, np.negative)
    _define(FLOAT, f"max.{kind}", kind, f"{kind} {kind}", maximum)
    _define(FLOAT, f"min.{kind}", kind, f"{kind} {kind}", minimum)

_define(FLOAT, "abs.f64", "f64", "f64", np.abs)
_define(FLOAT, "div.rn.f32", "f32", "f32 f32", div32)
_define(FLOAT, "div.rn.f64", "f64", "f64 f64", np.divide)
_define(FLOAT, "rcp.rn.f32", "f32", "f32", rcp)
_define(FLOAT, "fma.rn.f64", "f64", "f64 f64 f64", fma64)
_define(FLOAT, "rcp.approx.ftz.f64", "f64", "f64", rcp_approx_ftz_f64)
INSTRUCTIONS["rcp.approx.ftz.f64"] = INSTRUCTIONS["rcp.approx.ftz.f64"]._replace(
    section="floating-point-instructions-rcp-approx-ftz-f64"
)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with `.ftz`: subnormal operands and results become zero."""
    return lambda *operands: flush(function(*map(flush, operands)))


for name, sources, function in (
    ("abs", "f32", np.abs),
    ("ex2.approx", "f32", ex2),
    ("lg2.approx", "f32", lg2),
    ("rcp.approx", "f32", rcp),
    ("div.full", "f32 f32", div32),
    ("fma.rn", "f32 f32 f32", fma32),
):
    _define(FLOAT, f"{name}.f32", "f32", sources, function)
    _define(FLOAT, f"{name}.ftz.f32", "f32", sources, _flushing(function))


def _field(x: Array, start: Array, length: Array) -> Array:
    """`bfe.u32`: `length` bits of x from bit `start`, at most those that there are."""
    wide, first, count = (y.astype(np.uint64) for y in (x, start & 255, length & 255))
    shifted = np.where(first < 32, wide >> np.minimum(first, 31), 0).astype(np.uint64)
    mask = (np.uint64(1) << np.minimum(count, 32).astype(np.uint64)) - np.uint64(1)
    return (shifted & mask).astype(np.uint32)


_define(INTEGER, "bfe.u32", "u32", "u32 u32 u32", _field)

APPROXIMATIONS: dict[str, Bound] = {
    f"{name}{ftz}.f32": bound
    for name, bound in {
        # Notes of PTX ISA 9.1. "ex2": 2 ulp from the correctly rounded result. Older versions: 2^-22.5 for
        # the fraction, which is less.
        "ex2.approx": Bound(ulps=2),
        # "lg2": 2^-22, absolute for operands in (0.5, 2), i.e. results in (-1, 1), and relative for others.
        # Older versions: 2^-22.6 for the mantissa, which is less.
        "lg2.approx": Bound(relative=2.0**-22, absolute=2.0**-22),
        "rcp.approx": Bound(ulps=1),  # "rcp". Older versions: 2^-23 for operands from 1 to 2, which is 2 ulp
        "div.full": Bound(ulps=2),  # "div"
    }.items()
    for ftz in ("", ".ftz")
}
"""The error that the ISA allows, by opcode."""

# The ISA states no bound for this "gross approximation". One unit of its 20 bits is an assumption.
APPROXIMATIONS["rcp.approx.ftz.f64"] = Bound(ulps=1, missing_bits=32)

# ---- Integers. Results wrap around.


def _remainder(a: Array, b: Array) -> Array:
    """Remainder with the sign of a, which is the one of division that truncates.

    Raises:
        Fault: If an element of b is zero, for which PTX leaves the result unspecified.
    """
    if not np.all(b):
        raise Fault("an integer division by zero")
    return np.fmod(a, b)


def _quotient(a: Array, b: Array) -> Array:
    """Quotient, truncated towards zero. Raises Fault as `_remainder` does."""
    return (a - _remainder(a, b)) // b


for kind in ("s32", "u32", "s64", "u64"):
    for name, function in {
        "add": np.add,
        "sub": np.subtract,
        "mul.lo": np.multiply,
        "div": _quotient,
        "rem": _remainder,
        "max": np.maximum,
        "min": np.minimum,
    }.items():
        _define(INTEGER, f"{name}.{kind}", kind, f"{kind} {kind}", function)
    _define(INTEGER, f"mad.lo.{kind}", kind, f"{kind} {kind} {kind}", lambda a, b, c: a * b + c)

for kind in ("s32", "s64"):
    _define(INTEGER, f"neg.{kind}", kind, kind, np.negative)


def _wide_product(a: Array, b: Array) -> Array:
    """a * b of twice the width."""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


for kind, wide in {"s32": "s64", "u32": "u64"}.items():
    _define(INTEGER, f"mul.wide.{kind}", wide, f"{kind} {kind}", _wide_product)
    _define(
        INTEGER, f"mad.wide.{kind}", wide, f"{kind} {kind} {wide}", lambda a, b, c: _wide_product(a, b) + c
    )

# ---- Bits and predicates.

for kind in ("b16", "b32", "b64", "pred"):
    _define(LOGIC, f"not.{kind}", kind, kind, np.invert)
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        _define(LOGIC, f"{name}.{kind}", kind, f"{kind} {kind}", function)


def _clamped(shift: Callable[..., Array]) -> Callable[..., Array]:
    """Clamp the amount of a shift to the width of the type, which leaves only bits that are shifted in."""
    return lambda a, amount: shift(a, np.minimum(amount, 8 * a.dtype.itemsize).astype(a.dtype))


for bits in (16, 32, 64):
    _define(LOGIC, f"shl.b{bits}", f"b{bits}", f"b{bits} b32", _clamped(np.left_shift))
    for letter in "bus":  # NumPy shifts in the sign if the type is signed, as PTX does
        _define(
            LOGIC, f"shr.{letter}{bits}", f"{letter}{bits}", f"{letter}{bits} b32", _clamped(np.right_shift)
        )

# ---- Comparison and selection.


def _is_number(a: Array, b: Array) -> Array:
    """Whether neither operand is NaN."""
    return (a == a) & (b == b)


def _ordered(compare: np.ufunc) -> Callable[..., Array]:
    """The comparison, which is false if an operand is NaN."""
    return lambda a, b: compare(a, b) & _is_number(a, b)


def _unordered(compare: np.ufunc) -> Callable[..., Array]:
    """The comparison, which is true if an operand is NaN."""
    return lambda a, b: compare(a, b) | ~_is_number(a, b)


COMPARISONS: dict[str, np.ufunc] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}

for name, compare in COMPARISONS.items():
    for letter, bits in product("sub" if name in ("eq", "ne") else "su", (16, 32, 64)):
        kind = f"{letter}{bits}"
        _define(COMPARISON, f"setp.{name}.{kind}", "pred", f"{kind} {kind}", compare)
    for kind in ("f32", "f64"):
        _define(COMPARISON, f"setp.{name}.{kind}", "pred", f"{kind} {kind}", _ordered(compare))
        _define(COMPARISON, f"setp.{name}u.{kind}", "pred", f"{kind} {kind}", _unordered(compare))

for kind in ("f32", "f64"):
    _define(COMPARISON, f"setp.num.{kind}", "pred", f"{kind} {kind}", _is_number)
    _define(COMPARISON, f"setp.nan.{kind}", "pred", f"{kind} {kind}", lambda a, b: ~_is_number(a, b))

# ---- Moves and conversions.

for kind in DTYPES:
    if kind == "pred" or (BITS[kind] > 8 and kind != "f16"):
        _define(MOVEMENT, f"mov.{kind}", kind, kind, lambda a: a)
    if BITS[kind] > 8 and kind != "f16":
        _define(COMPARISON, f"selp.{kind}", kind, f"{kind} {kind} pred", lambda a, b, c: np.where(c, a, b))


def _to(kind: str) -> Callable[..., Array]:
    """Conversion to a type by NumPy: integers wrap around, floating point rounds to nearest even."""
    return lambda a: a.astype(DTYPES[kind])


def _packed(convert: Callable[..., Array]) -> Callable[..., Array]:
    """Conversion of two operands to 16 bits each, with the first in the upper half."""
    return lambda a, b: (convert(a).astype("u4") << 16) | convert(b)


INTEGERS = [f"{letter}{bits}" for letter, bits in product("su", (16, 32, 64))]
for kind, source in product(INTEGERS, INTEGERS):
    _define(MOVEMENT, f"cvt.{kind}.{source}", kind, source, _to(kind))
for kind, source in product(("f32", "f64"), INTEGERS):
    _define(MOVEMENT, f"cvt.rn.{kind}.{source}", kind, source, _to(kind))

_define(MOVEMENT, "cvt.f64.f32", "f64", "f32", _to("f64"))
_define(MOVEMENT, "cvt.rn.f32.f64", "f32", "f64", _to("f32"))
_define(MOVEMENT, "cvt.f32.f16", "f32", "f16", _to("f32"))
_define(MOVEMENT, "cvt.f32.bf16", "f32", "b16", from_bf16)
for name, convert in {"f16": to_f16, "bf16": to_bf16}.items():
    _define(MOVEMENT, f"cvt.rn.{name}.f32", "b16", "f32", convert)
    _define(MOVEMENT, f"cvt.rn.{name}x2.f32", "b32", "f32 f32", _packed(convert))
