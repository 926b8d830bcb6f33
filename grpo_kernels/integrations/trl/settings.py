"""Maps TRL's settings and batches to a `LossSpec` and the other arguments of `linear_grpo_loss`.

Every function takes the trainer, because TRL keeps some settings as its attributes and others in its `args`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...checks.choices import Aggregation
from ...spec import KL, LossSpec
from ...spec.surrogates import CISPO, SAPO, VESPO, PPOClip
from .normalizer import entropy_coef, trl_normalizer

AGGREGATION: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
    "cispo": "token-mean",
    "dapo": "token-mean",
    "vespo": "token-mean",
}
"""The aggregation of each `loss_type`."""


def spec_of_settings(trainer: Any) -> LossSpec:
    """Return the loss that the trainer's `args` ask for, without its entropy bonus.

    Raises:
        ValueError: no LossSpec describes this loss.
    """
    if trainer.loss_type not in AGGREGATION:
        raise ValueError(f"loss_type={trainer.loss_type!r} is none of {', '.join(AGGREGATION)}")
    kl = None
    if trainer.beta:
        kl = KL("k3", beta=trainer.beta, ratio_corrected=trainer.args.use_bias_correction_kl)
    level = trainer.importance_sampling_level
    if trainer.loss_type == "vespo":
        if level == "sequence" and kl is not None and kl.ratio_corrected:
            raise ValueError("VESPO's KL term would be corrected by the ratio of the sequence")
        level = "token"  # TRL weights whole sequences at either level
    return LossSpec(
        surrogate_of_settings(trainer),
        kl,
        level=level,
        aggregation=AGGREGATION[trainer.loss_type],
        max_tokens=trainer.max_completion_length if trainer.loss_type == "dr_grpo" else None,
    )


def surrogate_of_settings(trainer: Any) -> PPOClip | CISPO | SAPO | VESPO:
    """Return the surrogate of the trainer's `loss_type`, with TRL's bounds."""
    args = trainer.args
    match trainer.loss_type:
        case "cispo":
            # TRL's epsilon_high is the bound itself here, not an offset from 1.
            return CISPO(ratio_max=trainer.epsilon_high, ratio_min=0.0)
        case "sapo":
            return SAPO(tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg)
        case "vespo":
            return VESPO(
                k_pos=args.vespo_k_pos,
                lambda_pos=args.vespo_lambda_pos,
                k_neg=args.vespo_k_neg,
                lambda_neg=args.vespo_lambda_neg,
            )
        case _:
            return PPOClip(eps_low=trainer.epsilon_low, eps_high=trainer.epsilon_high, delta=args.delta)


def loss_arguments(trainer: Any, spec: LossSpec, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `linear_grpo_loss` for the batch `inputs` of TRL's `_compute_loss`."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    normalizer = trl_normalizer(trainer, spec, inputs)
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    weighted = corrected or trainer.loss_type == "vespo"
    return {
        "spec": replace(spec, entropy_coef=entropy_coef(trainer, spec, mask, normalizer)),
        "completion_mask": mask,
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs["ref_per_token_logps"] if trainer.beta else None,
        "token_weights": inputs.get("importance_sampling_ratio") if weighted else None,
        "normalizer": normalizer,
    }
