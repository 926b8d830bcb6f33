"""Statistics of the rows of policy and reference in one pass: log-softmax, gather, entropy, and exact KL."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .device import (
    LN2,
    LOG2E,
    LOWEST,
    MASKED,
    are_kept,
    exponent,
    is_kept,
    is_taken,
    known_column,
    load_block,
    log1p,
    logit_factors,
    lowest_logit,
    row_pointer,
    softcapped,
    store_optional,
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
    from ..tokens.statistics import RowStats
    from ..vocab.rows import Rows


@triton.jit
def fold(y, k, shift, BLOCK: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr):
    """Update the running maxima `shift` `[THREADS]` of y with a block.

    Returns the new maxima, `delta` (log2 of the factor that earlier sums must be scaled by), and exponents
    `d = k * (y - shift)`, `[BLOCK / (THREADS * GROUP), THREADS, GROUP]`. A block has this shape in registers,
    GROUP elements of one 16-byte load at a time, so the reductions over the outer dimensions stay inside a
    thread and the loop needs neither shuffles nor barriers.
    """
    y = tl.reshape(y, [BLOCK // (THREADS * GROUP), THREADS, GROUP])
    new_shift = tl.maximum(shift, tl.max(tl.max(y, 2), 0))
    return new_shift, shift_delta(shift, new_shift, k), exponent(y, new_shift[None, :, None], k)


@triton.jit
def shift_delta(shift, new_shift, k):
    """Return the exponent of the old maximum relative to the new. It is finite, because it may multiply 0."""
    return tl.maximum(exponent(shift, new_shift, k), LOWEST)


@triton.jit
def in_thread_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def rescaled(total, alpha):
    # The KL of a part may be infinite if its probability is 0. `where` avoids 0 * inf.
    return tl.where(alpha > 0, total * alpha, 0.0)


@triton.jit
def fold_rows(
    shift, total, spread, ref_shift, ref_total, cross, ref_cross,
    logits_ptr, ref_ptr, sampling_mask_ptr, block, start, columns, taken, V,
    k, scale, softcap, ref_k, ref_scale, ref_softcap,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, ENTROPY: tl.constexpr, KL_FORWARD: tl.constexpr,
    TAKEN: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr,
    GROUP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Add the block of the policy's and the reference's row at column `block` to the sums.

    `columns` are counted from `start`, `block` or 0. Columns that the sampling mask drops count as -inf.

    TAKEN: the block may contain the taken token, in column `taken`, counted from `start`. It is left out.

    total = sum e, spread = sum e d, cross = sum e (d - ref_d), ref_cross = sum ref_e (d - ref_d), with e =
    2^d. All are relative to the running maximum. If it changes by delta, so does d.
    """
    BLOCK: tl.constexpr = columns.shape[0]
    EVICTION: tl.constexpr = "evict_last" if KEEP else ""
    REF_EVICTION: tl.constexpr = "evict_first" if KEEP else ""
    y = load_block(logits_ptr + start, columns, V, scale, softcap, CAPPED, PARTIAL, DTYPE, EVICTION)
    if sampling_mask_ptr is not None:
        kept = are_kept(sampling_mask_ptr, block, columns, V, PARTIAL, THREADS, GROUP)
        y = tl.where(kept, y, float("-inf"))
    if TAKEN:
        left_out = is_taken(columns, taken, PARTIAL, THREADS, GROUP)
        y = tl.where(left_out, float("-inf"), y)
    shift, delta, d = fold(y, k, shift, BLOCK, THREADS, GROUP)
    e = tl.exp2(d)
    alpha = tl.exp2(delta)
    if ENTROPY:
        # If d is -inf, e is 0. A finite bound on d avoids 0 * inf.
        spread = (spread + total * delta) * alpha + in_thread_sum(e * tl.maximum(d, LOWEST))
    if ref_ptr is not None:
        ref_y = load_block(
            ref_ptr + start, columns, V, ref_scale, ref_softcap, REF_CAPPED, PARTIAL, DTYPE, REF_EVICTION
        )
        if sampling_mask_ptr is not None:
            ref_y = tl.where(kept, ref_y, float("-inf"))
        if TAKEN:
            ref_y = tl.where(left_out, float("-inf"), ref_y)
        ref_shift, ref_delta, ref_d = fold(ref_y, ref_k, ref_shift, BLOCK, THREADS, GROUP)
        ref_e = tl.exp2(ref_d)
        ref_alpha = tl.exp2(ref_delta)
        gap = delta - ref_delta
        cross = rescaled(cross + total * gap, alpha) + in_thread_sum(tl.where(e > 0, e * (d - ref_d), e))
        if KL_FORWARD:
            ref_cross = rescaled(ref_cross + ref_total * gap, ref_alpha)
            ref_cross += in_thread_sum(tl.where(ref_e > 0, ref_e * (d - ref_d), -ref_e))
        ref_total = ref_total * ref_alpha + in_thread_sum(ref_e)
    total = total * alpha + in_thread_sum(e)
    return shift, total, spread, ref_shift, ref_total, cross, ref_cross


@triton.jit
def reduce_row(
    logits_ptr, ref_ptr, sampling_mask_ptr, offsets, target, z, ref_z, V,
    k, scale, softcap, ref_k, ref_scale, ref_softcap,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, ENTROPY: tl.constexpr, KL_FORWARD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Reduce one row to the scalars of `RowStats`, from `logps` to `kl_forward`.

    The distribution is softmax(k * y), and `shift` is the largest y. Scalars that were not requested are 0.
    `offsets` are the columns of a block, `z` and `ref_z` the raw logits of the taken token. KEEP: ask the L2
    cache to keep the policy's row, which will be read again, instead of the reference's.

    The loops sum the other tokens. If the taken token is the likeliest, its exponential is 1 and
    log_sum = log1p(sum of the others). So logp = -log_sum keeps its digits however small it is, and so do
    the entropy and the KL, whose terms of the taken token are then 0.
    """
    log2_k, ref_log2_k = k * LOG2E, ref_k * LOG2E
    zeros = tl.zeros([THREADS], DTYPE)
    shift, ref_shift = zeros + lowest_logit(DTYPE), zeros + lowest_logit(DTYPE)
    total, spread, ref_total, cross, ref_cross = zeros, zeros, zeros, zeros, zeros
    target = known_column(target, V)
    # The block of the taken token is separate, so that the loop over the others compares no columns.
    full = V // BLOCK * BLOCK
    own = target // BLOCK * BLOCK
    stop = full
    if own < full:
        stop = full - BLOCK
        shift, total, spread, ref_shift, ref_total, cross, ref_cross = fold_rows(
            shift, total, spread, ref_shift, ref_total, cross, ref_cross,
            logits_ptr, ref_ptr, sampling_mask_ptr, own, own, offsets, target - own, V,
            log2_k, scale, softcap, ref_log2_k, ref_scale, ref_softcap,
            CAPPED, REF_CAPPED, ENTROPY, KL_FORWARD, True, False, DTYPE, THREADS, GROUP, KEEP,
        )  # fmt: skip
    for start in range(0, stop, BLOCK):
        other = tl.multiple_of(start + tl.where(start >= own, BLOCK, 0), BLOCK)
        shift, total, spread, ref_shift, ref_total, cross, ref_cross = fold_rows(
            shift, total, spread, ref_shift, ref_total, cross, ref_cross,
            logits_ptr, ref_ptr, sampling_mask_ptr, other, other, offsets, target, V,
            log2_k, scale, softcap, ref_log2_k, ref_scale, ref_softcap,
            CAPPED, REF_CAPPED, ENTROPY, KL_FORWARD, False, False, DTYPE, THREADS, GROUP, KEEP,
        )  # fmt: skip
    for start in range(full, V, TAIL):
        shift, total, spread, ref_shift, ref_total, cross, ref_cross = fold_rows(
            shift, total, spread, ref_shift, ref_total, cross, ref_cross,
            logits_ptr, ref_ptr, sampling_mask_ptr, start, 0, start + tl.arange(0, TAIL), target, V,
            log2_k, scale, softcap, ref_log2_k, ref_scale, ref_softcap,
            CAPPED, REF_CAPPED, ENTROPY, KL_FORWARD, True, True, DTYPE, THREADS, GROUP, KEEP,
        )  # fmt: skip

    y = softcapped(z, scale, softcap, CAPPED)
    if sampling_mask_ptr is not None:
        # Not before the loops, where it would take a register.
        taken_kept = is_kept(sampling_mask_ptr, target)
        y = tl.where(taken_kept, y, float("-inf"))
    row_shift, d, e = with_taken(y, shift, target, log2_k)
    delta = shift_delta(shift, row_shift, log2_k)
    alpha = tl.exp2(delta)
    others = tl.sum(total * alpha, 0)
    sum_exp = others + e
    log_sum = tl.where(y >= row_shift, log1p(others), tl.log(sum_exp))
    # In log2 units, a finite logit times log2(e) could overflow.
    logp = exponent(y, row_shift, k) - log_sum
    entropy, kl, kl_forward = 0 * k, 0 * k, 0 * k
    ref_logp, ref_row_shift, ref_sum_exp = 0 * k, 0 * k, 0 * k
    if ENTROPY:
        mean = (tl.sum((spread + total * delta) * alpha, 0) + e * tl.maximum(d, LOWEST)) / sum_exp
        entropy = log_sum - mean * LN2
        entropy = tl.where(entropy < 0, 0.0, entropy)
    if ref_ptr is not None:
        ref_y = softcapped(ref_z, ref_scale, ref_softcap, REF_CAPPED)
        if sampling_mask_ptr is not None:
            ref_y = tl.where(taken_kept, ref_y, float("-inf"))
        ref_row_shift, ref_d, ref_e = with_taken(ref_y, ref_shift, target, ref_log2_k)
        ref_delta = shift_delta(ref_shift, ref_row_shift, ref_log2_k)
        ref_alpha = tl.exp2(ref_delta)
        ref_others = tl.sum(ref_total * ref_alpha, 0)
        ref_sum_exp = ref_others + ref_e
        ref_log_sum = tl.where(ref_y >= ref_row_shift, log1p(ref_others), tl.log(ref_sum_exp))
        ref_logp = exponent(ref_y, ref_row_shift, ref_k) - ref_log_sum
        gap = delta - ref_delta
        mean = tl.sum(rescaled(cross + total * gap, alpha), 0) + tl.where(e > 0, e * (d - ref_d), e)
        kl = mean / sum_exp * LN2 - log_sum + ref_log_sum
        kl = tl.where(kl < 0, 0.0, kl)
        if KL_FORWARD:
            mean = tl.sum(rescaled(ref_cross + ref_total * gap, ref_alpha), 0)
            mean += tl.where(ref_e > 0, ref_e * (d - ref_d), -ref_e)
            kl_forward = log_sum - ref_log_sum - mean / ref_sum_exp * LN2
            kl_forward = tl.where(kl_forward < 0, 0.0, kl_forward)
    return logp, row_shift, sum_exp, entropy, ref_logp, ref_row_shift, ref_sum_exp, kl, kl_forward


@triton.jit
def with_taken(y, shift, target, k):
    """Return the row's maximum, and exponent and exponential of the taken token's logit y.

    `shift` `[THREADS]` are the maxima of the others. Without a taken token, the maximum is theirs.
    """
    y = tl.where(target < 0, float("-inf"), y)
    row_shift = tl.maximum(tl.max(shift, 0), y)
    d = exponent(y, row_shift, k)
    return row_shift, d, tl.exp2(d)


@triton.jit
def taken_logit(ptr, target, V, DTYPE: tl.constexpr):
    """Load the raw logit of the taken token. NaN for an id outside the vocabulary, which is not read."""
    return tl.load(ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(DTYPE)


@triton.jit(
    do_not_specialize=[
        "batch_stride", "time_stride", "ref_batch_stride", "ref_time_stride",
        "sampling_mask_batch_stride", "sampling_mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=PER_ROW,
)  # fmt: skip
def row_stats_kernel(
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, sampling_mask_batch_stride: tl.int64, sampling_mask_time_stride: tl.int64,
    targets_ptr, temperature_ptr,
    logps_ptr, shift_ptr, sum_exp_ptr, entropy_ptr,
    ref_logps_ptr, ref_shift_ptr, ref_sum_exp_ptr, kl_ptr, kl_forward_ptr, top1_ptr,
    T, V, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == MASKED:
        zero = tl.full((), 0.0, DTYPE)
        store_optional(logps_ptr, row, zero)
        store_optional(shift_ptr, row, zero)
        store_optional(sum_exp_ptr, row, zero)
        store_optional(entropy_ptr, row, zero)
        store_optional(ref_logps_ptr, row, zero)
        store_optional(ref_shift_ptr, row, zero)
        store_optional(ref_sum_exp_ptr, row, zero)
        store_optional(kl_ptr, row, zero)
        store_optional(kl_forward_ptr, row, zero)
        store_optional(top1_ptr, row, zero)
        return
    scale, softcap, k = logit_factors(scale, softcap, temperature_ptr, temperature, row, CAPPED, DTYPE)
    ref_scale, ref_softcap, ref_k = logit_factors(
        ref_scale, ref_softcap, temperature_ptr, temperature, row, REF_CAPPED, DTYPE
    )
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    z = taken_logit(logits_ptr, target, V, DTYPE)
    ref_z = z
    if ref_ptr is not None:
        ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
        ref_z = taken_logit(ref_ptr, target, V, DTYPE)
    if sampling_mask_ptr is not None:
        sampling_mask_ptr = row_pointer(
            sampling_mask_ptr, sampling_mask_batch_stride, sampling_mask_time_stride, row, T, 1
        )
    logp, shift, sum_exp, entropy, ref_logp, ref_shift, ref_sum_exp, kl, kl_forward = reduce_row(
        logits_ptr, ref_ptr, sampling_mask_ptr, tl.arange(0, BLOCK), target, z, ref_z, V,
        k, scale, softcap, ref_k, ref_scale, ref_softcap,
        CAPPED, REF_CAPPED, entropy_ptr is not None, kl_forward_ptr is not None, DTYPE,
        BLOCK, TAIL, THREADS, GROUP, False,
    )  # fmt: skip
    store_optional(logps_ptr, row, logp)
    store_optional(shift_ptr, row, shift)
    store_optional(sum_exp_ptr, row, sum_exp)
    store_optional(entropy_ptr, row, entropy)
    if top1_ptr is not None:
        top1 = softcapped(z, scale, softcap, CAPPED) >= shift
        if sampling_mask_ptr is not None:
            top1 &= logp > float("-inf")  # it may be the largest logit, and dropped
        tl.store(top1_ptr + row, top1.to(DTYPE))
    if ref_ptr is not None:
        store_optional(ref_logps_ptr, row, ref_logp)
        store_optional(ref_shift_ptr, row, ref_shift)
        store_optional(ref_sum_exp_ptr, row, ref_sum_exp)
        store_optional(kl_ptr, row, kl)
        store_optional(kl_forward_ptr, row, kl_forward)


def row_stats(rows: "Rows", out: "RowStats") -> None:
    """Fill those fields of `out` that are not None with the statistics of each row. Masked rows get zeros."""
    transform, constants = rows.transform, transform_constants(rows.transform)
    shape = blocking(
        transform.vocab_size,
        rows.logits,
        ref_logits=rows.ref_logits,
        capped=any(constants.values()),
        sampling_mask=rows.sampling_mask,
    )
    with on_device_of(rows.logits):
        row_stats_kernel[(rows.num_rows,)](
            rows.logits, *row_strides(rows.logits),
            rows.ref_logits, *row_strides(rows.ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            rows.targets, rows.temperatures, *out[:-1],
            rows.logits.shape[1], transform.vocab_size, *transform_arguments(transform),
            **constants, DTYPE=DTYPES[out.logps.dtype], **shape._asdict(), **compile_options(),
        )  # fmt: skip
