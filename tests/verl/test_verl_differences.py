"""The cases in which verl's losses differ from ours, and the options with which they agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from verl_cases import (
    CLAMP,
    KL_COEF,
    KLS,
    LOSSES,
    LOW_VAR_KL,
    MODES,
    WIDTH,
    Batch,
    assert_same,
    differ,
    error,
    ours,
    random_batch,
    theirs,
)

from grpo_kernels import DPPO, KL, LossSpec, PPOClip, grpo_loss

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("seq")])
def test_a_sequence_without_tokens(mode: str) -> None:
    """verl leaves a sequence without tokens out of the mean over sequences. We count it, as TRL does.

    `normalizer` chooses between the two.
    """
    batch = random_batch(0)
    assert batch.sequences == 6 and len(batch.mask) == 7
    spec = replace(LOSSES["vanilla"].spec, aggregation=mode, max_tokens=WIDTH)
    expected, alone = theirs("vanilla", batch, mode), ours(spec, batch)
    assert_same(alone._replace(loss=alone.loss * 7 / 6, grad=alone.grad * 7 / 6), expected)
    assert_same(ours(spec, batch, normalizer=6.0), expected)
    assert_same(ours(spec, batch.full()), theirs("vanilla", batch.full(), mode))


def test_geo_mean_counts_a_sequence_without_tokens() -> None:
    """geo_mean counts a sequence without tokens, unlike verl's other losses and unlike its KL term."""
    batch = random_batch(0)
    spec = replace(LOSSES["geo_mean"].spec, aggregation="seq-mean-token-mean")
    assert_same(ours(spec, batch), theirs("geo_mean", batch))
    assert differ(ours(spec, batch, normalizer=6.0), theirs("geo_mean", batch))
    with_kl = replace(spec, kl=KLS["k3"])
    expected = theirs("geo_mean", batch, "seq-mean-token-mean", "k3")
    assert differ(ours(with_kl, batch), expected)
    assert differ(ours(with_kl, batch, normalizer=6.0), expected)


@pytest.mark.parametrize("name", ["sapo", "geo_mean"])
def test_two_losses_ignore_loss_agg_mode(name: str) -> None:
    """sapo and geo_mean ignore loss_agg_mode."""
    batch = random_batch(0).full()
    first = theirs(name, batch, "seq-mean-token-mean")
    for mode in MODES:
        assert_same(theirs(name, batch, mode), first)
        spec = replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH)
        assert differ(ours(spec, batch), first) == (mode != "seq-mean-token-mean")


def test_geo_mean_ignores_the_global_batch() -> None:
    """geo_mean ignores the global batch, so micro-batches of different sizes do not add up to it.

    With `normalizer`, ours do.
    """
    batch = random_batch(0).full()
    halves = [Batch(*(x[part] for x in batch)) for part in (slice(0, 2), slice(2, 6))]
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 6}
    whole = theirs("geo_mean", batch, global_batch_info=info).loss
    verl = sum(theirs("geo_mean", half, global_batch_info=info).loss for half in halves)
    assert abs(float(verl / whole) - 1) > 0.1
    spec = replace(LOSSES["geo_mean"].spec, aggregation="seq-mean-token-mean")
    added = sum(ours(spec, half, normalizer=6.0).loss for half in halves)
    assert float(added) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("name, mode", [(name, entry.modes[0]) for name, entry in LOSSES.items()])
def test_a_batch_without_tokens(name: str, mode: str) -> None:
    """Without tokens verl's loss is 0 / 0 and ours is 0. Both gradients are 0."""
    batch = random_batch(0)
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    expected = theirs(name, batch, mode)
    assert bool(expected.loss.isnan()) == (name != "geo_mean")
    found = ours(replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH), batch)
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all()) and bool((expected.grad == 0).all())


@pytest.mark.parametrize(
    "name, mode, verl_loss, verl_gradient",
    [
        ("vanilla", "token-mean", True, True),  # the clamp has no gradient there
        ("vanilla", "seq-mean-token-mean", False, True),
        ("gspo", "token-mean", False, True),
        ("geo_mean", "seq-mean-token-mean", False, False),
        ("dro", "token-mean", True, False),
        ("cispo", "token-mean", True, False),
        ("dppo_tv", "seq-mean-token-sum", False, False),
    ],
)
def test_nan_at_a_masked_position(name: str, mode: str, verl_loss: bool, verl_gradient: bool) -> None:
    """NaN in old_logps at a masked position never reaches our result.

    Whether it reaches verl's depends on loss and aggregation.
    """
    batch = random_batch(0).full()
    spec = replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH)
    clean = ours(spec, batch)
    assert_same(clean, theirs(name, batch, mode))
    batch = batch._replace(old_logps=batch.old_logps.where(batch.mask, torch.nan))
    found, expected = ours(spec, batch), theirs(name, batch, mode)
    assert torch.equal(found.loss, clean.loss) and torch.equal(found.grad, clean.grad)
    assert bool(expected.loss.isfinite()) == verl_loss
    assert bool(expected.grad.isfinite().all()) == verl_gradient


@pytest.mark.parametrize("name", ["vanilla", "gspo", "geo_mean", "sapo", "cispo", "dppo_tv", "dppo_kl"])
def test_infinite_ratio_without_advantage(name: str) -> None:
    """The gradient of an infinite ratio without advantage is 0, with a clamp and without.

    verl's clamps prevent 0 * inf. geo_mean has no clamp.
    """
    batch = random_batch(0).full()
    batch = batch._replace(old_logps=batch.old_logps.clone())
    batch.old_logps[2, 0] = -torch.inf
    assert float(batch.advantages[2]) == 0
    expected = theirs(name, batch, LOSSES[name].modes[0])
    assert bool(expected.loss.isfinite()) == (name != "geo_mean")
    for clamp in (LOSSES[name].spec.log_ratio_clamp, None):
        spec = replace(LOSSES[name].spec, aggregation=LOSSES[name].modes[0], log_ratio_clamp=clamp)
        found = ours(spec, batch)
        assert bool((found.grad[2] == 0).all())
        assert bool(found.grad.isfinite().all())
        if clamp is not None:
            assert_same(found, expected)


def test_gspo_is_clamped_from_above_only() -> None:
    """verl bounds the ratio of gspo at exp(10) from above, in value and gradient.

    `log_ratio_clamp=10` is that bound, and a bound from below that verl does not have.
    """
    batch = random_batch(0).full()
    level = torch.tensor([12.0, 9.0, 11.0, -9.0, -12.0, 0.1], dtype=torch.float64)
    batch = batch.with_log_ratio(level[:, None] + 0.1 * batch.advantages[:, None])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    batch = batch._replace(advantages=advantages)
    above = Batch(*(x[:4] for x in batch))
    spec = LOSSES["gspo"].spec
    expected = theirs("gspo", above)
    assert bool((expected.grad[0] == 0).all()) and bool((expected.grad[1] != 0).any())
    assert_same(ours(replace(spec, log_ratio_clamp=10.0), above), expected)
    assert differ(ours(spec, above), expected)
    below = Batch(*(x[4:] for x in batch))
    expected = theirs("gspo", below)
    assert bool((expected.grad[0] != 0).any())
    assert_same(ours(spec, below), expected)
    assert bool((ours(replace(spec, log_ratio_clamp=10.0), below).grad[0] == 0).all())


def test_a_floating_point_mask_costs_verl_digits() -> None:
    """verl adds 1e-8 to the lengths, which changes the loss only if the mask is fp64.

    Masks of bool and integers become fp32, in which 1e-8 vanishes.
    """
    batch = random_batch(0).full()
    for name in ("vanilla", "geo_mean"):
        spec = replace(LOSSES[name].spec, aggregation="seq-mean-token-mean")
        found = ours(spec, batch)
        for dtype in (torch.bool, torch.int64, torch.float32):
            assert_same(found, theirs(name, batch, "seq-mean-token-mean", mask=batch.mask.to(dtype)))
        inexact = theirs(name, batch, "seq-mean-token-mean", mask=batch.mask.double())
        assert 1e-10 < error(inexact.loss, found.loss) < 1e-7


def test_a_tie_at_the_dual_clip() -> None:
    """At a ratio exactly on the dual clip, verl halves the gradient, as torch.min does. Ours keeps it."""
    one = random_batch(0).full()
    batch = Batch(
        *(x[1:2, :1] if x.dim() > 1 else x[1:2] for x in one)
    )  # one token, with a negative advantage
    batch = batch._replace(logits=torch.zeros(1, 1, 2, dtype=torch.float64), ids=batch.ids * 0)
    batch = batch._replace(old_logps=batch.logps() * 2, advantages=-torch.ones_like(batch.advantages))
    assert float((batch.logps() - batch.old_logps).exp()) == 2
    spec = replace(LOSSES["vanilla"].spec, surrogate=PPOClip(dual_clip=2.0))
    found, expected = ours(spec, batch), theirs("vanilla", batch, clip_ratio_c=2.0)
    assert float(found.loss) == float(expected.loss) == 2
    torch.testing.assert_close(found.grad, 2 * expected.grad)
    # At PPO's own bound, both keep the gradient.
    spec = replace(spec, surrogate=PPOClip(eps_high=1.0))
    batch = batch._replace(advantages=-batch.advantages)
    found, expected = ours(spec, batch), theirs("vanilla", batch, clip_ratio_high=1.0)
    assert_same(found, expected)


def test_the_cap_of_dppo() -> None:
    """DPPO's cap is 3 in verl, the default of `ActorConfig.clip_ratio_c`.

    The default in verl's functions is 20, but the config always replaces it.
    """
    batch = random_batch(0)
    thresholds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    expected = theirs("dppo_tv", batch, clip_ratio_c=ActorConfig.clip_ratio_c, **thresholds)
    assert differ(ours(LossSpec(DPPO("tv"), log_ratio_clamp=CLAMP), batch), expected)
    assert_same(ours(LossSpec(DPPO("tv", ratio_cap=3.0), log_ratio_clamp=CLAMP), batch), expected)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_trust_region_of_certain_tokens(name: str) -> None:
    """DPPO's trust region agrees for tokens that have become certain.

    Without verl's epsilon their binary KL would be infinite. Their gradient is 0 inside and outside of the
    region, so only the fraction outside shows a difference.
    """
    batch = random_batch(0).full()
    batch = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, 1.0))
    logits = torch.zeros_like(batch.logits).scatter(-1, batch.ids[..., None], 60.0)  # a probability of 1
    logits[:, ::2] = batch.logits[:, ::2]
    batch = batch._replace(logits=logits)
    steps = torch.tensor([1e-13, 1e-10, 1e-8, 1e-3, 1e-2, 1.0, 3.0, 30.0], dtype=torch.float64)
    batch = batch._replace(old_logps=-steps.expand(batch.mask.shape))
    expected = theirs(name, batch)
    found = ours(LOSSES[name].spec, batch)
    assert_same(found, expected)
    assert float(batch.logps()[0, 3].exp()) == 1
    clipped = expected.metrics["actor/pg_clipfrac"]
    assert 0 < clipped < 1 and float(found.metrics["clip_fraction"]) == pytest.approx(clipped, abs=1e-6)


def test_low_var_kl_has_no_gradient_beyond_its_clamp() -> None:
    """If k3 exceeds 10, verl's clamp removes the gradient of low_var_kl. k3 alone keeps it.

    This begins at ref_logp - logp = 2.6.
    """
    batch = random_batch(0).full()
    batch = batch._replace(ref_logps=batch.logps() + 3.0, advantages=torch.zeros_like(batch.advantages))
    expected = theirs("vanilla", batch, "token-mean", "low_var_kl")
    assert float(expected.loss) == pytest.approx(KL_COEF * 10) and bool((expected.grad == 0).all())
    found = ours(replace(LOSSES["vanilla"].spec, kl=LOW_VAR_KL), batch)
    assert float(found.loss) == pytest.approx(KL_COEF * 10) and bool((found.grad == 0).all())
    free = ours(replace(LOSSES["vanilla"].spec, kl=KL("k3", beta=KL_COEF)), batch)
    assert bool((free.grad[batch.mask] != 0).any(-1).all())


def test_digits_of_k3() -> None:
    """At x = 1e-4, verl's k3 keeps no digit in fp32, and ours keeps two.

    exp(x) - x - 1 cancels. k3 is 5e-9 there.
    """
    x = torch.tensor([1e-4, -3e-4, 1e-3])
    exact = torch.expm1(x.double()) - x.double()
    verl = core_algos.kl_penalty(-x, torch.zeros_like(x), "k3").double()
    assert float(((verl - exact) / exact).abs().max()) > 0.1
    for x_t, value in zip(x, exact, strict=True):
        out = grpo_loss(
            torch.zeros(1, 1, 1, requires_grad=True),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1),
            spec=LossSpec(kl=KL("k3", beta=1.0)),
            ref_logps=x_t.view(1, 1),
            backend="torch",
        )
        assert float(out.loss.detach()) == pytest.approx(float(value), rel=1e-2)


def test_digits_of_sapo() -> None:
    """For large ratios, verl's gradient of SAPO keeps no digit in fp32, because 1 - sigmoid(x) cancels."""
    batch = random_batch(0).full()
    ratios = torch.tensor([10.0, 14.0, 18.0], dtype=torch.float64)
    batch = batch.with_log_ratio(ratios.log().repeat(3)[:8].expand(batch.mask.shape))
    batch = batch._replace(advantages=torch.ones_like(batch.advantages))
    spec = LossSpec.preset("sapo")
    exact = ours(spec, batch).grad[batch.mask]
    single = Batch(*(x.float() if x.is_floating_point() else x for x in batch))
    single = single._replace(old_logps=single.logps() - ratios.log().float().repeat(3)[:8])
    defaults = {"tau_pos": 1.0, "tau_neg": 1.05}

    def worst(grad: Tensor) -> float:
        rows = grad[batch.mask].double()
        return float(((rows - exact).norm(dim=-1) / exact.norm(dim=-1)).max())

    assert worst(ours(spec, single).grad) < 1e-3
    assert worst(theirs("sapo", single, "seq-mean-token-mean", **defaults).grad) > 0.2


def test_kl_over_the_whole_vocabulary() -> None:
    """We offer the KL over the whole vocabulary. verl has a name for it and no implementation."""
    batch = random_batch(0)
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(batch.logits, batch.logits, "full")
    out = grpo_loss(
        batch.logits.clone().requires_grad_(),
        batch.ids,
        batch.advantages,
        spec=LossSpec(None, kl=KL("exact", beta=1.0)),
        completion_mask=batch.mask,
        ref_logits=batch.logits.flip(-1),
        backend="torch",
    )
    log_p = torch.log_softmax(batch.logits, -1)
    expected = (log_p.exp() * (log_p - log_p.flip(-1))).sum(-1)[batch.mask].mean()
    torch.testing.assert_close(out.loss.detach(), expected)
