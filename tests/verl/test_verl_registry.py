"""Our losses in verl's registry, after the import of the integration."""

from __future__ import annotations

import functools
from types import ModuleType

import pytest
import torch
from verl_cases import LOSSES, MODES, Batch, actor_config, assert_same, random_batch, theirs
from verl_imported import GLOBAL, PREFIX, TWINS, VERLS_LOSSES, ours_in_verl

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos

pytestmark = pytest.mark.usefixtures("integration")


def test_names(integration: ModuleType) -> None:
    """verl's registry has each preset under the prefix, `log_ratio` under its own name, and verl's losses."""
    registry = core_algos.POLICY_LOSS_REGISTRY
    added = registry.keys() - VERLS_LOSSES.keys()
    assert added == {"log_ratio"} | {PREFIX + preset for preset in integration.PRESET_NAMES}
    assert all(registry[name] is loss for name, loss in VERLS_LOSSES.items())


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("whole", [False, True], ids=["", "global"])
@pytest.mark.parametrize("name, mode", [(name, mode) for name in TWINS for mode in LOSSES[TWINS[name]].modes])
def test_losses(name: str, mode: str, whole: bool, weights: bool) -> None:
    """Value and gradient are those of verl's losses.

    verl's geo_mean counts every sequence and ignores other ranks.
    """
    twin = TWINS[name]
    for seed, per_token in [(0, False), (1, True)]:
        batch, info = random_batch(seed, per_token=per_token), GLOBAL if whole else {}
        if twin == "geo_mean":
            batch, info = batch.full(), {}
        options = {"weights": weights, "global_batch_info": dict(info)}
        assert_same(
            ours_in_verl(PREFIX + name, twin, batch, mode, **options), theirs(twin, batch, mode, **options)
        )


@pytest.mark.parametrize("mode", MODES)
def test_global_batch_of_gmpo(mode: str) -> None:
    """Micro-batches of different sizes add up to the batch, unlike those of verl's geo_mean."""
    batch = random_batch(0).full()
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 6}
    found = functools.partial(ours_in_verl, PREFIX + "gmpo", "geo_mean", mode=mode, global_batch_info=info)
    parts = [found(batch=Batch(*(x[part] for x in batch))) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, found(batch=batch).loss)


def test_metrics() -> None:
    """Metrics have verl's names and verl's values, as floats."""
    batch = random_batch(7)
    # verl's fraction for DPPO counts tokens without advantage.
    batch = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, -1.0))
    # One log-ratio exceeds verl's bound of 20, and none is below -20.
    batch = batch._replace(old_logps=batch.old_logps.where(batch.logps() - batch.old_logps > -20, -1.0))
    assert int((batch.logps() - batch.old_logps > 20)[batch.mask].sum()) == 1
    # The fractions of cispo and geo_mean also count the other side, so their meaning is different.
    of_verl_alone = {"sapo": {"actor/pg_clipfrac"}, "gspo": {"actor/pg_clipfrac_lower"}}
    fractions = {"vanilla": 2, "gspo": 1, "dppo_tv": 1, "dppo_kl": 1}
    for name, twin in TWINS.items():
        expected = theirs(twin, batch, LOSSES[twin].modes[0]).metrics
        found = ours_in_verl(PREFIX + name, twin, batch, LOSSES[twin].modes[0]).metrics
        assert all(type(value) is float for value in found.values())
        if twin == "gpg":  # gpg reports nothing
            expected = {"actor/ppo_kl": float((batch.old_logps - batch.logps())[batch.mask].mean())}
        assert found["actor/ppo_kl"] == pytest.approx(expected["actor/ppo_kl"], abs=1e-9)
        for key in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")[: fractions.get(twin, 0)]:
            # verl computes the mean in fp32 and divides by the number of tokens + 1e-8.
            assert found[key] == pytest.approx(expected[key], abs=1e-6)
            assert 0 < found[key] < 1, "all tokens are clipped, or none"
        assert not found.keys() & of_verl_alone.get(twin, set()), "a constant 0 is reported as a metric"


def test_ranks_without_global_counts() -> None:
    """With several ranks, the counts of the global batch are required, as by verl."""
    batch = random_batch(0)
    for mode in MODES:
        config = {"mode": mode, "global_batch_info": {"dp_size": 2}}
        if mode == "token-sum":
            assert_same(ours_in_verl("log_ratio", "gpg", batch, **config), theirs("gpg", batch, **config))
            continue
        for run in (
            functools.partial(ours_in_verl, "log_ratio", "gpg", batch),
            functools.partial(theirs, "gpg", batch),
        ):
            with pytest.raises(
                ValueError, match="batch_num_tokens" if mode == "token-mean" else "global_batch_size"
            ):
                run(**config)


def test_empty_batches_and_masked_positions() -> None:
    """A batch without tokens has loss 0, and values at masked positions have no effect."""
    batch = random_batch(0)
    empty = batch._replace(mask=torch.zeros_like(batch.mask))
    dirty = batch._replace(old_logps=batch.old_logps.where(batch.mask, torch.nan))
    for mode in MODES:
        found = ours_in_verl("grpo_kernels.dapo", "vanilla", empty, mode)
        assert float(found.loss) == 0 and bool((found.grad == 0).all())
        assert set(found.metrics.values()) == {0.0}
        clean, found = (ours_in_verl("grpo_kernels.dapo", "vanilla", x, mode) for x in (batch, dirty))
        assert torch.equal(found.loss, clean.loss) and torch.equal(found.grad, clean.grad)
        assert found.metrics == clean.metrics


def test_verl_chooses_the_aggregation(warned: pytest.LogCaptureFixture) -> None:
    """The aggregation is verl's, with one warning if the preset's own is different."""
    batch = random_batch(0)
    for _ in range(2):
        ours_in_verl("grpo_kernels.luspo", "vanilla", batch, "token-mean")
        ours_in_verl("grpo_kernels.luspo", "vanilla", batch, "seq-mean-token-sum")
    (record,) = warned.records
    assert "grpo_kernels.luspo" in record.message and "loss_agg_mode=token-mean" in record.message
    with pytest.raises(ValueError, match="aggregation"):
        core_algos.get_policy_loss_fn("log_ratio")(
            *(batch.old_logps, batch.logps(), batch.old_logps, batch.mask), "mean", actor_config("vanilla")
        )


def test_missing_options() -> None:
    """Missing and contradictory options raise an error that names them."""
    batch = random_batch(0)
    with pytest.raises(ValueError, match="dro_beta"):
        theirs("grpo_kernels.dro", batch)
    with pytest.raises(ValueError, match="dual_clip"):
        theirs("grpo_kernels.dapo", batch, clip_ratio_c=1.0)
