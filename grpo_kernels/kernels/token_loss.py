"""Kernels over tokens, for losses that do not couple tokens: loss with derivatives, and metrics.

PyTorch computes the same (tokens/loss.py, tokens/metrics.py) in up to a hundred launches on a few kilobytes
each.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import triton
import triton.language as tl
from torch import Tensor

from . import surrogates
from .kl import ESTIMATORS, kl_estimate
from .launch import PER_ROW, compile_options, on_device_of
from .surrogates import clamped_ratio, log_ratio_to

if TYPE_CHECKING:
    from ..spec.surrogates.base import Clip
    from ..tokens.inputs import TokenInputs
    from ..tokens.statistics import Coefficients, RowStats

BLOCK = 128

METRICS = (
    *("log_ratio", "ratio", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
    *("kl", "kl_exact", "entropy", "active_fraction"),
)
"""The metrics in the order in which `token_metrics_kernel` sums them. Two counts follow."""


@triton.jit
def token_loss(
    logp, old_logp, ref_logp, entropy, kl, kl_forward,
    advantage, row_weight, token_weight, dentropy,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, ZERO_WITHOUT_ADVANTAGE: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
):  # fmt: skip
    """A token's weighted loss and its derivatives with respect to `logp`, `kl` and `kl_forward`.

    The derivative with respect to the entropy is `dentropy`. Arguments that the loss does not use may be
    None.
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
        inactive = ZERO_WITHOUT_ADVANTAGE & (advantage == 0)
        if token_weight is not None:
            value *= token_weight
            dlogp *= token_weight
            inactive |= token_weight == 0
        # `where` instead of a product, because a zero advantage times an infinite ratio would be NaN.
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
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, ZERO_WITHOUT_ADVANTAGE: tl.constexpr,
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
        SURROGATE, ANCHOR, ZERO_WITHOUT_ADVANTAGE, KL_KIND, ESTIMATOR, STRAIGHT_THROUGH, RATIO_CORRECTED,
    )  # fmt: skip
    tl.store(value_ptr + i, tl.where(needed, value, 0.0), mask=i < N)
    tl.store(dlogp_ptr + i, tl.where(needed, dlogp, 0.0), mask=i < N)


@triton.jit
def store_sum(to_ptr, x, counted):
    tl.store(to_ptr, tl.sum(tl.where(counted, x, 0.0), 0))


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PER_ROW)
def token_metrics_kernel(
    sums_ptr, mask_ptr, known_ptr,
    logps_ptr, old_logps_ptr, ref_logps_ptr, entropy_ptr, kl_ptr, kl_forward_ptr,
    advantages_ptr, dlogp_ptr, dentropy_ptr, dkl_ptr, N, low, high,
    surrogate_params, log_ratio_clamp, kl_beta, kl_clamp, kl_output_clamp,
    RATIO: tl.constexpr, CLIP: tl.constexpr,
    SURROGATE: tl.constexpr, ANCHOR: tl.constexpr, ZERO_WITHOUT_ADVANTAGE: tl.constexpr,
    KL_KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row of sums: METRICS in their order, the number of known tokens, and that of unmasked ones.

    Metrics that do not apply have a sum of 0.
    """
    sums_ptr += tl.program_id(0) * WIDTH
    for column in tl.static_range(WIDTH):
        tl.store(sums_ptr + column, 0.0)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unmasked = tl.load(mask_ptr + i, mask=i < N, other=0) != 0
    known = tl.load(known_ptr + i, mask=i < N, other=0) != 0
    # Loaded one by one, because Triton before 3.7 cannot build a tuple of values that may be None.
    logp = load_given(logps_ptr, i, known)
    old_logp = load_given(old_logps_ptr, i, known)
    ref_logp = load_given(ref_logps_ptr, i, known)
    kl = load_given(kl_ptr, i, known)
    if RATIO:
        advantage = load_given(advantages_ptr, i, known)
        if ANCHOR == "ref":
            log_ratio = log_ratio_to(logp, ref_logp)
        else:
            log_ratio = log_ratio_to(logp, old_logp)
        ratio, _ = clamped_ratio(log_ratio, log_ratio_clamp)
        store_sum(sums_ptr, log_ratio, known)
        store_sum(sums_ptr + 1, ratio, known)
        if CLIP == "band":
            below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
            store_sum(sums_ptr + 2, (below | above).to(tl.float32), known)
            store_sum(sums_ptr + 3, below.to(tl.float32), known)
            store_sum(sums_ptr + 4, above.to(tl.float32), known)
        if CLIP == "log band":
            below, above = (log_ratio < low) & (advantage < 0), (log_ratio > high) & (advantage > 0)
            store_sum(sums_ptr + 2, (below | above).to(tl.float32), known)
        if CLIP == "cap":
            store_sum(sums_ptr + 2, ((ratio > high) & (advantage != 0)).to(tl.float32), known)
        if CLIP == "region":
            # The clamp keeps a ratio that underflows to 0 from counting as outside the region.
            _, weight, _ = SURROGATE(logp, log_ratio, advantage, 20.0, surrogate_params)
            store_sum(sums_ptr + 2, ((weight == 0) & (advantage != 0)).to(tl.float32), known)
    if KL_KIND == "sampled":
        estimate, _ = kl_estimate(
            logp, log_ratio_to(logp, old_logp), ref_logp, ESTIMATOR, kl_clamp, kl_output_clamp,
            STRAIGHT_THROUGH, RATIO_CORRECTED, log_ratio_clamp,
        )  # fmt: skip
        store_sum(sums_ptr + 5, estimate, known)
    if KL_KIND == "exact":
        store_sum(sums_ptr + 5, kl, known)
    if KL_KIND == "exact_forward":
        store_sum(sums_ptr + 5, load_given(kl_forward_ptr, i, known), known)
    if kl_ptr is not None:
        store_sum(sums_ptr + 6, kl, known)
    if entropy_ptr is not None:
        store_sum(sums_ptr + 7, load_given(entropy_ptr, i, known), known)
    active = load_given(dlogp_ptr, i, unmasked) != 0
    if dentropy_ptr is not None:
        active |= load_given(dentropy_ptr, i, unmasked) != 0
    if dkl_ptr is not None:
        active |= load_given(dkl_ptr, i, unmasked) != 0
    store_sum(sums_ptr + 8, active.to(tl.float32), unmasked)
    store_sum(sums_ptr + 9, known.to(tl.float32), known)
    store_sum(sums_ptr + 10, unmasked.to(tl.float32), unmasked)


class KernelLoss(NamedTuple):
    """Arguments of the kernels for a loss that does not couple tokens. A missing bound is infinity."""

    surrogate: Optional[str]  # a name in kernels/surrogates.py
    anchor: Optional[str]
    zero_without_advantage: bool
    params: tuple[float, ...]  # of the surrogate
    log_ratio_clamp: float
    kl_kind: Optional[str]
    kl_beta: float
    kl_clamp: float
    kl_output_clamp: float
    straight_through: bool
    ratio_corrected: bool

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The run-time arguments of a kernel."""
        return self.params, self.log_ratio_clamp, self.kl_beta, self.kl_clamp, self.kl_output_clamp

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        estimator = ESTIMATORS.get(self.kl_kind or "")
        return {
            "SURROGATE": None if self.surrogate is None else getattr(surrogates, self.surrogate),
            "ANCHOR": self.anchor,
            "ZERO_WITHOUT_ADVANTAGE": self.zero_without_advantage,
            "KL_KIND": self.kl_kind if estimator is None else "sampled",
            "ESTIMATOR": estimator,
            "STRAIGHT_THROUGH": self.straight_through,
            "RATIO_CORRECTED": self.ratio_corrected,
        }


def token_losses(
    value: Tensor, dlogp: Tensor, stats: "RowStats", inputs: "TokenInputs", loss: KernelLoss
) -> None:
    """Fill `value` and `dlogp` `[N]` fp32 with each token's weighted loss and its derivative."""
    count = inputs.mask.numel()
    with on_device_of(inputs.mask):
        token_loss_kernel[(triton.cdiv(count, BLOCK),)](
            value, dlogp, inputs.mask,
            stats.logps, inputs.old_logps, stats.ref_logps, stats.entropy, stats.kl, stats.kl_forward,
            inputs.advantages, inputs.row_weights, inputs.token_weights, inputs.entropy_weights, count,
            *loss.numbers, **loss.constants, BLOCK=BLOCK, **compile_options(),
        )  # fmt: skip


def token_metrics(
    known: Tensor,
    stats: "RowStats",
    inputs: "TokenInputs",
    derivatives: "Coefficients",
    loss: KernelLoss,
    *,
    ratio: bool,
    clip: "Clip | None",
) -> dict[str, Tensor]:
    """Compute the means of METRICS, 0-dim, over the tokens that `known` `[N]` bool marks.

    `ratio`: whether the loss has a ratio. Metrics that do not apply are 0, and the caller drops them.
    """
    count = inputs.mask.numel()
    programs = triton.cdiv(count, BLOCK)
    sums = stats.logps.new_empty(programs, len(METRICS) + 2)
    kind, low, high = (None, 0.0, 0.0) if clip is None else clip
    dkl = derivatives.dkl if derivatives.dkl_forward is None else derivatives.dkl_forward
    with on_device_of(inputs.mask):
        token_metrics_kernel[(programs,)](
            sums, inputs.mask, known,
            stats.logps, inputs.old_logps, stats.ref_logps, stats.entropy, stats.kl, stats.kl_forward,
            inputs.advantages, derivatives.dlogp, derivatives.dentropy, dkl, count, low, high, *loss.numbers,
            RATIO=ratio, CLIP=kind, **loss.constants,
            WIDTH=sums.shape[1], BLOCK=BLOCK, **compile_options(),
        )  # fmt: skip
    total, counts = sums.sum(0).split([len(METRICS), 2])
    known_count, unmasked_count = counts.clamp(min=1).unbind()
    # The last one, active_fraction, is a mean over all unmasked tokens.
    means = (*(total[:-1] / known_count).unbind(), total[-1] / unmasked_count)
    return dict(zip(METRICS, means))
