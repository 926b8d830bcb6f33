"""Divergences of two distributions: their description, and their formulas per vocabulary entry.

The formulas have no cancellation: their terms are not negative, so that the divergence of two nearly equal
rows keeps its digits. `own` and `other` are the probabilities of an entry, and `x = log(own / other)`.
kernels/divergence.py has the same `value_terms` and `slope_terms`, in a form that takes fewer instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.choices import DIVERGENCES, DivergenceKind
from ..checks.scalars import check_choice, number_field

NEAR = 0.5  # below this |x| a series replaces exp(-x) - 1 + x
NEAR_MIXTURE = 0.3  # below this |t| a series replaces t - log1p(t)


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


def horner(x: Tensor, factors: list[float]) -> Tensor:
    """Return `1 + f_1 x (1 + f_2 x (1 + ...))`."""
    one, total = x.new_ones(()), torch.ones_like(x)
    for factor in reversed(factors):
        total = torch.addcmul(one, x, total, value=factor)
    return total


def excess(x: Tensor) -> Tensor:
    """Compute `exp(-x) - 1 + x` for |x| <= NEAR by its Taylor series."""
    terms = 17 if x.dtype == torch.float64 else 9
    return 0.5 * x * x * horner(x, [-1 / i for i in range(3, terms + 1)])


def kl_terms(own: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """Return terms whose sum is KL(own || other): `own (exp(-x) - 1 + x)`.

    They differ from `own x` by `other - own`, whose sum is 0.
    """
    far = other - own + torch.where(own > 0, own * x, 0.0)
    return torch.where(x.abs() < NEAR, own * excess(x), far)


def log_mixture(x: Tensor, weight: float) -> Tensor:
    """Return `log(m / own)` of the mixture `m = weight other + (1 - weight) own`."""
    near = torch.log1p(weight * torch.expm1(-x))
    return torch.where(x > -1, near, torch.log(weight + (1 - weight) * x.exp()) - x)


def mixture_terms(own: Tensor, other: Tensor, x: Tensor, weight: float) -> Tensor:
    """Return terms whose sum is KL(own || m): `own (t - log1p(t))` with `t = m / own - 1`.

    They differ from `-own log1p(t)` by `weight (other - own)`, whose sum is 0.
    """
    t = weight * torch.expm1(-x)
    s = t / (2 + t)  # log1p(t) = 2 atanh(s), and t - 2 s = t s
    square = s * s
    count = 12 if x.dtype == torch.float64 else 6
    tail = square * s * horner(square, [(2 * i + 1) / (2 * i + 3) for i in range(1, count)]) * (2 / 3)
    far = weight * (other - own) - torch.where(own > 0, own * log_mixture(x, weight), 0.0)
    return torch.where(t.abs() < NEAR_MIXTURE, own * (t * s - tail), far)


def value_terms(p: Tensor, q: Tensor, x: Tensor, spec: Divergence) -> Tensor:
    """Return the terms of the divergence of student p and teacher q, with `x = log(p / q)`."""
    if spec.kind == "reverse_kl":
        return kl_terms(p, q, x)
    if spec.kind == "forward_kl":
        return kl_terms(q, p, -x)
    w = spec.weight
    return w * mixture_terms(q, p, -x, 1 - w) + (1 - w) * mixture_terms(p, q, x, w)


def slope_terms(p: Tensor, q: Tensor, x: Tensor, spec: Divergence) -> Tensor:
    """Return s_v such that the derivative by the student's scaled logit is `s_v - p_v sum(s)`.

    s is p log(p / q) for the reverse KL, p - q for the forward KL, (1 - w) p log(p / m) for the JSD.
    """
    if spec.kind == "reverse_kl":
        return torch.where(p > 0, p * x, 0.0)
    if spec.kind == "forward_kl":
        return torch.where(x.abs() < NEAR, -p * torch.expm1(-x), p - q)
    return torch.where(p > 0, (spec.weight - 1) * p * log_mixture(x, spec.weight), 0.0)
