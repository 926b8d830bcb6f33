"""From tokens to one number: every aggregation as a weight per token."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LossSpec


def safe_divide(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is: an empty batch has loss 0."""
    if isinstance(denominator, Tensor):
        return torch.where(denominator == 0, 0.0, numerator / denominator)
    return numerator / denominator if denominator else torch.zeros_like(numerator)


def aggregation_weights(
    spec: LossSpec,
    mask: Tensor,  # [B, T], or [N] packed; bool
    sequence_ids: Tensor | None,  # [N], packed: the sequence each token belongs to
    num_sequences: int | None,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of every token, `[N]`, such that the aggregated loss is `sum(weights * token losses)`."""
    weights = mask.to(dtype)
    if spec.aggregation == "token-mean":
        denominator = weights.sum() if normalizer is None else normalizer
    elif spec.aggregation == "token-sum":
        denominator = 1.0 if normalizer is None else normalizer
    else:
        denominator = normalizer if normalizer is not None else float(num_sequences or 0)
    if spec.aggregation == "seq-mean-token-mean":
        weights = safe_divide(weights, sequence_lengths(weights, sequence_ids, num_sequences))
    elif spec.aggregation == "seq-mean-token-sum-norm":
        denominator = denominator * (mask.shape[-1] if spec.max_tokens is None else spec.max_tokens)
    return safe_divide(weights, denominator).reshape(-1)


def sequence_lengths(weights: Tensor, sequence_ids: Tensor | None, num_sequences: int | None) -> Tensor:
    """Unmasked tokens of the sequence of each token, shaped to divide `weights`."""
    if sequence_ids is None:
        return weights.sum(-1, keepdim=True)
    assert num_sequences is not None
    lengths = weights.new_zeros(num_sequences).index_add(0, sequence_ids, weights)
    return lengths[sequence_ids]
