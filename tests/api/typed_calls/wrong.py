"""Calls that a type checker must refuse, each with the code of the error that test_typing.py expects."""

from __future__ import annotations

import torch

from grpo_kernels import (
    DPPO,
    DRO,
    KL,
    GRPOLoss,
    ImportanceRatio,
    LinearGRPOLoss,
    LossSpec,
    PPOClip,
    global_normalizer,
    group_advantages,
    grpo_loss,
    importance_weights,
    linear_grpo_loss,
    linear_logps,
    log_ratio_loss,
    mismatch_metrics,
    policy_loss,
    rejection_mask,
    selective_logps,
)

z = torch.zeros(2, 3, 7)
hidden, weight = torch.zeros(2, 3, 4), torch.zeros(7, 4)
ids, rewards, logps = torch.zeros(2, 3).long(), torch.ones(2), torch.zeros(2, 3)
loss_fn, linear_loss_fn = GRPOLoss(), LinearGRPOLoss()

# Misspelt names.
grpo_loss(z, ids, rewards, spec="dappo")  # error: arg-type
linear_grpo_loss(hidden, weight, ids, rewards, spec="dappo")  # error: arg-type
policy_loss(logps, rewards, spec="dappo")  # error: arg-type
GRPOLoss("dappo")  # error: arg-type
LinearGRPOLoss("dappo")  # error: arg-type
loss_fn(z, ids, rewards, spec="dappo")  # error: arg-type
LossSpec.preset("dappo")  # error: arg-type
KL("kk3")  # error: arg-type
KL(kind="k5")  # error: arg-type
LossSpec(level="sequences")  # error: arg-type
LossSpec(aggregation="mean")  # error: arg-type
LossSpec.preset("dapo", aggregation="mean")  # error: arg-type
LossSpec.preset("dapo", level="sequences")  # error: arg-type
LossSpec.preset("dppo_tv", kind="js")  # error: arg-type
ImportanceRatio("new")  # error: arg-type
ImportanceRatio(None)  # error: arg-type
DRO(0.1, anchor="new")  # error: arg-type
DPPO("js")  # error: arg-type
log_ratio_loss(z, z, ids, rewards, aggregation="mean")  # error: arg-type
global_normalizer(logps, aggregation="mean")  # error: arg-type
group_advantages(rewards, scale="standard")  # error: arg-type
group_advantages(rewards, estimator="gae")  # error: arg-type
grpo_loss(z, ids, rewards, prompt_ids=[0, 0])  # error: arg-type
importance_weights(logps, logps, logps, level="tokens")  # error: arg-type
importance_weights(logps, logps, logps, mode="clip")  # error: arg-type
rejection_mask(logps, logps, logps, statistic="k4")  # error: arg-type
rejection_mask(logps, logps, logps, over="sequence")  # error: arg-type
mismatch_metrics(logps, logps, logps, level="sequence-mean")  # error: arg-type
grpo_loss(z, ids, rewards, backend="cuda")  # error: arg-type
linear_grpo_loss(hidden, weight, ids, rewards, backend="cuda")  # error: arg-type
policy_loss(logps, rewards, backend="cuda")  # error: arg-type
GRPOLoss(backend="cuda")  # error: arg-type
selective_logps(z, ids, backend="cuda")  # error: call-overload
linear_logps(hidden, weight, ids, backend="cuda")  # error: call-overload

# Misspelt options.
LossSpec.preset("dapo", epsilon=0.2)  # error: call-arg
GRPOLoss("dapo", eps_high=0.3)  # error: call-arg
GRPOLoss(temprature=0.9)  # error: call-arg
GRPOLoss(lm_head_bias=None)  # error: call-arg
LinearGRPOLoss(inplace=True)  # error: call-arg
loss_fn(z, ids, rewards, maskk=logps)  # error: call-arg
linear_loss_fn(hidden, weight, ids, rewards, maskk=logps)  # error: call-arg
grpo_loss(z, ids, rewards, maskk=logps)  # error: call-arg
log_ratio_loss(z, z, ids, rewards, maskk=logps)  # error: call-arg
log_ratio_loss(z, z, ids, rewards, spec="dapo")  # error: call-arg
selective_logps(z, ids, maskk=logps)  # error: call-overload
linear_logps(hidden, weight, ids, maskk=logps)  # error: call-overload

# Wrong types.
loss_fn(z, ids, rewards, completion_mask="all")  # error: arg-type
GRPOLoss(temperature="0.9")  # error: arg-type
LossSpec.preset("dapo", eps_high="0.28")  # error: arg-type
LossSpec.preset("dapo", kl="k3")  # error: arg-type
LossSpec(PPOClip)  # error: arg-type
selective_logps(z, ids, return_entropy=True).sum()  # error: attr-defined
logps_and_entropy: tuple[torch.Tensor, torch.Tensor] = selective_logps(z, ids)  # error: assignment
