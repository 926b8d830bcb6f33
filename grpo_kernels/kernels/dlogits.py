"""The gradient with respect to the logits, in one pass, from a few coefficients per row."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .device import (
    LN2,
    LOG2E,
    LOWEST,
    MASKED,
    are_kept,
    expm1,
    exponent,
    is_taken,
    known_column,
    load_block,
    load_optional,
    logit_factors,
    row_pointer,
)
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
    from ..tokens.statistics import Coefficients, RowStats
    from ..vocab.rows import Rows


@triton.jit
def zero_columns(out_ptr, start, stop, BLOCK: tl.constexpr):
    for first in range(start, stop, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + columns, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=columns < stop)


@triton.jit
def gradient_block(
    out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr, block, start, columns, target, V, WIDTH,
    k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, ref_shift,
    by_p, by_d, by_ref_d, by_ref_p, taken, alone,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, WHOLE_ROW: tl.constexpr, KL_FORWARD: tl.constexpr,
    TAKEN: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr,
    GROUP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the block of a row of the gradient at column `block`. See `row_gradient`.

    `columns` are counted from `start`, `block` or 0. Columns that the sampling mask drops get zeros.

    TAKEN: the block may contain the taken token, in column `target`, counted from `start`. PARTIAL: it may
    end beyond the vocabulary, and `start` is 0. Otherwise `columns` are constants in the machine code.
    """
    EVICTION: tl.constexpr = "evict_first" if KEPT else ""
    y = load_block(logits_ptr + start, columns, V, scale, softcap, CAPPED, PARTIAL, DTYPE, EVICTION)
    d = exponent(y, shift, k)
    e = tl.exp2(d)
    per_p = by_p
    if WHOLE_ROW:
        # If p_v is 0, its logarithm is -inf. A finite bound on d avoids 0 * inf.
        per_p = tl.maximum(d, LOWEST) * by_d + per_p
    if ref_ptr is not None:
        ref_y = load_block(
            ref_ptr + start, columns, V, ref_scale, ref_softcap, REF_CAPPED, PARTIAL, DTYPE, EVICTION
        )
        ref_d = exponent(ref_y, ref_shift, ref_k)
        if not KL_FORWARD:
            per_p = tl.maximum(ref_d, LOWEST) * by_ref_d + per_p
    grad = e * per_p
    if KL_FORWARD:
        grad += by_ref_p * tl.exp2(ref_d)
    if TAKEN:
        own = is_taken(columns, target, PARTIAL, THREADS, GROUP)
        grad = tl.where(own, tl.where(alone, taken, grad + taken), grad)
    if CAPPED:
        tanh = y / softcap
        grad *= 1 - tanh * tanh
    if sampling_mask_ptr is not None:
        kept = are_kept(sampling_mask_ptr, block, columns, V, PARTIAL, THREADS, GROUP)
        # A zero that LLVM does not recognize. With a constant it would compute the selection from integers,
        # with one more instruction per column.
        zero = (tl.full((), V, tl.int32) >> 31).to(DTYPE)
        grad = tl.where(kept, grad, zero)
    if PARTIAL:
        grad = tl.where(columns < V, grad, 0.0)
        tl.store(
            out_ptr + columns,
            grad.to(out_ptr.dtype.element_ty),
            mask=columns < WIDTH,
            eviction_policy=EVICTION,
        )
    else:
        tl.store(out_ptr + start + columns, grad.to(out_ptr.dtype.element_ty), eviction_policy=EVICTION)


@triton.jit
def is_sure(logp):
    """Whether the taken token is certainly the likeliest: its probability is at least 0.6."""
    return logp > -0.5


@triton.jit
def log_normalizer(logp, sum_exp):
    """Compute `log(sum_exp)`. If the taken token is the likeliest, it is -logp, which has more digits."""
    return tl.where(is_sure(logp), -logp, tl.log(sum_exp))


@triton.jit
def row_gradient(
    out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr, offsets, target, V, WIDTH,
    k, scale, softcap, ref_k, ref_scale, ref_softcap,
    logp, shift, sum_exp, entropy, ref_logp, ref_shift, ref_sum_exp, kl,
    dlogp, dentropy, dkl, dkl_forward,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, WHOLE_ROW: tl.constexpr, KL_FORWARD: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr,
    GROUP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write one row of the gradient, and zeros from V to WIDTH. `out_ptr` may be `logits_ptr`.

    `offsets` are the columns of a block. WHOLE_ROW: there are coefficients other than dlogp. KEPT: this is
    the last read of a row that the L2 cache was asked to keep.

    dz_v = [ dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H) + dkl p_v (log p_v - log q_v - KL)
             + dkl_forward (p_v - q_v) ] * dy/dz * k
    With d = k (y - shift) in log2 units and e = 2^d, p_v = e / sum_exp and log p_v = LN2 d - log sum_exp, and
    likewise q_v. The gradient is then e (by_p + by_d d + by_ref_d ref_d) + by_ref_p ref_e. At the
    taken token dlogp is added. If that token is the likeliest, its entry is computed from the
    log-probabilities instead, with 1 - p_y = -expm1(logp): they keep the digits that 1 - p_y would cancel if
    p_y is nearly 1.
    """
    slope = k
    if CAPPED:
        slope = k * scale
    k, ref_k = k * LOG2E, ref_k * LOG2E
    taken = -dlogp * expm1(logp)
    slope_p = slope / sum_exp
    by_p = -dlogp
    by_d, by_ref_d, by_ref_p = 0 * slope, 0 * slope, 0 * slope
    if WHOLE_ROW:
        log_sum = log_normalizer(logp, sum_exp)
        by_p += -dentropy * (entropy - log_sum)
        difference = -dentropy * (entropy + logp)
        if ref_ptr is not None:
            # `kl` may be infinite if only `dkl_forward` is given. The branch avoids 0 * inf.
            if KL_FORWARD:
                by_p += dkl_forward
                taken += dkl_forward * (expm1(logp) - expm1(ref_logp))
            else:
                by_p += dkl * (log_normalizer(ref_logp, ref_sum_exp) - log_sum - kl)
                difference += dkl * (logp - ref_logp - kl)
            by_ref_d = -slope_p * dkl * LN2
            by_ref_p = -slope * dkl_forward / ref_sum_exp
        by_d = slope_p * (dkl - dentropy) * LN2
        p = tl.exp(logp)
        taken += tl.where(p > 0, p * difference, 0.0)
    by_p *= slope_p
    # If p is 0, dlogp may be infinite, and a sum with 0 * dlogp would be NaN.
    alone = is_sure(logp) | (tl.exp(logp) == 0)
    taken = tl.where(alone, taken, dlogp) * slope
    target = known_column(target, V)
    # The block of the taken token is separate, so that the loop over the others compares no columns.
    full = V // BLOCK * BLOCK
    own = target // BLOCK * BLOCK
    stop = full
    if own < full:
        stop = full - BLOCK
        gradient_block(
            out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr, own, own, offsets, target - own, V, WIDTH,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, ref_shift,
            by_p, by_d, by_ref_d, by_ref_p, taken, alone,
            CAPPED, REF_CAPPED, WHOLE_ROW, KL_FORWARD, True, False, DTYPE, THREADS, GROUP, KEPT,
        )  # fmt: skip
    for start in range(0, stop, BLOCK):
        other = tl.multiple_of(start + tl.where(start >= own, BLOCK, 0), BLOCK)
        gradient_block(
            out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr, other, other, offsets, target, V, WIDTH,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, ref_shift,
            by_p, by_d, by_ref_d, by_ref_p, taken, alone,
            CAPPED, REF_CAPPED, WHOLE_ROW, KL_FORWARD, False, False, DTYPE, THREADS, GROUP, KEPT,
        )  # fmt: skip
    for start in range(full, WIDTH, TAIL):
        gradient_block(
            out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr,
            start, 0, start + tl.arange(0, TAIL), target, V, WIDTH,
            k, scale, softcap, ref_k, ref_scale, ref_softcap, shift, ref_shift,
            by_p, by_d, by_ref_d, by_ref_p, taken, alone,
            CAPPED, REF_CAPPED, WHOLE_ROW, KL_FORWARD, True, True, DTYPE, THREADS, GROUP, KEPT,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "out_batch_stride", "out_time_stride", "batch_stride", "time_stride",
        "ref_batch_stride", "ref_time_stride",
        "sampling_mask_batch_stride", "sampling_mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=PER_ROW,
)  # fmt: skip
def dlogits_kernel(
    out_ptr, out_batch_stride: tl.int64, out_time_stride: tl.int64,
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, sampling_mask_batch_stride: tl.int64, sampling_mask_time_stride: tl.int64,
    targets_ptr, temperature_ptr,
    logps_ptr, shift_ptr, sum_exp_ptr, entropy_ptr, ref_logps_ptr, ref_shift_ptr, ref_sum_exp_ptr, kl_ptr,
    dlogp_ptr, dentropy_ptr, dkl_ptr, dkl_forward_ptr,
    T, V, WIDTH, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr = row_pointer(out_ptr, out_batch_stride, out_time_stride, row, T, GROUP)
    target = tl.load(targets_ptr + row)
    dlogp = load_optional(dlogp_ptr, row, DTYPE)
    dentropy = load_optional(dentropy_ptr, row, DTYPE)
    dkl = load_optional(dkl_ptr, row, DTYPE)
    dkl_forward = load_optional(dkl_forward_ptr, row, DTYPE)
    inactive = (dlogp == 0) & (dentropy == 0) & (dkl == 0) & (dkl_forward == 0)
    if inactive | (target == MASKED):
        zero_columns(out_ptr, 0, WIDTH, TAIL)
        return
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    if ref_ptr is not None:
        ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
    if sampling_mask_ptr is not None:
        sampling_mask_ptr = row_pointer(
            sampling_mask_ptr, sampling_mask_batch_stride, sampling_mask_time_stride, row, T, 1
        )
    scale, softcap, k = logit_factors(scale, softcap, temperature_ptr, temperature, row, CAPPED, DTYPE)
    ref_scale, ref_softcap, ref_k = logit_factors(
        ref_scale, ref_softcap, temperature_ptr, temperature, row, REF_CAPPED, DTYPE
    )
    row_gradient(
        out_ptr, logits_ptr, ref_ptr, sampling_mask_ptr, tl.arange(0, BLOCK), target, V, WIDTH,
        k, scale, softcap, ref_k, ref_scale, ref_softcap,
        tl.load(logps_ptr + row), tl.load(shift_ptr + row), tl.load(sum_exp_ptr + row),
        load_optional(entropy_ptr, row, DTYPE), load_optional(ref_logps_ptr, row, DTYPE),
        load_optional(ref_shift_ptr, row, DTYPE), load_optional(ref_sum_exp_ptr, row, DTYPE),
        load_optional(kl_ptr, row, DTYPE),
        dlogp, dentropy, dkl, dkl_forward,
        CAPPED, REF_CAPPED, dentropy_ptr is not None or ref_ptr is not None, dkl_forward_ptr is not None,
        DTYPE, BLOCK, TAIL, THREADS, GROUP, False,
    )  # fmt: skip


def dlogits(rows: "Rows", stats: "RowStats", coefficients: "Coefficients", out: Tensor) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with the gradient.

    Rows whose coefficients are all zero are not read and get zeros, as does the padding. `rows.ref_logits`
    are None unless there is a `dkl` or a `dkl_forward`. At most one of these is given.
    """
    transform, constants = rows.transform, transform_constants(rows.transform)
    logits, ref_logits = rows.logits, rows.ref_logits
    shape = blocking(
        transform.vocab_size,
        out,
        logits,
        ref_logits=ref_logits,
        capped=any(constants.values()),
        sampling_mask=rows.sampling_mask,
    )
    with on_device_of(logits):
        dlogits_kernel[(rows.num_rows,)](
            out, *row_strides(out),
            logits, *row_strides(logits),
            ref_logits, *row_strides(ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            rows.targets, rows.temperatures,
            stats.logps, stats.shift, stats.sum_exp, stats.entropy,
            stats.ref_logps, stats.ref_shift, stats.ref_sum_exp, stats.kl, *coefficients,
            logits.shape[1], transform.vocab_size, logits.shape[2], *transform_arguments(transform),
            **constants, DTYPE=DTYPES[stats.logps.dtype],
            **shape._asdict(), **compile_options(),
        )  # fmt: skip
