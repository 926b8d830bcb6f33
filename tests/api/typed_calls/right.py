"""Calls that must pass a type checker. test_typing.py runs mypy on them and executes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import grpo_kernels.normalizers
import grpo_kernels.weights
from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    GRPOLoss,
    ImportanceRatio,
    LinearGRPOLoss,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    Reinforce,
    VocabShard,
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
from grpo_kernels.checks.choices import PresetName
from grpo_kernels.policy_loss import policy_loss as from_its_module

z, ref = torch.zeros(2, 3, 7, requires_grad=True), torch.zeros(2, 3, 7)
hidden, head = torch.zeros(2, 3, 4), nn.Linear(4, 7)
ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
rewards = torch.ones(2)
group: torch.distributed.ProcessGroup
shard = VocabShard(0, 7, torch.distributed.group.WORLD)

# Specs.
spec = LossSpec()
LossSpec(LogRatio(), KL("k3", beta=0.04), "token", "seq-mean-token-mean", entropy_coef=0.01)
LossSpec(PPOClip(0.2, 0.28, delta=4.0, dual_clip=3.0), level="sequence", log_ratio_clamp=20.0)
LossSpec(ImportanceRatio("ref", max_ratio=2.0), aggregation="seq-mean-token-sum-norm", max_tokens=1024)
LossSpec(None, kl=KL("exact", beta=1))
LossSpec(CISPO(5.0), KL("k1", straight_through=True, clamp=20.0, output_clamp=10.0, ratio_corrected=True))
for surrogate in (
    SAPO(),
    Reinforce(),
    DRO(0.1, anchor="ref"),
    DPPO("kl", low=0.1, ratio_cap=None),
    VESPO(),
    GMPO(),
):
    LossSpec(surrogate)


def custom(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None, advantages: Tensor, mask: Tensor
) -> Tensor:
    return -advantages * logps


LossSpec(custom)
LossSpec(lambda logps, old_logps, ref_logps, advantages, mask: -advantages * logps)
assert_type(LossSpec.preset("dapo", eps_high=0.28, kl=KL("k3", beta=0.04)), LossSpec)
LossSpec.preset("dr_grpo", max_tokens=1024)
LossSpec.preset("dppo_tv", kind="kl", low=0.1, high=0.2, ratio_cap=20.0)
LossSpec.preset("opmd", beta=0.2, anchor="old")
name: PresetName = "gspo"
LossSpec.preset(name)

# Losses.
out = grpo_loss(z, ids, rewards)
assert_type(out, LossOutput)
out.metrics["kl_exact"].item()
loss, metrics, logps, ref_logps, entropy = out
grpo_loss(
    z,
    ids,
    rewards,
    spec="gspo",
    completion_mask=mask,
    seq_lens=None,
    ref_logits=ref,
    old_logps=out.logps,
    token_weights=mask,
    temperature=torch.ones(2),
    logit_scale=0.5,
    logit_softcap=30.0,
    ref_logit_scale=1,
    ref_logit_softcap=None,
    vocab_size=7,
    normalizer=mask.sum(),
    prompt_ids=torch.zeros(2, dtype=torch.long),
    return_entropy=True,
    inplace=True,
    shard=shard,
    backend="torch",
)
log_ratio_loss(z, ref, ids, rewards, aggregation="token-sum", completion_mask=mask, inplace=True)
assert_type(linear_grpo_loss(hidden, head.weight, ids, rewards, lm_head_bias=head.bias), LossOutput)
linear_grpo_loss(
    hidden,
    head.weight,
    ids,
    rewards,
    spec=spec,
    ref_hidden=hidden,
    ref_lm_head_weight=head.weight,
    chunk_tokens=512,
    logits_dtype=torch.bfloat16,
    compact=False,
    skip_inactive=True,
)
assert_type(policy_loss(logps, rewards, spec="bnpo", entropy=entropy, backend="auto"), LossOutput)
from_its_module(logps, rewards)

# Modules.
loss_fn = GRPOLoss("dapo", temperature=0.9, inplace=True)
assert_type(loss_fn(z, ids, rewards, completion_mask=mask, ref_logits=ref), LossOutput)
assert_type(GRPOLoss()(z, ids, rewards, spec="bnpo"), LossOutput)
linear_loss_fn = LinearGRPOLoss(LossSpec(), chunk_tokens=128)
assert_type(linear_loss_fn(hidden, head.weight, ids, rewards, lm_head_bias=head.bias), LossOutput)
nn.Sequential(loss_fn)

# Log-probabilities: their type follows return_entropy.
selective_logps(z, ids).sum()
assert_type(selective_logps(z, ids, temperature=0.9, mask=mask, backend="torch"), Tensor)
assert_type(selective_logps(z, ids, return_entropy=False, vocab_size=7), Tensor)
assert_type(selective_logps(z, ids, return_entropy=True), tuple[Tensor, Tensor])
linear_logps(hidden, head.weight, ids).sum()
assert_type(linear_logps(hidden, head.weight, ids, lm_head_bias=head.bias, chunk_tokens=8), Tensor)
pair = linear_logps(hidden, head.weight, ids, return_entropy=True, logits_dtype=torch.bfloat16)
assert_type(pair, tuple[Tensor, Tensor])


def either(wanted: bool) -> None:
    assert_type(selective_logps(z, ids, return_entropy=wanted), Tensor | tuple[Tensor, Tensor])
    found = linear_logps(hidden, head.weight, ids, return_entropy=wanted)
    assert_type(found, Tensor | tuple[Tensor, Tensor])


# Helpers.
assert_type(group_advantages(rewards, group_size=2, scale="none", leave_one_out=True), Tensor)
group_advantages(rewards, group_size=2, scale="batch")
group_advantages(rewards, group_ids=rewards.long(), estimator="opo", lengths=mask.sum(1))
group_advantages(torch.ones(2, 3), group_size=2, estimator="gdpo", reward_weights=[1, 0.5, 2])
global_normalizer([mask, mask], aggregation="prompt-mean", prompt_ids=[rewards.long(), rewards.long()])
assert_type(global_normalizer([mask, mask], aggregation="seq-mean-token-mean", group=None), Tensor)
assert_type(importance_weights(logps, logps, mask, level="sequence", mode="mask", high=None), Tensor)
importance_weights(logps, logps, mask, level="geometric", low=0.5, seq_lens=ids[0], normalize=True)
assert_type(rejection_mask(logps, logps, mask, statistic="k3", over="sequence-mean", high=1), Tensor)
rejection_mask(logps, logps, mask, low=-0.5, high=None, seq_lens=None)
assert_type(mismatch_metrics(logps, logps, mask, weights=mask, level="sequence", high=2.0), dict[str, Tensor])
grpo_kernels.normalizers.global_normalizer(mask)
grpo_kernels.weights.importance_weights(logps, logps, mask)
