"""The base class of the surrogates: what the loss, its metrics and the kernels ask of one."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...checks.choices import LEVELS, Anchor, Level
from ..formula import TokenLoss, TokenTerms, unbounded

if TYPE_CHECKING:
    from ...tokens.sequences import Sequences


class Clip(NamedTuple):
    """Which tokens the metric `clip_fraction` counts.

    kind:
        "band": the ratio is below `low` and the advantage negative, or above `high` and it is positive.
        "log band": the same for the log-ratio.
        "cap": the ratio is above `high` and the advantage not 0.
        "region": the surrogate gives the token a weight of 0 and the advantage is not 0.
    """

    kind: str
    low: float = 0.0
    high: float = float("inf")


class Surrogate:
    """Base of the surrogates. A subclass is a frozen dataclass of its numbers, with its formula `token_loss`.

    A subclass that couples the tokens of a sequence overrides `couple` too. docs/custom_losses.md shows both.
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
    """The name of its Triton function in kernels/surrogates.py. None: PyTorch computes the loss."""

    @property
    def clip(self) -> Clip | None:
        """The rule of the metric `clip_fraction`. None: the metric is absent."""
        return None

    @property
    def params(self) -> tuple[float, ...]:
        """The numbers that its Triton function takes: its fields in order, None as infinity."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(unbounded(value) for value in values if not isinstance(value, str))

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        """The loss of each token, before weights and aggregation.

        Args:
            logp: `[N]`, nats: log-probabilities of the taken tokens under the policy.
            log_ratio: `[N]`: `logp` minus the anchor's, or the sequence's log-ratio.
            advantage: `[N]`.
            clamp: bound on the absolute log-ratio, `inf` if there is none.
        """
        raise NotImplementedError

    def couple(self, terms: TokenTerms, level: Level, clamp: float, sequences: Sequences) -> TokenTerms:
        """The terms of a loss that couples tokens. By default the log-ratio becomes that of the sequence."""
        log_ratio, dlog_ratio = sequence_log_ratio(level, terms.log_ratio, sequences)
        return terms._replace(log_ratio=log_ratio, dlog_ratio=dlog_ratio)

    def spread_sequence_weights(self, weights: Tensor, sequences: Sequences) -> Tensor:
        """Token weights `[N]` from weights that were given one per sequence."""
        return weights


def sequence_log_ratio(level: Level, log_ratio: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
    """The mean log-ratio of each token's sequence, and its derivative with respect to the token's own."""
    dlog_ratio = None if level == "sequence-token" else 1 / sequences.lengths
    return sequences.total(log_ratio) / sequences.lengths, dlog_ratio
