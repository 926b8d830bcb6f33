"""Device functions shared by the kernels, and the losses as Triton states them.

The surrogates and KL estimators state in Triton what `objective.py` states in PyTorch, under the same names;
a test compares the two. A surrogate returns `(value, derivative by logp, derivative by the log-ratio)`, a KL
estimate the sum of the two derivatives.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1)  # in targets: a row that takes no part
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A lower bound on exponents, in log2 units. 2^LOWEST is 0, and LOWEST times a coefficient is finite. With
# -inf that product could be 0 * inf.
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
    ptr, columns, V, scale, softcap,
    CAPPED: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """`y` of a block of a row; PARTIAL: -inf beyond the vocabulary. EVICTION: from the L2 cache."""
    if PARTIAL:
        z = tl.load(ptr + columns, mask=columns < V, other=float("-inf"), eviction_policy=EVICTION)
    else:
        z = tl.load(ptr + columns, eviction_policy=EVICTION)
    y = softcapped(z.to(DTYPE), scale, softcap, CAPPED)
    if CAPPED and PARTIAL:
        y = tl.where(columns < V, y, float("-inf"))  # the softcap has made -softcap of it
    return y


@triton.jit
def lowest_logit(DTYPE: tl.constexpr):
    """The lowest finite number. Running maxima start here, so that columns of -inf give no -inf - -inf."""
    lowest: tl.constexpr = -1.7976931348623157e308 if DTYPE is tl.float64 else -3.4028234663852886e38
    return tl.full((), lowest, DTYPE)


@triton.jit
def exponent(y, shift, k):
    """`k * (y - shift)`. It is exactly 0 at the maximum `shift` of the row, also after compilation.

    `k * y - k * shift` takes one instruction less, but the compiler contracts it to an FMA, whose result at
    the maximum is the rounding error of `k * shift`: up to 2^9 for a mask of -1e10, which overflows exp2.
    The product is a `tl.fma` so that it cannot be contracted with what follows: `d - ref_d` of two equal rows
    is exactly 0.
    """
    return tl.fma(y - shift, tl.zeros_like(y) + k, tl.zeros_like(y))


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
def log_ratio_to(logp, anchor):
    if anchor is None:
        # Not logp - logp: a taken token at -inf has ratio 1, while a NaN stays one.
        log_ratio = tl.where(logp == logp, 0.0, logp)
    else:
        log_ratio = logp - anchor
    return log_ratio


@triton.jit
def clamped_ratio(log_ratio, clamp):
    ratio = tl.exp(bounded(log_ratio, -clamp, clamp))
    return ratio, tl.where(tl.abs(log_ratio) > clamp, 0.0, ratio)


@triton.jit
def log_ratio(logp, log_ratio, advantage, clamp, params):
    return -advantage * log_ratio, tl.zeros_like(log_ratio), -advantage


@triton.jit
def reinforce(logp, log_ratio, advantage, clamp, params):
    return -advantage * logp, -advantage, tl.zeros_like(logp)


@triton.jit
def importance_ratio(logp, log_ratio, advantage, clamp, params):
    max_ratio = params[0]
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    value = -advantage * tl.where(ratio > max_ratio, max_ratio, ratio)
    return value, tl.zeros_like(value), tl.where(ratio > max_ratio, 0.0, -advantage * dratio)


@triton.jit
def ppo_clip(logp, log_ratio, advantage, clamp, params):
    eps_low, eps_high, delta, dual_clip = params
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    low, high = 1 - eps_low, 1 + eps_high
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = bounded(ratio, low, high) * advantage
    value = -tl.where(unclipped > clipped, clipped, unclipped)
    # A tie counts as unclipped. With delta below the band, the clipped branch may be taken inside it.
    flat = tl.where(unclipped > clipped, (ratio < low) | (ratio > high), ratio > delta)
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (value > bound)
    slope = tl.where(flat | beyond, 0.0, -advantage * dratio)
    return tl.where(beyond, bound, value), tl.zeros_like(slope), slope


@triton.jit
def cispo(logp, log_ratio, advantage, clamp, params):
    ratio_max, ratio_min = params
    ratio, _ = clamped_ratio(log_ratio, clamp)
    return weighted_logp(logp, -advantage * bounded(ratio, ratio_min, ratio_max))


@triton.jit
def sigmoid(x):
    # The exponential of a negative number only: it cannot overflow.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sapo(logp, log_ratio, advantage, clamp, params):
    tau_pos, tau_neg = params
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = sigmoid(tau * (ratio - 1))
    # sigmoid(-x) and not 1 - sigmoid(x), which has no digits left where the ratio is large.
    steepness = gate * sigmoid(-tau * (ratio - 1))
    # Where it has vanished the ratio may be infinite.
    slope = tl.where(steepness == 0, 0.0, -4 * steepness * advantage * dratio)
    return -advantage * gate * 4 / tau, tl.zeros_like(slope), slope


@triton.jit
def dro(logp, log_ratio, advantage, clamp, params):
    beta = params[0]
    held = bounded(log_ratio, -clamp, clamp)
    slope = tl.where(tl.abs(log_ratio) > clamp, 0.0, beta * held)
    value, by_logp, _ = weighted_logp(logp, -advantage)
    return beta / 2 * held * held + value, by_logp, slope


@triton.jit
def dppo_tv(logp, log_ratio, advantage, clamp, params):
    low, high, ratio_cap = params
    change = tl.exp(logp) - tl.exp(logp - log_ratio)
    inside = tl.where(advantage > 0, change <= high, change >= -low)
    return within_region(logp, log_ratio, advantage, clamp, ratio_cap, inside)


@triton.jit
def dppo_kl(logp, log_ratio, advantage, clamp, params):
    low, high, ratio_cap = params
    p, old_p = tl.exp(logp), tl.exp(logp - log_ratio)
    # Rounding may have left a probability above 1; and 0 * inf is not the 0 that is meant.
    others, old_others = tl.where(p > 1, 0.0, 1 - p), tl.where(old_p > 1, 0.0, 1 - old_p)
    divergence = old_others * tl.log((old_others + 1e-8) / (others + 1e-8))
    divergence -= tl.where(old_p == 0, 0.0, old_p * log_ratio)
    raised = (divergence <= high) | (p <= old_p)
    lowered = (divergence <= low) | (p >= old_p)
    inside = tl.where(advantage > 0, raised, lowered)
    return within_region(logp, log_ratio, advantage, clamp, ratio_cap, inside)


@triton.jit
def within_region(logp, log_ratio, advantage, clamp, ratio_cap, inside):
    ratio, _ = clamped_ratio(log_ratio, clamp)
    inside |= ratio != ratio
    weight = tl.where(inside, -advantage * tl.where(ratio > ratio_cap, ratio_cap, ratio), 0.0)
    return weighted_logp(logp, weight)


@triton.jit
def weighted_logp(logp, weight):
    # A weight of 0 beside a taken token at -inf would be 0 * inf.
    return tl.where(weight == 0, 0.0, weight * logp), weight, tl.zeros_like(weight)


SURROGATES = {
    "log_ratio": log_ratio,
    "reinforce": reinforce,
    "importance_ratio": importance_ratio,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "sapo": sapo,
    "dro": dro,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
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
    log_ratio,
    ref_logp,
    ESTIMATOR: tl.constexpr,
    clamp,
    output_clamp,
    STRAIGHT_THROUGH: tl.constexpr,
    RATIO_CORRECTED: tl.constexpr,
    log_ratio_clamp,
):
    x = ref_logp - logp
    held = bounded(x, -clamp, clamp)
    value, slope = ESTIMATOR(held)
    over = tl.abs(value) > output_clamp
    flat = (tl.abs(x) > clamp) | over
    if STRAIGHT_THROUGH:
        slope = -x
    else:
        slope = tl.where(flat, 0.0, slope)
    value = bounded(value, -output_clamp, output_clamp)
    if RATIO_CORRECTED:
        ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
        value, slope = ratio * value, ratio * slope
        still = tl.abs(log_ratio) > log_ratio_clamp
        if ESTIMATOR is k3:
            # exp(x) may be inf beside a ratio of 0, where exp(log_ratio + x) is a number.
            grown = tl.exp(bounded(log_ratio, -log_ratio_clamp, log_ratio_clamp) + held)
            value = tl.where((held > 1) & (over == 0), grown - ratio * (1 + held), value)
        slope += tl.where(still, 0.0, value)
        if ESTIMATOR is k3 and not STRAIGHT_THROUGH:
            # d(r k3)/dlogp = r (exp(x) - 1 - x) - r (exp(x) - 1) = -r x; the difference has few digits of it.
            slope = tl.where(flat | still, slope, -ratio * held)
    return value, slope
