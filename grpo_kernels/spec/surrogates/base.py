"""The base class of the surrogates: the interface that the loss, its metrics and the kernels use."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...checks.choices import LEVELS, Anchor, Level
from ..formula import TokenLoss, TokenTerms, unbounded

if TYPE_CHECKING:
    from ...tokens.sequences import Sequences


class Clip(NamedTuple):
    """Rule for the tokens that the metric `clip_fraction` counts.

    kind:
        "band": the ratio is below `low` with a negative advantage, or above `high` with a positive one.
        "log band": the same for the log-ratio.
        "cap": the ratio is above `high` and the advantage is not 0.
        "region": the surrogate gives the token a weight of 0 and the advantage is not 0.
    """

    kind: str
    low: float = 0.0
    high: float = float("inf")


class Surrogate:
    """Base of the surrogates. A subclass is a frozen dataclass of parameters with a formula, `token_loss`.

    If it couples the tokens of a sequence, it also overrides `couple`. docs/custom_losses.md shows both.
    """

    anchor: Anchor | None = None
    """Which log-probabilities the log-ratio is taken against: "old", "ref", or None."""
    uses_ratio = False
    """Whether the loss depends on the ratio."""
    levels: tuple[Level, ...] = ("token",)
    """The levels at which its ratio may be computed."""
    clamped_levels: tuple[Level, ...] = LEVELS
    """The levels at which `LossSpec.log_ratio_clamp` applies."""
    couples_tokens = False
    """Whether a token's loss depends on other tokens of its sequence at every level."""
    zero_without_advantage = True
    """Whether a token with zero advantage has neither loss nor gradient."""
    zero_without_weight = True
    """Whether a token with zero token weight has neither loss nor gradient."""
    kernel: str | None = None
    """Name of the Triton function in kernels/surrogates.py. None: only PyTorch computes the loss."""

    @property
    def clip(self) -> Clip | None:
        """The rule of the metric `clip_fraction`, or None if there is no such metric."""
        return None

    @property
    def params(self) -> tuple[float, ...]:
        """Parameters of the Triton function: the numeric fields in order, with infinity for None."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(unbounded(value) for value in values if not isinstance(value, str))

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        """Compute the loss of each token, before weights and aggregation.

        Args:
            logp: `[N]`, nats: log-probabilities of the taken tokens under the policy.
            log_ratio: `[N]`: `logp` minus the anchor's, or the sequence's log-ratio.
            advantage: `[N]`.
            clamp: bound on the absolute log-ratio, `inf` if there is none.
        """
        raise NotImplementedError

    def couple(self, terms: TokenTerms, level: Level, clamp: float, sequences: Sequences) -> TokenTerms:
        """Return the terms of a loss that couples tokens, by default with the log-ratio of the sequence."""
        log_ratio, dlog_ratio = sequence_log_ratio(level, terms.log_ratio, sequences)
        return terms._replace(log_ratio=log_ratio, dlog_ratio=dlog_ratio)

    def spread_sequence_weights(self, weights: Tensor, sequences: Sequences) -> Tensor:
        """Convert weights per sequence, already expanded to `[N]`, to weights per token, `[N]`."""
        return weights


def sequence_log_ratio(level: Level, log_ratio: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
    """Return the mean log-ratio of each token's sequence, and its derivative with respect to the token's."""
    dlog_ratio = None if level == "sequence-token" else 1 / sequences.lengths
    return sequences.total(log_ratio) / sequences.lengths, dlog_ratio
