"""The corrections of NeMo-RL, OpenRLHF and IcePop, by their formulas, are products of weights and masks here.

Their packages are not installed. TRL and verl are called in tests/trainers and tests/verl.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_kernels import importance_weights, rejection_mask

LOW, HIGH = 0.8, 1.25


class Batch:
    """A random batch in fp64 with ratios on both sides of the bounds. Its fourth sequence has no token."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.arange(6) < torch.tensor([6, 2, 4, 0, 5, 6, 3, 1])[:, None]
        scale = torch.tensor([0.1, 0.3, 0.5, 1.0, 0.8, 0.3, 0.4, 0.2], dtype=torch.float64)[:, None]
        self.logps = -2 * torch.rand(8, 6, generator=generator, dtype=torch.float64)
        log_ratio = scale * torch.randn(8, 6, generator=generator, dtype=torch.float64)
        self.sampler_logps = self.logps - log_ratio
        self.ratio = log_ratio.exp()
        self.tokens = self.logps, self.sampler_logps, self.mask

    def mean(self, x: Tensor) -> Tensor:
        """The masked mean of every sequence, `[B, 1]`."""
        return (x * self.mask).sum(-1, keepdim=True) / self.mask.sum(-1, keepdim=True).clamp(min=1)


@pytest.fixture
def batch() -> Batch:
    return Batch()


def assert_same(batch: Batch, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got * batch.mask, want * batch.mask, rtol=1e-12, atol=0)
    assert len(set((want * batch.mask).view(-1).tolist())) > 2, "nothing would be compared"


def test_truncated(batch: Batch) -> None:
    """NeMo-RL `tis` and OpenRLHF `tis`."""
    got = importance_weights(*batch.tokens, low=LOW, high=HIGH)
    assert_same(batch, got, batch.ratio.clamp(LOW, HIGH))


def test_icepop(batch: Batch) -> None:
    """IcePop: NeMo-RL `icepop`, OpenRLHF `icepop`."""
    got = importance_weights(*batch.tokens, mode="mask", low=LOW, high=HIGH)
    assert_same(batch, got, batch.ratio * ((batch.ratio >= LOW) & (batch.ratio <= HIGH)))


def test_sequence_mask(batch: Batch) -> None:
    """NeMo-RL and OpenRLHF `seq-mask-tis`: tokens' ratios, masked by the geometric mean of the sequence."""
    geometric = batch.mean(batch.ratio.log()).exp()
    inside = (geometric >= LOW) & (geometric <= HIGH)
    assert 0 < int(inside.sum()) < len(inside)
    weights = importance_weights(*batch.tokens, high=None)
    bounds = {"low": -math.log(HIGH), "high": -math.log(LOW)}
    kept = rejection_mask(*batch.tokens, statistic="k1", over="sequence-mean", **bounds)
    assert_same(batch, weights * kept, batch.ratio * inside)
    # The same mask from the weights of the geometric level, and these weights themselves.
    masked = importance_weights(*batch.tokens, level="geometric", mode="mask", low=LOW, high=HIGH)
    assert torch.equal(masked != 0, kept != 0)
    assert_same(batch, masked, geometric * inside)


@pytest.mark.parametrize("over", ["token", "sequence-mean"])
def test_total_variation(batch: Batch, over: str) -> None:
    """OpenRLHF gated by `tv`, per token and per sequence, in its mode `mask`."""
    change = (batch.sampler_logps.exp() - batch.logps.exp()).abs()
    change = change if over == "token" else batch.mean(change)
    got = importance_weights(*batch.tokens, high=None)
    got = got * rejection_mask(*batch.tokens, statistic="tv", over=over, high=0.15)
    assert_same(batch, got, batch.ratio * (change <= 0.15))


def test_veto(batch: Batch) -> None:
    """A sequence with a token whose ratio is below a bound is dropped."""
    smallest = torch.where(batch.mask, batch.ratio, math.inf).amin(-1, keepdim=True)
    veto = rejection_mask(*batch.tokens, statistic="k1", over="sequence-max", high=-math.log(LOW))
    got = importance_weights(*batch.tokens, high=2.0) * veto
    assert_same(batch, got, batch.ratio.clamp(max=2.0) * (smallest >= LOW))
    assert 0 < int(veto.sum()) < len(veto)
