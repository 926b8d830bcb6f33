"""The estimators of `group_advantages` against loops over the groups, written from the papers' formulas."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import group_advantages
from grpo_kernels.checks.choices import ADVANTAGE_ESTIMATORS

# Groups of one, two, three and four completions, in no order.
IDS = [4, -1, 9, 4, 7, 9, 9, 7, 4, 9]
LENGTHS = [3, 1, 7, 4, 2, 5, 1, 6, 2, 9]
REWARDS = [1.5, 0.7, 0.0, 2.0, 1.0, 0.25, 3.0, 4.0, 0.5, 1.0]
EPS = 1e-3
EITHER = pytest.mark.parametrize("weighted", [False, True], ids=["completions", "tokens"])


def groups(ids: list[int]) -> list[list[int]]:
    """Return the completions of each group."""
    return [[i for i, x in enumerate(ids) if x == group] for group in sorted(set(ids))]


def spread(values: list[float], weights: list[float] | None = None) -> tuple[float, float]:
    """Return the mean and the standard deviation with Bessel's correction. `weights` count each value."""
    weights = [1.0] * len(values) if weights is None else weights
    count = sum(weights)
    mean = sum(w * x for w, x in zip(weights, values, strict=True)) / count
    squares = sum(w * (x - mean) ** 2 for w, x in zip(weights, values, strict=True))
    return mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0


def in_groups(rewards: list[float], formula: Any) -> list[float]:
    """Apply `formula(rewards of the group, their indices)` to each group with different rewards."""
    found = [0.0] * len(rewards)
    for members in groups(IDS):
        of_group = [rewards[i] for i in members]
        if len(set(of_group)) > 1:
            for i, advantage in zip(members, formula(of_group, members), strict=True):
                found[i] = advantage
    return found


def whitened(values: list[float], weighted: bool) -> list[float]:
    mean, std = spread(values, LENGTHS if weighted else None)
    return [(x - mean) / (std + EPS) for x in values]


def over_std(r: list[float], _: list[int]) -> list[float]:
    mean, std = spread(r)
    return [(x - mean) / (std + EPS) for x in r]


def centred(r: list[float], _: list[int]) -> list[float]:
    return [x - spread(r)[0] for x in r]


def call(rewards: Tensor, **options: Any) -> Tensor:
    options = {"group_ids": torch.tensor(IDS, device=rewards.device), "eps": EPS, **options}
    return group_advantages(rewards, **options)


def assert_equals(got: Tensor, want: list[float]) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.fixture
def rewards(device: str) -> Tensor:
    return torch.tensor(REWARDS, dtype=torch.float64, device=device)


@pytest.fixture
def lengths(device: str) -> Tensor:
    return torch.tensor(LENGTHS, device=device)


def test_opo(rewards: Tensor, lengths: Tensor) -> None:
    def formula(r: list[float], members: list[int]) -> list[float]:
        weights = [LENGTHS[i] for i in members]
        baseline = sum(w * x for w, x in zip(weights, r, strict=True)) / sum(weights)
        return [x - baseline for x in r]

    want = in_groups(REWARDS, formula)
    for given in (lengths, lengths.int(), lengths.float()):
        assert_equals(call(rewards, estimator="opo", lengths=given), want)


def test_maxrl(rewards: Tensor) -> None:
    want = in_groups(REWARDS, lambda r, _: [(x - spread(r)[0]) / (spread(r)[0] + EPS) for x in r])
    assert_equals(call(rewards, estimator="maxrl"), want)


def test_gpg(rewards: Tensor) -> None:
    nonzero = sum(x != 0 for x in REWARDS)
    assert nonzero < len(REWARDS)
    factor = len(REWARDS) / nonzero
    assert_equals(call(rewards, estimator="gpg"), [factor * x for x in in_groups(REWARDS, centred)])


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_pass_at_k(rewards: Tensor, scale: str) -> None:
    def formula(r: list[float], _: list[int]) -> list[float]:
        second, best = sorted(r)[-2:]
        std = {"std": spread(r)[1] + EPS, "batch": spread(REWARDS)[1] + EPS, "none": 1.0}[scale]
        return [(best - second) / std if x == best else 0.0 for x in r]

    got = call(rewards, estimator="grpo_passk", scale=scale)
    assert_equals(got, in_groups(REWARDS, formula))
    assert int((got != 0).sum()) == 3  # one in each group of several


def test_pass_at_k_of_two_best() -> None:
    """The second best is as good as the best."""
    got = group_advantages(torch.tensor([2.0, 2.0, 1.0, 0.0]), group_size=4, estimator="grpo_passk")
    assert not got.any()


@EITHER
def test_reinforce_plus_plus_baseline(rewards: Tensor, lengths: Tensor, weighted: bool) -> None:
    how = {"lengths": lengths} if weighted else {}
    got = call(rewards, estimator="reinforce_plus_plus_baseline", **how)
    assert_equals(got, whitened(in_groups(REWARDS, centred), weighted))


@EITHER
def test_reinforce_plus_plus(rewards: Tensor, lengths: Tensor, weighted: bool) -> None:
    """One group of the whole batch: no baseline but the mean that is subtracted in any case."""
    how = {"lengths": lengths} if weighted else {}
    got = group_advantages(
        rewards, group_size=len(rewards), eps=EPS, estimator="reinforce_plus_plus_baseline", **how
    )
    assert_equals(got, whitened(REWARDS, weighted))


def test_normalized_leave_one_out(rewards: Tensor) -> None:
    """TRL's RLOO with `normalize_advantages`."""

    def formula(r: list[float], _: list[int]) -> list[float]:
        return [x - (sum(r) - x) / (len(r) - 1) for x in r]

    got = call(rewards, estimator="reinforce_plus_plus_baseline", leave_one_out=True)
    assert_equals(got, whitened(in_groups(REWARDS, formula), False))


@EITHER
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0], "tensor"], ids=str)
def test_gdpo(rewards: Tensor, lengths: Tensor, weights: Any, scale: str, weighted: bool) -> None:
    second = [float(i % 3 == 0) for i in range(len(REWARDS))]
    both = torch.stack([rewards, rewards.new_tensor(second)], 1)
    factors = [1.0, 1.0] if weights is None else [0.5, 2.0]
    given = torch.tensor(factors, device=rewards.device) if weights == "tensor" else weights
    formula = over_std if scale == "std" else centred
    columns = [in_groups(x, formula) for x in (REWARDS, second)]
    total = [sum(w * x for w, x in zip(factors, pair, strict=True)) for pair in zip(*columns, strict=True)]
    how = {"lengths": lengths} if weighted else {}
    got = call(both, estimator="gdpo", reward_weights=given, scale=scale, **how)
    assert_equals(got, whitened(total, weighted))


def options_of(estimator: str, count: int) -> dict[str, Any]:
    return {"estimator": estimator, **({"lengths": torch.arange(1, count + 1)} if estimator == "opo" else {})}


def columns_of(rewards: Tensor, estimator: str) -> Tensor:
    return torch.stack([rewards, 2 * rewards], 1) if estimator == "gdpo" else rewards


every = pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)


@every
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_rewards_are_exactly_zero(estimator: str, size: int, eps: float) -> None:
    """Alone, and beside groups whose rewards differ."""
    equal = torch.rand(50, generator=torch.Generator().manual_seed(0)).repeat_interleave(size)
    # The mean of their advantages over the batch is not exactly 0.
    others = torch.rand(7 * size, generator=torch.Generator().manual_seed(1))
    for rewards in (equal, torch.cat([equal, others])):
        got = group_advantages(
            columns_of(rewards, estimator), group_size=size, eps=eps, **options_of(estimator, len(rewards))
        )
        assert not got[: len(equal)].any()
        assert size == 1 or len(rewards) == len(equal) or got[len(equal) :].any()


def test_equal_rewards_with_lengths() -> None:
    """All rewards are equal: exactly 0. One group of several: its zeros move by the mean over tokens."""
    how = {"estimator": "reinforce_plus_plus_baseline", "lengths": torch.tensor([3, 1, 1, 1])}
    assert not group_advantages(torch.full((4,), 0.1), group_size=2, **how).any()
    got = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2, **how)
    assert got[2] == got[3] and got[2] < 0


@every
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float32])
def test_dtypes(estimator: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1]).to(dtype)
    options = options_of(estimator, 9)
    got = group_advantages(columns_of(rewards.int(), estimator).to(dtype), group_size=3, **options)
    values = columns_of(rewards.int(), estimator).to(dtype).double()
    want = group_advantages(values, group_size=3, **options)
    assert got.dtype == (dtype if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(got, want.to(got.dtype))
    assert got.any()


@every
def test_nothing(estimator: str) -> None:
    rewards = torch.zeros(0, 2) if estimator == "gdpo" else torch.zeros(0)
    assert group_advantages(rewards, group_size=4, **options_of(estimator, 0)).shape == (0,)


def test_opo_without_tokens() -> None:
    lengths = torch.tensor([0, 0, 2, 2])
    got = group_advantages(torch.tensor([1.0, 2.0, 3.0, 5.0]), group_size=2, estimator="opo", lengths=lengths)
    assert got.isfinite().all() and got[2:].tolist() == [-1, 1]


R, L = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    "rewards, options, error, message",
    [
        (R, {"estimator": "gae"}, ValueError, "estimator must be one of 'grpo', 'opo',"),
        (R, {"estimator": "opo"}, ValueError, "estimator 'opo' needs lengths"),
        (R, {"lengths": L}, ValueError, "estimator 'grpo' does not take lengths: opo, reinforce_plus_plus_"),
        (
            R,
            {"estimator": "maxrl", "scale": "none"},
            ValueError,
            "estimator 'maxrl' does not take scale: grpo, grpo_passk, gdpo",
        ),
        (
            R,
            {"estimator": "gpg", "leave_one_out": True},
            ValueError,
            "estimator 'gpg' does not take leave_one_out: grpo,",
        ),
        (R, {"reward_weights": [1.0]}, ValueError, "estimator 'grpo' does not take reward_weights: gdpo"),
        (
            R,
            {"estimator": "gdpo"},
            ValueError,
            "rewards must be [B, R] of a real dtype, got torch.float32 of shape (4,)",
        ),
        (
            R[:, None],
            {"estimator": "opo", "lengths": L},
            ValueError,
            "rewards must be [B] of a real dtype, got torch.float32 of shape (4, 1)",
        ),
        (
            R,
            {"estimator": "opo", "lengths": L[:2]},
            ValueError,
            "lengths must be real numbers of shape (4,), got torch.float32 of shape (2,)",
        ),
        (
            R,
            {"estimator": "opo", "lengths": L.bool()},
            ValueError,
            "lengths must be real numbers of shape (4,), got torch.bool of shape (4,)",
        ),
        (R, {"estimator": "opo", "lengths": L.to("meta")}, ValueError, "lengths is on meta, rewards on cpu"),
        (R, {"estimator": "opo", "lengths": [1, 1, 1, 1]}, TypeError, "lengths must be a tensor, got list"),
        (
            torch.zeros(4, 3),
            {"estimator": "gdpo", "reward_weights": [1, 2]},
            ValueError,
            "reward_weights must have one weight for each of 3 rewards, got [1, 2]",
        ),
        (
            torch.zeros(4, 3),
            {"estimator": "gdpo", "reward_weights": torch.ones(2)},
            ValueError,
            "reward_weights must be real numbers of shape (3,), got torch.float32 of shape (2,)",
        ),
        (
            torch.zeros(4, 1),
            {"estimator": "gdpo", "reward_weights": torch.ones(1, device="meta")},
            ValueError,
            "reward_weights is on meta, rewards on cpu",
        ),
        (
            torch.zeros(4, 1),
            {"estimator": "gdpo", "reward_weights": ["1"]},
            TypeError,
            "reward_weights must be a number, got '1'",
        ),
    ],
)
def test_errors(rewards: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        group_advantages(rewards, group_size=2, **options)


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("reward", [torch.nan, torch.inf])
def test_pass_at_k_shows_a_reward_that_is_not_finite(scale: Any, reward: float) -> None:
    rewards = torch.tensor([reward, 1.0, 2.0, 0.0, 1.0, 5.0])
    found = group_advantages(rewards, group_size=3, estimator="grpo_passk", scale=scale)
    assert not found[:3].isfinite().any()
