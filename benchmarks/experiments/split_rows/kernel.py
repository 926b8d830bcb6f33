"""A token-local loss and its gradient in place, which read and write every logit once.

This is an experiment. The package's `fused_loss` gives a row to one block, which reads it twice and relies on
the L2 cache for the second read. Here a row is split over PARTS blocks, and each block holds its slice in
registers from the statistics to the gradient. In bf16, that moves 6 bytes per element with reference logits
and 4 without. Experiment 4 of docs/dev/tuning.md compares the two.

The blocks of a row exchange statistics through 64-bit words in global memory. A word holds two fp32 numbers
that are never both 0. The launcher clears all words, and each is written once. A block writes its words, and
then polls those of all PARTS blocks until none is 0. There is no deadlock, because all blocks of the grid are
resident (a cooperative launch) and the blocks of a row process their rows in the same order.

A block accesses only the logits of its slice. The block whose slice contains the taken token reads, publishes
and overwrites its logit. So blocks exchange nothing but words, no word depends on another, and relaxed
atomics suffice. With a release, every row would wait until the gradient of the previous row has reached
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.kernels.device import (
    LN2,
    LOG2E,
    MASKED,
    expm1,
    exponent,
    load_optional,
    logit_factors,
    lowest_logit,
    row_pointer,
    store_optional,
)
from grpo_kernels.kernels.dlogits import zero_columns
from grpo_kernels.kernels.launch import PER_ROW
from grpo_kernels.kernels.row_stats import fold, in_thread_sum, rescaled, shift_delta
from grpo_kernels.kernels.token_loss import token_loss

TWO_INFINITIES = tl.constexpr(0xFF80FF80 - 2**32)  # -inf in bf16, twice
HIGH_HALF = tl.constexpr(0xFFFF0000 - 2**32)
LANES = tl.constexpr(32)  # threads of a warp


@triton.jit
def publish(word_ptr, first, second):
    """Writes two fp32 scalars as one 64-bit word, so that a reader sees both or none."""
    high = first.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = second.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.atomic_xchg(word_ptr, high | low, sem="relaxed", scope="gpu")


@triton.jit
def first_of(word):
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def second_of(word):
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def poll(words_ptr, KINDS: tl.constexpr, PARTS: tl.constexpr):
    """Reads the words `[LANES]` of each kind once.

    LANES is the width of a warp. Each warp polls separately and has each word in a different lane. So
    it needs no barrier to know whether a word is missing. Warps may leave the loop at different times,
    because a word does not change once it is written.
    """
    lanes = tl.arange(0, LANES)
    words = ()
    for kind in tl.static_range(KINDS):
        here = lanes < PARTS + (kind < 2)
        word_ptrs = words_ptr + kind * (PARTS + 1) + lanes
        words = words + (tl.load(word_ptrs, mask=here, other=1, volatile=True),)  # noqa: RUF005
    return words


@triton.jit
def incomplete(words, KINDS: tl.constexpr):
    missing = words[0] == 0
    for kind in tl.static_range(1, KINDS):
        missing |= words[kind] == 0
    return tl.max(missing.to(tl.int32), 0) > 0


@triton.jit
def merged(shift, total, ref_shift, ref_total, cross, k, ref_k, KINDS: tl.constexpr):
    """Merges vectors of partial statistics, each relative to its own shift, into scalars."""
    whole_shift = tl.max(shift, 0)
    delta = shift_delta(shift, whole_shift, k)
    alpha = tl.exp2(delta)
    whole_total = tl.sum(total * alpha, 0)
    whole_ref_shift, whole_ref_total, whole_cross = 0 * whole_total, 0 * whole_total, 0 * whole_total
    if KINDS > 1:
        whole_ref_shift = tl.max(ref_shift, 0)
        ref_delta = shift_delta(ref_shift, whole_ref_shift, ref_k)
        whole_ref_total = tl.sum(ref_total * tl.exp2(ref_delta), 0)
        if KINDS > 2:
            whole_cross = tl.sum(rescaled(cross + total * (delta - ref_delta), alpha), 0)
    return whole_shift, whole_total, whole_ref_shift, whole_ref_total, whole_cross


@triton.jit
def load_chunks(ptr, length, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Loads a slice, all chunks before the first one is used.

    With PAIRS, an int32 holds two bf16 numbers. Otherwise each of them would take a register if there is
    control flow between its load and its use.
    """
    chunks = ()
    for i in tl.static_range(CHUNKS):
        if PAIRS:
            columns = i * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
            pairs_ptr = ptr.to(tl.pointer_type(tl.int32))
            chunk = tl.load(pairs_ptr + columns, mask=columns < length // 2, other=TWO_INFINITIES)
        else:
            columns = i * BLOCK + tl.arange(0, BLOCK)
            chunk = tl.load(ptr + columns, mask=columns < length, other=float("-inf"))
        chunks = chunks + (chunk,)  # noqa: RUF005
    return chunks


@triton.jit
def in_fp32(chunk, PAIRS: tl.constexpr):
    if PAIRS:
        even = (chunk << 16).to(tl.float32, bitcast=True)
        odd = (chunk & HIGH_HALF).to(tl.float32, bitcast=True)
        y = tl.join(even, odd).reshape([2 * chunk.shape[0]])
    else:
        y = chunk.to(tl.float32)
    return y


@triton.jit
def load_slices(
    logits_ptr, batch_stride, time_stride, ref_ptr, ref_batch_stride, ref_time_stride, targets_ptr,
    row, rows, T, start, length,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Loads target and slices of a row. No logit is read if the row is masked or does not exist."""
    target = tl.load(targets_ptr + row, mask=row < rows, other=MASKED)
    length = tl.multiple_of(tl.where(target == MASKED, 0, length), GROUP)
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    chunks = load_chunks(logits_ptr + start, length, CHUNKS, BLOCK, PAIRS)
    ref_chunks = ()
    if ref_ptr is not None:
        ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
        ref_chunks = load_chunks(ref_ptr + start, length, CHUNKS, BLOCK, PAIRS)
    return target, chunks, ref_chunks


@triton.jit
def slice_statistics(
    chunks, ref_chunks, k, ref_k, PAIRS: tl.constexpr, KINDS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Statistics of a slice, chunk by chunk, because only one chunk fits into registers in fp32."""
    zeros = tl.zeros([THREADS], tl.float32)
    shift, ref_shift = zeros + lowest_logit(tl.float32), zeros + lowest_logit(tl.float32)
    total, ref_total, cross = zeros, zeros, zeros
    for i in tl.static_range(CHUNKS):
        shift, delta, d = fold(in_fp32(chunks[i], PAIRS), k, shift, BLOCK, THREADS, GROUP)
        e = tl.exp2(d)
        alpha = tl.exp2(delta)
        if KINDS > 1:
            ref_y = in_fp32(ref_chunks[i], PAIRS)
            ref_shift, ref_delta, ref_d = fold(ref_y, ref_k, ref_shift, BLOCK, THREADS, GROUP)
            if KINDS > 2:
                earlier = rescaled(cross + total * (delta - ref_delta), alpha)
                cross = earlier + in_thread_sum(tl.where(e > 0, e * (d - ref_d), e))
            ref_total = ref_total * tl.exp2(ref_delta) + in_thread_sum(tl.exp2(ref_d))
        total = total * alpha + in_thread_sum(e)
    return merged(shift, total, ref_shift, ref_total, cross, k, ref_k, KINDS)


@triton.jit(
    do_not_specialize=[
        "batch_stride", "time_stride", "ref_batch_stride", "ref_time_stride", "rows", "T",
    ],
    do_not_specialize_on_alignment=PER_ROW,
)  # fmt: skip
def split_loss_kernel(
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    words_ptr, targets_ptr, temperature_ptr,
    advantages_ptr, row_weights_ptr, old_logps_ptr, given_ref_logps_ptr, token_weights_ptr,
    value_ptr, dlogp_ptr, logps_ptr, ref_logps_ptr, kl_ptr,
    rows, T, V, WIDTH, SLICE, temperature: tl.float64, scale: tl.float64, ref_scale: tl.float64,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, ZERO_WITHOUT_ADVANTAGE: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
    PAIRS: tl.constexpr, KINDS: tl.constexpr, PREFETCH: tl.constexpr, PARTS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """PARTS consecutive programs process the same rows, each with its own SLICE columns.

    The first of KINDS kinds of words is (shift, sum) of the policy, the second that of the reference, and the
    third `cross`, which the exact KL needs. Each kind has one word per part. The first two kinds have another
    word for the taken token's logit. With PREFETCH, the slices of the next row are loaded before polling for
    the words of this one.
    """
    part = tl.program_id(0) % PARTS
    group = tl.program_id(0) // PARTS
    groups = tl.num_programs(0) // PARTS
    start = part * SLICE
    length = tl.minimum(SLICE, V - start)
    if PREFETCH:
        target, chunks, ref_chunks = load_slices(
            logits_ptr, batch_stride, time_stride, ref_ptr, ref_batch_stride, ref_time_stride, targets_ptr,
            group, rows, T, start, length, CHUNKS, BLOCK, GROUP, PAIRS,
        )  # fmt: skip
    for row in range(group, rows, groups):
        if not PREFETCH:
            target, chunks, ref_chunks = load_slices(
                logits_ptr, batch_stride, time_stride, ref_ptr, ref_batch_stride, ref_time_stride,
                targets_ptr, row, rows, T, start, length, CHUNKS, BLOCK, GROUP, PAIRS,
            )  # fmt: skip
        row_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
        row_words_ptr = words_ptr + row * tl.full((), KINDS * (PARTS + 1), tl.int64)
        inside = (target >= 0) & (target < V)
        # The first block publishes the logit of an id outside the vocabulary, which is NaN.
        own = tl.where(inside, (target >= start) & (target < start + length), part == 0)
        if target != MASKED:
            _, _, k = logit_factors(scale, 1.0, temperature_ptr, temperature, row, False, tl.float32)
            _, _, ref_k = logit_factors(ref_scale, 1.0, temperature_ptr, temperature, row, False, tl.float32)
            # Must come before the reductions below: their barriers order it before the stores to this slice.
            z = tl.load(row_ptr + target, mask=own & inside, other=float("nan")).to(tl.float32)
            ref_z = z
            if KINDS > 1:
                ref_row_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
                ref_z = tl.load(ref_row_ptr + target, mask=own & inside, other=float("nan")).to(tl.float32)
            shift, total, ref_shift, ref_total, cross = slice_statistics(
                chunks, ref_chunks, k * LOG2E, ref_k * LOG2E, PAIRS, KINDS, CHUNKS, BLOCK, THREADS, GROUP
            )
            # The two numbers of a word are never both 0: a maximum of 0 adds 1 to the total. Numbers that can
            # be 0 are paired with 1.
            publish(row_words_ptr + part, shift, total)
            if KINDS > 1:
                publish(row_words_ptr + (PARTS + 1) + part, ref_shift, ref_total)
            if KINDS > 2:
                publish(row_words_ptr + 2 * (PARTS + 1) + part, cross, tl.full((), 1.0, tl.float32))
            if own:
                publish(row_words_ptr + PARTS, z, tl.full((), 1.0, tl.float32))
                if KINDS > 1:
                    publish(row_words_ptr + (PARTS + 1) + PARTS, ref_z, tl.full((), 1.0, tl.float32))
        held, row_target = chunks, target
        if PREFETCH:
            target, chunks, ref_chunks = load_slices(
                logits_ptr, batch_stride, time_stride, ref_ptr, ref_batch_stride, ref_time_stride,
                targets_ptr, row + groups, rows, T, start, length, CHUNKS, BLOCK, GROUP, PAIRS,
            )  # fmt: skip
        value, dlogp = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        logp, ref_logp, kl = value, value, value
        by_p, shift, k = value, value, value
        if row_target != MASKED:
            words = poll(row_words_ptr, KINDS, PARTS)
            while incomplete(words, KINDS):
                words = poll(row_words_ptr, KINDS, PARTS)
            lanes = tl.arange(0, LANES)
            is_part = lanes < PARTS
            shifts = tl.where(is_part, first_of(words[0]), lowest_logit(tl.float32))
            totals = tl.where(is_part, second_of(words[0]), 0.0)
            ref_shifts, ref_totals, crosses = shifts, totals, totals
            z = tl.sum(tl.where(lanes == PARTS, first_of(words[0]), 0.0), 0)
            ref_z = z
            if KINDS > 1:
                ref_shifts = tl.where(is_part, first_of(words[1]), lowest_logit(tl.float32))
                ref_totals = tl.where(is_part, second_of(words[1]), 0.0)
                ref_z = tl.sum(tl.where(lanes == PARTS, first_of(words[1]), 0.0), 0)
            if KINDS > 2:
                crosses = tl.where(is_part, first_of(words[2]), 0.0)
            _, _, k = logit_factors(scale, 1.0, temperature_ptr, temperature, row, False, tl.float32)
            _, _, ref_k = logit_factors(ref_scale, 1.0, temperature_ptr, temperature, row, False, tl.float32)
            shift, total, ref_shift, ref_total, cross = merged(
                shifts, totals, ref_shifts, ref_totals, crosses, k * LOG2E, ref_k * LOG2E, KINDS
            )
            logp = exponent(z, shift, k) - tl.log(total)
            ref_logp = load_optional(given_ref_logps_ptr, row, tl.float32)
            if KINDS > 1:
                ref_logp = exponent(ref_z, ref_shift, ref_k) - tl.log(ref_total)
            if KINDS > 2:
                kl = cross / total * LN2 - tl.log(total) + tl.log(ref_total)
                kl = tl.where(kl < 0, 0.0, kl)

            old_logp, token_weight = None, None
            if old_logps_ptr is not None:
                old_logp = tl.load(old_logps_ptr + row)
            if token_weights_ptr is not None:
                token_weight = tl.load(token_weights_ptr + row)
            value, dlogp, _, _ = token_loss(
                logp, old_logp, ref_logp, None, None, None,
                tl.load(advantages_ptr + row), tl.load(row_weights_ptr + row), token_weight, None,
                surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
                SURROGATE, ANCHOR, ZERO_WITHOUT_ADVANTAGE, KL_KIND, ESTIMATOR,
                STRAIGHT_THROUGH, RATIO_CORRECTED,
            )  # fmt: skip
            by_p = -k * dlogp / total
        if part == 0:
            store_optional(value_ptr, row, value)
            store_optional(dlogp_ptr, row, dlogp)
            store_optional(logps_ptr, row, logp)
            store_optional(ref_logps_ptr, row, ref_logp)
            store_optional(kl_ptr, row, kl)
        slice_ptr = row_ptr + start
        stop = tl.multiple_of(length, GROUP)
        if dlogp == 0:
            zero_columns(slice_ptr, 0, stop, BLOCK)
        else:
            for i in tl.static_range(CHUNKS):
                columns = i * BLOCK + tl.arange(0, BLOCK)
                grad = tl.exp2(exponent(in_fp32(held[i], PAIRS), shift, k * LOG2E)) * by_p
                tl.store(slice_ptr + columns, grad.to(slice_ptr.dtype.element_ty), mask=columns < stop)
            if own & inside:
                # dlogp (1 - p). The loop has stored -dlogp p, which saves it a comparison per element.
                tl.debug_barrier()
                taken = -k * dlogp * expm1(logp)
                tl.store(row_ptr + row_target, taken.to(row_ptr.dtype.element_ty))
        if part == PARTS - 1:
            zero_columns(row_ptr, V, WIDTH, BLOCK)
