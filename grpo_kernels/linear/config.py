"""The configuration of a pass from hidden states: dtypes, chunks, and which rows are run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.scalars import check_flag, check_integer
from .head import Head
from .products import multiplies_mixed, product_dtype


@dataclass(frozen=True)
class LinearConfig:
    """How logits are computed from hidden states.

    Attributes:
        dtype, ref_dtype: the dtypes of the operands of all matrix products, for policy and reference.
        logits_dtype, ref_logits_dtype: the dtypes of a chunk of logits, for policy and reference.
        chunk_tokens: tokens per chunk. None: `Chunks` chooses it.
        compact: order the rows, and leave out those that are not needed.
    """

    dtype: torch.dtype
    logits_dtype: torch.dtype
    ref_dtype: torch.dtype
    ref_logits_dtype: torch.dtype
    chunk_tokens: int | None
    compact: bool


def linear_config(
    hidden: Tensor,
    ref: Head | None,
    *,
    logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    compact: bool,
    skip_inactive: bool = False,
) -> LinearConfig:
    """Check the options that `linear_grpo_loss` documents, and return them as a LinearConfig."""
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be torch.float32 or torch.bfloat16, got {logits_dtype}")
    if logits_dtype == torch.bfloat16 != product_dtype(hidden):
        raise ValueError(f"logits_dtype=torch.bfloat16 needs bf16 operands, got {product_dtype(hidden)}")
    chunk_tokens = check_integer("chunk_tokens", chunk_tokens, optional=True)
    check_flag("compact", compact)
    check_flag("skip_inactive", skip_inactive)
    if skip_inactive and not compact:
        raise ValueError("skip_inactive=True needs compact=True, because only compact leaves out rows")
    ref_hidden = hidden if ref is None else ref.hidden
    return LinearConfig(
        *held_dtypes(hidden, logits_dtype),
        *held_dtypes(ref_hidden, logits_dtype),
        chunk_tokens,
        compact,
    )


def held_dtypes(hidden: Tensor, logits_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the operands and of the logits.

    If 16-bit operands cannot be multiplied into fp32, they are cast to fp32 once.
    """
    dtype = product_dtype(hidden)
    widens = logits_dtype == torch.float32 and dtype.itemsize == 2
    if dtype == logits_dtype or (widens and multiplies_mixed(hidden)):
        return dtype, logits_dtype
    wide = torch.promote_types(dtype, torch.float32)
    return wide, wide
