"""Rejection masks: statistics, bounds, sequences, and products with weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_kernels import importance_weights, rejection_mask

NAN, INF = math.nan, math.inf
# d = logps - sampler_logps. The sampler returned nothing for one token, and one is masked.
D = torch.tensor([[0.5, -1.0, 0.25], [0.25, 0.0, 9.0]])
SAMPLER = torch.tensor([[-1.0, -2.0, -1.5], [-3.0, NAN, -1.0]])
LOGPS = torch.where(SAMPLER.isnan(), -5.0, SAMPLER + D)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
LENGTHS = torch.tensor([3, 3])

TOKENS = {
    "k1": lambda d, p, q: -d,
    "k2": lambda d, p, q: d * d / 2,
    "k3": lambda d, p, q: math.exp(d) - 1 - d,
    "abs": lambda d, p, q: abs(d),
    "tv": lambda d, p, q: abs(math.exp(p) - math.exp(q)),
}


def statistics(kind: str) -> list[list[float]]:
    """The statistic of every unmasked token, by sequence."""
    rows = zip(*(x.tolist() for x in (LOGPS, SAMPLER, MASK)), strict=True)
    return [
        [0.0 if math.isnan(q) else TOKENS[kind](p - q, p, q) for p, q, m in zip(*row, strict=True) if m]
        for row in rows
    ]


OVER = {"sequence-mean": lambda x: math.fsum(x) / len(x), "sequence-sum": math.fsum, "sequence-max": max}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens(kind: str) -> None:
    """A bound a little above a token's statistic keeps it, and one a little below drops it."""
    values = statistics(kind)
    for value in (x for row in values for x in row):
        for edge in (value - 1e-3, value + 1e-3):
            above = rejection_mask(LOGPS, SAMPLER, MASK, statistic=kind, high=edge)
            below = rejection_mask(LOGPS, SAMPLER, MASK, statistic=kind, low=edge)
            assert not above.requires_grad and above.dtype == LOGPS.dtype
            for row, kept, others in zip(values, above.tolist(), below.tolist(), strict=True):
                assert kept[: len(row)] == [float(x <= edge) for x in row]
                assert others[: len(row)] == [float(x >= edge) for x in row]
            assert above[1, 2] == below[1, 2] == 1  # masked


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("kind", TOKENS)
def test_sequences(kind: str, over: str) -> None:
    values = [OVER[over](row) for row in statistics(kind)]
    for value in values:
        for edge in (value - 1e-3, value + 1e-3):
            kept = rejection_mask(LOGPS, SAMPLER, MASK, statistic=kind, over=over, high=edge)
            assert kept.tolist() == [[float(x <= edge)] for x in values]
            kept = rejection_mask(LOGPS, SAMPLER, MASK, statistic=kind, over=over, low=edge)
            assert kept.tolist() == [[float(x >= edge)] for x in values]
            tokens = (x.reshape(-1) for x in (LOGPS, SAMPLER, MASK))
            packed = rejection_mask(*tokens, statistic=kind, over=over, low=edge, seq_lens=LENGTHS)
            assert torch.equal(packed.view(2, 3), kept.expand(2, 3))


def test_bounds_are_inside() -> None:
    """These statistics are exact in fp32, and so are their bounds."""
    for bounds in ({"low": -0.5, "high": 1.0}, {"low": -0.5}, {"high": 1.0}, {}):
        assert torch.equal(rejection_mask(LOGPS, SAMPLER, MASK, **bounds), torch.ones(2, 3))
    for bounds in ({"low": -0.499}, {"high": 0.999}):
        assert int(rejection_mask(LOGPS, SAMPLER, MASK, **bounds).sum()) == 5
    exact = {"statistic": "k2", "over": "sequence-sum"}  # 0.65625 and 0.03125
    assert rejection_mask(LOGPS, SAMPLER, MASK, high=0.65625, low=0.03125, **exact).all()
    assert rejection_mask(LOGPS, SAMPLER, MASK, high=0.65624, **exact).tolist() == [[0], [1]]


def test_a_veto_is_a_maximum_with_a_bound() -> None:
    """A single token with a ratio below 0.4 rejects its sequence. Its ratio is exp(-1)."""
    assert math.exp(-1) < 0.4
    veto = {"statistic": "k1", "over": "sequence-max", "high": -math.log(0.4)}
    assert rejection_mask(LOGPS, SAMPLER, MASK, **veto).tolist() == [[0], [1]]
    assert rejection_mask(LOGPS, SAMPLER, MASK, **veto | {"high": 1.0}).tolist() == [[1], [1]]
    # The mean of the sequence is close to 0.
    assert rejection_mask(LOGPS, SAMPLER, MASK, **veto | {"over": "sequence-mean"}).tolist() == [[1], [1]]


def test_a_negative_maximum() -> None:
    """Masked tokens, whose statistic would be 0, do not count in the maximum of -0.25."""
    tokens = torch.tensor([[-0.75, -0.5, 5.0]]), torch.full((1, 3), -1.0), torch.tensor([[1, 1, 0]])
    packed = [x.view(-1) for x in tokens]
    options = {"statistic": "k1", "over": "sequence-max"}
    for low, kept in ((-0.25, 1), (-0.2, 0)):
        assert rejection_mask(*tokens, low=low, **options).tolist() == [[kept]]
        found = rejection_mask(*packed, low=low, seq_lens=torch.tensor([3]), **options)
        assert found.tolist() == [kept] * 3


def test_a_bound_on_the_ratio_is_one_on_k1() -> None:
    """The tokens that `importance_weights` zeroes are those that a mask on k1 drops."""
    low, high = 0.5, 1.5
    zeroed = importance_weights(LOGPS, SAMPLER, MASK, mode="mask", low=low, high=high) != 0
    kept = rejection_mask(LOGPS, SAMPLER, MASK, low=-math.log(high), high=-math.log(low))
    assert torch.equal(kept == 1, zeroed) and not zeroed.all()
    for level, over in (("sequence", "sequence-sum"), ("geometric", "sequence-mean")):
        options = {"low": 0.9, "high": 1.2}
        zeroed = importance_weights(LOGPS, SAMPLER, MASK, level=level, mode="mask", **options) != 0
        bounds = {"low": -math.log(1.2), "high": -math.log(0.9)}
        assert torch.equal(rejection_mask(LOGPS, SAMPLER, MASK, over=over, **bounds) == 1, zeroed)


def test_a_mask_never_changes_a_weight() -> None:
    """Weights times masks are the weights themselves where all masks keep, so no ratio counts twice."""
    weights = importance_weights(LOGPS, SAMPLER, MASK, high=1.2)
    masks = [
        rejection_mask(LOGPS, SAMPLER, MASK, statistic="k3", high=0.3),
        rejection_mask(LOGPS, SAMPLER, MASK, statistic="k1", over="sequence-mean", low=-0.2),
        rejection_mask(LOGPS, SAMPLER, MASK, statistic="tv", over="sequence-max", high=0.5),
    ]
    product, kept = weights, torch.ones(2, 3, dtype=torch.bool)
    for mask in masks:
        product, kept = product * mask, kept & (mask == 1)
    assert torch.equal(product, torch.where(kept, weights, 0.0)) and not kept.all()


def test_what_is_not_compared() -> None:
    """Masked tokens and empty sequences are kept by any bounds. Unknown tokens have a statistic of 0."""
    nothing = torch.zeros_like(MASK)
    for over in ("token", "sequence-mean", "sequence-sum", "sequence-max"):
        kept = rejection_mask(LOGPS, SAMPLER, nothing, statistic="abs", over=over, low=0.1)
        assert torch.equal(kept, torch.ones_like(kept))
    unknown = torch.full_like(SAMPLER, NAN)
    assert not rejection_mask(LOGPS, unknown, torch.ones(2, 3), statistic="abs", low=0.1).any()
    assert rejection_mask(LOGPS, unknown, torch.ones(2, 3), statistic="tv", high=0.0).all()


def test_values_beyond_the_range() -> None:
    """An infinite mismatch is outside every upper bound. NaN in the trainer's values is kept for the loss."""
    ones = torch.ones(1, 1)
    for logp, sampler in ((-1.0, -INF), (-INF, -1.0), (0.0, -200.0)):
        tokens = torch.tensor([[logp]]), torch.tensor([[sampler]]), ones
        for kind in ("k2", "k3", "abs"):
            assert rejection_mask(*tokens, statistic=kind, high=100.0).item() == 0, (kind, logp, sampler)
    nan = torch.tensor([[NAN]]), ones, ones
    for over in ("token", "sequence-mean", "sequence-sum", "sequence-max"):
        assert rejection_mask(*nan, over=over, low=-1.0, high=1.0).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    kept = rejection_mask(LOGPS.to(dtype), SAMPLER, MASK.bool(), high=0.5)
    assert kept.dtype == dtype and kept.tolist() == [[1, 0, 1], [1, 1, 1]]


def test_the_digits_of_k3() -> None:
    """In fp32 `exp(d) - 1 - d` has no digit at d = 1e-4, where it is 5e-9."""
    d = torch.tensor([[1e-4]])
    tokens = d - 1, torch.full((1, 1), -1.0), torch.ones(1, 1)
    exact = float((tokens[0] - tokens[1]).double())
    exact = math.expm1(exact) - exact
    assert rejection_mask(*tokens, statistic="k3", low=0.98 * exact, high=1.02 * exact).item() == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"statistic": "k4"}, "statistic must be one of 'k1', 'k2', 'k3', 'abs', 'tv', got 'k4'"),
        (
            {"over": "sequence"},
            "over must be one of 'token', 'sequence-mean', 'sequence-sum', 'sequence-max'",
        ),
        ({"low": 1.0, "high": 0.5}, "low must be at most high, got 1.0 and 0.5"),
        ({"high": INF}, "high must be finite and > -inf, got inf"),
        ({"mask": torch.ones(2, 2)}, r"mask must have shape \(2, 3\), got \(2, 2\)"),
        ({"logps": torch.ones(2, 3, 1)}, r"logps must be \[B, T\] or packed \[N\], got shape \(2, 3, 1\)"),
    ],
    ids=str,
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rejection_mask(**{"logps": LOGPS, "sampler_logps": SAMPLER, "mask": MASK, **options})


def test_refused_types() -> None:
    for options in ({"high": "1"}, {"low": True}, {"mask": None}, {"sampler_logps": [0.0]}):
        with pytest.raises(TypeError, match=next(iter(options))):
            rejection_mask(**{"logps": LOGPS, "sampler_logps": SAMPLER, "mask": MASK, **options})


def test_packed_sequences_need_seq_lens() -> None:
    tokens: list[Tensor] = [x.reshape(-1) for x in (LOGPS, SAMPLER, MASK)]
    rejection_mask(*tokens, high=1.0)
    with pytest.raises(ValueError, match="over='sequence-max' on a packed batch needs seq_lens"):
        rejection_mask(*tokens, over="sequence-max", high=1.0)
