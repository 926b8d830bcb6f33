"""The cases in which our losses differ from TRL's by design, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import (
    ADVANTAGES,
    CLIPPED,
    DTYPES,
    GLOBAL,
    B,
    LogitsForModel,
    Rollout,
    Settings,
    T,
    assert_same,
    assert_same_by_logits,
    both_gradients,
    high_entropy,
    logits_for_model,
    loss_types,
    ours,
    rollout,
    theirs,
)

from grpo_kernels import LossSpec, grpo_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def overflowing(batch: Rollout, rows: Tensor) -> Rollout:
    """Make the ratios of the sequences `rows` exp(100), which is infinite in fp32."""
    old = batch.inputs["old_per_token_logps"].clone()
    old[rows] = batch.logps[rows] - 100
    return batch.having(old_per_token_logps=old)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "sapo", "cispo", "vespo"])
def test_infinite_ratio_without_advantage(trainer: Any, loss_type: str) -> None:
    """An infinite ratio times an advantage of 0 is NaN in TRL, and 0 here.

    With the clipped ratio TRL's loss is NaN. With SAPO its gradient is NaN. TRL's CISPO and VESPO bound the
    ratio first and are not affected. Our results are those of the batch without that ratio.
    """
    model = logits_for_model(torch.float32)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type)
    harmless, harmless_grad, _, _ = both_gradients(trainer, settings, batch, model)
    wanted, wanted_grad, got, got_grad = both_gradients(
        trainer, settings, overflowing(batch, ADVANTAGES == 0), model
    )
    bounded = loss_type in ("cispo", "vespo")
    assert bool(wanted.isnan()) == (loss_type in CLIPPED)
    assert bool(wanted_grad.isnan().any()) == (not bounded)
    if bounded:
        assert_same("their gradient", wanted_grad, harmless_grad, 1e-5)
    assert_same("loss", got, harmless, 1e-5)
    assert_same("gradient", got_grad, harmless_grad, 1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "cispo", "vespo"])
def test_infinite_ratio_beyond_the_bound(trainer: Any, loss_type: str) -> None:
    """The gradient of a clipped token with an infinite ratio is NaN in TRL, and 0 here.

    TRL selects the value and multiplies the derivative, 0, by the ratio. CISPO and VESPO detach the ratio, so
    both agree there.
    """
    model = logits_for_model(torch.float32)
    large = ADVANTAGES.abs() > 1  # of either sign: delta bounds the ratios that the clip range does not
    batch = overflowing(rollout(trainer, model), large)
    settings = Settings.of(loss_type, delta=4.0)
    wanted, wanted_grad, got, got_grad = both_gradients(trainer, settings, batch, model)
    assert_same("loss", got, wanted, 1e-5)
    rows = large[:, None] & batch.mask.bool()
    if loss_type in ("cispo", "vespo"):
        assert_same("gradient", got_grad, wanted_grad, 1e-5)
        return
    assert wanted_grad[rows].isnan().all()
    assert not got_grad[rows].any()
    assert_same("other rows", got_grad[~rows], wanted_grad[~rows], 1e-5)


def test_saturated_sapo(trainer: Any) -> None:
    """For ratios of 5 to 11, the gradient of TRL's SAPO keeps no digit in fp32, and ours keeps four.

    TRL's derivative contains 1 - sigmoid(x), which cancels. Ours is computed from sigmoid(-x). The loss
    itself agrees.
    """
    found = {}
    for name, dtype in DTYPES.items():
        model = LogitsForModel(logits_for_model(torch.float32).logits.detach().to(dtype))
        batch = rollout(trainer, model)
        ratio = torch.linspace(5, 11, B * T, dtype=dtype).view(B, T)
        batch = batch.having(old_per_token_logps=(batch.logps - ratio.log()) * batch.mask)
        found[name] = [x.double() for x in both_gradients(trainer, Settings.of("sapo"), batch, model)]
    truth, truth_grad, got, got_grad = found["fp64"]
    kept = batch.mask.bool() & (ADVANTAGES != 0)[:, None]
    size = truth_grad.abs().amax(-1)[kept]

    def worst_row(grad: Tensor) -> float:
        return float(((grad - truth_grad).abs().amax(-1)[kept] / size).max())

    assert_same("fp64", got, truth, 1e-12)
    assert worst_row(got_grad) < 1e-6
    wanted, wanted_grad, got, got_grad = found["fp32"]
    assert_same("loss", got, wanted, 1e-5)
    assert worst_row(wanted_grad) > 0.5
    assert worst_row(got_grad) < 1e-4


@loss_types
def test_masked_positions(trainer: Any, loss_type: str) -> None:
    """NaN at a masked position reaches TRL's loss, because NaN * 0 is NaN. It never reaches ours."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, penalty="KL")
    harmless, harmless_grad, _, _ = both_gradients(trainer, settings, batch, model)
    masked = batch.mask == 0
    spoiled = batch.having(
        **{
            name: batch.inputs[name].masked_fill(masked, torch.nan)
            for name in ("old_per_token_logps", "ref_per_token_logps")
        }
    )
    wanted, _, got, got_grad = both_gradients(trainer, settings, spoiled, model)
    assert wanted.isnan()
    assert_same("loss", got, harmless, 1e-10)
    assert_same("gradient", got_grad, harmless_grad, 1e-10)


def test_small_divergence(trainer: Any) -> None:
    """At a distance of 1e-4 nats, TRL's k3 keeps no digit in fp32, and ours is right to 6 %.

    k3 is 5e-9 there. exp(x) - x - 1 cancels, and expm1(x) - x does not.
    """
    found = {}
    for name, dtype in DTYPES.items():
        model = LogitsForModel(logits_for_model(torch.float32).logits.detach().to(dtype))
        batch = rollout(trainer, model)
        # Both dtypes get the x that fp32 can represent.
        wide = rollout(trainer, LogitsForModel(model.logits.detach().double())).logps
        ref = ((wide.float() + 1e-4) * batch.mask).to(dtype)
        batch = batch.having(ref_per_token_logps=ref, advantages=torch.zeros(B, dtype=dtype))
        settings = Settings.of("bnpo", penalty="KL")
        found[name] = both_gradients(trainer, replace(settings, beta=1.0), batch, model)
    truth, truth_grad, _, _ = found["fp64"]
    assert_same("fp64", found["fp64"][2], truth, 1e-7)
    wanted, wanted_grad, got, got_grad = (x.double() for x in found["fp32"])
    assert float((wanted - truth).abs() / truth) > 0.9
    # A log-probability near -10 is a difference of rounded numbers. In fp32 it is right to 3e-6, 0.03 of the
    # distance. k3 is about half the square of the distance.
    assert float((got - truth).abs() / truth) < 0.06
    assert_same("our gradient", got_grad, truth_grad, 0.03)
    assert_same("their gradient", wanted_grad, truth_grad, 0.03)


@pytest.mark.parametrize("loss_type", GLOBAL)
def test_entropy_bonus_of_two_micro_batches(trainer: Any, loss_type: str) -> None:
    """With a normalizer, the entropy bonuses of two micro-batches sum to the mean over all their tokens.

    TRL's sum to the mean of the two means, which gives the tokens of the shorter micro-batch a larger weight.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    halves = [torch.arange(B) % 5 < 2, torch.arange(B) % 5 >= 2]
    settings = Settings.of(loss_type, accumulation=2, steps_per_generation=2)
    bonus = replace(settings, entropy_coef=1.0)
    window = batch.mask.sum()
    sums, means = {"theirs": 0.0, "ours": 0.0}, []
    for rows in halves:
        part = Rollout(
            {name: x[rows] for name, x in batch.inputs.items() if x.dim()} | {"num_items_in_batch": window},
            batch.logps[rows],
            batch.entropies[rows],
        )
        logits = LogitsForModel(model.logits.detach()[rows].clone())
        means.append(float(part.entropies.sum() / part.mask.sum()))
        for name, loss in (
            ("theirs", lambda s, logits=logits, part=part: theirs(trainer, logits, s, part)),
            ("ours", lambda s, logits=logits, part=part: ours(grpo_loss, (logits.logits,), s, part).loss),
        ):
            sums[name] -= float((loss(bonus) - loss(settings)).detach())
    assert sums["ours"] == pytest.approx(float(batch.entropies.sum() / window), rel=1e-9)
    assert sums["theirs"] == pytest.approx(sum(means) / 2, rel=1e-9)
    assert abs(sums["theirs"] / sums["ours"] - 1) > 1e-3


def test_entropy_bonus_of_high_entropy_tokens(trainer: Any) -> None:
    """TRL's entropy mask also restricts the entropy bonus. Our token weights do not.

    Without a KL term, TRL's loss is ours with all but those tokens masked, scaled to its own means.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of("bnpo", entropy_coef=0.05, top_entropy_quantile=0.33)
    kept = high_entropy(batch, 0.33)
    without = replace(settings, entropy_coef=0.0)
    wanted = float(
        (theirs(trainer, model, without, batch) - theirs(trainer, model, settings, batch)).detach()
    )
    weights = {"token_weights": kept.double()}
    surrogate = ours(grpo_loss, (model.logits,), without, batch, **weights)
    bonus = surrogate.loss - ours(grpo_loss, (model.logits,), settings, batch, **weights).loss
    got = float(bonus.detach())
    assert wanted == pytest.approx(0.05 * float(batch.entropies[kept].mean()), rel=1e-9)
    assert got == pytest.approx(0.05 * float(batch.entropies.sum() / batch.mask.sum()), rel=1e-9)
    assert wanted > 1.2 * got


def test_vespo_treats_token_weights_as_sampler_ratios(trainer: Any) -> None:
    """VESPO treats token weights as ratios of the sampler, so a weight of 0 affects the whole sequence.

    TRL's entropy mask and off-policy mask multiply token by token instead: see `masked_tokens`.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    kept = high_entropy(batch, 0.33).double()
    settings = Settings.of("vespo", top_entropy_quantile=0.33)
    as_weights = both_gradients(trainer, settings, batch, model, token_weights=kept)
    folded = batch.having(importance_sampling_ratio=kept.where(batch.mask.bool(), 1))
    wanted = theirs(trainer, model, replace(settings, top_entropy_quantile=1.0), folded)
    assert_same("folded", as_weights[2], wanted, 1e-10)
    assert abs(float(as_weights[2] / as_weights[0]) - 1) > 0.1


def test_vespo_at_sequence_level(trainer: Any) -> None:
    """We refuse VESPO at sequence level, and TRL accepts it with a warning.

    VESPO has one weight per sequence at either level. In TRL, the level still chooses the ratio that corrects
    the KL term.
    """
    settings = Settings.of("vespo", "sequence", "KL, corrected")
    with pytest.raises(ValueError, match="VESPO takes level 'token'"):
        LossSpec(settings.surrogate(), level="sequence")
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    wanted, _, got, _ = both_gradients(trainer, settings, batch, model)
    by_token = theirs(trainer, model, replace(settings, level="token"), batch)
    assert_same("by token", got, by_token, 1e-10)
    assert abs(float(wanted / got) - 1) > 1e-3
    # The rest of TRL's loss is the KL term that any loss has at sequence level.
    penalty = LossSpec(None, settings.spec().kl, level="sequence", aggregation="token-mean")
    alone = ours(grpo_loss, (model.logits,), settings, batch, spec=penalty).loss
    surrogate = replace(settings.spec(), kl=None)
    assert_same(
        "sum", ours(grpo_loss, (model.logits,), settings, batch, spec=surrogate).loss + alone, wanted, 1e-10
    )


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_rounded_numbers(trainer: Any, loss_type: str) -> None:
    """TRL's constants have seven digits in fp64, because `torch.where` of two Python numbers is fp32."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    numbers = {"sapo_temperatures": (1.3, 1.7), "vespo": (1.9, 2.7, 2.6, 1.6)}
    settings = Settings.of(loss_type, **numbers)
    wanted, _, got, _ = both_gradients(trainer, settings, batch, model)
    assert_same("to seven digits", got, wanted, 1e-6)
    assert abs(float(got / wanted) - 1) > 1e-10
    rounded = {name: tuple(torch.tensor(values).tolist()) for name, values in numbers.items()}
    assert_same_by_logits(trainer, settings, batch, model, spec=Settings.of(loss_type, **rounded).spec())
