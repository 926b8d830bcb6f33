"""NeMo-RL's `ClippedPGLossFn` and ours: values, gradients and metrics, in fp64.

The real class is used if nemo_rl is installed. `StandIn` has the formula of NeMo-RL 0.6.0 (commit 7ea279a),
`nemo_rl/algorithms/loss/loss_functions.py`, lines 374 to 788.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nemo_rl_stand_ins  # noqa: F401  (makes nemo_rl importable)
import pytest
import torch
from other_trainers import Batch, Trainer, batch, gradient, trainer
from torch import Tensor

from grpo_kernels import KL, LossSpec, policy_loss

pydantic = pytest.importorskip("pydantic")


class Config(pydantic.BaseModel):
    """The options of NeMo-RL's `ClippedPGLossConfig` with its defaults."""

    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0


def mean(x: Tensor, mask: Tensor, count: Tensor | None = None, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / ((mask.sum(dim) if count is None else count) + 1e-8)


class StandIn:
    """NeMo-RL's loss with its KL k3, its clamps, its weights for the sampler, and two of its metrics."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.cfg, self.force_on_policy_ratio = cfg, cfg.force_on_policy_ratio
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        cfg, logp = self.cfg, next_token_logprobs
        token_mask, samples = data["token_mask"][:, 1:], data["sample_mask"]
        mask, advantages = token_mask * samples[:, None], data["advantages"][:, 1:]
        sampler = data["generation_logprobs"][:, 1:]
        old = logp.detach() if cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]

        def aggregate(x: Tensor) -> Tensor:
            if cfg.token_level_loss:
                return mean(x, mask, global_valid_toks)
            return mean(mean(x, token_mask, dim=-1), samples, global_valid_seqs)

        kl = torch.zeros((), dtype=logp.dtype)
        if cfg.reference_policy_kl_penalty and not cfg.use_kl_in_reward:
            x = data["reference_policy_logprobs"][:, 1:] - logp
            weight, bounded = torch.exp(logp - logp.detach()), x.clamp(-20, 20)
            weight = torch.where(bounded == x, weight, weight.detach())
            estimate = (weight * (bounded.exp() - 1 - bounded)).clamp(-10, 10)
            kl = aggregate(cfg.reference_policy_kl_penalty * estimate)

        ratio = (logp - old).exp()
        if cfg.sequence_level_importance_ratios and not cfg.force_on_policy_ratio:
            ratio = mean(logp - old, token_mask, dim=-1)[:, None].exp().expand_as(logp)
        bounded = ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
        if cfg.use_cispo:
            loss = -advantages * bounded.detach() * logp
        elif cfg.disable_ppo_ratio and not cfg.force_on_policy_ratio:
            loss = -advantages * logp
        else:
            loss = torch.max(-advantages * ratio, -advantages * bounded)
        if cfg.ratio_clip_c is not None:
            loss = torch.where(advantages < 0, torch.min(loss, -advantages * cfg.ratio_clip_c), loss)
        if cfg.use_importance_sampling_correction:
            loss = loss * self.weights(old - sampler, mask)
        metrics = {"num_valid_samples": float(samples.sum()), "probs_ratio": mean(ratio, mask).item()}
        total = aggregate(loss) + kl
        return total, {"loss": total.item(), **metrics}

    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        cfg = self.cfg
        weights = log_ratio.exp()
        if cfg.sequence_level_importance_ratios:
            weights = (log_ratio * mask).sum(-1, keepdim=True).exp()
        low, high = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio
        match cfg.truncated_importance_sampling_type:
            case "tis":
                weights = weights.clamp(low or 0.0, high)
            case "icepop":
                weights = torch.where((weights < low) | (weights > high), 0.0, weights)
            case "seq-mask-tis":
                geometric = mean(log_ratio, mask, dim=-1)[:, None].exp()
                weights = weights * ((geometric >= low) & (geometric <= high))
        return weights.detach()


@pytest.fixture(scope="module")
def nemo_rl() -> Iterator[Trainer]:
    stand_in = {
        "nemo_rl.algorithms.loss.loss_functions": {"ClippedPGLossFn": StandIn, "ClippedPGLossConfig": Config}
    }
    module = "nemo_rl.algorithms.loss.loss_functions"
    with trainer(module, "nemo_rl", stand_in, version="0.6.0") as found:
        yield found


def data_of(given: Batch) -> dict[str, Tensor]:
    """The batch as NeMo-RL has it: a column more on the left, and whole samples that are masked."""

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x.new_full((len(x), 1), 9.0), x], 1)

    names = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages", "token_mask")
    tensors = (given.old, given.sampler, given.ref, given.advantages, given.mask)
    found = {name: padded(x) for name, x in zip(names, tensors, strict=True)}
    samples = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=given.old.dtype)
    return {**found, "sample_mask": samples, "rewards": torch.ones(4), "input_ids": torch.zeros(4, 8)}


COUNTS = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(50.0)}
BOUNDS = {"truncated_importance_sampling_ratio": 1.1, "truncated_importance_sampling_ratio_min": 0.9}
SAMPLER = {"use_importance_sampling_correction": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"ratio_clip_max": 0.28},
    "dual clip": {"ratio_clip_c": 1.5},
    "no KL": {"reference_policy_kl_penalty": 0.0},
    "mean per sequence": {"token_level_loss": False},
    "gspo": {"sequence_level_importance_ratios": True, "token_level_loss": False, **SAMPLER}
    | {"ratio_clip_min": 0.05, "ratio_clip_max": 0.05},
    "cispo": {"use_cispo": True},
    "reinforce": {"disable_ppo_ratio": True},
    "on-policy": {"force_on_policy_ratio": True},
    "on-policy reinforce": {"force_on_policy_ratio": True, "disable_ppo_ratio": True},
    "KL in the reward": {"use_kl_in_reward": True},
    "weights": SAMPLER,
    "tis": {**SAMPLER, **BOUNDS, "truncated_importance_sampling_type": "tis"},
    "icepop": {**SAMPLER, **BOUNDS, "truncated_importance_sampling_type": "icepop"},
    "seq-mask-tis": {**SAMPLER, **BOUNDS, "truncated_importance_sampling_type": "seq-mask-tis"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_its_own_losses(nemo_rl: Trainer, name: str) -> None:
    """Value, gradient and metrics are those of NeMo-RL's class."""
    given = batch(3)
    cfg = nemo_rl.theirs.ClippedPGLossConfig(**OPTIONS[name])
    found = []
    for kind in (nemo_rl.theirs.ClippedPGLossFn, nemo_rl.ours.PolicyLossFn):
        leaf = given.leaf()
        loss, metrics = kind(cfg)(data=data_of(given), next_token_logprobs=leaf, **COUNTS)
        found.append((loss, gradient(loss, leaf), metrics))
    for ours, theirs in zip(*found[::-1], strict=True):
        # NeMo-RL adds 1e-8 to each count, and its counts are fp32.
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_another_surrogate(nemo_rl: Trainer) -> None:
    """A preset replaces the surrogate. Its ratio may be to the reference."""
    given = batch(4)
    for preset in ("sapo", "log_ratio"):
        # The KL in the reward makes NeMo-RL compute the reference.
        cfg = nemo_rl.theirs.ClippedPGLossConfig(use_kl_in_reward=True)
        data, leaf, same = data_of(given), given.leaf(), given.leaf()
        loss, _ = nemo_rl.ours.PolicyLossFn(cfg, spec=preset)(leaf, data, **COUNTS)
        expected = policy_loss(
            same,
            given.advantages,
            spec=LossSpec(LossSpec.preset(preset).surrogate),
            completion_mask=given.mask * data["sample_mask"][:, None],
            old_logps=given.old,
            ref_logps=given.ref,
            normalizer=50.0,
        ).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, leaf), gradient(expected, same))


def test_what_is_refused(nemo_rl: Trainer) -> None:
    """NeMo-RL adds its KL itself, loads the reference only for a KL, and a dual clip needs a ratio."""
    config = nemo_rl.theirs.ClippedPGLossConfig
    with pytest.raises(ValueError, match="no KL and no entropy bonus"):
        nemo_rl.ours.PolicyLossFn(config(), spec=LossSpec(kl=KL("k3", beta=0.1)))
    with pytest.raises(ValueError, match="does not pass the reference's log-probabilities"):
        nemo_rl.ours.PolicyLossFn(config(reference_policy_kl_penalty=0.0), spec="log_ratio")
    with pytest.raises(ValueError, match="disable_ppo_ratio leaves no ratio"):
        nemo_rl.ours.PolicyLossFn(config(disable_ppo_ratio=True, ratio_clip_c=3.0))
