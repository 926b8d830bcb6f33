"""Importance weights between trainer and sampler, and the off-policy sequence mask."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels.weights import importance_weights, off_policy_sequence_mask

NAN = math.nan
# Log-ratios of trainer and sampler. One is missing, and the last token of each row is masked.
LOG_RATIO = torch.tensor([[0.5, -1.0, 9.0], [0.2, 1.0, 9.0]])
SAMPLER = torch.tensor([[-1.0, -2.0, NAN], [-3.0, NAN, -1.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 0]])
LOGPS = torch.where(SAMPLER.isnan(), -5.0, SAMPLER + LOG_RATIO).requires_grad_()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"high": None}, [[math.exp(0.5), math.exp(-1), 1], [math.exp(0.2), 1, 1]]),
        ({"high": 1.5}, [[1.5, math.exp(-1), 1], [math.exp(0.2), 1, 1]]),
        ({"low": 0.5, "high": 1.5}, [[1.5, 0.5, 1], [math.exp(0.2), 1, 1]]),
        ({"mode": "mask", "low": 0.5, "high": 1.5}, [[0, 0, 1], [math.exp(0.2), 1, 1]]),
        ({"mode": "mask", "high": 1.5}, [[0, math.exp(-1), 1], [math.exp(0.2), 1, 1]]),
        ({"level": "sequence"}, [[math.exp(-0.5)], [math.exp(0.2)]]),
        ({"level": "sequence", "high": 1.1}, [[math.exp(-0.5)], [1.1]]),
        ({"level": "sequence", "mode": "mask", "low": 0.9}, [[0], [math.exp(0.2)]]),
    ],
    ids=str,
)
def test_importance_weights(options: dict, expected: list[list[float]]) -> None:
    weights = importance_weights(LOGPS, SAMPLER, MASK, **options)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    want = importance_weights(LOGPS, SAMPLER, MASK)
    assert torch.equal(importance_weights(LOGPS, SAMPLER, MASK.to(dtype)), want)


def test_off_policy_sequence_mask() -> None:
    """The drift is the mean of sampler - policy: 0.25 in the first sequence, -0.1 in the second."""
    for advantages, threshold, expected in (
        ([-1.0, -1.0], 0.2, [[0.0], [1.0]]),
        ([-1.0, -1.0], 0.3, [[1.0], [1.0]]),
        ([-1.0, -1.0], -0.2, [[0.0], [0.0]]),
        ([0.0, 1.0], -0.2, [[1.0], [1.0]]),
    ):
        kept = off_policy_sequence_mask(torch.tensor(advantages), LOGPS, SAMPLER, MASK, threshold=threshold)
        assert torch.equal(kept, torch.tensor(expected))
    per_token = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    kept = off_policy_sequence_mask(per_token, LOGPS, SAMPLER, MASK, threshold=0.2)
    assert torch.equal(kept, torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))


def test_nothing_but_masked_tokens() -> None:
    nothing = torch.zeros_like(MASK)
    assert torch.equal(importance_weights(LOGPS, SAMPLER, nothing), torch.ones(2, 3))
    kept = off_policy_sequence_mask(-torch.ones(2), LOGPS, SAMPLER, nothing, threshold=0.1)
    assert torch.equal(kept, torch.ones(2, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"level": "batch"}, "level must be one of 'token', 'sequence'"),
        ({"mode": "clip"}, "mode must be one of"),
        ({"high": 0.0}, "high must be finite and > 0"),
        ({"low": 3.0}, "low must be at most high, got 3.0 and 2.0"),
        ({"mask": torch.ones(2, 2)}, r"must all be \[B, T\], got \(2, 3\), \(2, 3\), \(2, 2\)"),
    ],
    ids=str,
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(**{"logps": LOGPS, "sampler_logps": SAMPLER, "mask": MASK, **options})


def test_refused_advantages() -> None:
    with pytest.raises(ValueError, match=r"advantages must be .*\(3, 1\)"):
        off_policy_sequence_mask(torch.ones(3), LOGPS, SAMPLER, MASK, threshold=0.1)
