"""The formulas of the divergences in PyTorch and in Triton are the same functions, and have their digits."""

from __future__ import annotations

import mpmath
import pytest
import torch
from distillation_cases import KINDS
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from grpo_kernels.kernels import divergence as twins  # noqa: E402
from grpo_kernels.spec import divergence  # noqa: E402
from grpo_kernels.spec.divergence import Divergence  # noqa: E402

MAGNITUDES = [1e-12, 1e-6, 1e-3, 0.05, 0.26, 0.3, 0.499, 0.501, 1.0, 3.0, 30.0, 80.0]
LOG_RATIOS = [0.0, *MAGNITUDES, *(-x for x in MAGNITUDES)]


@triton.jit
def terms(
    p_ptr, q_ptr, x_ptr, value_ptr, slope_ptr, weight: tl.float64, FORWARD: tl.constexpr, JSD: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    p, q, x = tl.load(p_ptr + at), tl.load(q_ptr + at), tl.load(x_ptr + at)
    w, rest = tl.full((), weight, p.dtype), tl.full((), 1 - weight, p.dtype)
    tl.store(value_ptr + at, twins.value_terms(p, q, x, w, rest, FORWARD, JSD))
    tl.store(slope_ptr + at, twins.slope_terms(p, q, x, w, rest, FORWARD, JSD))


def probabilities(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and log(p / q), with zeros in one or both, padded to 64 entries."""
    x = torch.tensor(LOG_RATIOS, dtype=torch.float64)
    q = torch.full_like(x, 1e-3) * torch.exp(-x.clamp(min=0))
    p = q * x.exp()
    some = (
        torch.tensor([0.0, 0.25, 0.0], dtype=torch.float64),
        torch.tensor([0.25, 0.0, 0.0], dtype=torch.float64),
    )
    limits = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=torch.float64)
    rows = torch.cat([p, some[0]]), torch.cat([q, some[1]]), torch.cat([x, limits])
    p, q, x = (torch.cat([row, row.new_ones(64 - len(row))]).to(device, dtype) for row in rows)
    return p, q, x.masked_fill(p == 1, 0.0)


def torch_terms(p: Tensor, q: Tensor, x: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """Return the values and the slopes, and check that these do not depend on whether values are wanted."""
    x = torch.where((p == 0) & (q == 0), 0.0, x)
    value, slope, alone = (torch.full_like(p, torch.nan) for _ in range(3))
    spare = [torch.full_like(p, torch.nan) for _ in range(3)]
    divergence.terms(p, q, x, spec, value=value, slope=slope, spare=spare)
    divergence.terms(p, q, x, spec, value=None, slope=alone, spare=spare)
    assert torch.equal(slope, alone)
    return value, slope


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_twins(kind: str, weight: float, dtype: torch.dtype, needs_triton: None, device: str) -> None:
    p, q, x = probabilities(dtype, device)
    value, slope = torch.empty_like(p), torch.empty_like(p)
    terms[(1,)](p, q, x, value, slope, weight, kind == "forward_kl", kind == "jsd", 64)
    spec = Divergence(kind, weight)  # type: ignore[arg-type]
    rtol = 100 * torch.finfo(dtype).eps
    expected_value, expected_slope = torch_terms(p, q, x, spec)
    torch.testing.assert_close(value, expected_value, rtol=rtol, atol=0)
    torch.testing.assert_close(slope, expected_slope, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1e-8, 1e-4, 0.01, 0.5, 0.8, 0.998, 0.9999, 1 - 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_terms(kind: str, weight: float, dtype: torch.dtype) -> None:
    """In PyTorch both terms have all digits, for every log-ratio. The exact values have 50 digits."""
    bounds = [y for y in (-divergence.NEAR, divergence.NEAR) for y in (0.999 * y, y, 1.001 * y)]
    x = torch.tensor([-30, -9, -2, *bounds, -0.1, 0.2, -1e-3, 1e-5, -1e-8, 1, 5, 20], dtype=dtype)
    p = 0.1 * torch.exp(x.clamp(max=0))
    q = p * torch.exp(-x)
    found = torch_terms(p, q, x, Divergence(kind, weight))  # type: ignore[arg-type]
    rtol = 50 * torch.finfo(dtype).eps
    with mpmath.workdps(50):
        w = mpmath.mpf(weight)
        for i, (own, log_ratio) in enumerate(zip(p.tolist(), x.tolist(), strict=True)):
            own, log_ratio = mpmath.mpf(own), mpmath.mpf(log_ratio)
            other = own * mpmath.exp(-log_ratio)
            mixture = w * other + (1 - w) * own
            to_mixture = (1 - w) * own * mpmath.log(own / mixture)
            expected = {
                "reverse_kl": (other - own + own * log_ratio, own * log_ratio),
                "forward_kl": (own - other - other * log_ratio, own - other),
                "jsd": (to_mixture + w * other * mpmath.log(other / mixture), to_mixture),
            }[kind]
            for term, exact in zip(found, expected, strict=True):
                assert abs(mpmath.mpf(term[i].item()) / exact - 1) < rtol, (float(log_ratio), float(exact))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.8])
def test_digits(kind: str, weight: float) -> None:
    """fp32 terms have their digits, down to a log-ratio of 1e-12. They are not negative."""
    p, q, x = probabilities(torch.float32, "cpu")
    spec = Divergence(kind, weight)  # type: ignore[arg-type]
    value, _ = torch_terms(p, q, x, spec)
    exact, _ = torch_terms(p.double(), q.double(), x.double(), spec)
    assert bool((value >= 0).all())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-38)
    small = x.abs() <= 1e-3
    half = {"jsd": weight * (1 - weight)}.get(kind, 1.0) / 2
    torch.testing.assert_close(exact[small], half * (p * x * x)[small].double(), rtol=1e-3, atol=1e-38)
