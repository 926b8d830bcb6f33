"""The surrogates in Triton, named by `Surrogate.kernel`. A test compares each with its PyTorch class.

Each takes `(logp, log_ratio, advantage, clamp, params)` and returns the loss and its derivatives with respect
to `logp` and to the log-ratio.
"""

import triton
import triton.language as tl


@triton.jit
def bounded(x, low, high):
    """`x` clamped to [low, high]. A NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log_ratio_to(logp, anchor):
    if anchor is None:
        # The log-ratio is 0 even for a logp of -inf. NaN stays NaN.
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
    # A tie counts as unclipped. If delta is below the clip range, the minimum can be the clipped term at a
    # ratio inside the range, where that term has a slope.
    no_slope = tl.where(unclipped > clipped, (ratio < low) | (ratio > high), ratio > delta)
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (value > bound)
    slope = tl.where(no_slope | beyond, 0.0, -advantage * dratio)
    return tl.where(beyond, bound, value), tl.zeros_like(slope), slope


@triton.jit
def cispo(logp, log_ratio, advantage, clamp, params):
    ratio_max, ratio_min = params
    ratio, _ = clamped_ratio(log_ratio, clamp)
    return weighted_logp(logp, -advantage * bounded(ratio, ratio_min, ratio_max))


@triton.jit
def sigmoid(x):
    # The exponential of a negative number cannot overflow.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sapo(logp, log_ratio, advantage, clamp, params):
    tau_pos, tau_neg = params
    ratio, dratio = clamped_ratio(log_ratio, clamp)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = sigmoid(tau * (ratio - 1))
    # sigmoid(-x) instead of 1 - sigmoid(x), which loses all digits if the ratio is large.
    steepness = gate * sigmoid(-tau * (ratio - 1))
    # If the steepness is 0, the ratio may be infinite.
    slope = tl.where(steepness == 0, 0.0, -4 * steepness * advantage * dratio)
    return -advantage * gate * 4 / tau, tl.zeros_like(slope), slope


@triton.jit
def dro(logp, log_ratio, advantage, clamp, params):
    beta = params[0]
    clamped = bounded(log_ratio, -clamp, clamp)
    slope = tl.where(tl.abs(log_ratio) > clamp, 0.0, beta * clamped)
    value, by_logp, _ = weighted_logp(logp, -advantage)
    return beta / 2 * clamped * clamped + value, by_logp, slope


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
    # A probability may be rounded to more than 1. `where` avoids 0 * inf.
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
    # `where` avoids 0 * inf for a logp of -inf.
    return tl.where(weight == 0, 0.0, weight * logp), weight, tl.zeros_like(weight)
