"""The losses of SkyRL's registry and ours: values, gradients and metrics.

The real functions are used if skyrl is installed. The stand-ins have the formulas of skyrl 0.3.0,
`skyrl/backends/skyrl_train/utils/ppo_utils.py`, lines 554 to 878, and of
`off_policy_correction_utils.py`, lines 25 to 385.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from other_trainers import Trainer, batch, gradient, trainer
from torch import Tensor

from grpo_kernels import DRO, KL, LossSpec, PPOClip

UTILS = "skyrl.backends.skyrl_train.utils"


def config(policy_loss_type: str, **options: Any) -> SimpleNamespace:
    """SkyRL's `AlgorithmConfig`, as far as its losses read it."""
    correction = {
        "tis_ratio_type": None,
        "token_tis_ratio_clip_high": 1.1,
        "sequence_tis_ratio_clip_high": 1.2,
        "sequence_mask_metric": None,
        "outlier_token_is_threshold_low": None,
        "outlier_token_is_threshold_high": None,
        "token_mask_is_threshold_low": None,
        "token_mask_is_threshold_high": None,
    }
    return SimpleNamespace(
        policy_loss_type=policy_loss_type,
        loss_reduction="token_mean",
        eps_clip_low=0.2,
        eps_clip_high=0.28,
        clip_ratio_c=1.5,
        cispo=SimpleNamespace(cispo_eps_clip_low=0.3, cispo_eps_clip_high=0.4),
        dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.05, delta_high=0.02),
        sapo=SimpleNamespace(tau_pos=1.1, tau_neg=1.7),
        off_policy_correction=SimpleNamespace(**{**correction, **options}),
    )


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def correct(old: Tensor, sampler: Tensor, mask: Tensor, options: Any) -> tuple[Tensor | None, dict, Tensor]:
    """SkyRL's `compute_off_policy_correction` with its token mask and its two truncated ratios."""
    log_ratio, weights = old - sampler, None
    if options.token_mask_is_threshold_low is not None:
        ratio = log_ratio.exp()
        inside = ratio >= options.token_mask_is_threshold_low
        mask = mask * (inside & (ratio <= options.token_mask_is_threshold_high))
    if options.tis_ratio_type == "token":
        weights = log_ratio.exp().clamp(max=options.token_tis_ratio_clip_high)
    elif options.tis_ratio_type == "sequence":
        total = (log_ratio * mask).sum(-1, keepdim=True)
        weights = total.exp().clamp(max=options.sequence_tis_ratio_clip_high)
    return weights, {}, mask


def stand_in_loss(surrogate: Callable[..., Tensor]) -> Callable[..., Any]:
    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        sampler = old_log_probs if rollout_logprobs is None else rollout_logprobs
        values = surrogate(log_probs, old_log_probs, sampler, advantages, config, loss_mask)
        if rollout_logprobs is not None:
            options = config.off_policy_correction
            weights, _, loss_mask = correct(old_log_probs, rollout_logprobs, loss_mask, options)
            values = values if weights is None else values * weights
        return (values * loss_mask).sum(), {}

    return loss


def clipped(ratio: Tensor, advantages: Tensor, config: Any) -> Tensor:
    bounded = ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)
    value = -torch.min(ratio * advantages, bounded * advantages)
    if config.policy_loss_type == "dual_clip":
        value = torch.where(advantages < 0, torch.min(value, -config.clip_ratio_c * advantages), value)
    return value


def ppo(logp: Tensor, old: Tensor, _: Tensor, advantages: Tensor, config: Any, mask: Tensor) -> Tensor:
    return clipped((logp - old).clamp(-20, 20).exp(), advantages, config)


def gspo(logp: Tensor, old: Tensor, _: Tensor, advantages: Tensor, config: Any, mask: Tensor) -> Tensor:
    average = masked_mean(logp - old, mask, -1)[:, None].detach()
    return clipped((logp - logp.detach() + average).clamp(max=10).exp(), advantages, config)


def cispo(logp: Tensor, old: Tensor, _: Tensor, advantages: Tensor, config: Any, mask: Tensor) -> Tensor:
    low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
    return -advantages * (logp - old).exp().clamp(1 - low, 1 + high).detach() * logp


def sapo(logp: Tensor, old: Tensor, _: Tensor, advantages: Tensor, config: Any, mask: Tensor) -> Tensor:
    tau = torch.where(advantages > 0, config.sapo.tau_pos, config.sapo.tau_neg)
    return -torch.sigmoid(tau * ((logp - old).exp() - 1)) * 4 / tau * advantages


def dppo(logp: Tensor, old: Tensor, sampler: Tensor, advantages: Tensor, config: Any, mask: Tensor) -> Tensor:
    change = (logp.exp() - sampler.exp()).detach()
    outside = (advantages > 0) & (change > config.dppo.delta_high)
    outside |= (advantages < 0) & (-change > config.dppo.delta_low)
    return -(logp - sampler).exp() * advantages * ~outside


SURROGATES = {"regular": ppo, "dual_clip": ppo, "gspo": gspo, "cispo": cispo, "sapo": sapo, "dppo": dppo}


class Registry:
    losses: ClassVar[dict[str, Any]] = {name: stand_in_loss(loss) for name, loss in SURROGATES.items()}

    @classmethod
    def register(cls, name: str, loss: Any) -> None:
        if name in cls.losses:
            raise ValueError(f"policy loss '{name}' already registered")
        cls.losses[name] = loss

    @classmethod
    def get(cls, name: str) -> Any:
        return cls.losses[name]


@pytest.fixture(scope="module")
def skyrl() -> Iterator[Trainer]:
    stand_in = {
        f"{UTILS}.ppo_utils": {"PolicyLossRegistry": Registry},
        f"{UTILS}.off_policy_correction_utils": {"compute_off_policy_correction": correct},
    }
    needs = {"skyrl.train": {}, "skyrl.train.config": {"AlgorithmConfig": object}}
    with trainer(f"{UTILS}.ppo_utils", "skyrl", stand_in, version="0.3.0", needs=needs) as found:
        yield found


# Each loss of SkyRL, with ours. DPPO's value is -ratio * A there, and -sg(ratio) * A * logp here.
LOSSES: dict[str, Any] = {
    "regular": "dapo",
    "dual_clip": LossSpec(PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=1.5), log_ratio_clamp=20.0),
    "gspo": "gspo_token",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo": "dppo_tv",
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"tis_ratio_type": "token"},
    "sequence": {"tis_ratio_type": "sequence"},
    "masked": {"token_mask_is_threshold_low": 0.85, "token_mask_is_threshold_high": 1.15}
    | {"tis_ratio_type": "token"},
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("sampler", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(skyrl: Trainer, name: str, sampler: bool, correction: str) -> None:
    """Value and gradient are those of SkyRL, with advantages scaled as it scales them.

    SkyRL computes some ratios in fp32, hence the tolerance: a few roundings of 6e-8.
    """
    registry = skyrl.theirs.PolicyLossRegistry
    if f"ours.{name}" not in getattr(registry, "_functions", getattr(registry, "losses", {})):
        skyrl.ours.register_loss(f"ours.{name}", LOSSES[name])
    given, options = batch(2), config(name, **CORRECTIONS[correction])
    found = []
    for loss in (registry.get(name), registry.get(f"ours.{name}")):
        leaf = given.leaf()
        value, metrics = loss(
            leaf,
            given.old,
            given.advantages / given.mask.sum(),
            config=options,
            loss_mask=given.mask,
            rollout_logprobs=given.sampler if sampler else None,
        )
        assert all(isinstance(x, float) for x in metrics.values())
        found.append((value, gradient(value, leaf)))
    (value, grad), (own_value, own_grad) = found
    torch.testing.assert_close(own_grad, grad, rtol=1e-6, atol=1e-8)
    if name != "dppo":
        torch.testing.assert_close(own_value, value, rtol=1e-6, atol=1e-8)


def test_metrics(skyrl: Trainer) -> None:
    """The fraction of clipped tokens has SkyRL's name."""
    given = batch()
    loss = skyrl.ours.SkyRLLoss("dapo")
    _, metrics = loss(
        given.logps, given.old, given.advantages, config=config("regular"), loss_mask=given.mask
    )
    assert metrics["clip_ratio"] == pytest.approx(metrics["clip_ratio_low"] + metrics["clip_ratio_high"])
    assert metrics["clip_ratio"] > 0


def test_a_registered_loss_can_be_sent_to_a_worker(skyrl: Trainer) -> None:
    """The loss in the registry is pickled by reference to our module."""
    loss = skyrl.ours.SkyRLLoss("dapo")
    assert pickle.loads(pickle.dumps(loss)) == loss


def test_what_is_refused(skyrl: Trainer) -> None:
    """SkyRL adds KL and entropy bonus itself, scales the advantages and passes no reference."""
    for spec, message in [
        (LossSpec(kl=KL("k3", beta=0.1)), "no KL and no entropy bonus"),
        ("log_ratio", "does not pass the reference's log-probabilities"),
        (LossSpec(DRO(beta=0.1)), "must be linear in the advantages"),
        (LossSpec(lambda logps, *_: -logps), "must be linear in the advantages"),
    ]:
        with pytest.raises(ValueError, match=message):
            skyrl.ours.register_loss("refused", spec)
    with pytest.raises(ValueError, match="already registered"):
        skyrl.ours.register_loss("regular", "grpo")
