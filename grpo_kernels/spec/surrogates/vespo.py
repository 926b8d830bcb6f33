"""VESPO: the log-probability weighted by a smooth function of the sequence's ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks.choices import Level
from ...checks.scalars import number_field
from ..formula import TokenLoss, TokenTerms, select
from .base import Surrogate

if TYPE_CHECKING:
    from ...tokens.sequences import Sequences

LOWEST, HIGHEST = math.log(1e-8), 20.0
"""Bounds on the logarithms of a sequence's ratio and of a weight, as in TRL 1.16."""


@dataclass(frozen=True)
class VESPO(Surrogate):
    """`-sg(phi) * A * logp`, `phi = e^lambda * w^k * e^(-lambda w)`, `w` the product of a sequence's ratios.

    This is "vespo" of TRL 1.16 with its bounds: absolute token log-ratios are at most 20, log w is
    between log 1e-8 and 20, and lambda is at least 1e-4. Token weights multiply `w`, so exclude a token by
    zero advantage, not by zero weight.

    Attributes:
        k_pos: `k` if `A >= 0`.
        lambda_pos: `lambda` if `A >= 0`.
        k_neg: `k` otherwise.
        lambda_neg: `lambda` otherwise.

    Examples:
        >>> import torch
        >>> from grpo_kernels import VESPO, LossSpec, policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()  # the ratios are 1.4 and 0.6
        >>> spec = LossSpec(VESPO())
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec=spec, old_logps=old_logps)
        >>> out.loss.backward()
        >>> logps.grad  # -phi / 2 with w = 1.4 * 0.6
        tensor([[-0.5702, -0.5702]])
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    anchor = "old"
    uses_ratio = True
    couples_tokens = True
    zero_without_weight = False

    def __post_init__(self) -> None:
        for f in fields(self):
            number_field(self, f.name)

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        # `couple` puts phi into the token weights.
        return TokenLoss(-advantage * logp, -advantage, None)

    def couple(self, terms: TokenTerms, level: Level, clamp: float, sequences: Sequences) -> TokenTerms:
        log_ratio, advantages, weights, _ = terms
        clamp = min(HIGHEST, clamp)
        log_w = sequences.total(log_ratio.clamp(-clamp, clamp))
        if weights is not None:
            log_w = log_w + sequences.total(torch.log(weights).clamp(LOWEST, HIGHEST))
        log_w = log_w.clamp(LOWEST, HIGHEST)
        k = select(advantages >= 0, self.k_pos, self.k_neg, like=advantages)
        rate = select(advantages >= 0, self.lambda_pos, self.lambda_neg, like=advantages).clamp(min=1e-4)
        return terms._replace(token_weights=torch.exp(rate + k * log_w - rate * torch.exp(log_w)))

    def spread_sequence_weights(self, weights: Tensor, sequences: Sequences) -> Tensor:
        # A sequence's weight multiplies w once, not once per token.
        return torch.exp(torch.log(weights).clamp(LOWEST, HIGHEST) / sequences.lengths)
