"""Comparisons after a matrix product. The BLAS library, not this package, orders the sums of a product.

The order depends on processor, shape, number of threads and memory alignment. Two things hold in any order:

* Products of numbers with few digits are exact, because every partial sum is. `on_a_grid` makes such
  operands. Tests can then compare the bits of logits, and of results that are computed from logits.
* Gradients of hidden states, weight and bias are products of numbers with all their digits. Two orders of the
  same terms agree within the bound of `assert_same_products`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels.linear.chunks import Chunk
from grpo_kernels.linear.gradients import GradientSums
from grpo_kernels.linear.head import Head

GRID_BITS = 7  # bf16 holds 8


def on_a_grid(x: Tensor, bits: int = GRID_BITS) -> Tensor:
    """Round each row of `x` to multiples of a power of two, the step. No entry exceeds `2^bits` steps.

    The product of a row of `a` bits with a row of `b` bits is a multiple of the product of their steps, and
    so is each partial sum in any order. A sum of `K` terms has at most `2^(a + b) K` such steps, and fp32
    holds multiples up to 2^24. NaN and infinities stay.
    """
    wide = x.double()
    largest = torch.where(wide.isfinite(), wide, 0.0).abs().amax(-1, keepdim=True) if x.numel() else wide
    step = torch.exp2(torch.frexp(largest).exponent.double() - bits)
    return ((wide / step).round() * step).to(x.dtype)


def rounding_bound(terms: int, dtype: torch.dtype) -> float:
    """Return the maximal error of a sum of products, relative to the sum of their magnitudes.

    A product is rounded once, and a term takes part in at most `terms - 1` additions, so the share is
    `gamma = K u / (1 - K u)` with `K = terms` and the unit roundoff `u = eps / 2` (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1). Products of 16-bit operands are summed in fp32.
    """
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    assert terms * u < 0.5
    return terms * u / (1 - terms * u)


@contextlib.contextmanager
def magnitudes() -> Iterator[None]:
    """Inside this context, the linear form returns sums of magnitudes of terms as its gradients."""
    add = GradientSums.add

    def add_magnitudes(self: GradientSums, chunk: Chunk) -> None:
        self.head = Head(*(None if x is None else x.abs() for x in self.head))  # type: ignore[arg-type]
        add(self, chunk._replace(dlogits=chunk.dlogits.abs(), hidden=chunk.hidden.abs()))

    with mock.patch.object(GradientSums, "add", add_magnitudes):
        yield


def lengths(tokens: int, vocab: int) -> dict[str, int]:
    """Return the number of terms in the sum that gives an entry of each gradient."""
    return {"hidden": vocab, "weight": tokens, "bias": tokens}


def assert_same_products(got: Tensor, want: Tensor, magnitude: Tensor, terms: int, what: str) -> None:
    """Compare two gradients that sum the same `terms` products in different orders.

    The error of each is at most `rounding_bound` times the sum of the magnitudes of the products. The bound
    includes the factor that scales the sum. The two gradients differ by at most twice that. An entry that is
    finally rounded to 16 bits may also differ by one spacing.
    """
    assert got.dtype == want.dtype and got.shape == want.shape, what
    x, y, size = (each.double() for each in (got, want, magnitude.abs()))
    allowed = 2 * rounding_bound(terms + 2, got.dtype) * size
    info = torch.finfo(got.dtype)
    if info.bits == 16:
        allowed = (1 + info.eps) * allowed + info.eps * torch.maximum(x.abs(), y.abs())
    allowed = allowed + info.eps * info.smallest_normal
    wrong = ~((x - y).abs() <= allowed) & ~(x.isnan() & y.isnan()) & (x != y)  # infinities are equal
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {float(x[at]):.9g} at {at}, wanted {float(y[at]):.9g}, allowed {float(allowed[at]):.3g}"
        )
