"""Arithmetic of PTX on NumPy arrays: what NumPy lacks, or does differently.

All functions take arrays of any shapes that broadcast, and never write to them. The caller sets
`np.errstate(all="ignore")`.

The GPU returns one canonical NaN from arithmetic in fp32. These functions return a NaN where the GPU does,
but its payload may differ, except where a docstring says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

_SMALLEST_NORMAL = {np.dtype(dtype): np.finfo(dtype).smallest_normal for dtype in ("f4", "f8")}
_UINT = {np.dtype("f4"): np.dtype("u4"), np.dtype("f8"): np.dtype("u8")}
_CANONICAL_NAN = {
    np.dtype("f4"): np.uint32(0x7FFFFFFF).view("f4"),
    np.dtype("f8"): np.uint64(0x7FFFFFFFFFFFFFFF).view("f8"),
}


def is_subnormal_or_zero(x: Array) -> Array:
    """Whether each element is zero or subnormal."""
    return np.abs(x) < _SMALLEST_NORMAL[x.dtype]


def flush(x: Array) -> Array:
    """Replace subnormal numbers by zero of the same sign, as `.ftz` does with operands and results."""
    return np.where(is_subnormal_or_zero(x), np.copysign(x.dtype.type(0), x), x)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y as a rounded sum and its exact rounding error (Knuth's TwoSum)."""
    total = x + y
    from_y = total - x
    return total, (x - (total - from_y)) + (y - from_y)


def _two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """x * y in fp64 as a rounded product and its exact rounding error (Dekker, Veltkamp)."""
    product = x * y
    x_high, y_high = (134217729.0 * v - (134217729.0 * v - v) for v in (x, y))  # 2^27 + 1
    x_low, y_low = x - x_high, y - y_high
    return product, ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _sum_to_odd(x: Array, y: Array) -> Array:
    """x + y in fp64, rounded to odd: of the two neighbors of an inexact sum, the one whose last bit is 1.

    A result that is then rounded to at least two bits less is as if it had been rounded once
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    total, error = _two_sum(x, y)
    bits = total.view("i8")
    even_and_inexact = ((bits & 1) == 0) & ((error > 0) | (error < 0))  # the error of inf is NaN
    away_from_zero = (error > 0) == (total > 0)
    return np.where(even_and_inexact, bits + np.where(away_from_zero, 1, -1), bits).view("f8")


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp32, rounded once."""
    # fp64 holds the product of two fp32 exactly, and none of its sums overflows or underflows.
    return _sum_to_odd(a.astype("f8") * b.astype("f8"), c.astype("f8")).astype("f4")


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp64, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    low, rest = _two_sum(c, low)
    high, middle = _two_sum(high, low)
    result = high + _sum_to_odd(rest, middle)

    # Without a product that must be rounded, ordinary arithmetic is exact up to its one rounding.
    factors_finite, c_finite = np.isfinite(a) & np.isfinite(b), np.isfinite(c)
    plain = ~factors_finite | ~c_finite | (a == 0) | (b == 0)
    result = np.where(plain, np.where(factors_finite & ~c_finite, c, a * b + c), result)

    # In these ranges nothing above overflows, and every rounding error is a normal number. Others are rare.
    safe = _between(a, -400, 400) & _between(b, -400, 400) & (_between(c, -900, 900) | (c == 0))
    for lane in np.flatnonzero(~plain & ~safe):
        result.flat[lane] = _exact_fma64(float(a.flat[lane]), float(b.flat[lane]), float(c.flat[lane]))
    return result


def _between(x: Array, low: int, high: int) -> Array:
    """Whether 2^low <= |x| <= 2^high."""
    size = np.abs(x)
    return (size >= 2.0**low) & (size <= 2.0**high)


def _exact_fma64(a: float, b: float, c: float) -> float:
    """a * b + c of finite numbers with a * b != 0, by rational numbers."""
    total = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def div32(x: Array, y: Array) -> Array:
    """x / y in fp32, correctly rounded: NumPy's division is the one of IEEE 754."""
    return np.divide(x, y)


def rcp(x: Array) -> Array:
    """1 / x in fp32, correctly rounded."""
    return np.divide(np.float32(1), x)


def ex2(x: Array) -> Array:
    """2^x in fp32, rounded from fp64."""
    return np.exp2(x.astype("f8")).astype("f4")


def lg2(x: Array) -> Array:
    """log2(x) in fp32, rounded from fp64."""
    return np.log2(x.astype("f8")).astype("f4")


def rcp_approx_ftz_f64(x: Array) -> Array:
    """1 / x from the upper 32 bits of x, rounded to the upper 32 bits of the result.

    The ISA demands the flush of subnormal operands and results, and the canonical NaN's bits. It leaves
    the rounding open.
    """
    upper = np.uint64(0xFFFFFFFF00000000)
    operand = (x.view("u8") & upper).view("f8")
    quotient = flush(np.divide(1.0, flush(operand)))
    rounded = (quotient.view("u8") + np.uint64(0x80000000)) & upper
    return np.where(np.isnan(operand), np.uint64(0x7FFFFFFF00000000), rounded).view("f8").astype("f8")


def maximum(a: Array, b: Array) -> Array:
    """The greater operand, or the one that is not NaN; +0 > -0. Two NaN give the canonical NaN."""
    return _select(np.maximum(a, b), a, b, np.bitwise_and)


def minimum(a: Array, b: Array) -> Array:
    """The lesser operand, or the one that is not NaN; -0 < +0. Two NaN give the canonical NaN."""
    return _select(np.minimum(a, b), a, b, np.bitwise_or)


def _select(of_numbers: Array, a: Array, b: Array, combine: np.ufunc) -> Array:
    """`of_numbers` for two different numbers, and what PTX defines for zeros and NaN."""
    uint = _UINT[of_numbers.dtype]
    # Equal numbers have equal bits, which combining them does not change, except for the signs of zeros.
    equal = combine(a.view(uint), b.view(uint)).view(of_numbers.dtype)
    a_is_nan, b_is_nan = np.isnan(a), np.isnan(b)  # np.fmax would return a signaling NaN
    one_nan = np.where(a_is_nan, b, a)
    result = np.where(a_is_nan | b_is_nan, one_nan, np.where(a == b, equal, of_numbers))
    return np.where(a_is_nan & b_is_nan, _CANONICAL_NAN[of_numbers.dtype], result)


def to_bf16(x: Array) -> Array:
    """Bits of the nearest bf16, ties to even; 0x7FFF for NaN."""
    bits = x.view("u4")
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype("u4")) >> 16
    return np.where(np.isnan(x), 0x7FFF, nearest).astype("u2")


def from_bf16(bits: Array) -> Array:
    """The fp32 with the value of a bf16, given by its bits."""
    return (bits.astype("u4") << 16).view("f4")


def to_f16(x: Array) -> Array:
    """Bits of the nearest fp16, ties to even; 0x7FFF for NaN."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype("f2").view("u2"))


class Bound(NamedTuple):
    """The error that the ISA allows an approximation: the largest of the bounds that it states.

    It is a distance from the correctly rounded result.

    Attributes:
        ulps: Distance in units in the last place of the result.
        relative: Distance divided by the result.
        absolute: Distance.
        missing_bits: The last bits of the significand that the format of the result does not have.
    """

    ulps: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0
    missing_bits: int = 0

    def ulp(self, result: Array) -> Array:
        """Unit in the last place of each result, in fp64."""
        return np.spacing(np.abs(result)).astype("f8") * 2.0**self.missing_bits

    def error(self, result: Array) -> Array:
        """Largest distance allowed from each result, in fp64."""
        size = np.abs(result).astype("f8")
        # An error in ulps never changes the sign, not even of the smallest subnormals.
        in_ulps = np.minimum(self.ulps * self.ulp(result), size)
        return np.maximum(np.maximum(in_ulps, self.relative * size), self.absolute)


def perturbed(result: Array, inputs: Sequence[Array], bound: Bound) -> Array:
    """Move each result by a pseudo-random number of ulps, by no more than the bound allows.

    The error depends on the bits of the operands alone, as in hardware: the same operands give the same
    result. Infinite, NaN and zero results remain, and so does every result of a zero or subnormal operand:
    the result of zeros is in the ISA's tables, and `.ftz` makes zeros of subnormals. No normal result
    becomes subnormal.

    Args:
        result: Correctly rounded results, fp32 or fp64, of the shape to which the operands broadcast.
        inputs: Operands, fp32 or fp64.
        bound: The error that the ISA allows.
    """
    ulp, allowed = bound.ulp(result), bound.error(result)
    steps = np.trunc(_uniform(inputs) * (np.floor(allowed / ulp) + 1))
    moved = (result.astype("f8") + steps * ulp).astype(result.dtype)
    # The sum can leave the binade of the result upwards and be rounded to a coarser grid, or to infinity.
    beyond = ~(np.abs(moved.astype("f8") - result) <= allowed)
    becomes_subnormal = is_subnormal_or_zero(moved) & ~is_subnormal_or_zero(result)
    stays = beyond | becomes_subnormal | (result == 0) | ~np.isfinite(result)
    for x in inputs:
        stays = stays | is_subnormal_or_zero(x)
    return np.where(stays, result, moved)


def _uniform(inputs: Sequence[Array]) -> Array:
    """Pseudo-random numbers in [-1, 1) from the bits of the operands (the mixer of SplitMix64)."""
    state: Array = np.zeros((), "u8")
    for x in inputs:
        state = state + x.view(_UINT[x.dtype]) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype("f8") * 2.0**-52 - 1.0
