"""Log-probabilities alone, differentiable: for trainers that keep their own loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import logit_transform
from .autograd import RowConfig, row_statistics
from .backend import choose_backend
from .batch import Batch, by_rows, check_logits, check_vocab_size
from .heads import check_head, linear_config
from .linear_autograd import linear_row_statistics
from .objective import RowStats


def selective_logps(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the taken tokens, differentiable; with `return_entropy`, the entropies too.

    Args:
        logits: `[B, T, V]` or `[N, V]`, as in `grpo_loss`, as are the options.
        ids: `[B, T]` or `[N]`, int32 or int64.
        mask: `[B, T]` or `[N]`; where 0 the row is not read: log-probability, entropy and gradient are 0.

    Returns:
        `[B, T]` or `[N]` fp32 (fp64 for fp64 logits) in nats, or a pair of such. A row whose upstream
        gradient is exactly zero costs nothing in the backward but its zeros.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    check_logits("logits", logits)
    width = check_vocab_size(vocab_size, logits.shape[-1], "columns of logits")
    batch = Batch.of(logits, ids, mask, None, width, ids_name="ids", mask_name="mask")
    transform = logit_transform(width, temperature, logit_scale, logit_softcap)
    config = RowConfig(transform, choose_backend(backend, logits), entropy=return_entropy)
    stats = row_statistics(by_rows(logits), None, batch.targets, batch.temperatures(temperature), config)
    return _logps(batch, stats)


def linear_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_logps` of `hidden @ lm_head_weight.T + lm_head_bias`, never holding all logits at once.

    Takes 2 N V H operations for `N` unmasked tokens, and for each with an upstream gradient 6 V H in the
    backward, which makes its logits once more.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, as in `linear_grpo_loss`, as are the options.
        lm_head_weight: `[V, H]`.
        ids: `[B, T]` or `[N]`, int32 or int64.
        mask: `[B, T]` or `[N]`; where 0 the row is not run: log-probability, entropy and gradient are 0.

    Returns:
        `[B, T]` or `[N]` fp32 (fp64 for fp64 hidden states) in nats, or a pair of such; differentiable.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    head = check_head(hidden, lm_head_weight, lm_head_bias)
    width = check_vocab_size(vocab_size, head.weight.shape[0], "rows of lm_head_weight")
    batch = Batch.of(hidden, ids, mask, None, width, name="hidden", ids_name="ids", mask_name="mask")
    config = linear_config(
        hidden, None, logits_dtype=logits_dtype, chunk_tokens=chunk_tokens, compact=compact
    )
    transform = logit_transform(width, temperature, logit_scale, logit_softcap)
    rows = RowConfig(transform, choose_backend(backend, hidden), entropy=return_entropy)
    temperatures = batch.temperatures(temperature)
    return _logps(
        batch, linear_row_statistics(head, None, batch.targets, temperatures, batch.mask, config, rows)
    )


def _logps(batch: Batch, stats: RowStats) -> Tensor | tuple[Tensor, Tensor]:
    if stats.entropy is None:
        return batch.shaped(stats.logps)
    return batch.shaped(stats.logps), batch.shaped(stats.entropy)
