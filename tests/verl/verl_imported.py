"""verl with `grpo_kernels.integrations.verl` imported: names, originals, our losses in verl's functions."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_cases import LOSSES, Batch, Result, actor_config, theirs

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.models.transformers import monkey_patch
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module
from verl.workers.utils import losses as actor_losses

MODULE = "grpo_kernels.integrations.verl"
PREFIX = "grpo_kernels."

# verl before the import. `restore_verl` restores it, because later tests may need verl unchanged.
VERLS_LOSSES = dict(core_algos.POLICY_LOSS_REGISTRY)
VERLS_FUNCTION = torch_functional.FusedLinearForPPOFunction
VERLS_CROSS_ENTROPY = cross_entropy_module.linear_cross_entropy
VERLS_PPO_LOSS = actor_losses.ppo_loss
VERLS_PATCH = monkey_patch.patch_forward_with_backends

# The loss of verl that equals each preset, with verl's configuration.
TWINS = {
    "grpo": "vanilla",
    "bnpo": "vanilla",
    "dapo": "vanilla",
    "dr_grpo": "vanilla",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "gspo_token": "gspo",
    "sapo": "sapo",
    "reinforce": "gpg",
    "log_ratio": "gpg",  # without a reference; the values differ by a constant
    "gmpo": "geo_mean",
    "dro": "dro",
    "cispo": "cispo",
}
GLOBAL = {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 64, "loss_scale_factor": 50}


def verl_logps() -> ModuleType:
    """Return the module of the integration that computes log-probabilities."""
    return sys.modules[f"{MODULE}.logps"]


def restore_verl() -> None:
    """Undo what the import of the integration has changed in verl."""
    core_algos.POLICY_LOSS_REGISTRY.clear()
    core_algos.POLICY_LOSS_REGISTRY.update(VERLS_LOSSES)
    del sys.modules[MODULE]
    verl_logps().replace_in_verl(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    verl_logps().replace_in_verl(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    verl_logps().replace_in_verl(actor_losses, "ppo_loss", VERLS_PPO_LOSS)
    verl_logps().replace_in_verl(monkey_patch, "patch_forward_with_backends", VERLS_PATCH)


def ours_in_verl(name: str, twin: str, batch: Batch, mode: str, **options: Any) -> Result:
    """Compute a loss of ours from verl's registry, with the options of verl's loss `twin`."""
    entry = LOSSES[twin]
    return theirs(name, batch, mode, policy_loss=dict(entry.policy_loss), **{**entry.options, **options})


def jagged(rows: list[Tensor]) -> Tensor:
    """Return rows of several lengths as one nested tensor."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def actor_loss(
    name: str, twin: str, batch: Batch, mode: str, reference: bool = True, **options: Any
) -> Result:
    """Compute verl's `ppo_loss` of a batch without padding, as verl's engines pass it."""
    prompt, lengths = 2, [int(x.nonzero().max()) + 1 for x in batch.mask]
    leaf = batch.logits.clone().requires_grad_()

    def responses(x: Tensor) -> Tensor:
        return jagged([row[:length] for row, length in zip(x, lengths, strict=True)])

    def as_model_output(x: Tensor) -> Tensor:
        """Return each position's value one to the left of its token."""
        rows = [
            torch.cat([x.new_zeros(prompt - 1), row[:length], x.new_zeros(1)])
            for row, length in zip(x, lengths, strict=True)
        ]
        return jagged(rows)

    fields = {
        "prompts": jagged([torch.zeros(prompt, dtype=torch.int64) for _ in lengths]),
        "responses": responses(batch.ids),
        "response_mask": responses(batch.mask.long()),
        "old_log_probs": responses(batch.old_logps),
        "advantages": responses(batch.advantages),
        "rollout_is_weights": responses(batch.weights),
    }
    if reference:
        fields["ref_log_prob"] = responses(batch.ref_logps)
    info = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 24}
    data = tensordict_utils.get_tensordict(fields, info)
    log_p = torch.log_softmax(leaf, -1)
    output = {
        "log_probs": as_model_output(batch.logps(leaf)),
        "entropy": as_model_output(-(log_p.exp() * log_p).sum(-1)),
    }
    entry = LOSSES[twin]
    config = actor_config(
        name,
        loss_agg_mode=mode,
        loss_scale_factor=40,
        policy_loss=dict(entry.policy_loss),
        **{**entry.options, **options},
    )
    loss, metrics = actor_losses.ppo_loss(config, output, data)
    (grad,) = torch.autograd.grad(loss, leaf)
    values = {key: x.aggregate() if hasattr(x, "aggregate") else x for key, x in metrics.items()}
    return Result(loss.detach(), grad, values)
