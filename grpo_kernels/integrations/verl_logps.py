"""`linear_logps` in the place of verl's fused kernels."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module

from ..distributed import VocabShard
from ..logps import linear_logps

IGNORED_LABEL = -100


def fuse_verl_logps() -> None:
    """Puts `linear_logps` in the place of verl's own fused kernels: its backends "torch" and "triton".

    They run where `actor_rollout_ref.model.use_fused_kernels=True`. The backend "liger" stays Liger's.
    """
    replace_in_verl(torch_functional, "FusedLinearForPPOFunction", FusedLinearForPPOFunction)
    replace_in_verl(cross_entropy_module, "linear_cross_entropy", linear_cross_entropy)


class FusedLinearForPPOFunction:
    """In the place of verl's autograd function of this name, which its class `FusedLinearForPPO` applies."""

    @staticmethod
    def apply(
        hidden_states: Tensor,  # [B, T, H] or [N, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [B, T] or [N]
        temperature: float | Tensor = 1.0,
        chunk_size: int = 512,  # of verl's implementation
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities in fp32, entropies in the dtype of the hidden states; shaped as `input_ids`."""
        logps, entropy = logps_and_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logps, entropy.to(hidden_states.dtype)


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H], with a group this rank's rows of it
    labels: Tensor,  # [...]
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """In the place of verl's function of this name: log-probabilities and entropies `[N]`, both fp32."""
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be 'none', the only one that verl uses, got {reduction!r}")
    shard = None
    if dist_process_group is not None and dist_process_group.size() > 1:
        start = dist_process_group.rank() * weight.shape[0]
        stop, whole = start + weight.shape[0], not is_summed_over_ranks(hidden)
        shard = VocabShard(start, stop, dist_process_group, sum_dhidden=whole)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return logps_and_entropy(rows, weight, labels.reshape(-1), temperature, shard)


def is_summed_over_ranks(hidden: Tensor) -> bool:
    """Whether the backward of what made `hidden` sums its gradient over the tensor-parallel ranks.

    Megatron's sequence parallelism gathers the hidden states before the head and reduce-scatters their
    gradient, of which it expects each rank's part; without it, the whole on every rank.
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
) -> tuple[Tensor, Tensor]:
    if isinstance(temperature, Tensor) and temperature.numel() == 1:
        temperature = temperature.reshape(())
    found = linear_logps(
        hidden,
        weight,
        labels,
        temperature=temperature,
        mask=labels != IGNORED_LABEL,
        return_entropy=True,
        shard=shard,
    )
    assert isinstance(found, tuple)
    # As the outputs of a model they must not be views: FSDP2's hook on one would not survive an in-place
    # operation.
    logps, entropy = found
    return logps.clone(), entropy.clone()


def replace_in_verl(home: ModuleType, name: str, ours: Any) -> None:
    """Replaces `home.name`, there and wherever verl has imported it by name already."""
    theirs = getattr(home, name)
    for key, module in list(sys.modules.items()):
        if key.startswith("verl.") and vars(module).get(name) is theirs:
            setattr(module, name, ours)
