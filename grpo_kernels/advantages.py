"""Turns rewards into advantages: each reward is compared with the other completions of its prompt."""

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
    """Compute the advantages of groups of completions: `(r - mean_group) / (std_group + eps)`.

    Source: GRPO, arXiv:2402.03300. Pass either `group_size` or `group_ids`.

    Args:
        rewards: `[B]`, of any real dtype, including integers and bools.
        group_size: the number of consecutive completions that share a prompt. It must divide `B`.
        group_ids: `[B]` integers. Completions with equal ids share a prompt.
        scale: "std" divides by the group's standard deviation (with Bessel's correction) plus `eps`. "none"
            only subtracts the mean (Dr. GRPO, arXiv:2503.20783).
        eps: added to the standard deviation, in the unit of the rewards.
        leave_one_out: compare each reward with the mean of the other rewards of its group (RLOO,
            arXiv:2402.14740).

    Returns:
        `[B]` in the dtype of `rewards`, or in fp32 if that dtype is not floating point. Computed in fp64
        (fp32 on MPS).
        Exactly 0 if all rewards of a group are equal, for example in a group of one.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        TypeError: an argument has a wrong type.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    if rewards.dim() != 1 or rewards.dtype.is_complex:
        got = f"{rewards.dtype} of shape {tuple(rewards.shape)}"
        raise ValueError(f"rewards must be [B] of a real dtype, got {got}")
    check_choice("scale", scale, ADVANTAGE_SCALES)
    eps = check_number("eps", eps)
    groups, count = _groups(rewards, group_size, group_ids)
    # In fp32, the mean of rewards far from 0 would be inaccurate, and squares could underflow or overflow.
    values = rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)

    def group_sum(x: Tensor) -> Tensor:
        return x.new_zeros(count).index_add(0, groups, x)[groups]

    def group_extreme(which: str) -> Tensor:
        return values.new_zeros(count).scatter_reduce(0, groups, values, which, include_self=False)[groups]

    size = group_sum(torch.ones_like(values))
    centred = values - group_sum(values) / size
    # The standard deviation is that of the rewards. `leave_one_out` scales only the advantage.
    std = (group_sum(centred.square()) / (size - 1).clamp(min=1)).sqrt()
    if leave_one_out:
        centred = centred * size / (size - 1).clamp(min=1)
    advantages = centred / (std + eps) if scale == "std" else centred
    # The mean of equal rewards may be rounded. This rounding error divided by its own tiny standard deviation
    # would be a large advantage.
    equal = group_extreme("amax") == group_extreme("amin")
    dtype = rewards.dtype if rewards.dtype.is_floating_point else torch.float32
    return torch.where(equal, 0.0, advantages).to(dtype)


def _groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> tuple[Tensor, int]:
    """Return the index of each reward's group, `[B]`, and the number of groups."""
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
        # The number of groups depends on values, which a tensor without data does not have. There are at most
        # B groups, and no shape depends on their number.
        return group_ids.to(torch.int64), rewards.numel()
    unique, groups = torch.unique(group_ids, return_inverse=True)
    return groups, unique.numel()
