"""Our losses in verl's `ppo_loss`, which adds KL and entropy bonus, and custom losses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from verl_cases import KL_COEF, LOSSES, MODES, Result, assert_same, random_batch, theirs
from verl_imported import GLOBAL, PREFIX, TWINS, VERLS_LOSSES, actor_loss, ours_in_verl

from grpo_kernels import DRO, KL, LossSpec, PPOClip, grpo_loss

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos

pytestmark = pytest.mark.usefixtures("integration")


@pytest.mark.parametrize("name", ["dapo", "gspo_token", "cispo", "sapo", "dro", "reinforce"])
def test_actor_loss(name: str) -> None:
    """verl's KL and entropy bonus are added in place to the loss that we return, with verl's result."""
    twin, batch = TWINS[name], random_batch(5, per_token=True).full()
    for mode in LOSSES[twin].modes:
        options = {"use_kl_loss": True, "kl_loss_coef": KL_COEF, "kl_loss_type": "k3+", "entropy_coeff": 0.2}
        expected = actor_loss(twin, twin, batch, mode, **options)
        found = actor_loss(PREFIX + name, twin, batch, mode, **options)
        assert_same(found, expected)
        for key in ("actor/pg_loss", "actor/entropy_loss", "kl_loss", "kl_coef"):
            assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_log_ratio(mode: str, warned: pytest.LogCaptureFixture) -> None:
    """The log-ratio is relative to the reference if verl computes one.

    Without a reference the gradient is the same, and one warning explains the value.
    """
    batch = random_batch(3, per_token=True).full()
    options = {"use_kl_loss": True, "kl_loss_coef": 0.0}
    found = actor_loss("log_ratio", "gpg", batch, mode, **options)
    log_ratio = batch.logps() - batch.ref_logps
    info = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 24, "loss_scale_factor": 40}
    losses = -batch.advantages * log_ratio * batch.weights
    torch.testing.assert_close(found.loss, core_algos.agg_loss(losses, batch.mask, mode, **info))
    assert not warned.records

    without = [actor_loss("log_ratio", "gpg", batch, mode, reference=False) for _ in range(2)]
    assert_same(without[0], actor_loss("gpg", "gpg", batch, mode))
    torch.testing.assert_close(without[0].grad, found.grad, rtol=1e-12, atol=0)
    assert abs(float(without[0].loss - found.loss)) > 1e-3
    (record,) = warned.records
    assert "use_kl_loss=True" in record.message


@pytest.mark.parametrize("mode", MODES)
def test_opmd(mode: str) -> None:
    """OPMD equals `grpo_loss` with a reference, and raises an error without one."""
    batch = (
        random_batch(3).full()._replace(advantages=random_batch(3).full().advantages[:, None].expand(6, 8))
    )
    found = actor_loss("grpo_kernels.opmd", "dro", batch, mode)
    leaf = batch.logits.clone().requires_grad_()
    count = {"token-mean": 300, "token-sum": 1}.get(mode, 24)
    loss = grpo_loss(
        leaf,
        batch.ids,
        batch.advantages,
        spec=LossSpec(DRO(beta=0.4, anchor="ref"), level="sequence", aggregation=mode, max_tokens=40),
        completion_mask=batch.mask,
        ref_logps=batch.ref_logps,
        token_weights=batch.weights,
        normalizer=count / 2,
        backend="torch",
    ).loss
    assert_same(found, Result(loss.detach(), torch.autograd.grad(loss, leaf)[0], {}))
    with pytest.raises(ValueError, match="ref_log_prob"):  # the reference of the batch before is not reused
        ours_in_verl("grpo_kernels.opmd", "dro", batch, mode)
    with pytest.raises(ValueError, match=r"grpo_kernels\.opmd.*use_kl_loss=True"):
        actor_loss("grpo_kernels.opmd", "dro", batch, mode, reference=False)


def test_registered_losses(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`register_loss` adds a spec or a callable, and refuses what verl cannot run."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    register = integration.register_loss
    with pytest.raises(ValueError, match="spec must be one of"):
        register("mine", "dapoo")
    with pytest.raises(TypeError, match="spec must be a LossSpec or the name of a preset"):
        register("mine", 3)
    for name in VERLS_LOSSES:
        with pytest.raises(ValueError, match=f"'{name}' of its own"):
            register(name, LossSpec())
    for spec in (LossSpec(entropy_coef=0.1), LossSpec(kl=KL("exact"))):
        with pytest.raises(ValueError, match="entropy_coeff"):
            register("mine", spec)
    # A preset that needs max_tokens gets verl's loss_scale_factor or the padded width, as verl's losses do.
    register("mine", "dr_grpo")
    batch, mode = random_batch(1).full(), "seq-mean-token-sum-norm"
    unclamped = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e9}
    batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
    for info in ({}, GLOBAL):
        options = {**unclamped, "global_batch_info": dict(info)}
        assert_same(theirs("mine", batch, mode, **options), theirs("vanilla", batch, mode, **options))

    batch = random_batch(2, per_token=True).full()
    for mode in MODES:
        register(
            "wide", LossSpec(PPOClip(eps_low=0.5, eps_high=2.0))
        )  # losses of ours may be registered again
        plain = ours_in_verl("wide", "vanilla", batch, mode)
        assert not torch.allclose(plain.grad, ours_in_verl("grpo_kernels.dapo", "vanilla", batch, mode).grad)
        register("with_kl", LossSpec(PPOClip(eps_low=0.5, eps_high=2.0), kl=KL("k2", beta=KL_COEF)))
        with pytest.raises(ValueError, match="use_kl_loss=True"):
            ours_in_verl("with_kl", "vanilla", batch, mode)
        # verl adds its penalty to the loss. Ours is part of the loss.
        options = {"use_kl_loss": True, "kl_loss_type": "k2"}
        expected = actor_loss("wide", "vanilla", batch, mode, kl_loss_coef=KL_COEF, **options)
        assert_same(actor_loss("with_kl", "vanilla", batch, mode, kl_loss_coef=0.0, **options), expected)

    def custom(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, A: Tensor, mask: Tensor) -> Tensor:
        return -A * logps if ref_logps is None else -A * (logps - ref_logps)

    register("custom", LossSpec(custom))
    weightless = batch._replace(weights=torch.ones_like(batch.weights))
    for reference in (False, True):
        found = actor_loss("custom", "gpg", weightless, "token-mean", reference=reference)
        assert_same(found, actor_loss("log_ratio", "gpg", weightless, "token-mean", reference=reference))
