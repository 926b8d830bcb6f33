"""Replaces verl's fused kernels with `linear_logps`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module

from ...logps import linear_logps
from ...vocab.shard import VocabShard
from .engine import current_call, find_engines
from .heads import FIX, LogitRule, current_head, patch_forward_with_backends

IGNORED_LABEL = -100


def fuse_verl_logps() -> None:
    """Replace verl's own fused kernels, its backends "torch" and "triton", with `linear_logps`.

    verl calls them if `actor_rollout_ref.model.use_fused_kernels=True`. The backend "liger" stays Liger's.
    Models that verl patches after this call also get the bias, scale and softcap of their logits.

    Examples:
        >>> from grpo_kernels.integrations.verl import fuse_verl_logps  # the import alone calls it once
        >>> fuse_verl_logps()
        >>> from verl.utils.kernel import linear_cross_entropy
        >>> linear_cross_entropy.linear_cross_entropy.__module__
        'grpo_kernels.integrations.verl.logps'
    """
    replace_in_verl(monkey_patch, "patch_forward_with_backends", patch_forward_with_backends)
    replace_in_verl(torch_functional, "FusedLinearForPPOFunction", FusedLinearForPPOFunction)
    replace_in_verl(cross_entropy_module, "linear_cross_entropy", linear_cross_entropy)


class FusedLinearForPPOFunction:
    """Replaces verl's autograd function of this name, which its class `FusedLinearForPPO` applies."""

    @staticmethod
    def apply(
        hidden_states: Tensor,  # [B, T, H] or [N, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [B, T] or [N]
        temperature: float | Tensor = 1.0,
        chunk_size: int = 512,  # an option of verl's own implementation, ignored
    ) -> tuple[Tensor, Tensor | None]:
        """Return fp32 log-probabilities, and entropies in the dtype of `hidden_states`.

        Both have the shape of `input_ids`.
        """
        logps, entropy = logps_and_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logps, None if entropy is None else entropy.to(hidden_states.dtype)


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H], or this rank's rows of it
    labels: Tensor,  # [...]
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log-probabilities and entropies, both `[N]` fp32. Replaces verl's function of this name."""
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be 'none', the only value that verl uses, got {reduction!r}")
    if dist_process_group is not None:
        check_megatron_logits()
    shard = None
    if dist_process_group is not None and dist_process_group.size() > 1:
        start = dist_process_group.rank() * weight.shape[0]
        stop, whole = start + weight.shape[0], not is_summed_over_ranks(hidden)
        shard = VocabShard(start, stop, dist_process_group, sum_dhidden=whole)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return logps_and_entropy(rows, weight, labels.reshape(-1), temperature, shard)


def is_summed_over_ranks(hidden: Tensor) -> bool:
    """Return whether the backward sums the gradient of `hidden` over the tensor-parallel ranks.

    Megatron's sequence parallelism gathers the hidden states before the head. Its backward reduce-scatters
    their gradient and expects each rank's part of the sum. Without sequence parallelism, Megatron expects the
    whole gradient on every rank.
    """
    mappings: Any = sys.modules.get("megatron.core.tensor_parallel.mappings")
    if mappings is None:
        return False
    return isinstance(hidden.grad_fn, mappings._GatherFromSequenceParallelRegion._backward_cls)


def logps_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply `linear_logps` to the running model's head. The entropy is None if the engine does not use it."""
    head, call = current_head(), current_call.get()
    if isinstance(temperature, Tensor) and temperature.numel() == 1:
        temperature = temperature.reshape(())
    found = linear_logps(
        hidden,
        weight,
        labels,
        lm_head_bias=head.bias,
        temperature=temperature,
        logit_scale=head.rule.scale,
        logit_softcap=head.rule.softcap,
        mask=labels != IGNORED_LABEL,
        return_entropy=call is None or call.entropy,
        shard=shard,
    )
    # A model returns these tensors. They must not be views, because an in-place operation on a view would
    # remove FSDP2's hook from it.
    if isinstance(found, tuple):
        return found[0].clone(), found[1].clone()
    return found.clone(), None


def check_megatron_logits() -> None:
    """Raise ValueError for a config with a scale or softcap, which verl's forward for Megatron ignores."""
    call = current_call.get()
    if call is None:
        # The engine's calls are not recorded yet. Its next batch is checked.
        find_engines()
    elif call.config is not None and (rule := LogitRule.of(call.config)) != LogitRule():
        raise ValueError(
            f"verl's fused kernels would be wrong for {call.config.model_type} under Megatron: the config "
            f"describes {rule} after the head, and verl's fused forward does not apply it. {FIX}"
        )


def replace_in_verl(home: ModuleType, name: str, ours: Any) -> None:
    """Replace `home.name`, also in all modules of verl that have imported it by name."""
    theirs = getattr(home, name)
    for key, module in list(sys.modules.items()):
        if key.startswith("verl.") and vars(module).get(name) is theirs:
            setattr(module, name, ours)
