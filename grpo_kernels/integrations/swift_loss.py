"""ms-swift 4.6: `fuse_swift_loss` computes GRPO's loss from hidden states, in the place of Liger's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear_losses import linear_grpo_loss
from ..spec import KL, LossSpec
from ..spec.surrogates import SAPO, PPOClip
from .swift import grpo_trainer

ARGUMENTS = {"advantages": "advantages", "completion_mask": "attention_mask", "lm_head_bias": "bias"}
ARGUMENTS |= {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps"}
ARGUMENTS |= {"token_weights": "vllm_is_ratio"}
MEANS = {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}
MEANS |= {"bnpo": "token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


def fuse_swift_loss() -> None:
    """Let the GRPOTrainers that ms-swift makes from now on use `linear_grpo_loss`, in a plugin.

    Their constructor raises ValueError for options that this loss does not support.
    """
    grpo_trainer.GRPOTrainer._prepare_liger_loss = prepare


def prepare(trainer: Any) -> None:
    spec, temperature = spec_of(trainer), trainer.temperature

    def loss(_input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, **given: Any) -> Any:
        options = {ours: given[theirs] for ours, theirs in ARGUMENTS.items()} | {"temperature": temperature}
        out = linear_grpo_loss(_input, lin_weight, selected_token_ids, spec=spec, **options)
        not_clipped = torch.full_like(out.loss.detach(), torch.nan)  # SAPO has no clip range
        return out.loss, [out.metrics.get("kl"), out.metrics.get("clip_fraction", not_clipped)]

    trainer.use_liger_loss, trainer.liger_grpo_loss = True, loss
    trainer._forward_redirection = grpo_trainer._ForwardRedirection()


def spec_of(trainer: Any) -> LossSpec:
    kind, beta = trainer.loss_type, 0.0 if trainer.kl_in_reward else trainer.beta
    unsupported = {
        f"loss_type={kind}": kind not in MEANS,
        "overlong_filter": trainer.overlong_filter,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "log_entropy": trainer.args.log_entropy,
        "off_policy_sequence_mask_delta": trainer.off_policy_sequence_mask_delta is not None,
        "a teacher": trainer._has_teacher
        or trainer.sdar_loss_coef > 0
        or trainer.advantage_reweight == "rlsd",
        "padding_free": trainer.template.padding_free,
        "sequence_parallel_size": trainer.template.sequence_parallel_size > 1,
        "rollout_importance_sampling_mode with beta": beta and trainer.rollout_importance_sampling_mode,
    }
    if found := [name for name, value in unsupported.items() if value]:
        raise ValueError(f"fuse_swift_loss does not support {', '.join(found)}")
    clip = PPOClip(trainer.epsilon_low, trainer.epsilon_high, delta=trainer.args.delta)
    surrogate = SAPO(trainer.tau_pos, trainer.tau_neg) if kind == "sapo" else clip
    kl = KL("k3", beta=beta, clamp=20.0, output_clamp=10.0) if beta else None
    options: Any = {"level": trainer.importance_sampling_level.replace("_", "-"), "aggregation": MEANS[kind]}
    return LossSpec(surrogate, kl, max_tokens=trainer.max_completion_length, **options)
