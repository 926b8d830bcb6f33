"""Divergences of two distributions: their description, and their formulas per vocabulary entry.

The formulas have no cancellation: their terms are not negative, so that the divergence of two nearly equal
rows keeps its digits. `p` and `q` are the probabilities of an entry under student and teacher, and
`x = log(p / q)`. kernels/divergence.py computes the same terms in a form that takes fewer instructions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.choices import DIVERGENCES, DivergenceKind
from ..checks.scalars import check_choice, number_field

NEAR = 0.5
"""Below this |x| power series replace differences."""


@dataclass(frozen=True)
class Divergence:
    """A divergence of student p and teacher q.

    Attributes:
        kind: "reverse_kl", KL(p || q); "forward_kl", KL(q || p); or "jsd", w KL(q || m) + (1 - w) KL(p || m)
            with m = w q + (1 - w) p.
        weight: w, between 0 and 1 exclusive.

    Raises:
        ValueError: a bad value.
        TypeError: a wrong type.
    """

    kind: DivergenceKind = "reverse_kl"
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_choice("divergence", self.kind, DIVERGENCES)
        number_field(self, "weight", name="jsd_weight", strict=True)
        if self.weight >= 1:
            raise ValueError(f"jsd_weight must be < 1, got {self.weight!r}")


class Series(NamedTuple):
    """Power series in x of both terms, divided by p, from the first power that is not 0."""

    value: tuple[float, ...]  # from x^2
    slope: tuple[float, ...]  # from x


@functools.cache
def power_series(spec: Divergence, eps: float) -> Series:
    """Return the series of `value_terms` and `slope_terms`, exact to `eps` for |x| <= NEAR."""
    powers = range(40)
    exponential = [(-1) ** n / math.factorial(n) for n in powers]  # exp(-x)
    if spec.kind == "reverse_kl":  # exp(-x) - 1 + x, and x
        value, slope = exponential[2:], [1.0]
    elif spec.kind == "forward_kl":  # 1 - (1 + x) exp(-x), and 1 - exp(-x)
        value = [exponential[n] / (n + 2) for n in powers]
        slope = [-c for c in exponential[1:]]
    else:
        w = spec.weight
        # s = w q / m, as a function of x, has the derivative -s (1 - s). So that 1 - s keeps its digits, it
        # has a series of its own, r.
        s, r = [w], [1 - w]
        for n in powers[1:]:
            s.append(-sum(s[i] * r[n - 1 - i] for i in range(n)) / n)
            r.append(-s[n])
        # log(m / p) has the derivative -s; the value has the derivative w exp(-x) log(m / q).
        slope = [(1 - w) * s[n] / (n + 1) for n in powers]
        logs = [1 - w, *(-s[n] / (n + 1) for n in powers[1:])]  # log(m / q) / x
        value = [w * sum(exponential[n - i] * logs[i] for i in range(n + 1)) / (n + 2) for n in powers]
    return Series(truncated(value, eps), truncated(slope, eps))


def truncated(series: list[float], eps: float) -> tuple[float, ...]:
    """Leave out the powers that contribute less than `eps` of the sum for |x| <= NEAR."""
    kept = [n for n, c in enumerate(series) if abs(c) * NEAR**n > eps / 8 * abs(series[0])]
    return tuple(series[: kept[-1] + 1])


def terms(
    p: Tensor,
    q: Tensor,
    x: Tensor,
    spec: Divergence,
    *,
    value: Tensor | None,
    slope: Tensor,
    spare: list[Tensor],
) -> None:
    """Fill `slope`, and `value` if it is not None, with the terms of each entry.

    The sum of `value` over a row is the divergence. The derivative by the student's scaled logit is
    `slope - p * sum(slope)`. The slope is `p log(p / q)` for the reverse KL, `p - q` for the forward KL, and
    `(1 - w) p log(p / m)` for the JSD. Operations that choose between two tensors by a varying condition are
    slow on a CPU, so bits are combined.

    Args:
        p, q, x: of one shape. `x` is finite where p and q are 0.
        spare: three tensors of this shape. They are overwritten.
    """
    series = power_series(spec, torch.finfo(p.dtype).eps)
    near, a, b = spare
    integers = torch.int64 if p.dtype == torch.float64 else torch.int32
    torch.abs(x, out=near).sub_(NEAR)
    bits = near.view(integers)
    bits.bitwise_right_shift_(8 * near.element_size() - 1)  # copies the sign: all bits are 1 near 0
    if spec.kind == "reverse_kl":
        multiply(p, x, out=slope)
        if value is not None:
            torch.sub(q, p, out=a).add_(slope)
    elif spec.kind == "forward_kl":
        torch.sub(p, q, out=b)
        polynomial(x, series.slope, out=slope).mul_(x).mul_(p)
        choose(bits, slope, b)
        if value is not None:
            b.sub_(multiply(q, x, out=a))
            a = b
    else:
        w, tiny = spec.weight, torch.finfo(p.dtype).tiny
        # With these bounds each logarithm is finite, and its product with a probability of 0 is 0.
        torch.clamp_min(p, tiny, out=a)
        torch.clamp_min(q, tiny, out=b)
        difference = torch.sub(q, p, out=slope)
        log_mixture(torch.div(difference, a, out=a), q, p, w, 1 - w).mul_(p).mul_(w - 1)
        if value is not None:
            log_mixture(torch.div(difference, b, out=b).neg_(), p, q, 1 - w, w).mul_(q).mul_(w)
        polynomial(x, series.slope, out=slope).mul_(x).mul_(p)
        choose(bits, slope, a)
        if value is not None:
            a.sub_(b)
    if value is not None:
        polynomial(x, series.value, out=value).mul_(x).mul_(x).mul_(p)
        choose(bits, value, a)


def log_mixture(excess: Tensor, other: Tensor, own: Tensor, weight: float, rest: float) -> Tensor:
    """Overwrite `excess`, other / own - 1, with log(m / own) of the mixture `m = weight other + rest own`."""
    if rest > 1e-3:
        return excess.mul_(weight).log1p_()
    # A rest this small has few digits in `1 + weight excess`. It needs them where that is nearly 0.
    small = (other / own).mul_(weight).add_(rest).log_()
    return torch.where(excess < -0.5, small, excess.mul_(weight).log1p_(), out=excess)


def multiply(own: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Write `own * x` to `out`, with 0 where `own` is 0, although `x` may be infinite there."""
    torch.mul(own, x, out=out)
    if out.device.type != "cpu" or bool(out.sum().isnan()):  # on the CPU, so it does not sync
        out.masked_fill_(own == 0, 0.0)
    return out


def polynomial(x: Tensor, coefficients: tuple[float, ...], out: Tensor) -> Tensor:
    """Write `c_0 + c_1 x + c_2 x^2 + ...` to `out`."""
    out.fill_(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        torch.addcmul(torch.full((), c, dtype=x.dtype, device=x.device), x, out, out=out)
    return out


def choose(bits: Tensor, here: Tensor, elsewhere: Tensor) -> None:
    """Overwrite `here` with `elsewhere` where `bits` are 0. Where they are all 1, it stays."""
    other = elsewhere.view(bits.dtype)
    here.view(bits.dtype).bitwise_xor_(other).bitwise_and_(bits).bitwise_xor_(other)
