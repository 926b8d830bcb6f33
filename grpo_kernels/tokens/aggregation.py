"""The aggregations, each as a weight per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.choices import Aggregation
from .groups import group_sum, number_groups
from .sequences import Sequences


def safe_divide(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """`numerator / denominator`, or 0 if the denominator is 0: the loss of an empty batch is 0."""
    if isinstance(denominator, Tensor):
        return (numerator / denominator).masked_fill_(denominator == 0, 0.0)
    return numerator / denominator if denominator else torch.zeros_like(numerator)


def aggregation_weights(
    aggregation: Aggregation,
    max_tokens: int | None,
    sequences: Sequences,
    num_sequences: int | None,
    normalizer: Tensor | float | None,
    prompt_ids: Tensor | None,
) -> Tensor:
    """Return weights `[N]` such that the aggregated loss is `sum(weights * token losses)`.

    `max_tokens` is for "seq-mean-token-sum-norm", `prompt_ids`, integers `[B]` or `[S]`, for "prompt-mean".
    """
    weights = sequences.mask.to(sequences.dtype)
    if aggregation == "token-mean":
        denominator = sequences.over_ranks(weights.sum()) if normalizer is None else normalizer
    elif aggregation == "token-sum":
        denominator = 1.0 if normalizer is None else normalizer
    elif aggregation == "prompt-mean":
        assert prompt_ids is not None  # check_row_weights requires it
        prompts, count = number_groups(prompt_ids)
        # The counts are whole numbers, whose sum is exact in any order.
        tokens = group_sum(sequences.counts.view(-1), prompts).view_as(sequences.counts)
        weights = weights / sequences.spread(tokens.clamp(min=1))
        denominator = count.to(weights.dtype) if normalizer is None else normalizer
    else:
        denominator = normalizer if normalizer is not None else float(num_sequences or 0)
    if aggregation == "seq-mean-token-mean":
        weights = weights / sequences.lengths
    elif aggregation == "seq-mean-token-sum-norm":
        assert max_tokens is not None  # LossSpec and divergence_weights require it
        denominator = denominator * max_tokens
    return safe_divide(weights, denominator)
