"""The KL estimates in Triton, as spec/kl.py states them in PyTorch. A test compares the two."""

import triton
import triton.language as tl

from .device import expm1
from .surrogates import bounded, clamped_ratio


@triton.jit
def k1(x):
    return -x, tl.zeros_like(x) + 1.0


@triton.jit
def absolute(x):
    return tl.abs(x), tl.where(x > 0, -1.0, tl.where(x < 0, 1.0, 0.0))


@triton.jit
def k2(x):
    return x * x / 2, -x


@triton.jit
def k3(x):
    growth = expm1(x)
    return growth - x, -growth


ESTIMATORS = {"k1": k1, "abs": absolute, "k2": k2, "k3": k3}


@triton.jit
def kl_estimate(
    logp,
    log_ratio,
    ref_logp,
    ESTIMATOR: tl.constexpr,
    clamp,
    output_clamp,
    STRAIGHT_THROUGH: tl.constexpr,
    RATIO_CORRECTED: tl.constexpr,
    log_ratio_clamp,
):
    """Return the estimate and its derivative with respect to `logp`, including that through the ratio."""
    x = ref_logp - logp
    clamped = bounded(x, -clamp, clamp)
    value, slope = ESTIMATOR(clamped)
    output_clamped = tl.abs(value) > output_clamp
    no_slope = (tl.abs(x) > clamp) | output_clamped
    if STRAIGHT_THROUGH:
        slope = -x
    else:
        slope = tl.where(no_slope, 0.0, slope)
    value = bounded(value, -output_clamp, output_clamp)
    if RATIO_CORRECTED:
        ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
        value, slope = ratio * value, ratio * slope
        ratio_clamped = tl.abs(log_ratio) > log_ratio_clamp
        if ESTIMATOR is k3:
            # exp(x) may be infinite while the ratio is 0. exp(log_ratio + x) is finite then.
            exp_sum = tl.exp(bounded(log_ratio, -log_ratio_clamp, log_ratio_clamp) + clamped)
            value = tl.where((clamped > 1) & (output_clamped == 0), exp_sum - ratio * (1 + clamped), value)
        slope += tl.where(ratio_clamped, 0.0, value)
        if ESTIMATOR is k3 and not STRAIGHT_THROUGH:
            # d(r k3)/dlogp = r (exp(x) - 1 - x) - r (exp(x) - 1) = -r x. Subtracting would cancel digits.
            slope = tl.where(no_slope | ratio_clamped, slope, -ratio * clamped)
    return value, slope
