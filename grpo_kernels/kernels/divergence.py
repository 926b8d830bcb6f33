"""Divergences of rows of student and teacher and their gradient, from statistics of both rows."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .device import LOG2E, MASKED, exponent, load_block, log1p, logit_factors, row_pointer
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

if TYPE_CHECKING:
    from ..spec import LogitTransform
    from ..spec.divergence import Divergence
    from ..vocab.divergence_torch import Sums
    from ..vocab.rows import Rows

NEAR = tl.constexpr(0.5)
NEAR_MIXTURE = tl.constexpr(0.3)


@triton.jit
def excess(x):
    """Compute `exp(-x) - 1 + x` for |x| <= NEAR by its Taylor series."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 9
    total = 1.0 + 0 * x
    for i in tl.static_range(TERMS, 2, -1):
        total = 1.0 - x * total * (1.0 / i)
    return 0.5 * x * x * total


@triton.jit
def expm1_of_minus(x):
    return tl.where(tl.abs(x) < NEAR, excess(x) - x, tl.exp(-x) - 1.0)


@triton.jit
def kl_terms(own, other, x):
    """Return terms whose sum is KL(own || other), with `x = log(own / other)`. See spec/divergence.py."""
    far = other - own + tl.where(own > 0, own * x, 0.0)
    return tl.where(tl.abs(x) < NEAR, own * excess(x), far)


@triton.jit
def log_mixture(x, weight, rest):
    """Return `log(m / own)` of the mixture `m = weight other + rest own`."""
    # The bound keeps the branch that is not taken from overflowing.
    near = log1p(weight * expm1_of_minus(tl.maximum(x, -1.0)))
    return tl.where(x > -1, near, tl.log(weight + rest * tl.exp(x)) - x)


@triton.jit
def mixture_terms(own, other, x, weight, rest):
    """Return terms whose sum is KL(own || m): `own (t - log1p(t))` with `t = m / own - 1`."""
    t = weight * expm1_of_minus(x)
    s = t / (2 + t)
    square = s * s
    COUNT: tl.constexpr = 12 if x.dtype == tl.float64 else 6
    total = 1.0 + 0 * s
    for i in tl.static_range(COUNT - 1, 0, -1):
        total = 1.0 + square * total * ((2 * i + 1) / (2 * i + 3))
    tail = square * s * total * (2 / 3)
    far = weight * (other - own) - tl.where(own > 0, own * log_mixture(x, weight, rest), 0.0)
    return tl.where(tl.abs(t) < NEAR_MIXTURE, own * (t * s - tail), far)


@triton.jit
def compare(
    logits_ptr, ref_ptr, mask_ptr, start, columns, V, k, scale, softcap, ref_k, ref_scale, ref_softcap,
    shift, sum_exp, ref_shift, ref_sum,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, PARTIAL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Load a block of both rows: `columns`, counted from `start`. PARTIAL: it may end beyond the vocabulary.

    Returns the student's `y`, the probabilities p and q, and `log(p / q)`, which is NaN if both are 0. SAME:
    `k` and `ref_k` are equal.
    """
    y = load_block(logits_ptr + start, columns, V, scale, softcap, CAPPED, PARTIAL, DTYPE, "")
    ref_y = load_block(ref_ptr + start, columns, V, ref_scale, ref_softcap, REF_CAPPED, PARTIAL, DTYPE, "")
    if mask_ptr is not None:
        at = start + columns
        words = tl.load(mask_ptr + at // 32, mask=at < V, other=0)
        kept = ((words >> (at % 32)) & 1) != 0
        y = tl.where(kept, y, float("-inf"))
        ref_y = tl.where(kept, ref_y, float("-inf"))
    p = tl.exp2(exponent(y, shift, k * LOG2E)) / sum_exp
    q = tl.exp2(exponent(ref_y, ref_shift, ref_k * LOG2E)) / ref_sum
    if SAME:
        # The difference of two nearly equal logits is exact. If the models' logits differ by a constant,
        # their maxima are subtracted before.
        near = tl.abs(shift - ref_shift) < 1
        start_y, start_ref_y = tl.where(near, 0.0, shift), tl.where(near, 0.0, ref_shift)
        x = ((y - start_y) - (ref_y - start_ref_y) - tl.where(near, shift - ref_shift, 0.0)) * k
    else:
        x = exponent(y, shift, k) - exponent(ref_y, ref_shift, ref_k)
    return y, p, q, x - tl.log(sum_exp / ref_sum)


@triton.jit
def value_terms(p, q, x, weight, rest, FORWARD: tl.constexpr, JSD: tl.constexpr):
    if JSD:
        value = weight * mixture_terms(q, p, -x, rest, weight) + rest * mixture_terms(p, q, x, weight, rest)
    elif FORWARD:
        value = kl_terms(q, p, -x)
    else:
        value = kl_terms(p, q, x)
    return value


@triton.jit
def slope_terms(p, q, x, weight, rest, FORWARD: tl.constexpr, JSD: tl.constexpr):
    """Return s_v such that the derivative by the student's scaled logit is `s_v - p_v sum(s)`."""
    if JSD:
        slope = tl.where(p > 0, -rest * p * log_mixture(x, weight, rest), 0.0)
    elif FORWARD:
        slope = tl.where(tl.abs(x) < NEAR, -p * expm1_of_minus(x), p - q)
    else:
        slope = tl.where(p > 0, p * x, 0.0)
    return slope


@triton.jit(
    do_not_specialize=[
        "batch_stride", "time_stride", "ref_batch_stride", "ref_time_stride",
        "mask_batch_stride", "mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=(*PER_ROW, "needed_ptr", "slope_ptr", "sampling_mask_ptr"),
)  # fmt: skip
def divergence_kernel(
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, mask_batch_stride: tl.int64, mask_time_stride: tl.int64,
    needed_ptr, temperature_ptr, shift_ptr, sum_exp_ptr, ref_shift_ptr, ref_sum_exp_ptr,
    value_ptr, slope_ptr,
    T, V, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    weight: tl.float64, rest: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
    JSD: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr,
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
        sampling_mask_ptr = row_pointer(sampling_mask_ptr, mask_batch_stride, mask_time_stride, row, T, 1)
    shift, sum_exp = tl.load(shift_ptr + row), tl.load(sum_exp_ptr + row)
    ref_shift, ref_sum = tl.load(ref_shift_ptr + row), tl.load(ref_sum_exp_ptr + row)
    full = V // BLOCK * BLOCK
    values, slopes = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    for start in range(0, full, BLOCK):
        _, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, tl.multiple_of(start, BLOCK), tl.arange(0, BLOCK), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, sum_exp, ref_shift, ref_sum,
            CAPPED, REF_CAPPED, SAME, False, DTYPE,
        )  # fmt: skip
        values += value_terms(p, q, x, weight, rest, FORWARD, JSD)
        slopes += slope_terms(p, q, x, weight, rest, FORWARD, JSD)
    value, slope = tl.sum(values, 0), tl.sum(slopes, 0)
    for start in range(full, V, TAIL):
        _, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, 0, start + tl.arange(0, TAIL), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, sum_exp, ref_shift, ref_sum,
            CAPPED, REF_CAPPED, SAME, True, DTYPE,
        )  # fmt: skip
        value += tl.sum(value_terms(p, q, x, weight, rest, FORWARD, JSD), 0)
        slope += tl.sum(slope_terms(p, q, x, weight, rest, FORWARD, JSD), 0)
    tl.store(value_ptr + row, value)
    tl.store(slope_ptr + row, slope)


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
        "ref_batch_stride", "ref_time_stride", "mask_batch_stride", "mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=(*PER_ROW, "slope_ptr", "coefficient_ptr", "sampling_mask_ptr"),
)  # fmt: skip
def divergence_gradient_kernel(
    out_ptr, out_batch_stride: tl.int64, out_time_stride: tl.int64,
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, mask_batch_stride: tl.int64, mask_time_stride: tl.int64,
    targets_ptr, temperature_ptr, shift_ptr, sum_exp_ptr, ref_shift_ptr, ref_sum_exp_ptr,
    slope_ptr, coefficient_ptr,
    T, V, WIDTH, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    weight: tl.float64, rest: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
    JSD: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr,
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
        sampling_mask_ptr = row_pointer(sampling_mask_ptr, mask_batch_stride, mask_time_stride, row, T, 1)
    shift, sum_exp = tl.load(shift_ptr + row), tl.load(sum_exp_ptr + row)
    ref_shift, ref_sum = tl.load(ref_shift_ptr + row), tl.load(ref_sum_exp_ptr + row)
    slope = tl.load(slope_ptr + row)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        first = tl.multiple_of(start, BLOCK)
        y, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, first, tl.arange(0, BLOCK), V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, sum_exp, ref_shift, ref_sum,
            CAPPED, REF_CAPPED, SAME, False, DTYPE,
        )  # fmt: skip
        grad = block_gradient(y, p, q, x, softcap, weight, rest, slope, factor, CAPPED, FORWARD, JSD)
        tl.store(out_ptr + first + tl.arange(0, BLOCK), grad.to(out_ptr.dtype.element_ty))
    for start in range(full, V, TAIL):
        columns = start + tl.arange(0, TAIL)
        y, p, q, x = compare(
            logits_ptr, ref_ptr, sampling_mask_ptr, 0, columns, V,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, sum_exp, ref_shift, ref_sum,
            CAPPED, REF_CAPPED, SAME, True, DTYPE,
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
    # The formulas need as many registers as a softcap.
    shape = blocking(transform.vocab_size, rows.logits, ref_logits=rows.ref_logits, capped=True)
    with on_device_of(rows.logits):
        divergence_kernel[(rows.num_rows,)](
            rows.logits, *row_strides(rows.logits),
            rows.ref_logits, *row_strides(rows.ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            needed, rows.temperatures, *sums, value, slope,
            rows.logits.shape[1], transform.vocab_size, *transform_arguments(transform),
            spec.weight, 1 - spec.weight, **constants(transform, spec), DTYPE=DTYPES[value.dtype],
            BLOCK=shape.BLOCK, TAIL=shape.TAIL, GROUP=shape.GROUP, num_warps=shape.num_warps,
            **compile_options(),
        )  # fmt: skip


def gradient(
    rows: "Rows", sums: "Sums", slope: Tensor, coefficient: Tensor, spec: "Divergence", out: Tensor
) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with `coefficient` times the gradient."""
    transform, logits = rows.transform, rows.logits
    shape = blocking(transform.vocab_size, out, logits, ref_logits=rows.ref_logits, capped=True)
    with on_device_of(logits):
        divergence_gradient_kernel[(rows.num_rows,)](
            out, *row_strides(out),
            logits, *row_strides(logits),
            rows.ref_logits, *row_strides(rows.ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            rows.targets, rows.temperatures, *sums, slope, coefficient,
            logits.shape[1], transform.vocab_size, logits.shape[2], *transform_arguments(transform),
            spec.weight, 1 - spec.weight, **constants(transform, spec), DTYPE=DTYPES[slope.dtype],
            BLOCK=shape.BLOCK, TAIL=shape.TAIL, GROUP=shape.GROUP, num_warps=shape.num_warps,
            **compile_options(),
        )  # fmt: skip
