"""The distillation losses from hidden states, which include the products with the LM heads' weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks.choices import Aggregation, Backend, DivergenceKind, Rest
from .distillation import TopK, check_teacher, divergence_output, divergence_weights, exact_kl
from .linear.autograd import differentiable_stats
from .linear.config import linear_config
from .linear.divergence import linear_divergence
from .linear.head import check_head, check_ref_head
from .linear.rows import LinearRows
from .log import log_path, pass_path
from .spec import LogitTransform
from .spec.divergence import Divergence
from .tokens.batch import Batch
from .tokens.output import LossOutput
from .vocab.dispatch import choose_backend
from .vocab.rows import MASKED
from .vocab.sampling_mask import check_sampling_mask
from .vocab.shard import VocabShard
from .vocab.vocabulary import Vocabulary
from .vocab.want import Want


def linear_distillation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    divergence: DivergenceKind = "reverse_kl",
    jsd_weight: float = 0.5,
    rest: Rest = "bucket",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    completion_mask: Tensor | None = None,
    seq_lens: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    max_tokens: int | None = None,
    normalizer: float | Tensor | None = None,
    prompt_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    sampling_mask: Tensor | None = None,
    return_entropy: bool = False,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Compute `distillation_loss` of `hidden @ lm_head_weight.T + lm_head_bias` without storing all logits.

    With a whole teacher, loss and gradient are computed in the forward, a chunk of tokens at a time, in every
    dtype: 6 N V H FLOPs for `N` unmasked tokens, and 2 N V H' for the teacher. With the teacher's top K, the
    forward takes 2 N V H, and the backward computes the logits again, in 6 N V H. Masked rows cost nothing.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, as in `linear_grpo_loss`, as are `chunk_tokens`, `logits_dtype`,
            `compact` and `shard`. All other options are those of `distillation_loss`.
        lm_head_weight: `[V, H]`.
        lm_head_bias: `[V]`.
        teacher_hidden: `[B, T, H']` or `[N, H']` of the teacher, which gets no gradient. Its hidden size `H'`
            may differ. Or give `teacher_ids` and `teacher_logps`.
        teacher_lm_head_weight: `[V, H']`. With `vocab_size` the numbers of rows of the weights may differ.
        teacher_lm_head_bias: `[V]`.

    Returns:
        LossOutput as in `distillation_loss`.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import linear_distillation_loss
        >>> hidden, lm_head_weight = torch.zeros(1, 1, 8, requires_grad=True), torch.ones(4, 8)
        >>> teacher = {
        ...     "teacher_hidden": torch.ones(1, 1, 1),
        ...     "teacher_lm_head_weight": torch.tensor([[0.7], [0.1], [0.1], [0.1]]).log(),
        ... }
        >>> out = linear_distillation_loss(hidden, lm_head_weight, divergence="forward_kl", **teacher)
        >>> round(out.loss.item(), 4)
        0.4458
    """
    head = check_head(hidden, lm_head_weight, lm_head_bias, shard=shard)
    spec = Divergence(divergence, jsd_weight)
    whole = teacher_lm_head_weight if teacher_hidden is None else teacher_hidden
    check_teacher("teacher_hidden", whole, teacher_ids, teacher_logps, rest)
    vocab = Vocabulary.of(vocab_size, head.weight, 0, "rows of lm_head_weight", shard)
    batch = Batch.of(hidden, completion_mask, seq_lens, name="hidden")
    weights = divergence_weights(batch, aggregation, max_tokens, normalizer, prompt_ids)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    teacher = check_ref_head(
        teacher_hidden,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
        policy=hidden,
        width=vocab.width,
        padded=vocab_size is not None,
        shard=shard,
        prefix="teacher_",
    )
    batch.debug_numbers(hidden=hidden, teacher_hidden=teacher_hidden)
    batch.debug_head(vocab.width, lm_head_weight=head.weight, lm_head_bias=head.bias)
    if teacher is not None:
        parts = {"teacher_lm_head_weight": teacher.weight, "teacher_lm_head_bias": teacher.bias}
        batch.debug_head(vocab.width, **parts)
    config = linear_config(
        hidden, teacher, logits_dtype=logits_dtype, chunk_tokens=chunk_tokens, compact=compact
    )
    rows = LinearRows(
        head,
        teacher,
        torch.where(batch.mask, vocab.width, MASKED),
        batch.temperatures(temperature),
        None if kept is None else kept.flatten(0, 1),
        None,
        LogitTransform.of(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, hidden),
        config,
    )
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    exact = exact_kl(spec, teacher_ids)
    dtypes = {"operands": config.dtype, "logits": config.logits_dtype}
    if teacher_ids is None or teacher_logps is None:
        path = "one pass (loss and gradient in the forward)" if learns else pass_path(learns)
        log_path("linear_distillation_loss", path, rows.backend, **dtypes)
        loss, value, entropy = linear_divergence(rows, weights, spec, shard, entropy=return_entropy)
        return divergence_output(batch, weights, value, entropy, exact=exact, loss=loss)
    top = TopK.of(vocab, batch, teacher_ids, teacher_logps, every_row=return_entropy)
    rows = rows._replace(targets=top.targets, ids=top.ids)
    log_path("linear_distillation_loss", pass_path(learns), rows.backend, **dtypes)
    stats = differentiable_stats(rows, Want(entropy=return_entropy, shard=shard, ids=top.ids.shape[1]))
    assert stats.id_logps is not None
    value = top.divergence(stats.id_logps, spec, rest)
    return divergence_output(batch, weights, value, stats.entropy, exact=exact)
