"""Every policy loss and KL penalty of verl 0.9.1 has the same value and gradient here, in fp64.

Run by `make test-verl` in verl's environment.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from documented_losses import page
from torch import Tensor
from verl_cases import (
    CLAMP,
    CUSTOM,
    KL_COEF,
    KLS,
    LOSSES,
    MODES,
    OTHERS,
    WIDTH,
    Result,
    actor_config,
    assert_same,
    error,
    ours,
    random_batch,
    theirs,
    verl_normalizer,
)

from grpo_kernels import ImportanceRatio, LossSpec, PPOClip

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss


def test_every_loss_of_the_registry_is_listed() -> None:
    """Every entry of verl's registry is listed in these tests."""
    assert set(core_algos.POLICY_LOSS_REGISTRY) == LOSSES.keys() | CUSTOM | OTHERS


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "name, mode", [(name, mode) for name, entry in LOSSES.items() for mode in entry.modes]
)
def test_every_loss(name: str, mode: str, kl: str) -> None:
    """Loss and gradient agree, with advantages per sequence and per token, with and without token weights.

    If verl's mean is over the sequences that have a token, `normalizer` is their number.
    """
    spec = replace(LOSSES[name].spec, kl=KLS[kl], aggregation=mode, max_tokens=WIDTH)
    for seed in range(2):
        for per_token in (False, True):
            batch = random_batch(seed, per_token=per_token)
            normalizer = verl_normalizer(mode, batch)
            if name == "geo_mean":
                # verl counts the sequence without a token in this policy loss, but not in the KL.
                batch, normalizer = (batch, {}) if kl == "none" else (batch.full(), {})
            for weights in (False, True):
                expected = theirs(name, batch, mode, kl, weights=weights)
                assert_same(ours(spec, batch, weights=weights, **normalizer), expected)
                clipped = expected.metrics.get("actor/pg_clipfrac", 0.5)
                assert 0 < clipped < 1 or name == "sapo", "all tokens are clipped, or none"


@pytest.mark.parametrize("mode", MODES)
def test_global_batch(mode: str) -> None:
    """verl's counts of the global batch are our `normalizer`."""
    batch = random_batch(3)
    info = {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 64, "loss_scale_factor": 50}
    expected = theirs("vanilla", batch, mode, "k3", weights=True, global_batch_info=info)
    spec = replace(LOSSES["vanilla"].spec, kl=KLS["k3"], aggregation=mode, max_tokens=50)
    count = {"token-mean": 1000, "token-sum": 1}.get(mode, 64)
    assert_same(ours(spec, batch, weights=True, normalizer=count / 4), expected)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "dro"])
@pytest.mark.parametrize("mode", MODES)
def test_the_whole_actor_loss(name: str, mode: str) -> None:
    """verl's `ppo_loss` agrees as a whole: policy loss, rollout weights, entropy bonus and KL."""
    batch = random_batch(5, per_token=True)
    B, T = batch.mask.shape
    prompt = 2
    config = actor_config(
        name,
        loss_agg_mode=mode,
        use_kl_loss=True,
        kl_loss_coef=KL_COEF,
        kl_loss_type="k3+",
        entropy_coeff=0.2,
    )
    leaf = batch.logits.clone().requires_grad_()

    def as_model_output(x: Tensor) -> Tensor:
        """Return a tensor without padding, with each value one position to the left of its token."""
        row = torch.cat([x.new_zeros(B, prompt - 1), x, x.new_zeros(B, 1)], -1)
        return torch.nested.nested_tensor_from_jagged(row.flatten(), torch.arange(B + 1) * (prompt + T))

    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.zeros(B, prompt, dtype=torch.int64),
            "responses": batch.ids,
            "attention_mask": torch.ones(B, prompt + T, dtype=torch.int64),
            "response_mask": batch.mask.long(),
            "old_log_probs": batch.old_logps,
            "ref_log_prob": batch.ref_logps,
            "advantages": batch.advantages,
            "rollout_is_weights": batch.weights,
        },
        {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": batch.sequences},
    )
    log_p = torch.log_softmax(leaf, -1)
    output = {
        "log_probs": as_model_output(batch.logps(leaf)),
        "entropy": as_model_output(-(log_p.exp() * log_p).sum(-1)),
    }
    loss, _ = ppo_loss(config, output, data)
    (grad,) = torch.autograd.grad(loss, leaf)
    spec = replace(LOSSES[name].spec, kl=KLS["k3+"], aggregation=mode, max_tokens=WIDTH, entropy_coef=0.2)
    # A normalizer weights the entropy like the loss. Without one, it is a mean over tokens, as in TRL.
    count = {"token-mean": int(batch.mask.sum()), "token-sum": 1}.get(mode, batch.sequences)
    assert_same(ours(spec, batch, weights=True, normalizer=count), Result(loss.detach(), grad, {}))
    alone = ours(spec, batch, weights=True, **verl_normalizer(mode, batch))
    same = mode != "token-sum"  # with a normalizer, or if the mean is over tokens
    assert (error(alone.grad, grad) < 1e-11) == same


# Our presets with the options that equal verl's defaults.
DEFAULTS: dict[str, LossSpec] = {
    "vanilla": LossSpec.preset("bnpo", dual_clip=3.0, log_ratio_clamp=CLAMP),
    "dppo_tv": LossSpec.preset("dppo_tv", ratio_cap=3.0, log_ratio_clamp=CLAMP),
    "dppo_kl": LossSpec.preset("dppo_kl", ratio_cap=3.0, log_ratio_clamp=CLAMP),
    "gspo": LossSpec.preset("gspo_token", eps_low=0.2, eps_high=0.2, aggregation="token-mean"),
    "sapo": LossSpec.preset("sapo", log_ratio_clamp=CLAMP),
    "gpg": LossSpec.preset("reinforce"),
    "geo_mean": LossSpec.preset("gmpo", eps_low=0.2, eps_high=0.2),
    "dro": LossSpec.preset("dro", beta=0.4),
    "cispo": LossSpec.preset("cispo", ratio_max=1.2, ratio_min=0.8, log_ratio_clamp=CLAMP),
}


@pytest.mark.parametrize("name", LOSSES)
def test_defaults(name: str) -> None:
    """Our presets with these options equal verl's losses with verl's defaults."""
    batch = random_batch(11).full()
    config = {key: getattr(ActorConfig, key) for key in LOSSES[name].options}
    assert_same(ours(DEFAULTS[name], batch), theirs(name, batch, **config))


def test_metrics() -> None:
    """Our clip fractions and log-ratios equal verl's metrics."""
    for per_token in (False, True):
        batch = random_batch(7, per_token=per_token)
        batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
        # verl's fraction for DPPO counts tokens without advantage.
        # That for CISPO counts both bounds for either sign.
        unmoved = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, -1.0))
        for name in ("vanilla", "gspo", "dppo_tv", "dppo_kl"):
            expected, found = theirs(name, unmoved).metrics, ours(LOSSES[name].spec, unmoved).metrics
            assert float(found["clip_fraction"]) == pytest.approx(expected["actor/pg_clipfrac"], abs=1e-6)
        for name in ("vanilla", "gspo", "dppo_tv", "dppo_kl", "sapo", "geo_mean", "dro", "cispo"):
            expected, found = theirs(name, batch).metrics, ours(LOSSES[name].spec, batch).metrics
            assert -float(found["log_ratio"]) == pytest.approx(expected["actor/ppo_kl"], abs=1e-6)


COV = {
    "clip_cov": (
        {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.5, "clip_cov_ub": 3.0},
        {"eps": 0.2, "fraction": 0.1, "low": 0.5, "high": 3.0},
    ),
    "kl_cov": ({}, {"kl_cov_ratio": 0.15, "ppo_kl_coef": 0.7}, {"fraction": 0.15, "coef": 0.7}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COV)
def test_custom_losses(name: str, mode: str) -> None:
    """The callables of the page are verl's losses. Clip-Cov's random choice has the same seed."""
    options, policy_loss, arguments = COV[name]
    custom = functools.partial(page()[name], **arguments)
    spec = LossSpec(custom, kl=KLS["k3"], aggregation=mode, max_tokens=WIDTH)
    chosen: list[int] = []
    without = replace(spec, surrogate=PPOClip() if name == "clip_cov" else ImportanceRatio())
    for seed in range(4):
        batch = random_batch(seed, per_token=bool(seed % 2))
        batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
        for weights in (False, True):
            torch.manual_seed(seed)
            expected = theirs(name, batch, mode, "k3", weights=weights, policy_loss=policy_loss, **options)
            torch.manual_seed(seed)
            found = ours(spec, batch, weights=weights, **verl_normalizer(mode, batch))
            assert_same(found, expected)
            unchanged = ours(without, batch, weights=weights, **verl_normalizer(mode, batch))
            chosen.append(int((unchanged.grad != found.grad).any(-1).sum()))
    assert min(chosen) >= 1 and max(chosen) > 2, "the loss chose too few tokens"
