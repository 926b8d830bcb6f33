"""The distillation losses: divergences of the student from the teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks.choices import AGGREGATIONS, RESTS, Aggregation, Backend, DivergenceKind, Rest
from .checks.scalars import check_choice, check_integer
from .checks.tensors import check_device, check_tensor, traced
from .log import kernel_path, log_path
from .spec import LogitTransform
from .spec.divergence import Divergence
from .tokens.batch import Batch
from .tokens.differentiation import refuse_transforms
from .tokens.inputs import check_normalizer, check_row_weights
from .tokens.output import LossOutput
from .tokens.top_k import top_k_divergence
from .vocab.autograd import differentiable_stats
from .vocab.dispatch import choose_backend
from .vocab.divergence import differentiable_divergence, wanted
from .vocab.logits import check_logits, check_ref_logits, check_writable
from .vocab.rows import MASKED, Rows, as_rows
from .vocab.sampling_mask import check_sampling_mask, kept_logits
from .vocab.shard import VocabShard, local_part
from .vocab.vocabulary import Vocabulary
from .vocab.want import Want


def distillation_loss(
    logits: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    divergence: DivergenceKind = "reverse_kl",
    jsd_weight: float = 0.5,
    rest: Rest = "bucket",
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
    inplace: bool = False,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Compute the divergence of a student from a teacher, from the logits of both.

    With student p and teacher q, a token's loss is KL(p || q) for "reverse_kl", KL(q || p) for "forward_kl",
    and `w KL(q || m) + (1 - w) KL(p || m)` with `m = w q + (1 - w) p` for "jsd" (GKD, arXiv:2306.13649). Each
    is over the whole vocabulary, or over the teacher's K likeliest tokens if only these are given. Only the
    student gets a gradient. There is no factor of temperature squared. The `beta` of TRL's
    DistillationTrainer is `jsd_weight`, and its 0 and 1 are "forward_kl" and "reverse_kl".

    The divergence of nearly equal rows keeps three digits: every JSD, a KL below 1e-2, and a reverse KL of a
    student that is sure of its token are computed in another pass, without cancellation. Forward and backward
    read or write 7 rows of logits per token for the JSD, and 5, or with that pass 7, for a KL.

    Args:
        logits: the student's, `[B, T, V]` or `[N, V]`, as in `grpo_loss`, as are all options that are not
            described here. No completion ids are needed.
        teacher_logits: shaped as `logits`, any floating-point dtype (fp64 goes with fp64 only). With
            `vocab_size` the numbers of columns may differ.
        teacher_ids: instead of `teacher_logits`: `[B, T, K]` or `[N, K]`, int32 or int64, the teacher's K
            likeliest tokens. An id below 0 is padding. A position without an id contributes 0 to the loss,
            but counts as a token. The ids of a position must differ: a repeated one would count as two
            outcomes.
        teacher_logps: shaped as `teacher_ids`, nats: log-probabilities of these tokens under the teacher,
            which are taken as they are. Only the student's logits are divided by `temperature`.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        jsd_weight: w of the JSD, the teacher's weight in the mixture, 0 < w < 1.
        rest: with `teacher_ids` only. "bucket": all other tokens are one more outcome, of probability
            1 - sum, but at least the rounding error of the sum (in TRL 1e-7). "drop": the tokens of both
            models are renormalized over the K ids.
        aggregation: as in `LossSpec`.
        max_tokens: as in `LossSpec`.
        temperature: of both models; with `teacher_ids` of the student.
        ref_logit_scale: of the teacher's logits. None: that of the student.
        ref_logit_softcap: of the teacher's logits. None: that of the student.
        sampling_mask: the tokens that both models are renormalized over.
        inplace: let the gradient overwrite `logits` in the backward.

    Returns:
        LossOutput with

        * `loss`: 0-dim fp32, fp64 for fp64 logits.
        * `metrics`: detached 0-dim tensors, means over the unmasked tokens: `kl`, the divergence; `kl_exact`,
          the reverse KL, for "reverse_kl" over the whole vocabulary; `entropy` of the student, with
          `return_entropy`.
        * `logps`, `ref_logps`: None.
        * `entropy`: with `return_entropy`, detached `[B, T]` or `[N]`, nats, 0 at masked positions.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.

    A divergence is infinite if a token is possible under its first distribution and impossible under its
    second: for example "reverse_kl" if a teacher's logit is -inf and the student's is not. The JSD is finite.

    Examples:
        >>> import torch
        >>> from grpo_kernels import distillation_loss
        >>> student = torch.zeros(1, 1, 4, requires_grad=True)  # each of 4 tokens has the probability 0.25
        >>> teacher = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]]).log()
        >>> out = distillation_loss(student, teacher_logits=teacher, divergence="forward_kl")
        >>> round(out.loss.item(), 4)  # 0.7 log(0.7 / 0.25) + 0.3 log(0.1 / 0.25)
        0.4458
    """
    given = logits
    if shard is not None:
        logits = local_part(logits)
        teacher_logits = None if teacher_logits is None else local_part(teacher_logits)
    check_logits(logits)
    spec = Divergence(divergence, jsd_weight)
    check_teacher("teacher_logits", teacher_logits, teacher_ids, teacher_logps, rest)
    vocab = Vocabulary.of(vocab_size, logits, -1, "columns of logits", shard)
    batch = Batch.of(logits, completion_mask, seq_lens)
    weights = divergence_weights(batch, aggregation, max_tokens, normalizer, prompt_ids)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    batch.debug_numbers(logits=kept_logits(logits[..., : vocab.width], kept))
    if teacher_logits is not None:
        check_ref_logits(
            teacher_logits, logits, vocab.width, padded=vocab_size is not None, name="teacher_logits"
        )
        batch.debug_numbers(teacher_logits=kept_logits(teacher_logits[..., : vocab.width], kept))
        teacher_logits = as_rows(teacher_logits.detach())
    # A compiled graph copies what its operators overwrite, and cannot check which inputs share memory.
    inplace = inplace and not traced(logits)
    if inplace:
        refuse_transforms(logits)
        check_writable(as_rows(logits), given, teacher_logits, "teacher_logits")
    rows = Rows(
        as_rows(logits),
        teacher_logits,
        torch.where(batch.mask, vocab.width, MASKED),
        batch.temperatures(temperature),
        kept,
        None,
        LogitTransform.of(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, logits),
    )
    learns = torch.is_grad_enabled() and logits.requires_grad
    if teacher_ids is None or teacher_logps is None:
        want = wanted(spec, entropy=return_entropy, inplace=inplace, shard=shard)
        path, dtype = divergence_path(learns), None if teacher_logits is None else teacher_logits.dtype
        log_path("distillation_loss", path, rows.backend, logits=logits.dtype, teacher_logits=dtype)
        value, entropy = differentiable_divergence(rows, spec, want)
    else:
        top = TopK.of(vocab, batch, teacher_ids, teacher_logps, every_row=return_entropy)
        rows = rows._replace(targets=top.targets, ids=top.ids)
        want = Want(entropy=return_entropy, inplace=inplace, shard=shard, ids=top.ids.shape[1])
        path, dtype = kernel_path(learns), teacher_logps.dtype
        log_path("distillation_loss", path, rows.backend, logits=logits.dtype, teacher_logps=dtype)
        stats = differentiable_stats(rows, want)
        assert stats.id_logps is not None
        value, entropy = top.divergence(stats.id_logps, spec, rest), stats.entropy
    return divergence_output(batch, weights, value, entropy, exact=exact_kl(spec, teacher_ids))


def divergence_path(learns: bool) -> str:
    """Return the argument `path` of `log_path` for a divergence over the whole vocabulary."""
    if not learns:
        return "two kernels (statistics and divergence, no gradient)"
    return "three kernels (statistics and divergence, then the gradient in the backward)"


class TopK(NamedTuple):
    """The teacher's K likeliest tokens of each position."""

    targets: Tensor  # [N], as in Rows
    ids: Tensor  # [N, K], as in Rows
    logps: Tensor  # [N, K], nats
    valid: Tensor  # [N, K] bool

    @classmethod
    def of(cls, vocab: Vocabulary, batch: Batch, ids: Tensor, logps: Tensor, *, every_row: bool) -> TopK:
        """Check the arguments `teacher_ids` and `teacher_logps`."""
        targets, columns = vocab.several_targets(batch, ids, "teacher_ids", every_row=every_row)
        check_tensor("teacher_logps", logps)
        check_device("teacher_logps", logps, batch.device, batch.source)
        if not logps.is_floating_point():
            raise ValueError(f"teacher_logps must be floating-point numbers, got {logps.dtype}")
        if logps.shape != ids.shape:
            raise ValueError(
                f"teacher_logps must have the shape of teacher_ids {tuple(ids.shape)}, got "
                f"{tuple(logps.shape)}"
            )
        batch.debug_numbers(teacher_logps=logps.masked_fill(ids < 0, 0.0))
        return cls(targets, columns, logps.detach().flatten(0, -2), columns != MASKED)

    def divergence(self, logps: Tensor, spec: Divergence, rest: Rest) -> Tensor:
        """Return the divergence of each row `[N]` from the student's log-probabilities `[N, K]`."""
        return top_k_divergence(logps, self.logps.to(logps.dtype), self.valid, spec, rest)


def check_teacher(
    name: str, whole: Tensor | None, ids: Tensor | None, logps: Tensor | None, rest: Rest
) -> None:
    """Raise ValueError unless the teacher is given once: as `whole`, the argument `name`, or as top-K."""
    check_choice("rest", rest, RESTS)
    for given, other in (("teacher_ids", "teacher_logps"), ("teacher_logps", "teacher_ids")):
        present = {"teacher_ids": ids is not None, "teacher_logps": logps is not None}
        if present[given] and whole is not None:
            raise ValueError(f"{name} and {given} are both given: give one")
        if present[given] and not present[other]:
            raise ValueError(f"{given} is given without {other}")
    if whole is None and ids is None:
        raise ValueError(f"a teacher is missing: give {name}, or teacher_ids and teacher_logps")


def divergence_weights(
    batch: Batch,
    aggregation: Aggregation,
    max_tokens: int | None,
    normalizer: float | Tensor | None,
    prompt_ids: Tensor | None,
) -> Tensor:
    """Return the aggregation as a weight per token, `[N]`."""
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "seq-mean-token-sum-norm" and max_tokens is None:
        raise ValueError(f"aggregation {aggregation!r} divides by max_tokens: give max_tokens")
    max_tokens = check_integer("max_tokens", max_tokens, optional=True)
    return check_row_weights(aggregation, max_tokens, batch, check_normalizer(batch, normalizer), prompt_ids)


def exact_kl(spec: Divergence, teacher_ids: Tensor | None) -> bool:
    """Return whether the divergence is the reverse KL over the whole vocabulary."""
    return spec.kind == "reverse_kl" and teacher_ids is None


def divergence_output(
    batch: Batch,
    weights: Tensor,
    value: Tensor,
    entropy: Tensor | None,
    *,
    exact: bool,
    loss: Tensor | None = None,
) -> LossOutput:
    """Return the output of a distillation loss. `value` and `entropy` are `[N]`, 0 at masked positions.

    `loss` is computed from `value` if it is None. `exact`: see `exact_kl`.
    """
    if loss is None:
        loss = (weights * value).sum()
    known = {"kl": value.detach()}
    known |= {"kl_exact": value.detach()} if exact else {}
    known |= {} if entropy is None else {"entropy": entropy.detach()}
    count = batch.mask.sum(dtype=value.dtype).clamp(min=1)
    means = torch.stack([*known.values()]).sum(1) / count
    metrics = dict(zip(known, means.unbind()))
    shaped = None if entropy is None else batch.unflatten(entropy.detach())
    # There are no taken tokens, and so no log-probabilities of them.
    return LossOutput(loss, metrics, None, None, shaped)  # type: ignore[arg-type]
