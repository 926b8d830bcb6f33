"""Weights, rejection masks and metrics equal those of verl's rollout correction, in fp64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from verl_cases import LOSSES, assert_same, ours, random_batch, theirs

from grpo_kernels import importance_weights, mismatch_metrics, rejection_mask

pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")

from verl.trainer.ppo import rollout_corr_helper as verl_corr

# One threshold per option of verl. Each keeps some tokens of the batch and rejects others. That of a k1
# bounds the ratio of sampler and trainer, whose logarithm k1 is; see `kept`.
THRESHOLDS = {
    "token_k1": "0.5_1.9",
    "token_k2": "0.3",
    "token_k3": "0.25",
    "seq_sum_k1": "0.4_1.5",
    "seq_sum_k2": "1.2",
    "seq_sum_k3": "1.0",
    "seq_mean_k1": "0.8_1.2",
    "seq_mean_k2": "0.25",
    "seq_mean_k3": "0.2",
    "seq_max_k2": "0.9",
    "seq_max_k3": "0.8",
}
OVER = {
    "token": "token",
    "seq_sum": "sequence-sum",
    "seq_mean": "sequence-mean",
    "seq_max": "sequence-max",
}


class Tokens(NamedTuple):
    logps: Tensor  # [B, T]
    sampler_logps: Tensor  # [B, T]
    mask: Tensor  # [B, T]

    @property
    def log_ratio(self) -> Tensor:
        return self.logps - self.sampler_logps


LENGTHS = torch.tensor([8, 1, 5, 0, 7, 3, 8, 6, 2, 4])


def tokens(*, empty: bool = True) -> Tokens:
    """Sequences of several lengths and sizes of mismatch. One has no token, and one has a gap."""
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(10, 8, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.1, 2, 0.6, 1, 1.0, 0.3, 1.5, 0.8, 1.2, 0.05], dtype=torch.float64)[:, None]
    log_ratio = scale * torch.randn(10, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(8) < LENGTHS[:, None]
    mask[4, 2] = False
    batch = Tokens(logps, logps - log_ratio, mask.long())
    return batch if empty else Tokens(*(x[LENGTHS > 0] for x in batch))


def kept(option: str, batch: Tokens) -> Tensor:
    """Return our mask for an option of verl's `rollout_rs` and its threshold."""
    over, kind = option.rsplit("_", 1)
    low, _, high = THRESHOLDS[option].rpartition("_")
    bounds = {"high": float(high)}
    if kind == "k1":
        bounds = {"low": math.log(float(low)), "high": math.log(float(high))}
    return rejection_mask(*batch, statistic=kind, over=OVER[over], **bounds)


def test_every_option_is_compared() -> None:
    assert THRESHOLDS.keys() == verl_corr.SUPPORTED_ROLLOUT_RS_OPTIONS


COMBINATIONS = [
    *((option,) for option in THRESHOLDS),
    *itertools.combinations(THRESHOLDS, 2),
    tuple(THRESHOLDS),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=",".join)
def test_rejection(options: tuple[str, ...]) -> None:
    """Options that verl chains are masks that multiply."""
    batch = tokens()
    want, metrics = verl_corr.compute_rollout_rejection_mask(
        batch.log_ratio, batch.mask, ",".join(options), ",".join(THRESHOLDS[option] for option in options)
    )
    got = torch.ones(batch.mask.shape, dtype=torch.float64)
    for option in options:
        got = got * kept(option, batch)
    assert torch.equal(got * batch.mask, want.double())
    if len(options) == 1:
        assert 0 < int(want.sum()) < int(batch.mask.sum())
    shares = mismatch_metrics(*batch, weights=got)
    assert float(shares["reject_fraction"]) == pytest.approx(metrics["rollout_rs_masked_fraction"], rel=1e-7)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threshold", [2.0, 1.1, "0.3_3.0", "0.5_2.0"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights(level: str, threshold: float | str, normalize: bool) -> None:
    """Truncation (one threshold), IcePop (two), and batch normalization of each."""
    batch = tokens()
    want, metrics = verl_corr.compute_rollout_correction_weights(
        batch.log_ratio, batch.mask, level, threshold, rollout_is_batch_normalize=normalize
    )
    low, _, high = str(threshold).rpartition("_")
    bounds = {"low": float(low) if low else None, "high": float(high)}
    mode = "mask" if low else "truncate"
    got = importance_weights(*batch, level=level, mode=mode, normalize=normalize, **bounds)
    torch.testing.assert_close(got * batch.mask, want, rtol=1e-7, atol=0)
    # verl's metrics are those of the weights before it normalizes.
    weights = importance_weights(*batch, level=level, mode=mode, **bounds)
    found = mismatch_metrics(*batch, weights=weights, low=bounds["low"] or 1 / float(high), high=float(high))
    near = {"weight_mean": "rollout_is_mean", "weight_ess": "rollout_is_eff_sample_size"}
    if level == "token":
        near["clip_fraction_low"] = "rollout_is_ratio_fraction_low"
        near["clip_fraction_high"] = "rollout_is_ratio_fraction_high"
    for ours_name, name in near.items():
        assert float(found[ours_name]) == pytest.approx(metrics[name], rel=1e-7), name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options", [("token_k1",), ("seq_mean_k1", "token_k3"), ("seq_max_k2", "seq_sum_k1")]
)
def test_weights_and_rejection(level: str, options: tuple[str, ...]) -> None:
    """Weights times masks equal verl's weights in its modified response mask: no ratio counts twice."""
    batch = tokens()
    found, response_mask, _ = verl_corr.compute_rollout_correction_and_rejection_mask(
        *batch,
        rollout_is=level,
        rollout_is_threshold=1.5,
        rollout_rs=",".join(options),
        rollout_rs_threshold=",".join(THRESHOLDS[option] for option in options),
    )
    want = found.batch["rollout_is_weights"] * response_mask
    got = importance_weights(*batch, level=level, mode="truncate", high=1.5)
    for option in options:
        got = got * kept(option, batch)
    torch.testing.assert_close(got * batch.mask, want, rtol=1e-12, atol=0)
    assert bool((want > 1).any()) and bool((want == 0)[batch.mask.bool()].any())


def test_the_loss_of_rejected_tokens() -> None:
    """verl takes rejected tokens out of the mask, and so out of the denominator."""
    batch = random_batch(0)
    sampled = Tokens(batch.old_logps, (batch.old_logps - batch.advantages[:, None] / 4), batch.mask)
    keep = rejection_mask(*sampled, statistic="k2", over="sequence-max", high=0.05)
    assert 0 < int(keep.sum()) < len(keep)
    weights = importance_weights(*sampled, high=1.1).expand(batch.mask.shape)
    batch = batch._replace(weights=weights, mask=batch.mask & (keep != 0))
    spec = LOSSES["vanilla"].spec
    assert_same(ours(spec, batch, weights=True), theirs("vanilla", batch, weights=True))
    # As a factor of the weights, they count in the denominator.
    whole = batch._replace(weights=weights * keep, mask=random_batch(0).mask)
    scale = int(batch.mask.sum()) / int(whole.mask.sum())
    found = ours(spec, whole, weights=True)
    found = found._replace(loss=found.loss / scale, grad=found.grad / scale)
    assert_same(found, ours(spec, batch, weights=True))


def test_metrics() -> None:
    """verl's perplexity ratio counts a sequence without tokens as 1. Ours leaves it out."""
    batch = tokens(empty=False)
    want = verl_corr.compute_offpolicy_metrics(*batch)
    got = mismatch_metrics(*batch)
    for ours_name, name in {"k1": "kl", "k3": "k3_kl", "ppl_ratio": "ppl_ratio"}.items():
        assert float(got[ours_name]) == pytest.approx(want[name], rel=1e-7, abs=1e-9), name
    unbounded = importance_weights(*batch, high=None)
    metrics = verl_corr.compute_is_metrics(
        unbounded * batch.mask, unbounded * batch.mask, batch.log_ratio, batch.mask, "token", 1e9
    )
    assert float(got["ess"]) == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-7)
    largest = max(abs(math.log(metrics[f"rollout_is_{x}"])) for x in ("max", "min"))
    assert float(got["abs_max"]) == pytest.approx(largest, rel=1e-12)
    whole, all_of_verl = mismatch_metrics(*tokens()), verl_corr.compute_offpolicy_metrics(*tokens())
    assert float(whole["ppl_ratio"]) * 9 + 1 == pytest.approx(all_of_verl["ppl_ratio"] * 10, rel=1e-7)


def test_verl_bounds_the_log_ratio() -> None:
    """verl bounds every log-ratio to ±20 first. Bounded `sampler_logps` give its results."""
    sampler = torch.tensor([[-30.0, -1.0]], dtype=torch.float64)
    batch = Tokens(
        torch.tensor([[-1.0, -23.0]], dtype=torch.float64), sampler, torch.ones(1, 2)
    )  # 29 and -22
    bound = verl_corr.SAFETY_BOUND
    bounded = batch._replace(sampler_logps=batch.logps - batch.log_ratio.clamp(-bound, bound))
    options = {"statistic": "k1", "over": "sequence-sum", "low": -1.0, "high": 1.0}  # -7, or 0
    mask, _ = verl_corr.compute_rollout_rejection_mask(
        batch.log_ratio, batch.mask, "seq_sum_k1", f"{math.exp(-1)}_{math.exp(1)}"
    )
    assert mask.tolist() == [[1, 1]]
    assert rejection_mask(*batch, **options).item() == 0
    assert rejection_mask(*bounded, **options).item() == 1
    want, _ = verl_corr.compute_rollout_correction_weights(batch.log_ratio, batch.mask, "token", 2.0)
    torch.testing.assert_close(importance_weights(*bounded), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(importance_weights(*batch), want, rtol=0, atol=math.exp(-bound))
