"""Every opcode of the emulator against exact arithmetic: integers, rationals, decimals of 40 digits."""

from __future__ import annotations

import inspect
import math
import operator
import random
import struct
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import Fault, arithmetic
from emulator.instructions import APPROXIMATIONS, INSTRUCTIONS
from emulator.types import BITS, DTYPES

Value = Any  # int, float or bool


@pytest.fixture(autouse=True)
def ignore_floating_point_errors() -> Iterator[None]:
    """The emulated GPU has no floating-point exceptions."""
    with np.errstate(all="ignore"):
        yield


# ---- Exact arithmetic


class Format(NamedTuple):
    """A binary floating-point format: bits of the significand, range of the exponents of normal numbers."""

    precision: int
    least: int
    greatest: int


FORMATS = {
    "f16": Format(11, -14, 15),
    "bf16": Format(8, -126, 127),
    "f32": Format(24, -126, 127),
    "f64": Format(53, -1022, 1023),
    "upper f64": Format(21, -1022, 1023),  # the upper 32 bits of an f64
}


def nearest(x: Fraction, kind: str) -> float:
    """The nearest number of the format, ties to even. The sign of a result that underflows is kept."""
    precision, least, greatest = FORMATS[kind]
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    ulp = Fraction(2) ** (max(exponent, least) - precision + 1)
    rounded = abs(round(x / ulp)) * ulp
    size = float(rounded) if rounded < Fraction(2) ** (greatest + 1) else math.inf
    return size if x > 0 else -size


def flushed(x: float, kind: str = "f32") -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[kind].least else x


def fma(a: float, b: float, c: float, kind: str) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        return nearest(exact, kind)
    return math.copysign(0.0, a) * math.copysign(1.0, b) + c if a == 0 or b == 0 else 0.0


def divide(a: float, b: float, kind: str) -> float:
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    if b == 0 or math.isinf(a):
        return sign * math.inf
    if a == 0 or math.isinf(b):
        return sign * 0.0
    return nearest(Fraction(a) / Fraction(b), kind)


def around(x: Decimal) -> tuple[float, ...]:
    """The fp32 that rounding an fp64 result may give: the nearest to numbers within a relative 2^-45 of x."""
    exact = Fraction(x)
    return tuple(nearest(exact * (1 + Fraction(error, 2**45)), "f32") if exact else 0.0 for error in (-1, 1))


def power_of_two(x: float) -> float | tuple[float, ...]:
    if math.isnan(x) or abs(x) > 1000:
        return math.nan if math.isnan(x) else math.inf if x > 0 else 0.0
    return around(Decimal(2) ** Decimal(x))


def logarithm(x: float) -> float | tuple[float, ...]:
    if math.isnan(x) or x < 0:
        return math.nan
    if x == 0 or math.isinf(x):
        return -math.inf if x == 0 else x
    return around(Decimal(x).ln() / Decimal(2).ln())


def upper_reciprocal(x: float) -> float:
    bits = int.from_bytes(struct.pack("<d", x), "little") & 0xFFFFFFFF_00000000
    operand = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    return flushed(divide(1.0, flushed(operand, "f64"), "upper f64"), "f64")


def extremum(a: float, b: float, of: Callable[..., float]) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return of(a, b, key=lambda x: (x, math.copysign(1.0, x)))


def float_bits(x: float, kind: str) -> int:
    """Bits of the fp16 or bf16 nearest to x, and 0x7FFF for NaN."""
    if math.isnan(x):
        return 0x7FFF
    if x and math.isfinite(x):
        x = nearest(Fraction(x), kind)
    code, bits = ("<e", 16) if kind == "f16" else ("<f", 32)
    return int.from_bytes(struct.pack(code, x), "little") >> (bits - 16)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def wrapped(x: int, kind: str) -> int:
    """The integer that the type's bits hold."""
    x &= (1 << BITS[kind]) - 1
    return x - (1 << BITS[kind]) if kind[0] == "s" and x >> (BITS[kind] - 1) else x


# ---- What each opcode computes


class Expected(NamedTuple):
    result: str
    sources: list[str]
    exact: Callable[..., Value]


FLOATS: dict[str, Callable[..., Value]] = {
    # Without .ftz and the type, which is the last parameter.
    "add": (add := lambda a, b, kind: fma(a, 1.0, b, kind)),
    "add.rn": add,
    "sub": (sub := lambda a, b, kind: fma(b, -1.0, a, kind)),
    "sub.rn": sub,
    "mul": (mul := lambda a, b, kind: fma(a, b, -0.0, kind)),
    "mul.rn": mul,
    "fma.rn": fma,
    "div.rn": divide,
    "div.full": divide,
    "rcp.rn": (rcp := lambda a, kind: divide(1.0, a, kind)),
    "rcp.approx": rcp,
    "ex2.approx": lambda a, kind: power_of_two(a),
    "lg2.approx": lambda a, kind: logarithm(a),
    "neg": lambda a, kind: -a,
    "abs": lambda a, kind: abs(a),
    "max": lambda a, b, kind: extremum(a, b, max),
    "min": lambda a, b, kind: extremum(a, b, min),
}

INTEGERS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": truncated,
    "rem": lambda a, b: a - truncated(a, b) * b,
    "max": max,
    "min": min,
    "neg": operator.neg,
}

BITWISE: dict[str, Callable[..., int]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": lambda a: ~a,
}

ORDERED: dict[str, Callable[..., bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


def comparison(name: str, kind: str) -> Callable[[Value, Value], bool]:
    """The comparison of setp; those of floating point are false of NaN, or true if their name ends in u."""
    if kind[0] != "f":
        return ORDERED[name]

    def compare(a: float, b: float) -> bool:
        has_nan = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return has_nan == (name == "nan")
        if name in ORDERED:
            return not has_nan and ORDERED[name](a, b)
        return has_nan or ORDERED[name.removesuffix("u")](a, b)

    return compare


def conversion(modifiers: list[str], kind: str) -> Expected:
    """What cvt computes. `kind` is the type of the source."""
    target = modifiers[-1]
    rounded = modifiers[:-1] == ["rn"]
    if target.removesuffix("x2") in ("f16", "bf16") and kind == "f32" and rounded:
        half = target.removesuffix("x2")
        if target == half:
            return Expected("b16", ["f32"], lambda a: float_bits(a, half))
        return Expected("b32", ["f32"] * 2, lambda a, b: float_bits(a, half) << 16 | float_bits(b, half))
    if (modifiers, kind) in ((["f32"], "f16"), (["f64"], "f32")):
        return Expected(target, [kind], lambda a: a)
    if (modifiers, kind) == (["f32"], "bf16"):
        return Expected("f32", ["b16"], lambda a: struct.unpack("<f", struct.pack("<I", a << 16))[0])
    if rounded and target in ("f32", "f64"):

        def exact(a: float) -> float:
            return nearest(Fraction(a), target) if a and math.isfinite(a) else float(a)

        return Expected(target, [kind], exact)
    if not modifiers[:-1]:
        return Expected(target, [kind], lambda a: wrapped(a, target))
    raise KeyError(modifiers)


def expectation(opcode: str) -> Expected:
    """Types and exact result of an opcode, derived from its name.

    Raises:
        KeyError: If the opcode has no expectation.
    """
    name, *modifiers, kind = opcode.split(".")
    operation = ".".join([name, *(m for m in modifiers if m != "ftz")])
    flush = flushed if "ftz" in modifiers else lambda a: a
    if opcode == "rcp.approx.ftz.f64":
        return Expected("f64", ["f64"], upper_reciprocal)
    if name == "cvt":
        return conversion(modifiers, kind)
    if name == "setp":
        (compared,) = modifiers
        return Expected("pred", [kind, kind], comparison(compared, kind))
    if operation == "mov":
        return Expected(kind, [kind], lambda a: a)
    if operation == "selp":
        return Expected(kind, [kind, kind, "pred"], lambda a, b, c: a if c else b)
    if operation in ("shl", "shr"):
        shift = operator.lshift if name == "shl" else operator.rshift
        return Expected(kind, [kind, "b32"], lambda a, n: wrapped(shift(a, min(n, 64)), kind))
    if operation == "bfe":  # the low bytes of the operands count
        return Expected(kind, [kind] * 3, lambda a, b, c: (a >> (b & 255)) & ((1 << (c & 255)) - 1))
    if operation in ("mul.wide", "mad.wide"):
        wide = f"{kind[0]}{2 * BITS[kind]}"
        if name == "mul":
            return Expected(wide, [kind, kind], lambda a, b: a * b)
        return Expected(wide, [kind, kind, wide], lambda a, b, c: wrapped(a * b + c, wide))
    if kind in ("f32", "f64"):
        function = FLOATS[operation]

        def exact(*operands: float) -> Value:
            result = function(*map(flush, operands), kind)
            return tuple(map(flush, result)) if isinstance(result, tuple) else flush(result)

        return Expected(kind, [kind] * (len(inspect.signature(function).parameters) - 1), exact)
    if kind[0] in "us":
        function = INTEGERS[operation]
        arity = {"neg": 1, "mad.lo": 3}.get(operation, 2)
        return Expected(kind, [kind] * arity, lambda *operands: wrapped(function(*operands), kind))
    function = BITWISE[operation]
    return Expected(kind, [kind] * (1 if name == "not" else 2), lambda *x: wrapped(function(*x), kind))


# ---- Operands


def specials(kind: str) -> np.ndarray:
    """The special values of a type."""
    dtype = DTYPES[kind]
    if kind == "pred":
        return np.array([False, True])
    if dtype.kind in "iu":
        information = np.iinfo(dtype)
        values = [
            0,
            1,
            2,
            7,
            15,
            16,
            31,
            32,
            63,
            64,
            65,
            information.max - 1,
            information.max,
            information.min,
        ]
        return np.array(
            [*values, *([-1, -2, -7] if dtype.kind == "i" else [information.max // 2 + 1])], dtype
        )
    information = np.finfo(dtype)
    zero, one = dtype.type(0), dtype.type(1)
    tiny = information.smallest_normal
    positive = [zero, information.smallest_subnormal, tiny - information.smallest_subnormal, tiny, one]
    positive += [one + information.eps, one - information.epsneg, 1.5, 3, information.max, np.inf, np.nan]
    return np.array([*positive, *(-x for x in positive)], dtype)


def randoms(kind: str, number: int, seed: int) -> np.ndarray:
    """Random bit patterns, numbers of moderate size, and ties of roundings to bf16, fp16 and fp32."""
    dtype, generator = DTYPES[kind], np.random.default_rng(seed)
    if kind == "pred":
        return generator.integers(0, 2, 3 * number).astype("?")
    bits = generator.integers(0, 256, (number, dtype.itemsize), dtype="u1").view(dtype)[:, 0]
    if dtype.kind == "f":
        precision = generator.choice([8, 11, 24], number)
        half = 2 ** (precision - 1)  # an odd significand with one bit too many is a tie
        ties = np.ldexp(2.0 * generator.integers(half, 2 * half) + 1, generator.integers(-30, 3, number))
        others = np.concatenate([generator.normal(0, 10, number), ties]).astype(dtype)
    else:
        others = generator.integers(-80 if dtype.kind == "i" else 0, 80, 2 * number).astype(dtype)
    return generator.permutation(np.concatenate([bits, others]))


def operands_of(kinds: list[str]) -> list[np.ndarray]:
    """All combinations of special values, then random ones."""
    crossed = list(product(*(specials(kind) for kind in kinds)))
    if len(crossed) > 1500:
        crossed = random.Random(0).sample(crossed, 1500)
    columns = zip(*crossed, strict=True)
    return [
        np.concatenate([np.array(column, DTYPES[kind]), randoms(kind, 150, seed)])
        for seed, (column, kind) in enumerate(zip(columns, kinds, strict=True))
    ]


def same(actual: Value, expected: Value) -> bool:
    """Whether two values are equal, zeros with their signs, and NaN to NaN. A tuple has alternatives."""
    if isinstance(expected, tuple):
        return any(same(actual, x) for x in expected)
    if isinstance(expected, float) and expected == expected:
        return actual == expected and math.copysign(1, actual) == math.copysign(1, expected)
    return actual == expected or (actual != actual and expected != expected)


def check(opcode: str, operands: list[np.ndarray]) -> None:
    """Compare an opcode with exact arithmetic on every lane."""
    instruction, expected = INSTRUCTIONS[opcode], expectation(opcode)
    for operand in operands:
        operand.flags.writeable = False
    result = instruction.compute(*operands)
    assert result.dtype == DTYPES[instruction.result]
    assert result.shape == operands[0].shape
    with localcontext() as context:
        context.prec = 40
        for actual, *lane in zip(result.tolist(), *(x.tolist() for x in operands), strict=True):
            exact = expected.exact(*lane)
            assert same(actual, exact), f"{opcode} of {lane}: {actual}, exactly {exact}"


@pytest.mark.parametrize("opcode", INSTRUCTIONS)
def test_result_is_exact(opcode: str) -> None:
    instruction, expected = INSTRUCTIONS[opcode], expectation(opcode)
    assert (instruction.result, list(instruction.sources)) == (expected.result, expected.sources)
    operands = operands_of(expected.sources)
    if opcode.split(".")[0] in ("div", "rem") and expected.result[0] in "us":
        operands = [x[operands[1] != 0] for x in operands]
    check(opcode, operands)


def test_every_section_is_of_its_own_instruction() -> None:
    chapters = {
        "floating-point-instructions",
        "integer-arithmetic-instructions",
        "comparison-and-selection-instructions",
        "logic-and-shift-instructions",
        "data-movement-and-conversion-instructions",
    }
    for opcode, instruction in INSTRUCTIONS.items():
        name, *modifiers = opcode.split(".")
        chapter, _, section = instruction.section.partition("instructions-")
        assert f"{chapter}instructions" in chapters
        assert section in (name, "-".join([name, *modifiers]))
        assert chapter != "floating-point-" or modifiers[-1][0] == "f"


@pytest.mark.parametrize(
    "opcode", ["add.rz.f32", "max.NaN.f32", "cvt.f32.f64", "shl.s32", "setp.lt.b32", "mul.s32"]
)
def test_opcode_with_other_modifiers_is_no_key(opcode: str) -> None:
    assert opcode not in INSTRUCTIONS


@pytest.mark.parametrize("opcode", [x for x in INSTRUCTIONS if x.startswith(("div.s", "div.u", "rem."))])
def test_integer_division_by_zero_raises(opcode: str) -> None:
    x = np.array([1, 0, 5], DTYPES[INSTRUCTIONS[opcode].result])
    with pytest.raises(Fault):
        INSTRUCTIONS[opcode].compute(x, x)


# ---- Fused multiply-add


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("exponent", [0, -60, "subnormal", "near overflow"])
def test_fma_rounds_once(kind: str, exponent: int | str) -> None:
    """Sums that cancel, and sums that are close to a tie, of products of all sizes."""
    dtype, generator, lanes = DTYPES[kind], np.random.default_rng(1), 400
    precision, least, greatest = FORMATS[kind]
    exponent = {"subnormal": least - precision // 2, "near overflow": greatest - 2}.get(exponent, exponent)
    a, b = (generator.uniform(1, 2, lanes) * generator.choice([-1, 1], lanes) for _ in range(2))
    # Few bits in one factor make ties frequent.
    b = np.where(np.arange(lanes) % 2, b, np.ldexp(np.round(np.ldexp(b, 3)), -3))
    a, b = np.ldexp(a, exponent // 2).astype(dtype), np.ldexp(b, exponent - exponent // 2).astype(dtype)
    rounded = (a * b).astype(dtype)
    half_ulp = np.spacing(np.abs(rounded)) / 2
    shift = generator.choice([-1, 1], lanes) * np.ldexp(
        1.0, generator.integers(-2 * precision, precision + 3, lanes)
    )
    near_tie = np.ldexp(generator.integers(1, 8, lanes) / 4, -precision) * rounded
    for c in (
        -rounded,
        -rounded + half_ulp,
        rounded * shift,
        near_tie,
        half_ulp,
        -half_ulp,
        half_ulp * (1 + shift),
    ):
        check(f"fma.rn.{kind}", [a.copy(), b.copy(), c.astype(dtype)])


def test_fma_differs_from_two_roundings() -> None:
    a = np.array([1 + 2.0**-12], "f4")
    c = np.array([-(1 + 2.0**-11)], "f4")
    assert arithmetic.fma32(a, a, c).tolist() == [2.0**-24]
    assert (a * a + c).tolist() == [0.0]

    # The exact sum is 2^-70 below a tie of fp32. Rounded to fp64 first, it is the tie.
    a, b = np.array([1 + 2.0**-23], "f4"), np.array([2.0**-24 * (1 - 2.0**-23)], "f4")
    c = a.copy()
    check("fma.rn.f32", [a, b, c])
    assert arithmetic.fma32(a, b, c).tolist() == [1 + 2.0**-23]
    assert (a.astype("f8") * b + c).astype("f4").tolist() == [1 + 2.0**-22]


@pytest.mark.parametrize("shape", [(), (3, 4), (2, 0)])
@pytest.mark.parametrize("function, kind", [(arithmetic.fma32, "f4"), (arithmetic.fma64, "f8")])
def test_fma_broadcasts(shape: tuple[int, ...], function: Callable[..., np.ndarray], kind: str) -> None:
    a, b, c = np.full(shape, 3, kind), np.full((), 1e30, kind), np.full(shape[-1:], 2, kind)
    result = function(a, b, c)
    assert result.shape == shape
    assert result.dtype == kind
    np.testing.assert_array_equal(result, np.full(shape, np.dtype(kind).type(3) * b))


# ---- NaN whose bits the ISA or the docstring states


def test_canonical_nan() -> None:
    nan = np.array([0x7F800001, 0xFFC00000], "u4").view("f4")
    one = np.ones(2, "f4")
    for function in (arithmetic.maximum, arithmetic.minimum):
        assert function(nan, nan).view("u4").tolist() == [0x7FFFFFFF] * 2
        assert function(nan, one).tolist() == function(one, nan).tolist() == [1, 1]
        wide = nan.astype("f8")
        assert function(wide, wide).view("u8").tolist() == [0x7FFFFFFFFFFFFFFF] * 2
    wide = np.array([0x7FF0000100000000, 0xFFF8000000000000], "u8").view("f8")
    assert arithmetic.rcp_approx_ftz_f64(wide).view("u8").tolist() == [0x7FFFFFFF00000000] * 2


def test_pairs_have_their_first_operand_in_the_upper_half() -> None:
    one, two = np.array([1], "f4"), np.array([2], "f4")
    assert INSTRUCTIONS["cvt.rn.bf16x2.f32"].compute(one, two).tolist() == [0x3F80_4000]
    assert INSTRUCTIONS["cvt.rn.f16x2.f32"].compute(one, two).tolist() == [0x3C00_4000]


# ---- The error of approximations


def allowed_error(opcode: str, lane: list[float], result: float) -> float:
    """The error that the ISA states for these operands, whose exact result is rounded to `result`."""
    kind = "upper f64" if opcode.endswith("f64") else "f32"
    precision, least, _ = FORMATS[kind]
    ulp = 2.0 ** (max(math.frexp(result)[1] - 1, least) - precision + 1)
    if opcode.startswith("lg2"):
        return 2.0**-22 if 0.5 < lane[0] < 2 else 2.0**-22 * abs(result)
    return {"ex2": 2, "rcp": 1, "div": 2}[opcode[:3]] * ulp


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_perturbation_reaches_the_bound_and_stays_within(opcode: str) -> None:
    instruction = INSTRUCTIONS[opcode]
    operands = operands_of(list(instruction.sources))
    dtype = DTYPES[instruction.result]
    operands = [
        np.concatenate([x, np.random.default_rng(i).normal(0, 3, 3000).astype(dtype)])
        for i, x in enumerate(operands)
    ]
    result = instruction.compute(*operands)
    moved = arithmetic.perturbed(result, operands, APPROXIMATIONS[opcode])
    assert moved.dtype == result.dtype
    np.testing.assert_array_equal(moved, arithmetic.perturbed(result, operands, APPROXIMATIONS[opcode]))
    # The error is one of the operands, whatever the lane in which they are.
    backwards = arithmetic.perturbed(result[::-1], [x[::-1] for x in operands], APPROXIMATIONS[opcode])
    np.testing.assert_array_equal(moved, backwards[::-1])

    greatest, smallest, directions = 0.0, float(np.finfo(dtype).smallest_normal), set()
    for before, after, *lane in zip(
        result.tolist(), moved.tolist(), *(x.tolist() for x in operands), strict=True
    ):
        is_special = before == 0 or not math.isfinite(before) or min(map(abs, lane)) < smallest
        if is_special:
            assert same(after, before), (lane, before, after)
            continue
        error = abs(after - before) / allowed_error(opcode, lane, before)
        assert error <= 1, (lane, before, after)
        assert abs(before) < smallest or abs(after) >= smallest, (lane, before, after)
        greatest = max(greatest, error)
        directions.add((after > before) - (after < before))
    assert greatest > 0.99
    assert directions == {-1, 0, 1}


def test_perturbation_leaves_the_lower_bits_of_an_approximate_fp64_reciprocal_zero() -> None:
    opcode = "rcp.approx.ftz.f64"
    x = randoms("f64", 500, 0)
    moved = arithmetic.perturbed(INSTRUCTIONS[opcode].compute(x), [x], APPROXIMATIONS[opcode])
    assert not np.any(moved.view("u8") & np.uint64(0xFFFFFFFF))


def test_perturbation_keeps_the_power_of_zero() -> None:
    """PTX ISA, "ex2": the result of zeros is 1."""
    x = np.array([0.0, -0.0, 1e-40], "f4")
    moved = arithmetic.perturbed(arithmetic.ex2(x), [x], APPROXIMATIONS["ex2.approx.f32"])
    assert moved.tolist() == [1, 1, 1]


def test_perturbation_keeps_the_sign_of_subnormal_results() -> None:
    x = np.linspace(-150, -146, 500, dtype="f4")
    moved = arithmetic.perturbed(arithmetic.ex2(x), [x], APPROXIMATIONS["ex2.approx.f32"])
    assert np.any(moved != arithmetic.ex2(x))
    assert not np.any(np.signbit(moved))


def test_every_approximation_has_a_bound() -> None:
    assert set(APPROXIMATIONS) == {
        opcode for opcode in INSTRUCTIONS if ".approx" in opcode or ".full" in opcode
    }
