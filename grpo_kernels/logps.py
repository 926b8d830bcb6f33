"""Log-probabilities alone, differentiable: for trainers that keep their own loss."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .arguments import logit_transform
from .autograd import RowConfig, row_statistics
from .backend import choose_backend, log_path, two_kernels, two_passes
from .batch import Batch, Vocabulary, by_rows, check_logits
from .distributed import VocabShard, local_part
from .heads import check_head, linear_config
from .linear_autograd import linear_row_statistics
from .names import Backend
from .objective import RowStats
from .options import LinearLogpsOptions, LogpsOptions


@overload
def selective_logps(
    logits: Tensor, ids: Tensor, *, return_entropy: Literal[False] = False, **options: Unpack[LogpsOptions]
) -> Tensor: ...
@overload
def selective_logps(
    logits: Tensor, ids: Tensor, *, return_entropy: Literal[True], **options: Unpack[LogpsOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_logps(
    logits: Tensor, ids: Tensor, *, return_entropy: bool, **options: Unpack[LogpsOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    shard: VocabShard | None = None,
    backend: Backend = "auto",
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
    if shard is not None:
        logits = local_part(logits)
    check_logits("logits", logits)
    vocab = Vocabulary.of(vocab_size, logits, -1, "columns of logits", shard)
    batch = Batch.of(logits, ids, mask, None, vocab, ids_name="ids", mask_name="mask")
    batch.look_at(logits=logits[..., : vocab.width])
    transform = logit_transform(vocab.width, temperature, logit_scale, logit_softcap)
    config = RowConfig(transform, choose_backend(backend, logits), entropy=return_entropy, shard=shard)
    learns = torch.is_grad_enabled() and logits.requires_grad
    log_path("selective_logps", two_kernels(learns), config.backend, logits=logits.dtype)
    stats = row_statistics(by_rows(logits), None, batch.targets, batch.temperatures(temperature), config)
    found = TokenStatistics.of(stats, batch)
    return found.logps if found.entropy is None else (found.logps, found.entropy)


@overload
def linear_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[LinearLogpsOptions],
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LinearLogpsOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    return_entropy: bool,
    **options: Unpack[LinearLogpsOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_logps` of `hidden @ lm_head_weight.T + lm_head_bias`, never holding all logits at once.

    Takes 2 N V H operations for `N` unmasked tokens, and for each with an upstream gradient 6 V H in the
    backward, which makes its logits once more.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, as in `linear_grpo_loss`, as are the options.
        lm_head_weight: `[V, H]`.
        ids: `[B, T]` or `[N]`, int32 or int64.
        shard: `lm_head_weight` and `lm_head_bias` hold these rows; see `linear_grpo_loss`.
        mask: `[B, T]` or `[N]`; where 0 the row is not run: log-probability, entropy and gradient are 0.

    Returns:
        `[B, T]` or `[N]` fp32 (fp64 for fp64 hidden states) in nats, or a pair of such; differentiable.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    found = linear_token_statistics(
        hidden,
        lm_head_weight,
        ids,
        lm_head_bias=lm_head_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
        mask=mask,
        entropy=return_entropy,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
        compact=compact,
        shard=shard,
        backend=backend,
    )
    return found.logps if found.entropy is None else (found.logps, found.entropy)


class TokenStatistics(NamedTuple):
    """`[B, T]` or `[N]` each, 0 (False) where masked; None where it was not asked for."""

    logps: Tensor  # nats, differentiable
    entropy: Tensor | None  # nats, differentiable
    top1: Tensor | None  # bool: no token is likelier than the taken one

    @classmethod
    def of(cls, stats: RowStats, batch: Batch) -> TokenStatistics:
        entropy = None if stats.entropy is None else batch.shaped(stats.entropy)
        top1 = None if stats.top1 is None else batch.shaped(stats.top1 == 1)
        return cls(batch.shaped(stats.logps), entropy, top1)


def linear_token_statistics(
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
    entropy: bool = False,
    top1: bool = False,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
    function: str = "linear_logps",
) -> TokenStatistics:
    """All that `linear_logps` can tell of each token in one pass; arguments and errors as there.

    `function` is the caller's name in the log.
    """
    head = check_head(hidden, lm_head_weight, lm_head_bias, shard=shard)
    vocab = Vocabulary.of(vocab_size, head.weight, 0, "rows of lm_head_weight", shard)
    batch = Batch.of(hidden, ids, mask, None, vocab, name="hidden", ids_name="ids", mask_name="mask")
    batch.look_at(hidden=hidden)
    batch.look_at_heads(vocab.width, lm_head_weight=head.weight, lm_head_bias=head.bias)
    config = linear_config(
        hidden, None, logits_dtype=logits_dtype, chunk_tokens=chunk_tokens, compact=compact
    )
    transform = logit_transform(vocab.width, temperature, logit_scale, logit_softcap)
    rows = RowConfig(transform, choose_backend(backend, hidden), entropy=entropy, top1=top1, shard=shard)
    temperatures = batch.temperatures(temperature)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    dtypes = {"operands": config.dtype, "logits": config.logits_dtype}
    log_path(function, two_passes(learns), rows.backend, **dtypes)
    stats = linear_row_statistics(head, None, batch.targets, temperatures, config, rows)
    return TokenStatistics.of(stats, batch)
