"""TRL's ratios and masks equal `token_weights`, and accumulation, ranks and the entropy bonus agree."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import (
    AGGREGATION,
    GLOBAL,
    LOSS_TYPES,
    B,
    Rollout,
    Settings,
    T,
    assert_same,
    assert_same_by_logits,
    high_entropy,
    levels,
    logits_for_model,
    loss_types,
    ours,
    per_token_advantages,
    rollout,
    theirs,
)

from grpo_kernels import grpo_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def sampler_ratio(batch: Rollout, kind: str) -> Tensor:
    """Return ratios as vLLM's correction gives them: per token or per sequence, truncated or masked.

    They are 1 at masked positions, as in TRL.
    """
    generator = torch.Generator().manual_seed(2)
    width = 1 if kind.startswith("sequence") else T
    ratio = torch.exp(0.5 * torch.randn(B, width, generator=generator, dtype=torch.float64))
    if width == T:
        ratio = ratio.where(batch.mask.bool(), 1)
    ratio = ratio.clamp(max=1.5) if kind.endswith("truncate") else ratio.where(ratio <= 1.5, 0)
    return ratio.to(batch.logps.dtype)


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@levels
@loss_types
def test_sampler_ratio_is_token_weights(trainer: Any, loss_type: str, level: str, kind: str) -> None:
    """The correction for vLLM multiplies the loss before the KL term. VESPO includes it in its weight."""
    if loss_type == "vespo" and kind.startswith("sequence"):
        pytest.skip("GRPOTrainer refuses it")
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    ratio = sampler_ratio(batch, kind)
    settings = Settings.of(loss_type, level, "KL", use_vllm=True)
    for each in (batch, per_token_advantages(batch)):
        each = each.having(importance_sampling_ratio=ratio)
        assert_same_by_logits(trainer, settings, each, model, token_weights=ratio)


def kept_on_policy(batch: Rollout, threshold: float) -> Tensor:
    """Return the sequences or tokens that the off-policy mask of DeepSeek-V3.2 keeps.

    It drops a negative advantage if the sampler's log-probability exceeds the policy's by more than
    `threshold` per token of the sequence.
    """
    advantages = batch.inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    sampler = batch.inputs.get("sampling_per_token_logps", batch.inputs.get("old_per_token_logps"))
    drift = ((sampler - batch.logps) * batch.mask).sum(-1) / batch.mask.sum(-1).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)[:, None]


def masked_tokens(settings: Settings, batch: Rollout, kept: Tensor) -> dict[str, Tensor]:
    """Return a weight of 0 for every token that is not kept.

    VESPO would treat weights as ratios of the sampler, so it gets an advantage of 0 instead.
    """
    kept = kept.to(batch.logps.dtype)
    if settings.loss_type != "vespo":
        return {"token_weights": kept}
    advantages = batch.inputs["advantages"]
    return {"advantages": (advantages[:, None] if advantages.dim() == 1 else advantages) * kept}


@levels
@loss_types
def test_off_policy_mask_is_token_weights(trainer: Any, loss_type: str, level: str) -> None:
    """TRL's off-policy mask equals token weights of 0."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    sampled = batch.having(sampling_per_token_logps=batch.inputs["old_per_token_logps"].roll(1, 0))
    settings = Settings.of(loss_type, level, "KL", off_policy_mask_threshold=0.05)
    for each in (batch, per_token_advantages(batch), sampled):
        kept = kept_on_policy(each, 0.05)
        assert 0 < int((~kept).sum()) < kept.numel()
        assert_same_by_logits(trainer, settings, each, model, **masked_tokens(settings, each, kept))


@levels
@loss_types
def test_entropy_mask_is_token_weights(trainer: Any, loss_type: str, level: str) -> None:
    """Only tokens of high entropy learn, as in "Beyond the 80/20 Rule". The KL term keeps all tokens."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", top_entropy_quantile=0.33)
    kept = high_entropy(batch, 0.33)
    assert 0 < int(kept.sum()) < int(batch.mask.sum())
    for each in (batch, per_token_advantages(batch)):
        assert_same_by_logits(trainer, settings, each, model, **masked_tokens(settings, each, kept))


@loss_types
def test_weights_multiply(trainer: Any, loss_type: str) -> None:
    """Ratio, off-policy mask and entropy mask multiply. Tokens of a tool are not trained on."""
    model = logits_for_model(torch.float64)
    generator = torch.Generator().manual_seed(3)
    batch = rollout(trainer, model).having(tool_mask=(torch.rand(B, T, generator=generator) < 0.7).long())
    ratio = sampler_ratio(batch, "token_truncate")
    batch = per_token_advantages(batch).having(importance_sampling_ratio=ratio)
    settings = Settings.of(
        loss_type, "token", "KL", use_vllm=True, off_policy_mask_threshold=0.05, top_entropy_quantile=0.6
    )
    kept = kept_on_policy(batch, 0.05) & high_entropy(batch, 0.6)
    options = masked_tokens(settings, batch, kept)
    options["token_weights"] = ratio * options.get("token_weights", 1)
    assert_same_by_logits(trainer, settings, batch, model, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@loss_types
def test_accumulation(trainer: Any, loss_type: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three micro-batches on one of two ranks has TRL's loss. An evaluation does not accumulate."""
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(
        loss_type, "token", "KL", accumulation=3, steps_per_generation=6, training=training
    )
    normalizer = settings.normalizer(batch.inputs, processes=2)
    assert_same_by_logits(trainer, settings, batch, model, normalizer=normalizer)
    if loss_type in GLOBAL or not training:
        return
    # The same number as a normalizer replaces the division of our loss.
    sequences = AGGREGATION[loss_type].startswith("seq")
    count = 3 * (B if sequences else int(batch.mask.sum()))
    wanted = theirs(trainer, model, settings, batch)
    got = ours(grpo_loss, (model.logits,), replace(settings, accumulation=1), batch, normalizer=count)
    assert_same("loss", got.loss, wanted, 1e-12)


@levels
@loss_types
def test_entropy_bonus(trainer: Any, loss_type: str, level: str) -> None:
    """TRL's entropy bonus is a mean over the tokens of the micro-batch.

    Ours is divided by the normalizer if there is one. The coefficient makes up for it.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", entropy_coef=0.05, accumulation=3, steps_per_generation=2)
    spec = settings.spec()
    normalizer = settings.normalizer(batch.inputs)
    if normalizer is not None:
        tokens = int(batch.mask.sum()) * settings.accumulation
        spec = replace(spec, entropy_coef=settings.entropy_coef * float(normalizer) / tokens)
    assert_same_by_logits(trainer, settings, batch, model, spec=spec)


@pytest.mark.parametrize("delta", [None, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratio_on_its_bound(trainer: Any, level: str, delta: float | None) -> None:
    """A ratio exactly on its bound keeps the whole gradient.

    On-policy, with a clip range of width 0, every bound and every ratio is 1. From torch 2.14 on, a clamped
    value on its bound has no gradient. So TRL's has half of it, by its minimum of a clamped ratio and a free
    one, or none if both are clamped.
    """
    one = torch.ones((), requires_grad=True)
    clamp_keeps_it = bool(torch.autograd.grad(one.clamp(1, 1), one)[0])
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model).without("old_per_token_logps")
    settings = Settings.of("grpo", level, epsilon=0.0, epsilon_high=0.0, delta=delta)

    def grad(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, model.logits)[0]

    free = grad(ours(grpo_loss, (model.logits,), Settings.of("grpo", level), batch).loss)
    bound = grad(ours(grpo_loss, (model.logits,), settings, batch).loss)
    assert_same("ours, as without a bound", bound, free, 1e-10)
    share = 1.0 if clamp_keeps_it else 0.5 if delta is None else 0.0
    assert_same("TRL's", grad(theirs(trainer, model, settings, batch)), share * free, 1e-10)


def test_empty_batch(trainer: Any) -> None:
    """Loss and gradient of a batch without tokens are 0 in both."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    nothing = batch.having(completion_mask=torch.zeros_like(batch.mask), num_items_in_batch=torch.tensor(0))
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        settings = Settings.of(loss_type, level, "KL", entropy_coef=0.05)
        logits = model.logits.detach().clone().requires_grad_()
        got = ours(grpo_loss, (logits,), settings, nothing).loss
        for loss, leaf in ((theirs(trainer, model, settings, nothing), model.logits), (got, logits)):
            assert float(loss.detach()) == 0, settings
            assert not torch.autograd.grad(loss, leaf)[0].any(), settings
