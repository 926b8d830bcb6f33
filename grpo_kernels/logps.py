"""Differentiable log-probabilities, for trainers that keep their own loss."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .checks.choices import Backend
from .linear.autograd import differentiable_stats as differentiable_linear_stats
from .linear.config import linear_config
from .linear.head import check_accumulate_into, check_head
from .linear.rows import LinearRows
from .log import kernel_path, log_path, pass_path
from .options import LinearLogpsOptions, LogpsOptions
from .spec import LogitTransform
from .tokens.batch import Batch
from .tokens.statistics import RowStats
from .vocab.autograd import differentiable_stats
from .vocab.dispatch import choose_backend
from .vocab.logits import check_logits
from .vocab.rows import Rows, as_rows
from .vocab.sampling_mask import check_sampling_mask, kept_logits
from .vocab.shard import VocabShard, local_part
from .vocab.vocabulary import Vocabulary
from .vocab.want import Want


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
    sampling_mask: Tensor | None = None,
    return_entropy: bool = False,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute differentiable log-probabilities of the taken tokens, with `return_entropy` also entropies.

    Args:
        logits: `[B, T, V]` or `[N, V]`, as in `grpo_loss`, as are the options that are not described here.
        ids: `[B, T]` or `[N]`, int32 or int64. Or `[B, T, K]` or `[N, K]`: `K` tokens per position, computed
            in the same pass. A negative one is padding: its log-probability is 0 and has no gradient.
        mask: `[B, T]` or `[N]`. If 0, the row is not read, and log-probability, entropy and gradient are 0.

    Returns:
        Log-probabilities in the shape of `ids`, fp32 (fp64 for fp64 logits), in nats, with `return_entropy`
        also entropies, `[B, T]` or `[N]`. In the backward, a row whose upstream gradient is exactly zero is
        not read.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import selective_logps
        >>> logits = torch.tensor([[[0.0, 1.0, 2.0]]])  # one token, a vocabulary of 3
        >>> logps, entropy = selective_logps(logits, torch.tensor([[2]]), return_entropy=True)
        >>> round(logps.item(), 4), round(entropy.item(), 4)
        (-0.4076, 0.8324)
        >>> selective_logps(logits, torch.tensor([[[2, 0]]]))  # two tokens of the same position
        tensor([[[-0.4076, -2.4076]]])
    """
    if shard is not None:
        logits = local_part(logits)
    check_logits(logits)
    vocab = Vocabulary.of(vocab_size, logits, -1, "columns of logits", shard)
    batch = Batch.of(logits, mask, None, mask_name="mask")
    targets, several = token_targets(vocab, batch, ids, every_row=return_entropy)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    batch.debug_numbers(logits=kept_logits(logits[..., : vocab.width], kept))
    rows = Rows(
        as_rows(logits),
        None,
        targets,
        batch.temperatures(temperature),
        kept,
        several,
        LogitTransform.of(vocab.width, temperature, logit_scale, logit_softcap),
        choose_backend(backend, logits),
    )
    learns = torch.is_grad_enabled() and logits.requires_grad
    log_path("selective_logps", kernel_path(learns), rows.backend, logits=logits.dtype)
    want = Want(entropy=return_entropy, shard=shard, ids=0 if several is None else several.shape[1])
    stats = differentiable_stats(rows, want)
    found = TokenStats.of(stats, batch)
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
    sampling_mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    accumulate_into: Tensor | None = None,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_logps` of `hidden @ lm_head_weight.T + lm_head_bias` without storing all logits.

    It takes 2 N V H FLOPs for `N` unmasked tokens. The backward takes 6 V H for each token with an upstream
    gradient, because it computes the logits again.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, as in `linear_grpo_loss`, as are the options that are not described
            here.
        lm_head_weight: `[V, H]`.
        ids: `[B, T]` or `[N]`, or for `K` tokens per position `[B, T, K]` or `[N, K]`, int32 or int64.
        accumulate_into: as in `linear_grpo_loss`, without a further cost, as the backward computes the logits
            again anyway.
        mask: `[B, T]` or `[N]`. If 0, the row is not run, and log-probability, entropy and gradient are 0.
        shard: `lm_head_weight` and `lm_head_bias` have only these rows. See `linear_grpo_loss`.

    Returns:
        As `selective_logps`, fp64 for fp64 hidden states.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import linear_logps
        >>> hidden = torch.tensor([[[1.0, 2.0]]])  # [B, T, H]
        >>> lm_head_weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # [V, H]
        >>> linear_logps(hidden, lm_head_weight, torch.tensor([[2]]))  # the logits are 0, 1, 2
        tensor([[-0.4076]])
    """
    found = linear_token_stats(
        hidden,
        lm_head_weight,
        ids,
        lm_head_bias=lm_head_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
        mask=mask,
        sampling_mask=sampling_mask,
        entropy=return_entropy,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
        compact=compact,
        accumulate_into=accumulate_into,
        shard=shard,
        backend=backend,
    )
    return found.logps if found.entropy is None else (found.logps, found.entropy)


class TokenStats(NamedTuple):
    """Statistics of each token, `[B, T]` or `[N]`, 0 or False at masked positions. None if not requested."""

    logps: Tensor  # nats, differentiable; or `[B, T, K]` or `[N, K]`
    entropy: Tensor | None  # nats, differentiable
    top1: Tensor | None  # bool: no token is likelier than the taken one

    @classmethod
    def of(cls, stats: RowStats, batch: Batch) -> TokenStats:
        entropy = None if stats.entropy is None else batch.unflatten(stats.entropy)
        top1 = None if stats.top1 is None else batch.unflatten(stats.top1 == 1)
        logps = stats.logps if stats.id_logps is None else stats.id_logps
        return cls(batch.unflatten(logps), entropy, top1)


def token_targets(
    vocab: Vocabulary, batch: Batch, ids: Tensor, *, every_row: bool
) -> tuple[Tensor, Tensor | None]:
    """Return `Rows.targets` and, if `ids` has several tokens per position, `Rows.ids`."""
    if ids.dim() <= len(batch.shape):
        return vocab.targets(batch, ids, "ids"), None
    return vocab.several_targets(batch, ids, "ids", every_row=every_row)


def linear_token_stats(
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
    sampling_mask: Tensor | None = None,
    entropy: bool = False,
    top1: bool = False,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    accumulate_into: Tensor | None = None,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
    function: str = "linear_logps",
) -> TokenStats:
    """Compute the statistics of each token in one pass. Arguments and errors are those of `linear_logps`.

    `function` is the name of the caller in the log.
    """
    head = check_head(hidden, lm_head_weight, lm_head_bias, shard=shard)
    total = check_accumulate_into(accumulate_into, lm_head_weight, head, shard)
    vocab = Vocabulary.of(vocab_size, head.weight, 0, "rows of lm_head_weight", shard)
    batch = Batch.of(hidden, mask, None, name="hidden", mask_name="mask")
    targets, several = token_targets(vocab, batch, ids, every_row=entropy)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    batch.debug_numbers(hidden=hidden)
    batch.debug_head(vocab.width, lm_head_weight=head.weight, lm_head_bias=head.bias)
    config = linear_config(
        hidden, None, logits_dtype=logits_dtype, chunk_tokens=chunk_tokens, compact=compact
    )
    rows = LinearRows(
        head,
        None,
        targets,
        batch.temperatures(temperature),
        None if kept is None else kept.flatten(0, 1),
        several,
        LogitTransform.of(vocab.width, temperature, logit_scale, logit_softcap),
        choose_backend(backend, hidden),
        config,
    )
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    dtypes = {"operands": config.dtype, "logits": config.logits_dtype}
    log_path(function, pass_path(learns), rows.backend, **dtypes)
    count = 0 if several is None else several.shape[1]
    want = Want(entropy=entropy, top1=top1, shard=shard, ids=count)
    stats = differentiable_linear_stats(rows, want, total)
    return TokenStats.of(stats, batch)
