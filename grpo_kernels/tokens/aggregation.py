"""The aggregations, each as a weight per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LossSpec
from .sequences import Sequences


def safe_divide(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """`numerator / denominator`, or 0 if the denominator is 0: the loss of an empty batch is 0."""
    if isinstance(denominator, Tensor):
        return (numerator / denominator).masked_fill_(denominator == 0, 0.0)
    return numerator / denominator if denominator else torch.zeros_like(numerator)


def aggregation_weights(
    spec: LossSpec,
    sequences: Sequences,
    num_sequences: int | None,
    normalizer: Tensor | float | None,
) -> Tensor:
    """Return weights `[N]` such that the aggregated loss is `sum(weights * token losses)`."""
    weights = sequences.mask.to(sequences.dtype)
    if spec.aggregation == "token-mean":
        denominator = sequences.over_ranks(weights.sum()) if normalizer is None else normalizer
    elif spec.aggregation == "token-sum":
        denominator = 1.0 if normalizer is None else normalizer
    else:
        denominator = normalizer if normalizer is not None else float(num_sequences or 0)
    if spec.aggregation == "seq-mean-token-mean":
        weights = weights / sequences.lengths
    elif spec.aggregation == "seq-mean-token-sum-norm":
        assert spec.max_tokens is not None  # LossSpec requires it
        denominator = denominator * spec.max_tokens
    return safe_divide(weights, denominator)
