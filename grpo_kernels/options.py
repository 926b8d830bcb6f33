"""Types of keyword options that are passed on as `**options`, so that type checkers refuse a misspelt name.

Each class has the names and types of a function's keyword arguments. tests/api/test_typing.py compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from typing_extensions import TypedDict

from .checks.choices import Backend
from .vocab.shard import VocabShard


class LossOptions(TypedDict, total=False):
    """The options that `grpo_loss` and `linear_grpo_loss` share, except for the spec."""

    completion_mask: Tensor | None
    seq_lens: Tensor | None
    ref_logps: Tensor | None
    old_logps: Tensor | None
    token_weights: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    logit_softcap: float | None
    ref_logit_scale: float | None
    ref_logit_softcap: float | None
    vocab_size: int | None
    sampling_mask: Tensor | None
    normalizer: float | Tensor | None
    prompt_ids: Tensor | None
    return_entropy: bool
    shard: VocabShard | None
    context_group: dist.ProcessGroup | None
    backend: Backend


class LogRatioLossOptions(LossOptions, total=False):
    """The options that `log_ratio_loss` passes on to `grpo_loss`."""

    inplace: bool


class GRPOLossOptions(LogRatioLossOptions, total=False):
    """The options of `grpo_loss`, except for the spec."""

    ref_logits: Tensor | None


class LinearGRPOLossOptions(LossOptions, total=False):
    """The options of `linear_grpo_loss`, except for the spec."""

    lm_head_bias: Tensor | None
    ref_hidden: Tensor | None
    ref_lm_head_weight: Tensor | None
    ref_lm_head_bias: Tensor | None
    chunk_tokens: int | None
    logits_dtype: torch.dtype
    compact: bool
    skip_inactive: bool
    accumulate_into: Tensor | None


class LogpsOptions(TypedDict, total=False):
    """The options of `selective_logps`, except for `return_entropy`."""

    temperature: float | Tensor
    logit_scale: float
    logit_softcap: float | None
    vocab_size: int | None
    mask: Tensor | None
    sampling_mask: Tensor | None
    shard: VocabShard | None
    backend: Backend


class LinearLogpsOptions(LogpsOptions, total=False):
    """The options of `linear_logps`, except for `return_entropy`."""

    lm_head_bias: Tensor | None
    chunk_tokens: int | None
    logits_dtype: torch.dtype
    compact: bool
    accumulate_into: Tensor | None
