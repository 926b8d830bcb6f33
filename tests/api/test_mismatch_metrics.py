"""Metrics of the mismatch: each by its formula, what they count, and what they do without tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo_kernels import importance_weights, mismatch_metrics, rejection_mask

NAN = math.nan
D = torch.tensor([[0.5, -1.0, 0.25], [0.25, 0.0, 9.0]])
SAMPLER = torch.tensor([[-1.0, -2.0, -1.5], [-3.0, NAN, -1.0]])
LOGPS = torch.where(SAMPLER.isnan(), -5.0, SAMPLER + D)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
KNOWN = [0.5, -1.0, 0.25, 0.25]  # of the unmasked tokens with a sampler's value
ALWAYS = {"k1", "k3", "ppl_ratio", "abs_max", "ess"}


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x)


def near(got: dict[str, torch.Tensor], **expected: float) -> None:
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-5), name


def test_formulas() -> None:
    """The token without a sampler's value counts in none of these."""
    got = mismatch_metrics(LOGPS.clone().requires_grad_(), SAMPLER, MASK)
    assert set(got) == ALWAYS
    assert all(x.shape == () and x.dtype == torch.float32 and not x.requires_grad for x in got.values())
    ratios = [math.exp(d) for d in KNOWN]
    near(
        got,
        k1=-mean(KNOWN),
        k3=mean([math.expm1(d) - d for d in KNOWN]),
        ppl_ratio=(math.exp(0.25 / 3) + math.exp(-0.25)) / 2,
        abs_max=1.0,
        ess=mean(ratios) ** 2 / mean([r * r for r in ratios]),
    )


def test_clipped_tokens() -> None:
    """Tokens are counted, so a sequence counts as often as it has tokens."""
    got = mismatch_metrics(LOGPS, SAMPLER, MASK, low=0.5, high=1.5)
    near(got, clip_fraction_low=1 / 5, clip_fraction_high=1 / 5, clip_fraction=2 / 5)
    got = mismatch_metrics(LOGPS, SAMPLER, MASK, level="sequence", low=0.8)  # ratios exp(-0.25), exp(0.25)
    near(got, clip_fraction_low=3 / 5, clip_fraction_high=0, clip_fraction=3 / 5)
    got = mismatch_metrics(LOGPS, SAMPLER, MASK, level="geometric", high=1.1)  # exp(-0.25 / 3), exp(0.25 / 2)
    near(got, clip_fraction_low=0, clip_fraction_high=2 / 5, clip_fraction=2 / 5)


def test_rejected_tokens() -> None:
    """`weights` are those of the loss: weights, a mask, or both, per token or per sequence."""
    weights = importance_weights(LOGPS, SAMPLER, MASK, high=1.5)
    got = mismatch_metrics(LOGPS, SAMPLER, MASK, weights=weights)
    assert set(got) == ALWAYS | {"weight_mean", "weight_ess", "reject_fraction"}
    values = [1.5, math.exp(-1), math.exp(0.25), math.exp(0.25), 1.0]
    near(got, weight_mean=mean(values), reject_fraction=0)
    near(got, weight_ess=mean(values) ** 2 / mean([x * x for x in values]))
    kept = rejection_mask(LOGPS, SAMPLER, MASK, statistic="k2", over="sequence-max", high=0.4)
    for shape in ((2, 1), (2,)):
        got = mismatch_metrics(LOGPS, SAMPLER, MASK, weights=kept.view(shape))
        near(got, weight_mean=2 / 5, reject_fraction=3 / 5, weight_ess=2 / 5)
    got = mismatch_metrics(LOGPS, SAMPLER, MASK, weights=weights * kept)
    near(got, weight_mean=(math.exp(0.25) + 1) / 5, reject_fraction=3 / 5)


def test_packed() -> None:
    tokens = [x.reshape(-1) for x in (LOGPS, SAMPLER, MASK)]
    weights = importance_weights(LOGPS, SAMPLER, MASK, level="sequence")
    options: dict[str, Any] = {"level": "sequence", "low": 0.9, "high": 1.1}
    want = mismatch_metrics(LOGPS, SAMPLER, MASK, weights=weights, **options)
    for packed in (weights.view(-1), weights.expand(2, 3).reshape(-1)):
        lengths = torch.tensor([3, 3])
        got = mismatch_metrics(*tokens, weights=packed, seq_lens=lengths, **options)
        torch.testing.assert_close(got, want)
    # Perplexities are those of sequences.
    whole = set(mismatch_metrics(LOGPS, SAMPLER, MASK, high=2.0))
    assert set(mismatch_metrics(*tokens, high=2.0)) == whole - {"ppl_ratio"}
    with pytest.raises(ValueError, match="level 'geometric' on a packed batch needs seq_lens"):
        mismatch_metrics(*tokens, level="geometric", high=2.0)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (6,), (0,)], ids=str)
def test_no_token(shape: tuple[int, ...]) -> None:
    """Without a token to average over, every metric is 0."""
    zeros = torch.zeros(shape)
    seq_lens = torch.tensor(shape) if len(shape) == 1 else None
    got = mismatch_metrics(zeros - 1, zeros - 2, zeros, weights=zeros + 1, low=0.5, seq_lens=seq_lens)
    assert {float(x) for x in got.values()} == {0.0}
    unknown = mismatch_metrics(zeros - 1, zeros + NAN, zeros + 1, seq_lens=seq_lens)
    assert {float(x) for x in unknown.values()} == {0.0}


def test_ratios_whose_squares_overflow() -> None:
    """The effective sample size does not depend on the scale of the ratios: a half of two tokens."""
    logps, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-601.0, -1.0]])
    got = mismatch_metrics(logps, sampler, torch.ones(1, 2))
    near(got, ess=0.5, abs_max=600.0, k1=-300.0)


def test_fp64() -> None:
    got = mismatch_metrics(LOGPS.double(), SAMPLER, MASK)
    assert {x.dtype for x in got.values()} == {torch.float64}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"level": "batch"}, "level must be one of 'token', 'sequence', 'geometric', got 'batch'"),
        ({"low": 3.0, "high": 2.0}, "low must be at most high, got 3.0 and 2.0"),
        ({"weights": torch.ones(3)}, r"weights must have shape .*, got \(3,\)"),
        ({"mask": torch.ones(2, 2)}, r"mask must have shape \(2, 3\), got \(2, 2\)"),
    ],
    ids=str,
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mismatch_metrics(**{"logps": LOGPS, "sampler_logps": SAMPLER, "mask": MASK, **options})
