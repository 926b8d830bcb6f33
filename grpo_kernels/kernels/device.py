"""Device functions shared by the kernels, and the losses as Triton states them.

The surrogates and KL estimators state in Triton what `objective.py` states in PyTorch, under the same names;
a test compares the two. Each returns `(value, derivative by logp)`.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1)  # in targets: a row that takes no part
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a block of nothing but -inf leaves no -inf - -inf behind,
# and small enough in magnitude to stay finite times k.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def row_pointer(ptr, batch_stride, time_stride, row, T, GROUP: tl.constexpr):
    """The first element of row b * T + t. `row` is int64: the offsets of a batch exceed 2^31."""
    ptr += (row // T) * batch_stride + (row % T) * time_stride
    if GROUP > 1:
        # The launcher has seen that every row is aligned; saying so here rather than by specialising on the
        # strides keeps one variant for all lengths.
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_optional(ptr, row, DTYPE: tl.constexpr):
    if ptr is None:
        x = tl.full((), 0.0, DTYPE)
    else:
        x = tl.load(ptr + row)
    return x


@triton.jit
def store_optional(ptr, row, value):
    if ptr is not None:
        tl.store(ptr + row, value)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    t = tl.exp2(a * (-2 * LOG2E))
    value = (1 - t) / (1 + t)
    if x.dtype != tl.float64:
        # 1 - t cancels for small a: the series up to a^9 is exact to fp32 there.
        b = a * a
        series = a * (1 - b * (1 / 3 - b * (2 / 15 - b * (17 / 315 - b * (62 / 2835)))))
        value = tl.where(a < 0.3, series, value)
    return tl.where(x < 0, -value, value)


@triton.jit
def softcapped(z, scale, softcap, CAPPED: tl.constexpr):
    """`y` of a raw logit: the softcapped logit, or the logit itself, whose scale is part of k."""
    if CAPPED:
        z = softcap * tanh(z * (scale / softcap))
    return z


@triton.jit
def load_block(
    ptr, start, V, scale, softcap,
    CAPPED: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`y` of a block of a row; -inf beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK)
    if TAIL:
        z = tl.load(ptr + columns, mask=columns < V, other=float("-inf"))
    else:
        z = tl.load(ptr + columns)
    y = softcapped(z.to(DTYPE), scale, softcap, CAPPED)
    if CAPPED and TAIL:
        y = tl.where(columns < V, y, float("-inf"))  # the softcap has made -softcap of it
    return y


@triton.jit
def logit_factors(
    scale, softcap, temperature_ptr, temperature, row, CAPPED: tl.constexpr, DTYPE: tl.constexpr
):
    """`scale`, `softcap` and `k` in the dtype of the arithmetic: the distribution is softmax(k * y)."""
    scale = tl.full((), scale, DTYPE)
    softcap = tl.full((), softcap, DTYPE)
    if temperature_ptr is None:
        temperature = tl.full((), temperature, DTYPE)
    else:
        temperature = tl.load(temperature_ptr + row)
    if CAPPED:
        k = 1 / temperature
    else:
        k = scale / temperature
    return scale, softcap, k


@triton.jit
def expm1(x):
    """`exp(x) - 1` without cancellation: the Taylor series where |x| < 0.5, exact to fp64."""
    r = 1.0 + 0 * x
    for i in tl.static_range(17, 1, -1):
        r = 1.0 + x * r / i
    return tl.where(tl.abs(x) < 0.5, x * r, tl.exp(x) - 1.0)


@triton.jit
def bounded(x, low, high):
    """`x` held to [low, high]; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def clamped_ratio(logp, anchor, clamp):
    if anchor is None:
        # Not 1 + 0 * logp: a taken token at -inf has ratio 1, while a NaN stays one.
        ratio = tl.where(logp == logp, 1.0, logp)
        dratio = ratio
    else:
        log_ratio = logp - anchor
        ratio = tl.exp(bounded(log_ratio, -clamp, clamp))
        dratio = tl.where(tl.abs(log_ratio) > clamp, 0.0, ratio)
    return ratio, dratio


@triton.jit
def log_ratio(logp, anchor, advantage, clamp, params):
    return -advantage * (logp - anchor), -advantage


@triton.jit
def reinforce(logp, anchor, advantage, clamp, params):
    return -advantage * logp, -advantage


@triton.jit
def importance_ratio(logp, anchor, advantage, clamp, params):
    max_ratio = params[0]
    ratio, dratio = clamped_ratio(logp, anchor, clamp)
    value = -advantage * tl.where(ratio > max_ratio, max_ratio, ratio)
    return value, tl.where(ratio > max_ratio, 0.0, -advantage * dratio)


@triton.jit
def ppo_clip(logp, anchor, advantage, clamp, params):
    eps_low, eps_high, delta, dual_clip = params
    ratio, dratio = clamped_ratio(logp, anchor, clamp)
    low, high = 1 - eps_low, 1 + eps_high
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = bounded(ratio, low, high) * advantage
    value = -tl.where(unclipped > clipped, clipped, unclipped)
    # A tie counts as unclipped. With delta below the band, the clipped branch may be taken inside it.
    flat = tl.where(unclipped > clipped, (ratio < low) | (ratio > high), ratio > delta)
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (value > bound)
    return tl.where(beyond, bound, value), tl.where(flat | beyond, 0.0, -advantage * dratio)


SURROGATES = {
    "LogRatio": log_ratio,
    "Reinforce": reinforce,
    "ImportanceRatio": importance_ratio,
    "PPOClip": ppo_clip,
}


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


KL_ESTIMATORS = {"k1": k1, "abs": absolute, "k2": k2, "k3": k3}


@triton.jit
def kl_estimate(
    logp,
    old_logp,
    ref_logp,
    ESTIMATOR: tl.constexpr,
    clamp,
    output_clamp,
    STRAIGHT_THROUGH: tl.constexpr,
    RATIO_CORRECTED: tl.constexpr,
    log_ratio_clamp,
):
    x = ref_logp - logp
    value, slope = ESTIMATOR(bounded(x, -clamp, clamp))
    if STRAIGHT_THROUGH:
        slope = -x
    else:
        slope = tl.where((tl.abs(x) > clamp) | (tl.abs(value) > output_clamp), 0.0, slope)
    value = bounded(value, -output_clamp, output_clamp)
    if RATIO_CORRECTED:
        ratio, dratio = clamped_ratio(logp, old_logp, log_ratio_clamp)
        slope = dratio * value + ratio * slope
        value = ratio * value
    return value, slope
