"""OpenRLHF's `PolicyLoss` and ours: values, gradients and metrics, in fp64.

The real class is used if openrlhf is installed. `StandIn` has the formula of openrlhf 0.11.2,
`openrlhf/models/loss.py`, lines 176 to 281.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from other_trainers import Trainer, batch, gradient, trainer
from torch import Tensor

from grpo_kernels import GMPO, KL, LossSpec, policy_loss


def mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim)


class StandIn(torch.nn.Module):
    """PPO and GSPO of OpenRLHF, with the correction of single tokens by the ratio to the sampler."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.policy_loss_type, self.token_level_loss = policy_loss_type, token_level_loss
        if policy_loss_type == "gspo":
            self.token_level_loss = False
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.bounds = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        mask, corrected = action_mask, self.is_correction_level != "off"
        change = log_probs - old_log_probs
        if self.policy_loss_type == "gspo":
            change = log_probs - (rollout_log_probs if corrected else old_log_probs)
            average = (change * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            ratio = average.exp() * mask
        else:
            ratio = change.clamp(-20, 20).exp()
        free = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
        gain = torch.min(free, clipped)
        if self.dual_clip is not None:
            gain = torch.where(advantages < 0, torch.max(gain, self.dual_clip * advantages), gain)
        loss, kl, filtered = -gain, None, None
        if corrected and self.policy_loss_type == "ppo":
            weight = (old_log_probs - rollout_log_probs).detach().exp()
            low, high = self.bounds
            outside = (weight < low) | (weight > high)
            clips = self.is_correction_mode == "clip"
            loss = loss * (weight.clamp(low, high) if clips else torch.where(outside, 0.0, weight))
            kl, filtered = mean(rollout_log_probs - old_log_probs, mask), mean(outside.to(loss.dtype), mask)
        if self.token_level_loss:
            count = mask.sum() if batch_num_tokens is None else batch_num_tokens / dp_size
            value = (loss * mask).sum() / count
        else:
            lengths = mask.sum(-1)
            count = (lengths > 0).sum() if global_batch_size is None else global_batch_size / dp_size
            value = ((loss * mask).sum(-1) / (lengths + 1e-8)).sum() / count
        clip = mean((clipped < free).to(loss.dtype), mask)
        return value, clip, mean((old_log_probs - log_probs).detach(), mask), kl, filtered


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[Trainer]:
    stand_in = {"openrlhf.models.loss": {"PolicyLoss": StandIn}}
    module, needs = "openrlhf.models.loss", {"deepspeed": {}}
    with trainer(module, "openrlhf", stand_in, version="0.11.2", needs=needs) as found:
        yield found


COUNTS = {"dp_size": 2, "batch_num_tokens": 100.0, "global_batch_size": 9.0}
OPTIONS = {
    "ppo": {"clip_eps_high": 0.28},
    "dual clip": {"dual_clip": 1.5},
    "mean per sequence": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
    "gspo to the sampler": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "clipped weights": {"is_correction_level": "token", "is_correction_mode": "clip"}
    | {"is_correction_threshold": (0.9, 1.1)},
    "masked weights": {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)}
    | {"token_level_loss": False},
}


@pytest.mark.parametrize("counts", [{}, COUNTS])
@pytest.mark.parametrize("name", OPTIONS)
def test_its_own_losses(openrlhf: Trainer, name: str, counts: dict[str, Any]) -> None:
    """All five results and the gradient are those of OpenRLHF's class."""
    given = batch()
    found = []
    for kind in (openrlhf.theirs.PolicyLoss, openrlhf.ours.PolicyLoss):
        leaf = given.leaf()
        results = kind(**OPTIONS[name])(
            leaf, given.old, given.advantages, given.mask, rollout_log_probs=given.sampler, **counts
        )
        found.append((*results, gradient(results[0], leaf)))
    for ours, theirs in zip(*found[::-1], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            # OpenRLHF adds 1e-8 to each length.
            torch.testing.assert_close(ours, theirs, rtol=2e-8, atol=1e-12, check_dtype=False)
    assert 0 < found[0][1] < 1, "all tokens are clipped, or none"


def test_another_surrogate(openrlhf: Trainer) -> None:
    """A preset is summed with OpenRLHF's counts and weights, also one that reads weights as ratios."""
    given = batch(1)
    for spec in (LossSpec.preset("sapo"), LossSpec(GMPO())):
        leaf, same = given.leaf(), given.leaf()
        loss, clip, *_ = openrlhf.ours.PolicyLoss(spec=spec)(
            leaf, given.old, given.advantages, given.mask, **COUNTS
        )
        expected = policy_loss(
            same,
            given.advantages,
            spec=LossSpec(spec.surrogate),
            completion_mask=given.mask,
            old_logps=given.old,
            normalizer=50.0,
        )
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(gradient(loss, leaf), gradient(expected.loss, same))
        torch.testing.assert_close(clip, expected.metrics.get("clip_fraction", clip))


def test_what_is_refused(openrlhf: Trainer) -> None:
    """OpenRLHF adds KL and entropy bonus itself, and passes no reference."""
    for spec, message in [
        (LossSpec(kl=KL("k3", beta=0.1)), "no KL and no entropy bonus"),
        (LossSpec(entropy_coef=0.1), "no KL and no entropy bonus"),
        ("log_ratio", "does not pass the reference's log-probabilities"),
        ("opmd", "does not pass the reference's log-probabilities"),
        ("gppo", "spec must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            openrlhf.ours.PolicyLoss(spec=spec)
    with pytest.raises(ValueError, match="policy_loss_type, which must be 'ppo'"):
        openrlhf.ours.PolicyLoss(policy_loss_type="gspo", spec="gspo")
