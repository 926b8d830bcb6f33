"""Losses whose tokens are coupled: sums over sequences, and what they make of a token's log-ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .objective import either, unbounded
from .spec import LossSpec
from .surrogates import DRO, GMPO, VESPO


@dataclass
class Layout:
    """Which tokens make a sequence."""

    shape: tuple[int, ...]  # [B, T], or [N] packed
    mask: Tensor  # [N] bool
    dtype: torch.dtype  # of the arithmetic
    seq_lens: Tensor | None = None  # [S], packed
    sequence_ids: Tensor | None = None  # [N], packed: the sequence of each token
    _lengths: Tensor | None = field(default=None, init=False, repr=False)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the unmasked tokens of each token's sequence, `[N]`; in fp64, where there is one."""
        wide = torch.where(self.mask, x, 0.0).to(x.dtype if x.device.type == "mps" else torch.float64)
        return self._sums(wide).to(x.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        if self.seq_lens is None or self.sequence_ids is None:
            return x.view(self.shape).sum(-1, keepdim=True).expand(self.shape).reshape(-1)
        # Not index_add, which on a GPU adds in any order.
        return torch.segment_reduce(x, "sum", lengths=self.seq_lens, unsafe=True)[self.sequence_ids]

    @property
    def lengths(self) -> Tensor:
        """Unmasked tokens of each token's sequence, `[N]`, at least 1."""
        if self._lengths is None:  # counted once; torch.compile does not know functools.cached_property
            self._lengths = self._sums(self.mask.to(self.dtype)).clamp(min=1)
        return self._lengths


class Terms(NamedTuple):
    """What a surrogate's statement is given of each token, `[N]`."""

    log_ratio: Tensor
    advantages: Tensor
    token_weights: Tensor | None
    share: Tensor | None = None
    """Where the log-ratio is the sequence's: its derivative by the token's own. None: it is the token's."""


def couple(spec: LossSpec, terms: Terms, layout: Layout) -> Terms:
    """Of a loss whose tokens are coupled: what its statement is given instead."""
    coupling = COUPLINGS.get(type(spec.surrogate))
    if coupling is not None:
        return coupling(spec, terms, layout)
    log_ratio, share = sequence_log_ratio(spec.level, terms.log_ratio, layout)
    if isinstance(spec.surrogate, DRO):
        # It squares the sum, of which each token carries an equal part.
        root = layout.lengths.sqrt()
        log_ratio, share = log_ratio * root, 1 / root
    return terms._replace(log_ratio=log_ratio, share=share)


def sequence_log_ratio(level: str, log_ratio: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The mean log-ratio of each token's sequence, and its derivative by the token's own."""
    share = None if level == "sequence-token" else 1 / layout.lengths
    return layout.total(log_ratio) / layout.lengths, share


def geometric_mean(spec: LossSpec, terms: Terms, layout: Layout) -> Terms:
    """GMPO: the mean of log-ratios that are bounded on the side to which the advantage pushes."""
    surrogate = spec.surrogate
    assert isinstance(surrogate, GMPO)
    log_ratio, advantages, weights, _ = terms
    count = layout.lengths
    high = either(advantages > 0, surrogate.eps_high, math.inf, like=advantages)
    low = either(advantages < 0, -surrogate.eps_low, -math.inf, like=advantages)
    flat = (log_ratio > high) | (log_ratio < low) | (advantages == 0)
    bounded = torch.where(advantages == 0, 0.0, torch.minimum(torch.maximum(log_ratio, low), high))
    if weights is not None:
        mean = torch.exp(layout.total(torch.log(weights + 1e-10)) / count)
        weights = torch.where(layout.total(weights) == 0, 0.0, mean)
    return Terms(
        layout.total(bounded) / count,
        layout.total(advantages) / count,
        weights,
        torch.where(flat, 0.0, 1 / count),
    )


# Of VESPO, in logarithms: no ratio of a sequence, and no weight, counts as less or more.
LOWEST, HIGHEST = math.log(1e-8), 20.0


def weights_of_sequences(spec: LossSpec, weights: Tensor, layout: Layout) -> Tensor:
    """`[N]`, one weight for all tokens of a sequence: a factor of VESPO's ratio once, not once per token."""
    if not isinstance(spec.surrogate, VESPO):
        return weights
    return torch.exp(torch.log(weights).clamp(LOWEST, HIGHEST) / layout.lengths)


def variational(spec: LossSpec, terms: Terms, layout: Layout) -> Terms:
    """VESPO: a constant weight of the sequence's ratio, in the token weights' place."""
    surrogate = spec.surrogate
    assert isinstance(surrogate, VESPO)
    log_ratio, advantages, weights, _ = terms
    clamp = min(HIGHEST, unbounded(spec.log_ratio_clamp))
    log_w = layout.total(log_ratio.clamp(-clamp, clamp))
    if weights is not None:
        log_w = log_w + layout.total(torch.log(weights).clamp(LOWEST, HIGHEST))
    log_w = log_w.clamp(LOWEST, HIGHEST)
    k = either(advantages >= 0, surrogate.k_pos, surrogate.k_neg, like=advantages)
    rate = either(advantages >= 0, surrogate.lambda_pos, surrogate.lambda_neg, like=advantages).clamp(
        min=1e-4
    )
    return terms._replace(token_weights=torch.exp(rate + k * log_w - rate * torch.exp(log_w)))


COUPLINGS: dict[Any, Callable[[LossSpec, Terms, Layout], Terms]] = {
    GMPO: geometric_mean,
    VESPO: variational,
}
