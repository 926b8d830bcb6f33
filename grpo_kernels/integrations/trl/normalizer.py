"""TRL's denominators: the tokens of a whole optimizer step, or the number of micro-batches.

Every function takes the trainer, because these numbers depend on its arguments and on its current step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...spec import LossSpec

TOKENS_OF_ALL_MICRO_BATCHES = ("cispo", "dapo", "vespo")
"""The values of `loss_type` whose loss TRL divides by the tokens of all micro-batches."""


def accumulated_micro_batches(trainer: Any) -> int:
    """Return the number of micro-batches whose losses TRL adds up in an optimizer step; 1 in evaluation."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def trl_normalizer(trainer: Any, spec: LossSpec, inputs: dict[str, Any]) -> Tensor | None:
    """Return the tokens of an optimizer step per process, or None for the micro-batch's own denominator.

    `num_items_in_batch` counts the tokens of a whole generation on all processes. TRL divides by
    the average number of tokens in one of the generation's optimizer steps.
    """
    if trainer.loss_type not in TOKENS_OF_ALL_MICRO_BATCHES or spec.aggregation != "token-mean":
        return None
    tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    if not trainer.model.training:
        return tokens
    return tokens * accumulated_micro_batches(trainer) / trainer.args.steps_per_generation


def micro_batch_divisor(trainer: Any, normalizer: Tensor | None) -> int:
    """Return the divisor of a micro-batch's loss. It is 1 if a normalizer counts all micro-batches."""
    return accumulated_micro_batches(trainer) if normalizer is None else 1


def entropy_coef(trainer: Any, spec: LossSpec, mask: Tensor, normalizer: Tensor | None) -> float:
    """Return the `entropy_coef` that makes our entropy bonus equal to TRL's.

    If `GRPOConfig` asks for no bonus, this is the spec's own coefficient.
    """
    if not trainer._entropy_bonus_enabled:
        return spec.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    if normalizer is None:
        return trainer.entropy_coef
    # We divide the bonus by the normalizer. TRL takes its mean over the micro-batch. This line syncs with the
    # device, because a LossSpec needs numbers.
    tokens = mask.sum().clamp(min=1) * accumulated_micro_batches(trainer)
    return trainer.entropy_coef * float(normalizer / tokens)
