"""The reasons why `FusedGRPOTrainer` leaves the loss to TRL, and the settings that it rejects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...spec import LossSpec
from .head import GRPOTrainer

LOSS_OPTIONS = ("chunk_tokens", "logits_dtype", "compact", "backend")


def refuse_data_parallel(model: Any) -> None:
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "FusedGRPOTrainer does not support nn.DataParallel, whose replicas would all call the forward of "
            "one model. Start the script with `accelerate launch` or `torchrun`, or make a single GPU "
            "visible with CUDA_VISIBLE_DEVICES"
        )


def refuse_unknown_options(options: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(LOSS_OPTIONS))
    if unknown:
        raise ValueError(f"loss_options takes {', '.join(LOSS_OPTIONS)}, got {unknown}")


def find_override(cls: type, method: str, *, start: type, ours: type) -> str | None:
    """Name the first class from `start` on that overrides a method of TRL, as "Class.method".

    The search follows the method resolution order of `cls` and ends before GRPOTrainer. It skips `ours`, the
    class FusedGRPOTrainer. Returns None if no class overrides the method.
    """
    order = cls.__mro__
    for other in order[order.index(start) : order.index(GRPOTrainer)]:
        if other is not ours and method in vars(other):
            return f"{other.__name__}.{method}"
    return None


def check_settings(trainer: Any, *, own_spec: bool) -> None:
    """Raise ValueError if TRL's settings need a loss that our forward cannot compute.

    Args:
        trainer: a `FusedGRPOTrainer`.
        own_spec: whether the loss is that of an overridden `loss_spec()`.
    """
    for name, unset in (("top_entropy_quantile", 1.0), ("off_policy_mask_threshold", None)):
        value = getattr(trainer, name)
        if value != unset:
            raise ValueError(
                f"{name}={value} weighs tokens by entropies or log-probabilities, which are known only "
                "after the forward"
            )
    if (
        trainer.loss_type == "vespo"
        and not own_spec
        and trainer.get_gamma_weights is not GRPOTrainer.get_gamma_weights
    ):
        raise ValueError("get_gamma_weights is overridden")


def check_spec(spec: Any, *, beta: float) -> LossSpec:
    """Return `spec` if TRL computes all that it needs.

    Args:
        spec: what `loss_spec()` returned.
        beta: TRL's `beta`. TRL runs its reference only if it is not 0.

    Raises:
        TypeError: `spec` is not a LossSpec.
        ValueError: `spec` needs the reference's logits, its log-probabilities while `beta` is 0, or the ids
            of prompts.
    """
    if not isinstance(spec, LossSpec):
        raise TypeError(f"loss_spec() must return a LossSpec, got {spec!r}")
    if spec.exact_kl is not None:
        raise ValueError(
            f"{spec.exact_kl} runs over the vocabulary: TRL provides only log-probabilities of the reference"
        )
    if spec.aggregation == "prompt-mean":
        raise ValueError(
            f"aggregation {spec.aggregation!r} needs the prompt of each completion, which TRL's batches lack"
        )
    if not beta and (spec.anchored_to_reference or spec.sampled_kl is not None):
        raise ValueError(f"{spec} needs a reference, which TRL runs only if beta is not 0, got beta={beta}")
    return spec
