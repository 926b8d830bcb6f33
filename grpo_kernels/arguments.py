"""What the losses do with their arguments, from logits and from hidden states alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import debug
from .aggregation import aggregation_weights, safe_divide
from .batch import Batch, moved_scalar
from .checks import check_choice, check_number
from .metrics import metrics
from .names import PRESET_NAMES, PresetName
from .objective import Coefficients, RowStats, TokenInputs
from .row_loss import reference_logps
from .sequences import weights_of_sequences
from .spec import COMPLETE_PRESETS, LogitTransform, LossSpec
from .surrogates import Surrogate


class LossOutput(NamedTuple):
    """What a loss returns; see `grpo_loss`."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor
    ref_logps: Tensor | None
    entropy: Tensor | None


def resolve_spec(spec: LossSpec | PresetName) -> LossSpec:
    if isinstance(spec, str):
        check_choice("spec", spec, PRESET_NAMES)
        return COMPLETE_PRESETS.get(spec) or LossSpec.preset(spec)  # which says what is missing
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec must be a LossSpec or the name of a preset, got {spec!r}")
    return spec


def check_reference(spec: LossSpec, whole: Tensor | None, ref_logps: Tensor | None, name: str | None) -> None:
    """`whole`: what gives the reference's distribution, the argument `name`, where there is such a one."""
    if whole is not None and ref_logps is not None:
        raise ValueError(f"{name} and ref_logps are both given: give one")
    if spec.exact_kl is not None and whole is None:
        needed = "logits or hidden states" if name is None else name
        raise ValueError(f"KL({spec.exact_kl.kind!r}) runs over the vocabulary: it needs {needed}")
    give = "ref_logps" if name is None else f"{name} or ref_logps"
    if whole is None and ref_logps is None:
        if isinstance(spec.surrogate, Surrogate) and spec.surrogate.anchor == "ref":
            raise ValueError(f"{spec.surrogate} needs a reference: give {give}")
        if spec.sampled_kl is not None:
            raise ValueError(f"{spec.sampled_kl} needs a reference: give {give}")


def logit_transform(
    vocab_size: int,
    temperature: float | Tensor,
    scale: float,
    softcap: float | None,
    ref_scale: float | None = None,
    ref_softcap: float | None = None,
) -> LogitTransform:
    """The reference's as the policy's, where it is not given."""
    return LogitTransform(
        vocab_size,
        scale,
        softcap,
        scale if ref_scale is None else ref_scale,
        softcap if ref_softcap is None else ref_softcap,
        1.0 if isinstance(temperature, Tensor) else temperature,
    )


def token_inputs(
    spec: LossSpec,
    batch: Batch,
    *,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> TokenInputs:
    """The constants of the loss, checked and laid out by rows."""
    normalizer = _normalizer(batch, normalizer)
    row_weights = _row_weights(spec, batch, normalizer)
    if spec.couples_tokens and not spec.uses_callable:
        name = "a KL" if spec.surrogate is None else type(spec.surrogate).__name__
        batch.require_sequences(f"{name} at level {spec.level!r}")
    weights = batch.optional("token_weights", token_weights, per_sequence=True)
    if weights is not None and token_weights is not None and tuple(token_weights.shape) != batch.shape:
        weights = weights_of_sequences(spec, weights, batch.layout)
    return TokenInputs(
        mask=batch.mask,
        advantages=batch.per_token("advantages", advantages, per_sequence=True),
        row_weights=row_weights,
        old_logps=batch.optional("old_logps", old_logps),
        ref_logps=batch.optional("ref_logps", ref_logps),
        token_weights=weights,
        entropy_weights=_entropy_weights(spec, batch, row_weights, normalizer),
    )


def loss_output(
    spec: LossSpec,
    batch: Batch,
    loss: Tensor,
    stats: RowStats,  # constants
    inputs: TokenInputs,
    derivatives: Coefficients,
    backend: str,
    ran: Tensor | None = None,  # [B * T] bool: the rows whose statistics are known; None: all unmasked ones
) -> LossOutput:
    reference = reference_logps(stats, inputs)
    if reference is not None and ran is not None:
        reference = torch.where(ran, reference, 0.0)
    return LossOutput(
        loss,
        metrics(spec, stats, inputs, derivatives, batch.layout, backend, ran),
        batch.shaped(stats.logps),
        None if reference is None else batch.shaped(reference),
        None if stats.entropy is None else batch.shaped(stats.entropy),
    )


def _normalizer(batch: Batch, normalizer: float | Tensor | None) -> float | Tensor | None:
    """Check the normalizer, and return a 0-dim tensor on the batch's device, a Python number or None."""
    if not isinstance(normalizer, Tensor):
        return check_number("normalizer", normalizer, optional=True)
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a float or a 0-dim tensor, got shape {tuple(normalizer.shape)}")
    if debug.enabled():
        debug.check_scalar("normalizer", normalizer)
    return moved_scalar(normalizer, batch.mask.device).to(batch.mask.device)


def _row_weights(spec: LossSpec, batch: Batch, normalizer: float | Tensor | None) -> Tensor:
    """The aggregation as a weight per row; raises ValueError where it lacks what it needs."""
    if spec.aggregation == "seq-mean-token-mean" or (
        spec.aggregation.startswith("seq-") and normalizer is None
    ):
        batch.require_sequences(f"aggregation {spec.aggregation!r}")
    return aggregation_weights(spec, batch.layout, batch.num_sequences, normalizer)


def _entropy_weights(
    spec: LossSpec, batch: Batch, row_weights: Tensor, normalizer: float | Tensor | None
) -> Tensor | None:
    """The bonus is a mean over the unmasked tokens; a normalizer makes it aggregate as the loss does."""
    if not spec.entropy_coef:
        return None
    if normalizer is None:
        row_weights = safe_divide(batch.mask.to(batch.dtype), batch.mask.sum())
    return -spec.entropy_coef * row_weights
