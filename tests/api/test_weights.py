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
        ({"level": "geometric"}, [[math.exp(-0.25)], [math.exp(0.1)]]),
        ({"level": "geometric", "mode": "mask", "low": 0.9}, [[0], [math.exp(0.1)]]),
    ],
    ids=str,
)
def test_importance_weights(options: dict, expected: list[list[float]]) -> None:
    weights = importance_weights(LOGPS, SAMPLER, MASK, **options)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_normalize() -> None:
    """Bounded weights are divided by their mean: of unmasked tokens, or of the sequences that have one."""
    one, other = math.exp(-1), math.exp(0.2)
    got = importance_weights(LOGPS, SAMPLER, MASK, high=1.5, normalize=True)
    mean = (1.5 + one + other + 1) / 4
    torch.testing.assert_close(got[:, :2], torch.tensor([[1.5, one], [other, 1.0]]) / mean)
    got = importance_weights(LOGPS, SAMPLER, MASK, mode="mask", high=1.5, normalize=True)
    torch.testing.assert_close(got[:, :2], torch.tensor([[0, one], [other, 1.0]]) / ((one + other + 1) / 4))
    # The third sequence has no token. The second has fewer than the first, and counts as much.
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    tokens = [torch.cat([x, x[:1]]) for x in (LOGPS, SAMPLER)]
    weights = torch.tensor([[math.exp(-0.5)], [other], [1.0]])
    got = importance_weights(*tokens, mask, level="sequence", normalize=True)
    torch.testing.assert_close(got, weights / weights[:2].mean())


def test_normalize_without_weight() -> None:
    """If all weights are 0, or there is no token, nothing is divided by 0."""
    got = importance_weights(LOGPS, SAMPLER, MASK, mode="mask", high=0.1, normalize=True)
    assert torch.equal(got, torch.zeros(2, 3))
    nothing = torch.zeros_like(MASK)
    assert torch.equal(importance_weights(LOGPS, SAMPLER, nothing, normalize=True), torch.ones(2, 3))


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


def test_packed_sequences() -> None:
    """In a packed batch each token has the weight of its sequence."""
    logps, sampler, mask = (x.reshape(-1) for x in (LOGPS, SAMPLER, MASK))
    packed = {"seq_lens": torch.tensor([3, 0, 3])}
    got = importance_weights(logps, sampler, mask, level="geometric", high=1.1, **packed)
    torch.testing.assert_close(got, torch.tensor([math.exp(-0.25)] * 3 + [1.1] * 3))
    # Weights of tokens need no sequences.
    want = importance_weights(LOGPS, SAMPLER, MASK).view(-1)
    assert torch.equal(importance_weights(logps, sampler, mask), want)
    for advantages, expected in (
        (torch.tensor([-1.0, -1.0, -1.0]), [0, 0, 1, 1, 1, 1]),  # the third token is masked
        (torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0, -1.0]), [0, 1, 1, 1, 1, 1]),
    ):
        kept = off_policy_sequence_mask(advantages, logps, sampler, mask, threshold=0.2, **packed)
        assert kept.tolist() == expected


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_packed_sequences_need_seq_lens(level: str) -> None:
    tokens = [x.reshape(-1) for x in (LOGPS, SAMPLER, MASK)]
    with pytest.raises(ValueError, match=f"level '{level}' on a packed batch needs seq_lens"):
        importance_weights(*tokens, level=level)
    with pytest.raises(ValueError, match="off_policy_sequence_mask on a packed batch needs seq_lens"):
        off_policy_sequence_mask(torch.ones(6), *tokens, threshold=0.1)
    with pytest.raises(ValueError, match="seq_lens must be non-negative and sum to N = 6, got a sum of 5"):
        importance_weights(*tokens, seq_lens=torch.tensor([2, 3]))


def test_nan_is_kept() -> None:
    """NaN in what is trained on must reach the loss. A weight of 0 would hide it."""
    logps = LOGPS.detach().clone()
    logps[0, 0] = NAN
    assert importance_weights(logps, SAMPLER, MASK, mode="mask")[0, 0].isnan()
    for advantages in (torch.tensor([-1.0, 1.0]), torch.tensor([NAN, 1.0])):
        kept = off_policy_sequence_mask(advantages, logps, SAMPLER, MASK, threshold=-9.0)
        assert torch.equal(kept, torch.ones(2, 1))
    tokens = [x.reshape(-1) for x in (LOGPS, SAMPLER, MASK)]
    lengths = torch.tensor([3, 3])
    kept = off_policy_sequence_mask(torch.full((6,), NAN), *tokens, threshold=-9.0, seq_lens=lengths)
    assert kept.all()


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
        ({"low": -1.0}, "low must be finite and >= 0"),
        ({"mask": torch.ones(2, 2)}, r"mask must have shape \(2, 3\), got \(2, 2\)"),
        ({"sampler_logps": SAMPLER[:1]}, r"sampler_logps must have shape \(2, 3\), got \(1, 3\)"),
        ({"logps": torch.ones(2, 3).long()}, "logps must be fp16, bf16, fp32 or fp64"),
        ({"seq_lens": torch.tensor([3, 3])}, r"seq_lens belongs to packed logps \[N, ...\]"),
    ],
    ids=str,
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(**{"logps": LOGPS, "sampler_logps": SAMPLER, "mask": MASK, **options})


def test_refused_advantages() -> None:
    with pytest.raises(ValueError, match=r"advantages must have shape .*, got \(3,\)"):
        off_policy_sequence_mask(torch.ones(3), LOGPS, SAMPLER, MASK, threshold=0.1)


def test_normalized_weights_that_fp32_cannot_represent() -> None:
    """The ratio is exp(199). Divided by the mean of both, it is 2."""
    logps, sampler_logps = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -200.0]])
    found = importance_weights(logps, sampler_logps, torch.ones(1, 2), high=None, normalize=True)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0]]))
