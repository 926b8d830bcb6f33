"""Statistics, loss and gradient in one launch, if the loss does not couple tokens."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .device import (
    MASKED,
    load_optional,
    logit_factors,
    row_pointer,
    store_optional,
)
from .dlogits import row_gradient, zero_columns
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
from .row_stats import reduce_row, taken_logit
from .token_loss import KernelLoss, token_loss

if TYPE_CHECKING:
    from ..tokens.inputs import TokenInputs
    from ..vocab.rows import FusedOutput, Rows

KEEP = False
"""Whether to ask the L2 cache to keep a row between its two reads. Experiment 4 in docs/dev/tuning.md."""


@triton.jit(
    do_not_specialize=[
        "out_batch_stride", "out_time_stride", "batch_stride", "time_stride",
        "ref_batch_stride", "ref_time_stride",
        "sampling_mask_batch_stride", "sampling_mask_time_stride", "T",
    ],
    do_not_specialize_on_alignment=PER_ROW,
)  # fmt: skip
def fused_loss_kernel(
    out_ptr, out_batch_stride: tl.int64, out_time_stride: tl.int64,
    logits_ptr, batch_stride: tl.int64, time_stride: tl.int64,
    ref_ptr, ref_batch_stride: tl.int64, ref_time_stride: tl.int64,
    sampling_mask_ptr, sampling_mask_batch_stride: tl.int64, sampling_mask_time_stride: tl.int64,
    targets_ptr, temperature_ptr,
    advantages_ptr, row_weights_ptr, old_logps_ptr, given_ref_logps_ptr, token_weights_ptr,
    entropy_weights_ptr,
    value_ptr, dlogp_ptr, logps_ptr, entropy_ptr, ref_logps_ptr, kl_ptr, kl_forward_ptr,
    T, V, WIDTH, temperature: tl.float64,
    scale: tl.float64, softcap: tl.float64, ref_scale: tl.float64, ref_softcap: tl.float64,
    # Not `params`, a name that Triton's generated code uses.
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, ZERO_WITHOUT_ADVANTAGE: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr = row_pointer(out_ptr, out_batch_stride, out_time_stride, row, T, GROUP)
    target = tl.load(targets_ptr + row)
    if target == MASKED:
        zero = tl.full((), 0.0, DTYPE)
        store_optional(value_ptr, row, zero)
        store_optional(dlogp_ptr, row, zero)
        store_optional(logps_ptr, row, zero)
        store_optional(entropy_ptr, row, zero)
        store_optional(ref_logps_ptr, row, zero)
        store_optional(kl_ptr, row, zero)
        store_optional(kl_forward_ptr, row, zero)
        zero_columns(out_ptr, 0, WIDTH, TAIL)
        return
    logits_ptr = row_pointer(logits_ptr, batch_stride, time_stride, row, T, GROUP)
    scale, softcap, k = logit_factors(scale, softcap, temperature_ptr, temperature, row, CAPPED, DTYPE)
    ref_scale, ref_softcap, ref_k = logit_factors(
        ref_scale, ref_softcap, temperature_ptr, temperature, row, REF_CAPPED, DTYPE
    )
    # Loaded before the reductions below. Their barriers order this load before every store to the row.
    z = taken_logit(logits_ptr, target, V, DTYPE)
    ref_z = z
    if ref_ptr is not None:
        ref_ptr = row_pointer(ref_ptr, ref_batch_stride, ref_time_stride, row, T, GROUP)
        ref_z = taken_logit(ref_ptr, target, V, DTYPE)
    if sampling_mask_ptr is not None:
        sampling_mask_ptr = row_pointer(
            sampling_mask_ptr, sampling_mask_batch_stride, sampling_mask_time_stride, row, T, 1
        )
    # Computed once. LLVM would merge two copies into values that it does not know to be constants. In rows
    # that are not aligned, each of these values would take a register.
    offsets = tl.arange(0, BLOCK)
    logp, shift, sum_exp, entropy, ref_logp, ref_shift, ref_sum_exp, kl, kl_forward = reduce_row(
        logits_ptr, ref_ptr, sampling_mask_ptr, offsets, target, z, ref_z, V,
        k, scale, softcap, ref_k, ref_scale, ref_softcap,
        CAPPED, REF_CAPPED, entropy_ptr is not None, kl_forward_ptr is not None, DTYPE,
        BLOCK, TAIL, THREADS, GROUP, KEEP,
    )  # fmt: skip
    if ref_ptr is None:
        ref_logp = load_optional(given_ref_logps_ptr, row, DTYPE)

    old_logp, token_weight, dentropy = None, None, None
    if old_logps_ptr is not None:
        old_logp = tl.load(old_logps_ptr + row)
    if token_weights_ptr is not None:
        token_weight = tl.load(token_weights_ptr + row)
    if entropy_weights_ptr is not None:
        dentropy = tl.load(entropy_weights_ptr + row)
    value, dlogp, dkl, dkl_forward = token_loss(
        logp, old_logp, ref_logp, entropy, kl, kl_forward,
        tl.load(advantages_ptr + row), tl.load(row_weights_ptr + row), token_weight, dentropy,
        surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
        SURROGATE, ANCHOR, ZERO_WITHOUT_ADVANTAGE, KL_KIND, ESTIMATOR, STRAIGHT_THROUGH, RATIO_CORRECTED,
    )  # fmt: skip
    dentropy = load_optional(entropy_weights_ptr, row, DTYPE)  # None in the loss is 0 in the gradient

    store_optional(value_ptr, row, value)
    store_optional(dlogp_ptr, row, dlogp)
    store_optional(logps_ptr, row, logp)
    store_optional(entropy_ptr, row, entropy)
    store_optional(ref_logps_ptr, row, ref_logp)
    store_optional(kl_ptr, row, kl)
    store_optional(kl_forward_ptr, row, kl_forward)
    if (dlogp == 0) & (dentropy == 0) & (dkl == 0) & (dkl_forward == 0):
        zero_columns(out_ptr, 0, WIDTH, TAIL)
    else:
        gradient_ref_ptr = None
        if KL_KIND == "exact" or KL_KIND == "exact_forward":
            gradient_ref_ptr = ref_ptr
        row_gradient(
            out_ptr, logits_ptr, gradient_ref_ptr, sampling_mask_ptr, offsets, target, V, WIDTH,
            k, scale, softcap, ref_k, ref_scale, ref_softcap,
            logp, shift, sum_exp, entropy, ref_logp, ref_shift, ref_sum_exp, kl,
            dlogp, dentropy, dkl, dkl_forward,
            CAPPED, REF_CAPPED, entropy_weights_ptr is not None or gradient_ref_ptr is not None,
            KL_KIND == "exact_forward", DTYPE, BLOCK, TAIL, THREADS, GROUP, KEEP,
        )  # fmt: skip


def fused_loss(rows: "Rows", loss: KernelLoss, inputs: "TokenInputs", out: "FusedOutput") -> None:
    """Fill `out` with statistics, loss, and the gradient of `sum(value)`. `out.dlogits` may be the logits."""
    transform, constants = rows.transform, transform_constants(rows.transform)
    logits, ref_logits, stats = rows.logits, rows.ref_logits, out.stats
    shape = blocking(
        transform.vocab_size,
        out.dlogits,
        logits,
        ref_logits=ref_logits,
        capped=any(constants.values()),
        sampling_mask=rows.sampling_mask,
    )
    with on_device_of(logits):
        fused_loss_kernel[(rows.num_rows,)](
            out.dlogits, *row_strides(out.dlogits),
            logits, *row_strides(logits),
            ref_logits, *row_strides(ref_logits),
            rows.sampling_mask, *row_strides(rows.sampling_mask),
            rows.targets, rows.temperatures,
            inputs.advantages, inputs.row_weights, inputs.old_logps, inputs.ref_logps,
            inputs.token_weights, inputs.entropy_weights,
            out.value, out.dlogp, stats.logps, stats.entropy, stats.ref_logps, stats.kl, stats.kl_forward,
            logits.shape[1], transform.vocab_size, out.dlogits.shape[2], *transform_arguments(transform),
            *loss.numbers, **loss.constants, **constants, DTYPE=DTYPES[out.value.dtype],
            KEEP=KEEP, **shape._asdict(), **compile_options(),
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch_stride", "time_stride", "T"])
def scale_rows_kernel(
    x_ptr, batch_stride: tl.int64, time_stride: tl.int64, factor_ptr, T, WIDTH,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    x_ptr = row_pointer(x_ptr, batch_stride, time_stride, tl.program_id(0).to(tl.int64), T, GROUP)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + columns, mask=columns < WIDTH)
        tl.store(x_ptr + columns, (x.to(factor.dtype) * factor).to(x.dtype), mask=columns < WIDTH)


def scale_rows(x: Tensor, factor: Tensor) -> None:
    """Compute `x *= factor`: `x` is `[B, T, V]`, `factor` 0-dim, fp32 (fp64 for fp64).

    If it is 1, `x` is not touched.
    """
    shape = blocking(x.shape[2], x)
    with on_device_of(x):
        scale_rows_kernel[(x.shape[0] * x.shape[1],)](
            x, *row_strides(x), factor, x.shape[1], x.shape[2],
            BLOCK=shape.BLOCK, GROUP=shape.GROUP, num_warps=shape.num_warps, **compile_options(),
        )  # fmt: skip
