"""Properties of weights, rejection masks and mismatch metrics, over shapes, masks and missing values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import importance_weights, mismatch_metrics, rejection_mask
from grpo_kernels.checks.choices import (
    MISMATCH_STATISTICS,
    STATISTIC_OVERS,
    WEIGHT_LEVELS,
    WEIGHT_MODES,
)
from grpo_kernels.weights import off_policy_sequence_mask

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

NAN, INF = math.nan, math.inf
RTOL = {torch.float32: 1e-4, torch.float64: 1e-9}


class Token(NamedTuple):
    logp: float
    sampler: float  # NaN: the sampler returned none
    unmasked: bool

    @property
    def log_ratio(self) -> float:
        return 0.0 if math.isnan(self.sampler) else self.logp - self.sampler

    def statistic(self, kind: str) -> float:
        d = self.log_ratio
        if kind == "tv":
            return 0.0 if math.isnan(self.sampler) else abs(math.exp(self.logp) - math.exp(self.sampler))
        return {"k1": -d, "k2": d * d / 2, "k3": exp(d) - 1 - d, "abs": abs(d)}[kind]


class Drawn(NamedTuple):
    """Sequences of tokens, some of them empty or masked as a whole."""

    sequences: list[list[Token]]
    dtype: torch.dtype
    mask_dtype: torch.dtype

    @property
    def unmasked(self) -> list[list[Token]]:
        return [[token for token in sequence if token.unmasked] for sequence in self.sequences]

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor([len(sequence) for sequence in self.sequences])

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors([token for sequence in self.sequences for token in sequence])

    def padded(self, hidden: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return `[B, T]` tensors. Every masked position holds the value `hidden`."""
        width = max(map(len, self.sequences), default=0)
        padding = Token(hidden, hidden, False)
        rows = [
            [token if token.unmasked else padding for token in sequence] + [padding] * (width - len(sequence))
            for sequence in self.sequences
        ]
        shape = len(rows), width
        return tuple(x.view(shape) for x in self.tensors([x for row in rows for x in row]))  # type: ignore[return-value]

    def tensors(self, tokens: list[Token]) -> tuple[Tensor, Tensor, Tensor]:
        logps, sampler, mask = ([token[i] for token in tokens] for i in range(3))
        return (
            torch.tensor(logps, dtype=self.dtype),
            torch.tensor(sampler, dtype=torch.float64),
            torch.tensor(mask, dtype=torch.bool).to(self.mask_dtype),
        )

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the values of a padded result, `[B, T]` or `[B, 1]`, at the tokens, packed."""
        rows = [
            row[: len(sequence)] if len(row) > 1 or not len(sequence) else row.expand(len(sequence))
            for row, sequence in zip(x, self.sequences, strict=True)
        ]
        return torch.cat(rows) if rows else x.new_zeros(0)


LOGPS = st.one_of(st.floats(-8, 0, width=32), st.sampled_from([-0.0, -1.0, -1.5, -2.0, -60.0]))
TOKENS = st.builds(Token, LOGPS, st.one_of(LOGPS, st.just(NAN)), st.booleans())
BATCHES = st.builds(
    Drawn,
    st.lists(st.lists(TOKENS, max_size=5), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([torch.bool, torch.int64, torch.float32]),
)
OPTIONS_OF_WEIGHTS = st.fixed_dictionaries(
    {
        "level": st.sampled_from(WEIGHT_LEVELS),
        "mode": st.sampled_from(WEIGHT_MODES),
        "low": st.sampled_from([None, 0.3]),
        "high": st.sampled_from([None, 2.0]),
        "normalize": st.booleans(),
    }
)
OPTIONS_OF_MASKS = st.fixed_dictionaries(
    {
        "statistic": st.sampled_from(MISMATCH_STATISTICS),
        "over": st.sampled_from(STATISTIC_OVERS),
        "low": st.sampled_from([None, -0.3, 0.0, 0.2]),
        "high": st.sampled_from([None, 0.2, 1.5]),
    }
)
OPTIONS_OF_METRICS = st.fixed_dictionaries(
    {
        "level": st.sampled_from(WEIGHT_LEVELS),
        "low": st.sampled_from([None, 0.3]),
        "high": st.sampled_from([None, 2.0]),
    }
)


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else INF


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x) if x else 0.0


def log_ratio(sequence: list[Token], level: str) -> float:
    values = [token.log_ratio for token in sequence]
    return math.fsum(values) if level == "sequence" else mean(values)


def ratios(drawn: Drawn, level: str) -> list[float]:
    """The ratios of all unmasked tokens, or of all sequences that have one."""
    if level == "token":
        return [exp(token.log_ratio) for sequence in drawn.unmasked for token in sequence]
    return [exp(log_ratio(sequence, level)) for sequence in drawn.unmasked if sequence]


def counted(drawn: Drawn, x: Tensor, level: str) -> list[float]:
    """The values of a padded result that belong to the entries of `ratios`."""
    mask = drawn.padded()[2] != 0
    if level == "token":
        return x[mask].tolist()
    return x[:, 0][mask.any(-1)].tolist()


def near_a_bound(value: float, options: dict[str, Any], tolerance: float) -> bool:
    bounds = [bound for bound in (options["low"], options["high"]) if bound is not None]
    return any(abs(value - bound) <= tolerance * (1 + abs(bound)) for bound in bounds)


def outside(value: float, options: dict[str, Any]) -> bool:
    low, high = options["low"], options["high"]
    return (low is not None and value < low) or (high is not None and value > high)


@given(BATCHES, OPTIONS_OF_WEIGHTS)
def test_weights(drawn: Drawn, options: dict[str, Any]) -> None:
    tolerance, level = RTOL[drawn.dtype], options["level"]
    got = importance_weights(*drawn.padded(NAN), **options)
    assert got.dtype == drawn.dtype and len(got) == len(drawn.sequences)
    want = ratios(drawn, level)
    if any(x > 1e30 or near_a_bound(x, options, 10 * tolerance) for x in want):
        return
    low, high = options["low"] or 0.0, INF if options["high"] is None else options["high"]
    if options["mode"] == "truncate":
        want = [min(max(x, low), high) for x in want]
    else:
        want = [0.0 if outside(x, options) else x for x in want]
    if options["normalize"] and mean(want) > 1e-8:
        want = [x / mean(want) for x in want]
    assert counted(drawn, got, level) == pytest.approx(want, rel=tolerance)
    if not options["normalize"]:
        # Nothing else than the bounds changes the weight of what is masked.
        empty = (drawn.padded()[2] == 0) if level == "token" else (drawn.padded()[2] == 0).all(-1, True)
        assert (got[empty] == 1).all()


@given(BATCHES, OPTIONS_OF_MASKS)
def test_masks(drawn: Drawn, options: dict[str, Any]) -> None:
    tolerance, kind, over = RTOL[drawn.dtype], options["statistic"], options["over"]
    got = rejection_mask(*drawn.padded(NAN), **options)
    assert got.dtype == drawn.dtype
    values = [[token.statistic(kind) for token in sequence] for sequence in drawn.unmasked]
    if over == "token":
        want = [x for sequence in values for x in sequence]
    else:
        reduce = {"sequence-mean": mean, "sequence-sum": math.fsum, "sequence-max": max}[over]
        want = [reduce(sequence) for sequence in values if sequence]
    found = counted(drawn, got, "token" if over == "token" else "sequence")
    for kept, value in zip(found, want, strict=True):
        # The statistic of a token without a value is exactly 0, which may be a bound.
        if (value == 0 and over == "token") or not near_a_bound(value, options, 10 * tolerance):
            assert kept == float(not outside(value, options)), value
    empty = (drawn.padded()[2] == 0) if over == "token" else (drawn.padded()[2] == 0).all(-1, True)
    assert (got[empty] == 1).all()


@given(BATCHES, OPTIONS_OF_METRICS)
def test_metrics(drawn: Drawn, options: dict[str, Any]) -> None:
    tolerance = RTOL[drawn.dtype]
    tokens = drawn.padded(NAN)
    weights = importance_weights(*tokens, mode="mask", high=1.5)
    got = {k: float(x) for k, x in mismatch_metrics(*tokens, weights=weights, **options).items()}
    known = [[x for x in sequence if not math.isnan(x.sampler)] for sequence in drawn.unmasked]
    d = [token.log_ratio for sequence in known for token in sequence]
    largest = max(d, default=0.0)
    scaled = [math.exp(x - largest) for x in d]
    squares = mean([x * x for x in scaled])
    want = {
        "k1": -mean(d),
        "k3": mean([exp(x) - 1 - x for x in d]),
        "ppl_ratio": mean([exp(-log_ratio(sequence, "mean")) for sequence in known if sequence]),
        "abs_max": max(map(abs, d), default=0.0),
        "ess": mean(scaled) ** 2 / squares if d else 0.0,
    }
    given_weights = counted(drawn, weights, "token")
    want["weight_mean"] = mean(given_weights)
    squares = mean([x * x for x in given_weights])
    want["weight_ess"] = mean(given_weights) ** 2 / squares if squares else 0.0
    want["reject_fraction"] = mean([float(x == 0) for x in given_weights])
    if options["low"] is not None or options["high"] is not None:
        level = options["level"]
        values = [
            exp(token.log_ratio if level == "token" else log_ratio(sequence, level))
            for sequence in drawn.unmasked
            for token in sequence
        ]
        if any(near_a_bound(x, options, 10 * tolerance) for x in values):
            return
        low, high = options["low"] or 0.0, INF if options["high"] is None else options["high"]
        want["clip_fraction_low"] = mean([float(x < low) for x in values])
        want["clip_fraction_high"] = mean([float(x > high) for x in values])
        want["clip_fraction"] = want["clip_fraction_low"] + want["clip_fraction_high"]
    assert got == pytest.approx(want, rel=tolerance, abs=2e-6 if drawn.dtype == torch.float32 else 1e-12)


CALLS = st.one_of(
    st.tuples(st.just(importance_weights), OPTIONS_OF_WEIGHTS),
    st.tuples(st.just(rejection_mask), OPTIONS_OF_MASKS),
    st.tuples(st.just(mismatch_metrics), OPTIONS_OF_METRICS),
    st.tuples(st.just("drift"), st.fixed_dictionaries({"threshold": st.sampled_from([0.1, -0.5])})),
)


def call(function: Any, tokens: tuple[Tensor, ...], options: dict[str, Any], seq_lens: Tensor | None) -> Any:
    if function == "drift":
        # Alternating advantages, one per sequence.
        count = len(tokens[0]) if seq_lens is None else len(seq_lens)
        advantages = torch.arange(count) % 2 - 0.5
        return off_policy_sequence_mask(advantages, *tokens, seq_lens=seq_lens, **options)
    return function(*tokens, seq_lens=seq_lens, **options)


@given(BATCHES, CALLS)
def test_packed_equals_padded(drawn: Drawn, drawn_call: tuple[Any, dict[str, Any]]) -> None:
    """Equal up to the rounding of sums, which run in another order."""
    function, options = drawn_call
    padded = call(function, drawn.padded(), options, None)
    packed = call(function, drawn.packed(), options, drawn.seq_lens)
    how = {"rtol": RTOL[drawn.dtype] * 1e-2, "atol": RTOL[drawn.dtype] * 1e-2, "equal_nan": True}
    if function is mismatch_metrics:
        torch.testing.assert_close(packed, padded, **how)
        return
    unmasked = drawn.packed()[2] != 0
    got, want = packed[unmasked], drawn.of_tokens(padded)[unmasked]
    if function is importance_weights and options["mode"] == "truncate":
        torch.testing.assert_close(got, want, **how)
    else:
        # A ratio or statistic on a bound may round to either side.
        differ = ((got - want).abs() > how["atol"] + how["rtol"] * want.abs()) & ~(got.isnan() & want.isnan())
        assert int(differ.sum()) == 0 or on_an_edge(drawn, options)


def on_an_edge(drawn: Drawn, options: dict[str, Any]) -> bool:
    """Whether any statistic of a sequence is so close to a bound that rounding decides."""
    kinds = [options["statistic"]] if "statistic" in options else ["k1"]
    for sequence in drawn.unmasked:
        values = [token.statistic(kinds[0]) for token in sequence]
        for value in (mean(values), math.fsum(values)):
            candidates = [value] if "statistic" in options or "threshold" in options else [exp(-value)]
            bounds = [options.get("low"), options.get("high"), options.get("threshold")]
            if any(abs(c - b) < 1e-6 * (1 + abs(b)) for c in candidates for b in bounds if b is not None):
                return True
    return False


@given(BATCHES, CALLS, st.sampled_from([NAN, INF, -INF, 1e30]))
def test_masked_positions_are_not_read(
    drawn: Drawn, drawn_call: tuple[Any, dict[str, Any]], hidden: float
) -> None:
    """What they hold changes no bit of the result."""
    want = call(drawn_call[0], drawn.padded(), drawn_call[1], None)
    got = call(drawn_call[0], drawn.padded(hidden), drawn_call[1], None)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@given(BATCHES, CALLS)
def test_a_sequence_alone(drawn: Drawn, drawn_call: tuple[Any, dict[str, Any]]) -> None:
    """Weights and masks of a sequence have the same bits in any batch, unless the batch normalizes them."""
    function, options = drawn_call
    if function is mismatch_metrics:
        return
    options = {name: value for name, value in options.items() if name != "normalize"}
    whole = call(function, drawn.padded(), options, None)
    for number in range(0, len(drawn.sequences), 2):  # an even one keeps the sign of its advantage
        alone = call(function, tuple(x[number : number + 1] for x in drawn.padded()), options, None)
        assert torch.equal(alone[0].nan_to_num(-1), whole[number].nan_to_num(-1))
