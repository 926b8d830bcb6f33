"""Keyword options that are handed on with `**options`, as types: a misspelt name fails in a type checker.

Each class mirrors the keyword arguments of a function, names and types; tests/test_typing.py compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .distributed import VocabShard
from .names import Backend


class LossOptions(TypedDict, total=False):
    """What `grpo_loss` and `linear_grpo_loss` both take, but the spec."""

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
    normalizer: float | Tensor | None
    return_entropy: bool
    shard: VocabShard | None
    backend: Backend


class LogRatioLossOptions(LossOptions, total=False):
    """What `log_ratio_loss` hands on to `grpo_loss`."""

    inplace: bool


class GRPOLossOptions(LogRatioLossOptions, total=False):
    """What `grpo_loss` takes, but the spec."""

    ref_logits: Tensor | None


class LinearGRPOLossOptions(LossOptions, total=False):
    """What `linear_grpo_loss` takes, but the spec."""

    lm_head_bias: Tensor | None
    ref_hidden: Tensor | None
    ref_lm_head_weight: Tensor | None
    ref_lm_head_bias: Tensor | None
    chunk_tokens: int | None
    logits_dtype: torch.dtype
    compact: bool
    skip_inactive: bool


class LogpsOptions(TypedDict, total=False):
    """What `selective_logps` takes, but `return_entropy`."""

    temperature: float | Tensor
    logit_scale: float
    logit_softcap: float | None
    vocab_size: int | None
    mask: Tensor | None
    shard: VocabShard | None
    backend: Backend


class LinearLogpsOptions(LogpsOptions, total=False):
    """What `linear_logps` takes, but `return_entropy`."""

    lm_head_bias: Tensor | None
    chunk_tokens: int | None
    logits_dtype: torch.dtype
    compact: bool
