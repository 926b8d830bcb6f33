"""ms-swift 4.6: `fuse_swift_loss` computes GRPO's loss from hidden states, in the place of Liger's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..linear_losses import linear_grpo_loss
from ..logps import linear_logps
from ..spec import KL, LossSpec
from ..spec.surrogates import SAPO, PPOClip
from .logit_rule import LogitRule, is_linear, wrapped_layer
from .swift import grpo_trainer

ARGUMENTS = {"advantages": "advantages", "completion_mask": "attention_mask", "lm_head_bias": "bias"}
ARGUMENTS |= {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps"}
ARGUMENTS |= {"token_weights": "vllm_is_ratio"}
MEANS = {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}
MEANS |= {"bnpo": "token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


def fuse_swift_loss() -> None:
    """Let the GRPOTrainers that ms-swift makes from now on use `linear_grpo_loss`, in a plugin.

    The log-probabilities of the old policy and the reference come from `linear_logps`.
    Their constructor raises ValueError for options that this loss does not support.
    """
    grpo_trainer.GRPOTrainer._prepare_liger_loss = prepare


def prepare(trainer: Any) -> None:
    """Replace what ms-swift calls to compute log-probabilities, and its loss from hidden states."""
    spec = spec_of(trainer)

    def loss(_input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, **given: Any) -> Any:
        options = {ours: given[theirs] for ours, theirs in ARGUMENTS.items()}
        options |= logit_options(trainer, trainer.accelerator.unwrap_model(trainer.model))
        out = linear_grpo_loss(_input, lin_weight, selected_token_ids, spec=spec, **options)
        not_clipped = torch.full_like(out.loss.detach(), torch.nan)  # SAPO has no clip range
        return out.loss, [out.metrics.get("kl"), out.metrics.get("clip_fraction", not_clipped)]

    trainer.use_liger_loss, trainer.liger_grpo_loss = True, loss
    trainer._forward_redirection = grpo_trainer._ForwardRedirection()
    trainer.compute_liger_loss = partial(compute_loss, trainer, trainer.compute_liger_loss)
    trainer._get_logps_via_local_forward = partial(compute_logps, trainer)


def compute_loss(trainer: Any, stock: Callable[..., Tensor], model: Any, inputs: Any, batch: Any) -> Tensor:
    """Call ms-swift's `compute_liger_loss`, which calls `loss` above.

    It runs in the autocast of the model's own forward. A KL in the reward is logged with the reward only.
    """
    if batch.teacher_per_token_logps is not None:
        raise ValueError("fuse_swift_loss does not support a teacher (the column teacher_prompt)")
    beta, trainer.beta = trainer.beta, beta_of_loss(trainer)
    try:
        with trainer.accelerator.autocast():
            return stock(model, inputs, batch)
    finally:
        trainer.beta = beta


def compute_logps(
    trainer: Any, model: Any, inputs: Any, length: int, ids: Tensor, compute_entropy: bool = False
) -> tuple[Tensor, None]:
    """Compute the log-probabilities of the old policy or the reference, which round as those of the loss."""
    inner = trainer.accelerator.unwrap_model(model)

    def logps(*_: Any, **__: Any) -> Tensor:
        with trainer.accelerator.autocast():
            hidden, head = trainer._get_last_hidden_state(inner, inputs, length), inner.lm_head
            options = {"lm_head_bias": head.bias, **logit_options(trainer, inner)}
            return linear_logps(hidden, head.weight, ids[:, -length:], **options)

    return trainer._forward_redirection(model, inner, logps, **inputs), None


def logit_options(trainer: Any, model: Any) -> dict[str, Any]:
    rule = LogitRule.of(model.config)
    return {"temperature": trainer.temperature, "logit_scale": rule.scale, "logit_softcap": rule.softcap}


def beta_of_loss(trainer: Any) -> float:
    return 0.0 if trainer.kl_in_reward else trainer.beta


def spec_of(trainer: Any) -> LossSpec:
    kind, beta = trainer.loss_type, beta_of_loss(trainer)
    head = getattr(trainer.accelerator.unwrap_model(trainer.model), "lm_head", None)
    unsupported = {
        f"loss_type={kind}": kind not in MEANS,
        f"advantage_estimator={trainer.advantage_estimator}": trainer.advantage_estimator != "grpo",
        "overlong_filter": trainer.overlong_filter,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "log_entropy": trainer.args.log_entropy,
        "log_rollout_offpolicy_metrics": trainer.log_rollout_offpolicy_metrics,
        "off_policy_sequence_mask_delta": trainer.off_policy_sequence_mask_delta is not None,
        # `_has_teacher` is true without a teacher, because a batch may bring one.
        "a teacher": trainer._has_teacher_explicit()
        or trainer.sdar_loss_coef > 0
        or trainer.advantage_reweight == "rlsd",
        "padding_free": trainer.template.padding_free,
        "sequence_parallel_size": trainer.template.sequence_parallel_size > 1,
        "rollout_importance_sampling_mode with beta": beta and trainer.rollout_importance_sampling_mode,
        f"an lm_head of {type(head)}": not is_linear(wrapped_layer(head)),
    }
    if found := [name for name, value in unsupported.items() if value]:
        raise ValueError(f"fuse_swift_loss does not support {', '.join(found)}")
    clip = PPOClip(trainer.epsilon_low, trainer.epsilon_high, delta=trainer.args.delta)
    surrogate = SAPO(trainer.tau_pos, trainer.tau_neg) if kind == "sapo" else clip
    kl = KL("k3", beta=beta, clamp=20.0, output_clamp=10.0) if beta else None
    options: Any = {"level": trainer.importance_sampling_level.replace("_", "-"), "aggregation": MEANS[kind]}
    return LossSpec(surrogate, kl, max_tokens=trainer.max_completion_length, **options)
