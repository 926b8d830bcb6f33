"""From rewards to advantages: each reward relative to the other completions of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks.choices import ADVANTAGE_SCALES, AdvantageScale
from .checks.scalars import check_choice, check_integer, check_number
from .checks.tensors import has_data


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: AdvantageScale = "std",
    eps: float = 1e-4,
    leave_one_out: bool = False,
) -> Tensor:
    """`(r - mean_group) / (std_group + eps)` (GRPO, arXiv:2402.03300).

    Args:
        rewards: `[B]`, of any real dtype, integers and bools included.
        group_size: consecutive completions that share a prompt; divides `B`. Or
        group_ids: `[B]` integers: completions with equal ids share a prompt. One of the two.
        scale: "std" divides by the group's standard deviation (with Bessel's correction) plus `eps`; "none"
            only centres (Dr. GRPO, arXiv:2503.20783).
        leave_one_out: compare each reward with the mean of the others of its group (RLOO, arXiv:2402.14740).

    Returns:
        `[B]` in the dtype of `rewards`, or in fp32 if that dtype is not floating point; computed in fp64.
        Exactly 0 if all rewards of a group are equal, as in a group of one.

    Raises:
        ValueError: a wrong shape, dtype, device, group size or scale; TypeError: a wrong type.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    if rewards.dim() != 1 or rewards.dtype.is_complex:
        got = f"{rewards.dtype} of shape {tuple(rewards.shape)}"
        raise ValueError(f"rewards must be [B] of a real dtype, got {got}")
    check_choice("scale", scale, ADVANTAGE_SCALES)
    eps = check_number("eps", eps)
    groups, count = _groups(rewards, group_size, group_ids)
    # In fp32 the mean of rewards far from zero is off by their rounding, and squares are 0 or inf.
    values = rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)

    def group_sum(x: Tensor) -> Tensor:
        return x.new_zeros(count).index_add(0, groups, x)[groups]

    def group_extreme(which: str) -> Tensor:
        return values.new_zeros(count).scatter_reduce(0, groups, values, which, include_self=False)[groups]

    size = group_sum(torch.ones_like(values))
    centred = values - group_sum(values) / size
    # The spread is that of the rewards: leaving one out scales the advantage and not the unit it is measured
    # in.
    std = (group_sum(centred.square()) / (size - 1).clamp(min=1)).sqrt()
    if leave_one_out:
        centred = centred * size / (size - 1).clamp(min=1)
    advantages = centred / (std + eps) if scale == "std" else centred
    # Equal rewards teach nothing. Their mean may round, and what that leaves over the tiny spread must not
    # count.
    undecided = group_extreme("amax") == group_extreme("amin")
    dtype = rewards.dtype if rewards.dtype.is_floating_point else torch.float32
    return torch.where(undecided, 0.0, advantages).to(dtype)


def _groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> tuple[Tensor, int]:
    """The number of each reward's group, `[B]`, and how many groups there are."""
    if (group_size is None) == (group_ids is None):
        raise ValueError("give one of group_size and group_ids")
    if group_size is not None:
        group_size = check_integer("group_size", group_size)
        if rewards.numel() % group_size:
            raise ValueError(f"group_size must divide the {rewards.numel()} rewards, got {group_size}")
        return torch.arange(
            rewards.numel(), device=rewards.device
        ) // group_size, rewards.numel() // group_size
    if not isinstance(group_ids, Tensor):
        raise TypeError(f"group_ids must be a tensor, got {type(group_ids).__name__}")
    if group_ids.device != rewards.device:
        raise ValueError(f"group_ids is on {group_ids.device}, rewards on {rewards.device}")
    if group_ids.shape != rewards.shape or group_ids.dtype.is_floating_point:
        got = f"{group_ids.dtype} of shape {tuple(group_ids.shape)}"
        raise ValueError(f"group_ids must be integers of shape {tuple(rewards.shape)}, got {got}")
    if not has_data(group_ids):
        # The number of groups depends on values. There are at most B, and no shape depends on it.
        return group_ids.to(torch.int64), rewards.numel()
    unique, groups = torch.unique(group_ids, return_inverse=True)
    return groups, unique.numel()
