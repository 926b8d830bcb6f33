"""Divergences of rows of student and teacher and their gradient, from statistics of both rows."""

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .device import LOG2E, MASKED, are_kept, exponent, load_block, logit_factors, row_pointer
from .dlogits import zero_columns
from .launch import (
    DTYPES,
    PER_ROW,
    blocking,
    compile_options,
    on_device_of,
    row_strides,
    transform_arguments,
    transform_constants,
)
from .row_stats import in_thread_sum

if TYPE_CHECKING:
    from ..spec import LogitTransform
    from ..spec.divergence import Divergence
    from ..vocab.divergence_torch import Sums
    from ..vocab.rows import Rows

NEAR = tl.constexpr(0.5)
NEAR_MIXTURE = tl.constexpr(0.3)
INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(n) for n in range(18)))


@triton.jit
def excess(x):
    """Compute `exp(-x) - 1 + x` for |x| <= NEAR by its Taylor series."""
    LAST: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    total = INVERSE_FACTORIALS[LAST - 1] - x * INVERSE_FACTORIALS[LAST]
    for n in tl.static_range(LAST - 2, 1, -1):
        total = INVERSE_FACTORIALS[n] - x * total
    return x * x * total


@triton.jit
def sinh_and_cosh(x):
    """Return `sinh(x)` and `cosh(x) - 1` for |x| <= NEAR by their Taylor series."""
    LAST: tl.constexpr = 15 if x.dtype == tl.float64 else 7
    square = x * x
    odd = INVERSE_FACTORIALS[LAST - 2] + square * INVERSE_FACTORIALS[LAST]
    even = INVERSE_FACTORIALS[LAST - 1] + square * INVERSE_FACTORIALS[LAST + 1]
    for n in tl.static_range(LAST - 4, 0, -2):
        odd = INVERSE_FACTORIALS[n] + square * odd
        even = INVERSE_FACTORIALS[n + 1] + square * even
    return x * odd, square * even


@triton.jit
def kl_terms(own, other, x):
    """Return terms whose sum is KL(own || other), with `x = log(own / other)`. See spec/divergence.py."""
    far = other - own + tl.where(own > 0, own * x, 0.0)
    return tl.where(tl.abs(x) < NEAR, own * excess(x), far)


@triton.jit
def log_mixture(factor, expm1, exp, rest):
    """Return `t = m / own - 1 = factor * expm1`, `log1p(t)`, and for a small t also `t - log1p(t)`.

    `m = factor other + rest own` is the mixture, `exp` is other / own, and `expm1` is exp - 1.
    """
    t = factor * expm1
    LAST: tl.constexpr = 30 if t.dtype == tl.float64 else 14
    total = 1.0 / (LAST - 1) - t * (1.0 / LAST)
    for n in tl.static_range(LAST - 2, 1, -1):
        total = 1.0 / n - t * total
    difference = t * t * total
    log = tl.where(tl.abs(t) < NEAR_MIXTURE, t - difference, tl.log(rest + factor * exp))
    return t, log, difference


@triton.jit
def log_mixtures(x, weight, rest):
    """Return what `log_mixture` does, for the student as `own`, and then for the teacher.

    Every logarithm is finite, so that its product with a probability of 0 is 0: |x| is bounded, and NaN, of
    two probabilities of 0, counts as a large distance. The bound is the distance from 1 to the smallest
    normal number.
    """
    LARGEST: tl.constexpr = 708.0 if x.dtype == tl.float64 else 87.0
    x = tl.minimum(tl.where(x > -LARGEST, x, -LARGEST), LARGEST)
    odd, even = sinh_and_cosh(x)
    down, up = tl.exp2(-x * LOG2E), tl.exp2(x * LOG2E)
    near = tl.abs(x) < NEAR
    t, log_p, near_p = log_mixture(weight, tl.where(near, even - odd, down - 1.0), down, rest)
    u, log_q, near_q = log_mixture(rest, tl.where(near, even + odd, up - 1.0), up, weight)
    return t, log_p, near_p, u, log_q, near_q


@triton.jit
def jsd_terms(p, q, x, weight, rest):
    """Return terms whose sum is `weight KL(q || m) + rest KL(p || m)`.

    With `t = m / p - 1` and `u = m / q - 1`, `rest p t` and `weight q u` cancel. For small t and u the terms
    are `rest p (t - log1p(t)) + weight q (u - log1p(u))`, without cancellation.
    """
    t, log_p, near_p, u, log_q, near_q = log_mixtures(x, weight, rest)
    own, other = rest * p, weight * q
    near = (tl.abs(t) < NEAR_MIXTURE) & (tl.abs(u) < NEAR_MIXTURE)
    return tl.where(near, own * near_p + other * near_q, -(own * log_p + other * log_q))


@triton.jit
def normalizers(sum_exp_ptr, ref_sum_exp_ptr, row):
    """Return the reciprocals of both sums of a row, and the logarithm of their ratio.

    A division per column would take eight instructions.
    """
    sum_exp, ref_sum = tl.load(sum_exp_ptr + row), tl.load(ref_sum_exp_ptr + row)
    return 1.0 / sum_exp, 1.0 / ref_sum, tl.log(sum_exp / ref_sum)


@triton.jit
def compare(
    logits_ptr, ref_ptr, sampling_mask_ptr, block, start, columns, V,
    k, scale, softcap, ref_k, ref_scale, ref_softcap,
    shift, inverse, ref_shift, ref_inverse, log_ratio,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, PARTIAL: tl.constexpr,
    DTYPE: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Load the block at column `block` of both rows. `columns` are counted from `start`, `block` or 0.

    Returns the student's `y`, the probabilities p and q, and `log(p / q)`, which is NaN if both are 0. Both
    are 0 in columns that the sampling mask drops, and, if PARTIAL, in those beyond the vocabulary. SAME: `k`
    and `ref_k` are equal.
    """
    y = load_block(logits_ptr + start, columns, V, scale, softcap, CAPPED, PARTIAL, DTYPE, "")
    ref_y = load_block(ref_ptr + start, columns, V, ref_scale, ref_softcap, REF_CAPPED, PARTIAL, DTYPE, "")
    if sampling_mask_ptr is not None:
        kept = are_kept(sampling_mask_ptr, block, columns, V, PARTIAL, THREADS, GROUP)
        y = tl.where(kept, y, float("-inf"))
        ref_y = tl.where(kept, ref_y, float("-inf"))
    p = tl.exp2(exponent(y, shift, k * LOG2E)) * inverse
    q = tl.exp2(exponent(ref_y, ref_shift, ref_k * LOG2E)) * ref_inverse
    if SAME:
        # The difference of two nearly equal logits is exact. If the models' logits differ by a constant,
        # their maxima are subtracted before.
        near = tl.abs(shift - ref_shift) < 1
        start_y, start_ref_y = tl.where(near, 0.0, shift), tl.where(near, 0.0, ref_shift)
        x = ((y - start_y) - (ref_y - start_ref_y) - tl.where(near, shift - ref_shift, 0.0)) * k
    else:
        x = exponent(y, shift, k) - exponent(ref_y, ref_shift, ref_k)
    return y, p, q, x - log_ratio


@triton.jit
def value_terms(p, q, x, weight, rest, FORWARD: tl.constexpr, JSD: tl.constexpr):
    if JSD:
        value = jsd_terms(p, q, x, weight, rest)
    elif FORWARD:
        value = kl_terms(q, p, -x)
    else:
        value = kl_terms(p, q, x)
    return value


@triton.jit
def slope_terms(p, q, x, weight, rest, FORWARD: tl.constexpr, JSD: tl.constexpr):
    """Return s_v such that the derivative by the student's scaled logit is `s_v - p_v sum(s)`."""
    if JSD:
        _, log_p, _, _, _, _ = log_mixtures(x, weight, rest)
        slope = -rest * p * log_p
    elif FORWARD:
        # p - q = q expm1(x), and the values have the same series.
        slope = tl.where(tl.abs(x) < NEAR, q * (excess(-x) + x), p - q)
    else:
        slope = tl.where(p > 0, p * x, 0.0)
    return slope


@triton.jit
def row_sums(terms, THREADS: tl.constexpr, GROUP: tl.constexpr):
    """Sum a block of terms to `[THREADS]`, in the shape that it has in registers."""
    BLOCK: tl.constexpr = terms.shape[0]
    return in_thread_sum(tl.reshape(terms, [BLOCK // (THREADS * GROUP), THREADS, GROUP]))


@triton.jit(
    do_not_specialize=[
        "batch_stride", "time_stride", "ref_batch_stride", "ref_time_stride",
        "sampling_mask_batch_stride", "sampling_mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=(*PER_ROW, "needed_ptr", "slope_ptr"),
)  # fmt: skip
def divergence_kernel(
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, sampling_mask_batch_stride: tl.int64, sampling_mask_time_stride: tl.int64,
    needed_ptr, temperature_ptr, shift_ptr, sum_exp_ptr, ref_shift_ptr, ref_sum_exp_ptr,
    value_ptr, slope_ptr,
    T, V, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    weight: tl.float64, rest: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
    JSD: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(needed_ptr + row) == 0:
        zero = tl.full((), 0.0, DTYPE)
        tl.store(value_ptr + row, zero)
        tl.store(slope_ptr + row, zero)
        return
    scale, softcap, k = logit_factors(scale, softcap, temperature_ptr, temperature, row, CAPPED, DTYPE)
    ref_scale, ref_softcap, ref_k = logit_factors(
        ref_scale, ref_softcap, temperature_ptr, temperature, row, REF_CAPPED, DTYPE
    )
    weight, rest = tl.full((), weight, DTYPE), tl.full((), rest, DTYPE)
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
    if sampling_mask_ptr is not None:
        sampling_mask_ptr = row_pointer(
            sampling_mask_ptr, sampling_mask_batch_stride, sampling_mask_time_stride, row, T, 1
        )
    shift, ref_shift = tl.load(shift_ptr + row), tl.load(ref_shift_ptr + row)
    inverse, ref_inverse, log_ratio = normalizers(sum_exp_ptr, ref_sum_exp_ptr, row)
    full = V // BLOCK * BLOCK
    # One sum per thread instead of one per column of a block, which would take 16 registers.
    value, slope = tl.zeros([THREADS], DTYPE), tl.zeros([THREADS], DTYPE)
    for start in range(0, full, BLOCK):
        first = tl.multiple_of(start, BLOCK)
        _, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, first, first, tl.arange(0, BLOCK), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap,
            shift, inverse, ref_shift, ref_inverse, log_ratio,
            CAPPED, REF_CAPPED, SAME, False, DTYPE, THREADS, GROUP,
        )  # fmt: skip
        value += row_sums(value_terms(p, q, x, weight, rest, FORWARD, JSD), THREADS, GROUP)
        slope += row_sums(slope_terms(p, q, x, weight, rest, FORWARD, JSD), THREADS, GROUP)
    for start in range(full, V, TAIL):
        _, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, start, 0, start + tl.arange(0, TAIL), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap,
            shift, inverse, ref_shift, ref_inverse, log_ratio,
            CAPPED, REF_CAPPED, SAME, True, DTYPE, THREADS, GROUP,
        )  # fmt: skip
        value += row_sums(value_terms(p, q, x, weight, rest, FORWARD, JSD), THREADS, GROUP)
        slope += row_sums(slope_terms(p, q, x, weight, rest, FORWARD, JSD), THREADS, GROUP)
    tl.store(value_ptr + row, tl.sum(value, 0))
    tl.store(slope_ptr + row, tl.sum(slope, 0))


@triton.jit
def block_gradient(
    y, p, q, x, softcap, weight, rest, slope, factor,
    CAPPED: tl.constexpr, FORWARD: tl.constexpr, JSD: tl.constexpr,
):  # fmt: skip
    """Return a block of the gradient. `slope` is the sum of the row's `slope_terms`."""
    grad = (slope_terms(p, q, x, weight, rest, FORWARD, JSD) - p * slope) * factor
    if CAPPED:
        tanh = y / softcap
        # The raw logit of a dropped column may be NaN.
        grad = tl.where((p == 0) & (q == 0), 0.0, grad * (1 - tanh * tanh))
    return grad


@triton.jit(
    do_not_specialize=[
        "out_batch_stride", "out_time_stride", "batch_stride", "time_stride",
        "ref_batch_stride", "ref_time_stride",
        "sampling_mask_batch_stride", "sampling_mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=(*PER_ROW, "slope_ptr", "coefficient_ptr"),
)  # fmt: skip
def divergence_gradient_kernel(
    out_ptr, out_batch_stride: tl.int64, out_time_stride: tl.int64,
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, sampling_mask_batch_stride: tl.int64, sampling_mask_time_stride: tl.int64,
    targets_ptr, temperature_ptr, shift_ptr, sum_exp_ptr, ref_shift_ptr, ref_sum_exp_ptr,
    slope_ptr, coefficient_ptr,
    T, V, WIDTH, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    weight: tl.float64, rest: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
    JSD: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr = row_pointer(out_ptr, out_batch_stride, out_time_stride, row, T, GROUP)
    coefficient = tl.load(coefficient_ptr + row)
    if (coefficient == 0) | (tl.load(targets_ptr + row) == MASKED):
        zero_columns(out_ptr, 0, WIDTH, TAIL)
        return
    scale, softcap, k = logit_factors(scale, softcap, temperature_ptr, temperature, row, CAPPED, DTYPE)
    ref_scale, ref_softcap, ref_k = logit_factors(
        ref_scale, ref_softcap, temperature_ptr, temperature, row, REF_CAPPED, DTYPE
    )
    factor = coefficient * k
    if CAPPED:
        factor *= scale
    weight, rest = tl.full((), weight, DTYPE), tl.full((), rest, DTYPE)
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
    if sampling_mask_ptr is not None:
        sampling_mask_ptr = row_pointer(
            sampling_mask_ptr, sampling_mask_batch_stride, sampling_mask_time_stride, row, T, 1
        )
    shift, ref_shift = tl.load(shift_ptr + row), tl.load(ref_shift_ptr + row)
    inverse, ref_inverse, log_ratio = normalizers(sum_exp_ptr, ref_sum_exp_ptr, row)
    slope = tl.load(slope_ptr + row)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        first = tl.multiple_of(start, BLOCK)
        y, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, first, first, tl.arange(0, BLOCK), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap,
            shift, inverse, ref_shift, ref_inverse, log_ratio,
            CAPPED, REF_CAPPED, SAME, False, DTYPE, THREADS, GROUP,
        )  # fmt: skip
        grad = block_gradient(y, p, q, x, softcap, weight, rest, slope, factor, CAPPED, FORWARD, JSD)
        tl.store(out_ptr + first + tl.arange(0, BLOCK), grad.to(out_ptr.dtype.element_ty))
    for start in range(full, V, TAIL):
        columns = start + tl.arange(0, TAIL)
        y, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, start, 0, columns, V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap,
            shift, inverse, ref_shift, ref_inverse, log_ratio,
            CAPPED, REF_CAPPED, SAME, True, DTYPE, THREADS, GROUP,
        )  # fmt: skip
        grad = block_gradient(y, p, q, x, softcap, weight, rest, slope, factor, CAPPED, FORWARD, JSD)
        tl.store(out_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=columns < V)
    zero_columns(out_ptr, V, WIDTH, TAIL)


def constants(transform: "LogitTransform", spec: "Divergence") -> dict[str, bool]:
    """Return the compile-time arguments that both kernels share."""
    kinds = {"FORWARD": spec.kind == "forward_kl", "JSD": spec.kind == "jsd"}
    return {**transform_constants(transform), "SAME": transform.same_factor, **kinds}


def divergence(
    rows: "Rows",
    sums: "Sums",
    needed: Tensor,
    spec: "Divergence",
    value: Tensor,
    slope: Tensor,
) -> None:
    """Fill `value` and `slope` with the sums of the terms over these columns.

    Rows that are not `needed`, `[N]` bool, are not read and get zeros.
    """
    transform = rows.transform
    shape = blocking(
        transform.vocab_size,
        rows.logits,
        ref_logits=rows.ref_logits,
        capped=True,  # the formulas need as many registers as a softcap
        sampling_mask=rows.sampling_mask,
    )
    with on_device_of(rows.logits):
        divergence_kernel[(rows.num_rows,)](
            rows.logits, *row_strides(rows.logits),
            rows.ref_logits, *row_strides(rows.ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            needed, rows.temperatures, *sums, value, slope,
            rows.logits.shape[1], transform.vocab_size, *transform_arguments(transform),
            spec.weight, 1 - spec.weight, **constants(transform, spec), DTYPE=DTYPES[value.dtype],
            **shape._asdict(), **compile_options(),
        )  # fmt: skip


def gradient(
    rows: "Rows", sums: "Sums", slope: Tensor, coefficient: Tensor, spec: "Divergence", out: Tensor
) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with `coefficient` times the gradient."""
    transform, logits = rows.transform, rows.logits
    shape = blocking(
        transform.vocab_size,
        out,
        logits,
        ref_logits=rows.ref_logits,
        capped=True,
        sampling_mask=rows.sampling_mask,
    )
    with on_device_of(logits):
        divergence_gradient_kernel[(rows.num_rows,)](
            out, *row_strides(out),
            logits, *row_strides(logits),
            rows.ref_logits, *row_strides(rows.ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            rows.targets, rows.temperatures, *sums, slope, coefficient,
            logits.shape[1], transform.vocab_size, logits.shape[2], *transform_arguments(transform),
            spec.weight, 1 - spec.weight, **constants(transform, spec), DTYPE=DTYPES[slope.dtype],
            **shape._asdict(), **compile_options(),
        )  # fmt: skip
