"""From rewards to advantages: each reward relative to the other completions of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import check_choice, check_number


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "std",
    eps: float = 1e-4,
    leave_one_out: bool = False,
) -> Tensor:
    """`(r - mean_group) / (std_group + eps)` (GRPO, arXiv:2402.03300).

    Args:
        rewards: `[B]`, floating point.
        group_size: consecutive completions that share a prompt; divides `B`. Or
        group_ids: `[B]` integers: completions with equal ids share a prompt. One of the two.
        scale: "std" divides by the group's standard deviation (with Bessel's correction) plus `eps`; "none"
            only centres (Dr. GRPO, arXiv:2503.20783).
        leave_one_out: compare each reward with the mean of the others of its group (RLOO, arXiv:2402.14740).

    Returns:
        `[B]` in the dtype of `rewards`. A group of one has advantage 0.

    Raises:
        ValueError: a wrong shape, dtype, group size or scale; TypeError: rewards that are no tensor.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    if rewards.dim() != 1 or not rewards.dtype.is_floating_point:
        raise ValueError(
            f"rewards must be [B] floating point, got {rewards.dtype} of shape {tuple(rewards.shape)}"
        )
    check_choice("scale", scale, ("std", "none"))
    check_number("eps", eps)
    if (group_size is None) == (group_ids is None):
        raise ValueError("give one of group_size and group_ids")
    if group_size is not None:
        if group_size < 1 or rewards.numel() % group_size:
            raise ValueError(f"group_size must divide the {rewards.numel()} rewards, got {group_size}")
        groups = torch.arange(rewards.numel(), device=rewards.device) // group_size
        count = rewards.numel() // group_size
    else:
        assert group_ids is not None
        if group_ids.shape != rewards.shape:
            raise ValueError(
                f"group_ids must have shape {tuple(rewards.shape)}, got {tuple(group_ids.shape)}"
            )
        unique, groups = torch.unique(group_ids, return_inverse=True)
        count = unique.numel()

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add(0, groups, values)[groups]

    size = group_sum(torch.ones_like(rewards))
    centred = rewards - group_sum(rewards) / size
    # The sum of squares before leave-one-out: its factor is part of the advantage, not of the spread.
    std = (group_sum(centred.square()) / (size - 1).clamp(min=1)).sqrt()
    if leave_one_out:
        centred = centred * size / (size - 1).clamp(min=1)
    centred = torch.where(size > 1, centred, 0.0)
    return centred / (std + eps) if scale == "std" else centred
