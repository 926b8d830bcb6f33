"""A token-local loss, its derivatives by the statistics and its metrics, many rows at a time.

PyTorch does the same (`row_loss.py`, `metrics.py`) in up to a hundred launches, each on a few kilobytes.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device import KL_ESTIMATORS, SURROGATES, clamped_ratio, kl_estimate, log_ratio_to
from .launch import PER_ROW, compile_options, on_device_of

BLOCK = 128

METRICS = (
    *("log_ratio", "ratio", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
    *("kl", "kl_exact", "entropy", "active_fraction"),
)
"""What `token_metrics` sums up: their order is that of the sums, which two counts follow."""


@triton.jit
def token_loss(
    logp, old_logp, ref_logp, entropy, kl, kl_forward,
    advantage, row_weight, token_weight, dentropy,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, RESTS_AT_ZERO: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
):  # fmt: skip
    """A row's share of the loss, and its derivatives by `logp`, `kl` and `kl_forward`; by the entropy it is
    `dentropy`. What the loss does not have may be None.
    """
    value, dlogp = tl.zeros_like(logp), tl.zeros_like(logp)
    if SURROGATE is not None:
        if ANCHOR == "ref":
            log_ratio = log_ratio_to(logp, ref_logp)
        else:
            log_ratio = log_ratio_to(logp, old_logp)
        value, by_logp, by_log_ratio = SURROGATE(
            logp, log_ratio, advantage, log_ratio_clamp, surrogate_params
        )
        dlogp = by_logp + by_log_ratio
        inactive = RESTS_AT_ZERO & (advantage == 0)
        if token_weight is not None:
            value *= token_weight
            dlogp *= token_weight
            inactive |= token_weight == 0
        # A select, never a product: a zero advantage beside an infinite ratio would be 0 * inf = NaN.
        value = tl.where(inactive, 0.0, value * row_weight)
        dlogp = tl.where(inactive, 0.0, dlogp * row_weight)
    dkl, dkl_forward = tl.zeros_like(logp), tl.zeros_like(logp)
    if KL_KIND == "sampled":
        kl_value, slope = kl_estimate(
            logp, log_ratio_to(logp, old_logp), ref_logp, ESTIMATOR, kl_clamp, kl_output_clamp,
            STRAIGHT_THROUGH, RATIO_CORRECTED, log_ratio_clamp,
        )  # fmt: skip
        value += kl_beta * row_weight * kl_value
        dlogp += kl_beta * row_weight * slope
    if KL_KIND == "exact":
        dkl = kl_beta * row_weight
        value += dkl * kl
    if KL_KIND == "exact_forward":
        dkl_forward = kl_beta * row_weight
        value += dkl_forward * kl_forward
    if dentropy is not None:
        value += dentropy * entropy
    return value, dlogp, dkl, dkl_forward


@triton.jit
def load_given(ptr, i, needed):
    x = None
    if ptr is not None:
        x = tl.load(ptr + i, mask=needed, other=0.0)
    return x


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PER_ROW)
def token_loss_kernel(
    value_ptr, dlogp_ptr,
    mask_ptr, logps_ptr, old_logps_ptr, ref_logps_ptr, entropy_ptr, kl_ptr, kl_forward_ptr,
    advantages_ptr, row_weights_ptr, token_weights_ptr, entropy_weights_ptr, N,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, RESTS_AT_ZERO: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    needed = tl.load(mask_ptr + i, mask=i < N, other=0) != 0
    value, dlogp, _, _ = token_loss(
        load_given(logps_ptr, i, needed), load_given(old_logps_ptr, i, needed),
        load_given(ref_logps_ptr, i, needed), load_given(entropy_ptr, i, needed),
        load_given(kl_ptr, i, needed), load_given(kl_forward_ptr, i, needed),
        load_given(advantages_ptr, i, needed), load_given(row_weights_ptr, i, needed),
        load_given(token_weights_ptr, i, needed), load_given(entropy_weights_ptr, i, needed),
        surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
        SURROGATE, ANCHOR, RESTS_AT_ZERO, KL_KIND, ESTIMATOR, STRAIGHT_THROUGH, RATIO_CORRECTED,
    )  # fmt: skip
    tl.store(value_ptr + i, tl.where(needed, value, 0.0), mask=i < N)
    tl.store(dlogp_ptr + i, tl.where(needed, dlogp, 0.0), mask=i < N)


@triton.jit
def store_sum(to_ptr, x, counted):
    tl.store(to_ptr, tl.sum(tl.where(counted, x, 0.0), 0))


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PER_ROW)
def token_metrics_kernel(
    sums_ptr, mask_ptr, ran_ptr,
    logps_ptr, old_logps_ptr, ref_logps_ptr, entropy_ptr, kl_ptr, kl_forward_ptr,
    advantages_ptr, dlogp_ptr, dentropy_ptr, dkl_ptr, N, low, high,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    RATIO: tl.constexpr, CLIP: tl.constexpr,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, RESTS_AT_ZERO: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of sums: METRICS in their order, then the number of tokens that ran, and of unmasked ones."""
    sums_ptr += tl.program_id(0) * WIDTH
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unmasked = tl.load(mask_ptr + i, mask=i < N, other=0) != 0
    ran = tl.load(ran_ptr + i, mask=i < N, other=0) != 0
    # One by one: Triton before 3.7 makes no tuple of what a function has returned if that may be None.
    logp = load_given(logps_ptr, i, ran)
    old_logp = load_given(old_logps_ptr, i, ran)
    ref_logp = load_given(ref_logps_ptr, i, ran)
    kl = load_given(kl_ptr, i, ran)
    if RATIO:
        advantage = load_given(advantages_ptr, i, ran)
        if ANCHOR == "ref":
            log_ratio = log_ratio_to(logp, ref_logp)
        else:
            log_ratio = log_ratio_to(logp, old_logp)
        ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
        store_sum(sums_ptr, log_ratio, ran)
        store_sum(sums_ptr + 1, ratio, ran)
        if CLIP == "band":
            below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
            store_sum(sums_ptr + 2, (below | above).to(tl.float32), ran)
            store_sum(sums_ptr + 3, below.to(tl.float32), ran)
            store_sum(sums_ptr + 4, above.to(tl.float32), ran)
        if CLIP == "cap":
            store_sum(sums_ptr + 2, ((ratio > high) & (advantage != 0)).to(tl.float32), ran)
        if CLIP == "region":
            # Clamped, lest a ratio that vanishes pass for one outside of the region.
            _, weight, _ = SURROGATE(logp, log_ratio, advantage, 20.0, surrogate_params)
            store_sum(sums_ptr + 2, ((weight == 0) & (advantage != 0)).to(tl.float32), ran)
    if KL_KIND == "sampled":
        estimate, _ = kl_estimate(
            logp, log_ratio_to(logp, old_logp), ref_logp, ESTIMATOR, kl_clamp, kl_output_clamp,
            STRAIGHT_THROUGH, RATIO_CORRECTED, log_ratio_clamp,
        )  # fmt: skip
        store_sum(sums_ptr + 5, estimate, ran)
    if KL_KIND == "exact":
        store_sum(sums_ptr + 5, kl, ran)
    if KL_KIND == "exact_forward":
        store_sum(sums_ptr + 5, load_given(kl_forward_ptr, i, ran), ran)
    if kl_ptr is not None:
        store_sum(sums_ptr + 6, kl, ran)
    if entropy_ptr is not None:
        store_sum(sums_ptr + 7, load_given(entropy_ptr, i, ran), ran)
    active = load_given(dlogp_ptr, i, unmasked) != 0
    if dentropy_ptr is not None:
        active |= load_given(dentropy_ptr, i, unmasked) != 0
    if dkl_ptr is not None:
        active |= load_given(dkl_ptr, i, unmasked) != 0
    store_sum(sums_ptr + 8, active.to(tl.float32), unmasked)
    store_sum(sums_ptr + 9, ran.to(tl.float32), ran)
    store_sum(sums_ptr + 10, unmasked.to(tl.float32), unmasked)


def loss_arguments(
    *,
    surrogate: str | None,
    anchor: str | None,
    rests_at_zero: bool,
    params: tuple[float, ...],
    log_ratio_clamp: float,
    kl_kind: str | None,
    kl_beta: float,
    kl_clamp: float,
    kl_output_clamp: float,
    straight_through: bool,
    ratio_corrected: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A loss as the kernels take it: numbers at run time, and what shapes code."""
    estimator = KL_ESTIMATORS.get(kl_kind or "")
    return (params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp), {
        "SURROGATE": None if surrogate is None else SURROGATES[surrogate],
        "ANCHOR": anchor,
        "RESTS_AT_ZERO": rests_at_zero,
        "KL_KIND": kl_kind if estimator is None else "sampled",
        "ESTIMATOR": estimator,
        "STRAIGHT_THROUGH": straight_through,
        "RATIO_CORRECTED": ratio_corrected,
    }


def token_losses(
    value: Tensor,  # the row's share of the loss; [N] fp32, as all but the mask
    dlogp: Tensor,
    mask: Tensor,  # bool; where False nothing else is read and both are 0
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    kl_forward: Tensor | None,
    advantages: Tensor,
    row_weights: Tensor,
    token_weights: Tensor | None,
    entropy_weights: Tensor | None,
    **loss: Any,  # see `loss_arguments`
) -> None:
    """Fills `value` and `dlogp`."""
    numbers, shape = loss_arguments(**loss)
    count = mask.numel()
    with on_device_of(mask):
        token_loss_kernel[(triton.cdiv(count, BLOCK),)](
            value, dlogp,
            mask, logps, old_logps, ref_logps, entropy, kl, kl_forward,
            advantages, row_weights, token_weights, entropy_weights, count,
            *numbers, **shape, BLOCK=BLOCK, **compile_options(),
        )  # fmt: skip


def token_metrics(
    mask: Tensor,  # [N] bool
    ran: Tensor,  # [N] bool: where the statistics are known
    logps: Tensor,  # [N] fp32, as the rest
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    kl_forward: Tensor | None,
    advantages: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    dkl: Tensor | None,  # of whichever exact KL the loss has
    *,
    ratio: bool,  # whether there is a ratio to speak of
    clip: str | None,  # see `metrics.Clip`
    low: float,
    high: float,
    **loss: Any,  # see `loss_arguments`
) -> dict[str, Tensor]:
    """Means of METRICS, 0-dim, over the tokens that ran; of what does not apply, anything."""
    numbers, shape = loss_arguments(**loss)
    count = mask.numel()
    programs = triton.cdiv(count, BLOCK)
    sums = logps.new_empty(programs, len(METRICS) + 2)
    with on_device_of(mask):
        token_metrics_kernel[(programs,)](
            sums, mask, ran, logps, old_logps, ref_logps, entropy, kl, kl_forward,
            advantages, dlogp, dentropy, dkl, count, low, high, *numbers,
            RATIO=ratio, CLIP=clip, **shape, WIDTH=sums.shape[1], BLOCK=BLOCK, **compile_options(),
        )  # fmt: skip
    total, counts = sums.sum(0).split([len(METRICS), 2])
    ran_count, unmasked_count = counts.clamp(min=1).unbind()
    # The last, active_fraction, is one of all unmasked tokens.
    means = (*(total[:-1] / ran_count).unbind(), total[-1] / unmasked_count)
    return dict(zip(METRICS, means, strict=True))
