"""The losses from hidden states, which include the product with the LM head's weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from typing_extensions import Unpack

from .checks.choices import Backend, PresetName
from .checks.tensors import traced
from .linear.autograd import differentiable_stats, linear_loss
from .linear.config import linear_config
from .linear.head import check_accumulate_into, check_head, check_ref_head
from .linear.plan import RowPlan
from .linear.products import product_dtype
from .linear.rows import LinearRows
from .log import log_path, pass_path
from .losses import LossModule
from .options import LinearGRPOLossOptions
from .spec import LogitTransform, LossSpec, resolve_spec
from .tokens.autograd import loss_of_statistics
from .tokens.batch import Batch
from .tokens.inputs import check_reference, token_inputs
from .tokens.loss import BatchLoss
from .tokens.output import LossOutput, loss_output
from .vocab.autograd import fusible
from .vocab.dispatch import choose_backend
from .vocab.rows import MASKED
from .vocab.sampling_mask import check_sampling_mask
from .vocab.shard import VocabShard
from .vocab.vocabulary import Vocabulary
from .vocab.want import Want


def linear_grpo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    ref_lm_head_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    skip_inactive: bool = False,
    accumulate_into: Tensor | None = None,
    spec: LossSpec | PresetName = LossSpec(),
    completion_mask: Tensor | None = None,
    seq_lens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    sampling_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    prompt_ids: Tensor | None = None,
    return_entropy: bool = False,
    shard: VocabShard | None = None,
    context_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Compute `grpo_loss` of `hidden @ lm_head_weight.T + lm_head_bias` without storing all logits.

    Loss and gradient are computed in the forward, a chunk of tokens at a time, in 6 N V H FLOPs for `N`
    tokens, or 4 N V H with a frozen head. Losses that couple tokens (callables, sequence-level ratios),
    fp16, fp64, `accumulate_into` and `torch.compile` take two passes, 8 N V H: statistics in the forward, and
    the logits again in the backward. Masked rows cost nothing. Rows without a gradient cost 2 V H each. In
    most losses these are the rows with zero advantage or zero token weight, unless there is a KL term or an
    entropy bonus. docs/kernels.md has all counts.

    Args:
        hidden: `[B, T, H]` or packed `[N, H]`, fp16, bf16, fp32 or fp64: the input of the LM head.
            `hidden[b, t]` predicts `completion_ids[b, t]`.
        lm_head_weight: `[V, H]`, in the dtype of `hidden`, or in any dtype under autocast. Its gradient is
            summed in fp32 over the chunks and rounded once. A frozen weight gets none, which saves
            2 N V H FLOPs. A DTensor is gathered, and its shards get the mean of all ranks' gradients, as
            with FSDP2.
        completion_ids: `[B, T]` or `[N]`, as in `grpo_loss`, as are all options that are not described here.
        advantages: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`; `[N]` if S = N.
        lm_head_bias: `[V]`.
        ref_hidden: `[B, T, H']` or `[N, H']` of the reference model, which gets no gradient. Or give
            `ref_logps`.
        ref_lm_head_weight: `[V, H']` of the reference model.
        ref_lm_head_bias: `[V]` of the reference model.
        chunk_tokens: tokens per chunk. None: chosen by vocabulary and free memory, so that the chunks have
            nearly equal lengths. The logger "grpo_kernels" shows it at level DEBUG.
        logits_dtype: dtype of a chunk of logits. `torch.float32` keeps the precision of the products. With
            bf16 operands, `torch.bfloat16` halves the memory traffic at 1e4 times the error.
        compact: leave out rows that need no computation, and run those with a gradient first. Counting them
            syncs with the device once. A loss with two passes syncs once more in the backward. False: all
            rows are run in their own order, without a sync.
        skip_inactive: leave rows without a gradient out of the forward, too. Their `logps`, `ref_logps` and
            `entropy` are 0, and the metrics except `active_fraction` are means over the other rows.
        accumulate_into: `[V, H]`, fp32, bf16 or the dtype of `lm_head_weight` (fp64 for fp64), for example
            `lm_head_weight.grad` or Megatron's `main_grad`. The backward adds the gradient of
            `lm_head_weight` to it, a chunk at a time, and hands none to autograd, so nothing of the weight's
            size is allocated. A 16-bit buffer is rounded once per chunk. This takes two passes, 8 N V H,
            because the factor of the loss is known only in the backward. docs/kernels.md has the rules for
            several ranks. `lm_head_weight` must require a gradient, and may be a DTensor only with a `shard`.
        shard: the heads have these rows of a vocabulary that is split over ranks. All ranks have the same
            hidden states, as in tensor parallelism after gathering the sequences. Loss, outputs and the
            gradient of `hidden`, summed over the ranks, are then the same on all of them, and each has the
            gradients of its own rows. The ranks communicate in every chunk. If `chunk_tokens` is
            None, they agree on it, which syncs. If the heads are DTensors, their local parts are used, with
            `VocabShard.of(weight)`.

    Returns:
        LossOutput as in `grpo_loss`.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import grpo_loss, linear_grpo_loss
        >>> _ = torch.manual_seed(0)
        >>> hidden, lm_head_weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8)
        >>> batch = torch.randint(11, (2, 3)), torch.tensor([1.0, -0.5])
        >>> out = linear_grpo_loss(hidden, lm_head_weight, *batch, spec="dapo")
        >>> from_logits = grpo_loss(hidden @ lm_head_weight.T, *batch, spec="dapo")
        >>> torch.allclose(out.logps, from_logits.logps, atol=1e-4)
        True
    """
    spec = resolve_spec(spec)
    head = check_head(hidden, lm_head_weight, lm_head_bias, shard=shard)
    total = check_accumulate_into(accumulate_into, lm_head_weight, head, shard)
    vocab = Vocabulary.of(vocab_size, head.weight, 0, "rows of lm_head_weight", shard)
    batch = Batch.of(hidden, completion_mask, seq_lens, name="hidden", context_group=context_group)
    targets = vocab.targets(batch, completion_ids)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    check_reference(spec, ref_hidden, ref_logps, "ref_hidden")
    ref = check_ref_head(
        ref_hidden,
        ref_lm_head_weight,
        ref_lm_head_bias,
        policy=hidden,
        width=vocab.width,
        padded=vocab_size is not None,
        shard=shard,
    )
    batch.debug_numbers(hidden=hidden, ref_hidden=ref_hidden)
    batch.debug_head(vocab.width, lm_head_weight=head.weight, lm_head_bias=head.bias)
    if ref is not None:
        batch.debug_head(vocab.width, ref_lm_head_weight=ref.weight, ref_lm_head_bias=ref.bias)
    config = linear_config(
        hidden,
        ref,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        compact=compact,
        skip_inactive=skip_inactive,
    )
    rows = LinearRows(
        head,
        ref,
        targets,
        batch.temperatures(temperature),
        None if kept is None else kept.flatten(0, 1),
        None,
        LogitTransform.of(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, hidden),
        config,
    )
    want = Want.of(spec, reference=ref is not None, entropy=return_entropy, shard=shard)
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
        prompt_ids=prompt_ids,
    )
    loss = BatchLoss(spec, inputs, batch.sequences)

    active = loss.may_be_active()
    run = active if skip_inactive else batch.mask
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    one_pass = learns and total is None and fusible(spec, product_dtype(hidden))
    one_pass = one_pass and not traced(hidden)  # only the two passes have custom operators
    path = "one pass (loss and gradient in the forward)" if one_pass else pass_path(learns)
    log_path("linear_grpo_loss", path, rows.backend, operands=config.dtype, logits=config.logits_dtype)
    if one_pass:
        value, dlogp, stats = linear_loss(rows, loss, RowPlan.of(run, active, compact=compact), want)
        derivatives = loss.coefficients(dlogp)
    else:
        rows = rows._replace(targets=torch.where(run, targets, MASKED))
        stats = differentiable_stats(rows, want, total)
        value, stats, derivatives = loss_of_statistics(stats, loss, rows.backend)
    return loss_output(value, batch, loss, stats, derivatives, rows.backend, run)


class LinearGRPOLoss(LossModule):
    """`linear_grpo_loss` as a module, with a spec and default options.

    Args:
        spec: as in `grpo_loss`. Options of the loss, such as `eps_high`, go into `LossSpec.preset`.
        **options: keyword arguments of `linear_grpo_loss`.

    Raises:
        TypeError: an option that `linear_grpo_loss` does not have.
        ValueError: an unknown preset.

    Examples:
        >>> import torch
        >>> from grpo_kernels import LinearGRPOLoss
        >>> loss_fn = LinearGRPOLoss("dapo", temperature=0.9)
        >>> hidden, lm_head_weight = torch.zeros(1, 2, 8, requires_grad=True), torch.ones(5, 8)
        >>> out = loss_fn(hidden, lm_head_weight, torch.tensor([[3, 4]]), torch.tensor([1.0]))
        >>> out.loss.backward()
        >>> hidden.grad.shape
        torch.Size([1, 2, 8])
    """

    function = staticmethod(linear_grpo_loss)

    def __init__(
        self, spec: LossSpec | PresetName = LossSpec(), **options: Unpack[LinearGRPOLossOptions]
    ) -> None:
        super().__init__(spec, **options)

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        completion_ids: Tensor,
        advantages: Tensor,
        *,
        spec: LossSpec | PresetName | None = None,
        **options: Unpack[LinearGRPOLossOptions],
    ) -> LossOutput:
        """Call `linear_grpo_loss`. Options given here override those of the module."""
        return self.call(hidden, lm_head_weight, completion_ids, advantages, spec=spec, **options)

    if TYPE_CHECKING:  # as in GRPOLoss

        def __call__(
            self,
            hidden: Tensor,
            lm_head_weight: Tensor,
            completion_ids: Tensor,
            advantages: Tensor,
            *,
            spec: LossSpec | PresetName | None = None,
            **options: Unpack[LinearGRPOLossOptions],
        ) -> LossOutput: ...
