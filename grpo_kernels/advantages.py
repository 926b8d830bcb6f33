"""Turns rewards into advantages: each reward is compared with the other completions of its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks.choices import ADVANTAGE_ESTIMATORS, ADVANTAGE_SCALES, AdvantageEstimator, AdvantageScale
from .checks.scalars import check_choice, check_flag, check_integer, check_number
from .checks.tensors import check_device, check_tensor
from .tokens.groups import group_extreme, group_sum, number_groups

# The estimators that take each option. The others compute without it.
TAKES: dict[str, tuple[AdvantageEstimator, ...]] = {
    "scale": ("grpo", "grpo_passk", "gdpo"),
    "leave_one_out": ("grpo", "reinforce_plus_plus_baseline", "gdpo"),
    "lengths": ("opo", "reinforce_plus_plus_baseline", "gdpo"),
    "reward_weights": ("gdpo",),
}
WHITENED: tuple[AdvantageEstimator, ...] = ("reinforce_plus_plus_baseline", "gdpo")


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: AdvantageScale = "std",
    eps: float = 1e-4,
    leave_one_out: bool = False,
    estimator: AdvantageEstimator = "grpo",
    lengths: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Compute the advantages of groups of completions: `(r - mean_group) / (std_group + eps)`.

    Source: GRPO, arXiv:2402.03300. Pass either `group_size` or `group_ids`. docs/advantages.md lists which
    call equals which option of a trainer. The other estimators, with `l` the lengths and `B` completions:

    | estimator | advantage | source |
    |---|---|---|
    | "opo" | `r - sum_group(l r) / sum_group(l)` | OPO, arXiv:2505.23585 |
    | "maxrl" | `(r - mean_group) / (mean_group + eps)`, for rewards >= 0 | MaxRL, arXiv:2602.02710 |
    | "gpg" | `(r - mean_group) B / (number of rewards that are not 0)` | verl 0.9.1, after arXiv:2504.02546 |
    | "grpo_passk" | the best: `(r - second best) / (std_group + eps)`; the others: 0 | arXiv:2503.19595 |
    | "reinforce_plus_plus_baseline" | `whiten(r - mean_group)` | REINFORCE++, arXiv:2501.03262 |
    | "gdpo" | `whiten(sum_k w_k (r_k - mean_group) / (std_group + eps))` | GDPO, arXiv:2601.05242 |

    `whiten(x)` is `(x - mean) / (std + eps)`. Without `lengths`, mean and standard deviation are those of the
    batch's completions, as in TRL. With `lengths`, they are those of its tokens, as in verl.

    Args:
        rewards: `[B]`, of any real dtype, including integers and bools. "gdpo": `[B, R]`, `R` rewards of each
            completion.
        group_size: the number of consecutive completions that share a prompt. It must divide `B`.
        group_ids: `[B]` integers. Completions with equal ids share a prompt.
        scale: "std" divides by the group's standard deviation (with Bessel's correction) plus `eps`. "batch"
            divides by the standard deviation of all `rewards` plus `eps` (arXiv:2508.08221, TRL's
            `scale_rewards="batch"`). "none" only subtracts the mean (Dr. GRPO, arXiv:2503.20783). For "grpo",
            "grpo_passk" and "gdpo". The other estimators have no such option.
        eps: added to each standard deviation, and to the mean in "maxrl", in the unit of the rewards.
        leave_one_out: compare each reward with the mean of the other rewards of its group (RLOO,
            arXiv:2402.14740). For "grpo", "reinforce_plus_plus_baseline" and "gdpo".
        estimator: "grpo", or one of the table above.
        lengths: `[B]`, integer or floating point: the number of unmasked tokens of each completion. "opo"
            needs it. "reinforce_plus_plus_baseline" and "gdpo" take it.
        reward_weights: for "gdpo": `[R]`, or a sequence of `R` numbers. None: 1 each.

    Returns:
        `[B]` in the dtype of `rewards`, or in fp32 if that dtype is not floating point. Computed in fp64
        (fp32 on MPS), without a device sync.
        Exactly 0 if all rewards of a group are equal, for example in a group of one. But with `lengths`, the
        mean over tokens that `whiten` subtracts is not 0, and neither are these advantages.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; `lengths` is missing; or the
            estimator does not take a given option.
        TypeError: an argument has a wrong type.

    An infinite or NaN reward makes the advantages of its group infinite or NaN, unless all rewards of the
    group are equal. With "batch" or `whiten`, the other groups may get NaN too.

    Examples:
        >>> import torch
        >>> from grpo_kernels import group_advantages
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])  # two prompts, two completions of each
        >>> group_advantages(rewards, group_size=2)
        tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
        >>> group_advantages(rewards, group_ids=torch.tensor([7, 3, 7, 3]), scale="none")
        tensor([ 0.0000, -0.5000,  0.0000,  0.5000])
    """
    check_choice("estimator", estimator, ADVANTAGE_ESTIMATORS)
    check_rewards(rewards, estimator)
    check_choice("scale", scale, ADVANTAGE_SCALES)
    check_flag("leave_one_out", leave_one_out)
    eps = check_number("eps", eps)
    given = {
        "scale": scale != "std",
        "leave_one_out": leave_one_out,
        "lengths": lengths is not None,
        "reward_weights": reward_weights is not None,
    }
    for name, takers in TAKES.items():
        if given[name] and estimator not in takers:
            raise ValueError(f"estimator {estimator!r} does not take {name}: {', '.join(takers)}")
    if estimator == "opo" and lengths is None:
        raise ValueError("estimator 'opo' needs lengths")
    groups = number_completions(rewards, group_size, group_ids)
    # In fp32, the mean of rewards far from 0 would be inaccurate, and squares could underflow or overflow.
    values = rewards.detach().to(torch.float32 if rewards.device.type == "mps" else torch.float64)
    if lengths is not None:
        lengths = check_lengths(lengths, rewards).to(values.dtype)
    how = How(estimator, scale, eps, leave_one_out, lengths)
    if estimator == "gdpo":
        weights = check_weights(reward_weights, rewards)
        advantages = values.new_zeros(values.shape[0])
        for column, weight in zip(values.unbind(1), weights):
            advantages = advantages + weight * compared(column, groups, how)
    else:
        advantages = compared(values, groups, how)
    if estimator in WHITENED:
        advantages = whitened(advantages, lengths, eps)
    return advantages.to(rewards.dtype if rewards.dtype.is_floating_point else torch.float32)


class How(NamedTuple):
    """The options of `group_advantages`."""

    estimator: AdvantageEstimator
    scale: AdvantageScale
    eps: float
    leave_one_out: bool
    lengths: Tensor | None  # [B], in the dtype of the arithmetic


def compared(rewards: Tensor, groups: Tensor, how: How) -> Tensor:
    """Compare each of `rewards` `[B]` with its group. Return the advantages `[B]` before `whitened`."""

    def total(x: Tensor) -> Tensor:
        return group_sum(x, groups)

    size = total(torch.ones_like(rewards))
    others = (size - 1).clamp(min=1)
    mean = total(rewards) / size
    centred = rewards - mean
    best = group_extreme(rewards, groups, "amax")
    if how.estimator == "opo":
        assert how.lengths is not None  # group_advantages requires it
        advantages = centred - total(how.lengths * centred) / total(how.lengths).clamp(min=1)
    elif how.estimator == "maxrl":
        advantages = centred / (mean + how.eps)
    elif how.estimator == "gpg":
        advantages = centred * rewards.shape[0] / rewards.count_nonzero().clamp(min=1)
    elif how.estimator == "grpo_passk":
        # If several are the best, the second best is equal to it, and the advantage is 0.
        alone = (rewards == best) & (total((rewards == best).to(rewards.dtype)) == 1)
        second = group_extreme(rewards.masked_fill(alone, -torch.inf), groups, "amax")
        # A NaN is not equal to the best, and an infinite one may be: the mean tells.
        advantages = torch.where(alone, best - second, 0.0) + (mean - mean)
    else:
        advantages = centred * size / others if how.leave_one_out else centred
    if how.estimator in TAKES["scale"] and how.scale != "none":
        # The standard deviation is that of the rewards. `leave_one_out` scales only the advantage.
        if how.scale == "std":
            variance = total(centred.square()) / others
        else:
            variance = (rewards - rewards.mean()).square().sum() / max(rewards.shape[0] - 1, 1)
        advantages = advantages / (variance.sqrt() + how.eps)
    # The mean of equal rewards may be rounded. This rounding error divided by its own tiny standard deviation
    # would be a large advantage.
    return torch.where(best == group_extreme(rewards, groups, "amin"), 0.0, advantages)


def whitened(advantages: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    """Return `(x - mean) / (std + eps)` over the batch's completions, or with `lengths` over its tokens."""
    weights = torch.ones_like(advantages) if lengths is None else lengths
    count = weights.sum()
    if lengths is not None:
        advantages = advantages - (lengths * advantages).sum() / count.clamp(min=1)
    # Without lengths the mean is 0, as it is in every group. Subtracting its rounding error would move the
    # zeros of groups with equal rewards.
    variance = (weights * advantages.square()).sum() / (count - 1).clamp(min=1)
    return torch.where(advantages == 0, 0.0, advantages / (variance.sqrt() + eps))


def check_rewards(rewards: Tensor, estimator: AdvantageEstimator) -> None:
    """Raise an error unless `rewards` has the shape that the estimator takes and a real dtype."""
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    shape, dimensions = ("[B, R]", 2) if estimator == "gdpo" else ("[B]", 1)
    if rewards.dim() != dimensions or rewards.dtype.is_complex:
        got = f"{rewards.dtype} of shape {tuple(rewards.shape)}"
        raise ValueError(f"rewards must be {shape} of a real dtype, got {got}")


def check_lengths(lengths: Tensor, rewards: Tensor) -> Tensor:
    """Return `lengths`, or raise an error unless it has one real number per completion."""
    check_tensor("lengths", lengths)
    check_device("lengths", lengths, rewards.device, "rewards")
    if lengths.shape != rewards.shape[:1] or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        got = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise ValueError(f"lengths must be real numbers of shape ({rewards.shape[0]},), got {got}")
    return lengths


def check_weights(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Sequence[Tensor | float]:
    """Return one weight for each column of `rewards` `[B, R]`."""
    columns = rewards.shape[1]
    if weights is None:
        return [1.0] * columns
    if isinstance(weights, Tensor):
        check_device("reward_weights", weights, rewards.device, "rewards")
        if weights.shape != (columns,) or weights.dtype.is_complex:
            got = f"{weights.dtype} of shape {tuple(weights.shape)}"
            raise ValueError(f"reward_weights must be real numbers of shape ({columns},), got {got}")
        return weights.detach().unbind()
    # A list becomes no tensor, because a copy from the host to a GPU would sync.
    numbers = [check_number("reward_weights", x, low=-math.inf, strict=True) for x in weights]
    if len(numbers) != columns:
        raise ValueError(f"reward_weights must have one weight for each of {columns} rewards, got {numbers}")
    return numbers


def number_completions(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """Return the number of each completion's group, `[B]`."""
    if (group_size is None) == (group_ids is None):
        raise ValueError("give one of group_size and group_ids")
    count = rewards.shape[0]
    if group_size is not None:
        group_size = check_integer("group_size", group_size)
        if count % group_size:
            raise ValueError(f"group_size must divide the {count} rewards, got {group_size}")
        return torch.arange(count, device=rewards.device) // group_size
    if not isinstance(group_ids, Tensor):
        raise TypeError(f"group_ids must be a tensor, got {type(group_ids).__name__}")
    check_device("group_ids", group_ids, rewards.device, "rewards")
    if group_ids.shape != rewards.shape[:1] or group_ids.is_floating_point() or group_ids.is_complex():
        got = f"{group_ids.dtype} of shape {tuple(group_ids.shape)}"
        raise ValueError(f"group_ids must be integers of shape ({count},), got {got}")
    return number_groups(group_ids)[0]
