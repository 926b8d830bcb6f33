"""`group_advantages` equals verl's functions, called as verl's trainer calls them, in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_kernels import group_advantages

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

T, EPS = 9, 1e-6
IDS = torch.tensor([2, 0, 1, 2, 1, 1, 0, 2, 2])
LENGTHS = torch.tensor([3, 1, 7, 4, 2, 5, 8, 6, 9])
MASK = torch.arange(T) < LENGTHS[:, None]
REWARDS = torch.tensor([1.5, 0.0, 2.0, 0.3, 1.0, 0.25, 3.0, 4.0, 0.5], dtype=torch.float64)
OURS = {
    # verl's name: our options
    "grpo": {},
    "grpo_vectorized": {},
    "rloo": {"scale": "none", "leave_one_out": True},
    "rloo_vectorized": {"scale": "none", "leave_one_out": True},
    "opo": {"estimator": "opo", "lengths": LENGTHS},
    "gpg": {"estimator": "gpg"},
    "grpo_passk": {"estimator": "grpo_passk"},
    "reinforce_plus_plus_baseline": {"estimator": "reinforce_plus_plus_baseline", "lengths": LENGTHS},
}


def token_rewards(rewards: Tensor) -> Tensor:
    """Put each reward on the last token of its completion, as verl does."""
    zeros = torch.zeros(len(rewards), T, dtype=rewards.dtype)
    return zeros.scatter(1, LENGTHS[:, None] - 1, rewards[:, None])


def theirs(name: str, rewards: Tensor = REWARDS, **options: Any) -> Tensor:
    """Return verl's advantages, `[B, T]`."""
    function = core_algos.get_adv_estimator_fn(name)
    config = options.pop("config", AlgoConfig(gamma=1.0))
    if name != "reinforce_plus_plus":
        options = {"index": IDS.numpy().astype(str).astype(object), "epsilon": EPS, **options}
    found, _ = function(
        token_level_rewards=token_rewards(rewards), response_mask=MASK.double(), config=config, **options
    )
    return found


def assert_same(got: Tensor, want: Tensor, rtol: float) -> None:
    """Compare advantages of completions with those of their tokens."""
    assert got.dtype == torch.float64 and got.abs().max() > 0.1
    torch.testing.assert_close(got[:, None] * MASK, want.double(), rtol=rtol, atol=rtol)


# verl adds 1e-8 to the variance of the batch and 1e-8 to its number of tokens, and ours 1e-6 to the standard
# deviation. The variances are near 1. grpo_vectorized computes in fp32.
RTOL = {"grpo_vectorized": 1e-6, "reinforce_plus_plus_baseline": 1e-5}


@pytest.mark.parametrize("name", OURS)
def test_same_advantages(name: str) -> None:
    got = group_advantages(REWARDS, group_ids=IDS, eps=EPS, **OURS[name])
    assert_same(got, theirs(name), RTOL.get(name, 1e-12))


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
def test_without_the_standard_deviation(name: str) -> None:
    got = group_advantages(REWARDS, group_ids=IDS, scale="none")
    assert_same(got, theirs(name, norm_adv_by_std_in_grpo=False), RTOL.get(name, 1e-12))


def test_pass_at_k_without_the_standard_deviation() -> None:
    config = AlgoConfig(norm_adv_by_std_in_grpo=False)
    got = group_advantages(REWARDS, group_ids=IDS, scale="none", estimator="grpo_passk")
    assert_same(got, theirs("grpo_passk", config=config), 1e-12)


def test_reinforce_plus_plus() -> None:
    """With `gamma=1` every token has the reward of its completion, and the batch is one group."""
    got = group_advantages(
        REWARDS,
        group_size=len(REWARDS),
        eps=EPS,
        estimator="reinforce_plus_plus_baseline",
        lengths=LENGTHS,
    )
    assert_same(got, theirs("reinforce_plus_plus"), 1e-5)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0]], ids=str)
def test_gdpo(weights: list[float] | None) -> None:
    """verl keeps its rewards in fp32. These are exact in it."""
    rewards = torch.stack([torch.tensor([1, 0, 2, 0, 1, 0, 3, 4, 0.5]), (torch.arange(9) % 4).float()], 1)
    config = {"gdpo_reward_keys": ["accuracy", "format"], "gdpo_reward_weights": weights}
    prompts = torch.zeros(len(rewards), 2)
    batch = {"prompts": prompts, "attention_mask": torch.cat([torch.ones_like(prompts), MASK], 1).long()}
    columns = {"accuracy": rewards[:, 0].numpy(), "format": rewards[:, 1].numpy()}
    want = theirs("gdpo", config=config, non_tensor_batch=columns, batch=batch)
    got = group_advantages(
        rewards.double(),
        group_ids=IDS,
        eps=EPS,
        estimator="gdpo",
        lengths=LENGTHS,
        reward_weights=weights,
    )
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"])
def test_a_group_of_one_is_different(name: str) -> None:
    """verl subtracts no baseline from the reward of a group of one. Ours is 0 before it is normalized."""
    ids, rewards = torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    options = dict(OURS[name])
    if "lengths" in options:
        options["lengths"] = torch.ones(3)
    got = group_advantages(rewards, group_ids=ids, eps=EPS, **options)
    function = core_algos.get_adv_estimator_fn(name)
    want, _ = function(
        token_level_rewards=rewards[:, None],
        response_mask=torch.ones(3, 1, dtype=torch.float64),
        index=np.array(["a", "a", "b"], dtype=object),
        epsilon=EPS,
    )
    if name == "reinforce_plus_plus_baseline":
        assert float(got[2]) == 0 and float(want[2, 0]) > 1
        return
    assert float(got[2]) == 0 and float(want[2, 0]) == pytest.approx(5.0, rel=1e-5)
    torch.testing.assert_close(got[:2], want[:2, 0], rtol=1e-9, atol=0)


def test_estimators_that_need_more() -> None:
    """verl's registry has these and no others that we lack."""
    more = {"gae", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"}
    known = {*OURS, "reinforce_plus_plus", "gdpo"}
    assert {x.value for x in core_algos.AdvantageEstimator} == known | more
