"""The losses from hidden states: the product with the head's weight is part of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Unpack

from .arguments import (
    LossOutput,
    check_reference,
    logit_transform,
    loss_output,
    resolve_spec,
    token_inputs,
)
from .autograd import RowConfig, fusible, loss_of_statistics
from .backend import choose_backend, log_path, traced, two_passes
from .batch import Batch, Vocabulary
from .distributed import VocabShard
from .heads import check_head, check_ref_head, linear_config, product_dtype
from .linear_autograd import linear_loss, linear_row_statistics
from .losses import LossModule
from .names import Backend, PresetName
from .objective import MASKED
from .options import LinearGRPOLossOptions
from .row_loss import coefficients, may_be_active
from .spec import LossSpec


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
    normalizer: float | Tensor | None = None,
    return_entropy: bool = False,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """`grpo_loss` of `logits = hidden @ lm_head_weight.T + lm_head_bias`, which are never held all at once.

    Loss and gradient are made in the forward, a chunk of tokens at a time: 6 N V H operations for `N` tokens,
    4 with a frozen head. Losses that couple tokens (callables, sequence-level ratios), fp16, fp64 and
    `torch.compile` take two passes: statistics in the forward, the logits once more in the backward, 8 N V H.
    Masked rows cost nothing, rows without a gradient (of most losses those of zero advantage or token weight,
    unless there is a KL term or an entropy bonus) 2 V H each. docs/kernels.md counts them all.

    Args:
        hidden: `[B, T, H]` or packed `[N, H]`, fp16, bf16, fp32 or fp64: what the head is applied to.
            `hidden[b, t]` predicts `completion_ids[b, t]`.
        lm_head_weight: `[V, H]`, in the dtype of `hidden`, or in any under autocast. Its gradient is summed
            in fp32 over the chunks and rounded once; frozen, it costs none. A DTensor is gathered, and its
            shards get the mean of all ranks' gradients, as from FSDP2.
        completion_ids, advantages: as in `grpo_loss`, as are all options that are not named here.
        lm_head_bias: `[V]`.
        ref_hidden, ref_lm_head_weight, ref_lm_head_bias: the reference model's, `[B, T, H']`, `[V, H']` and
            `[V]`; no gradient. Or `ref_logps`.
        chunk_tokens: tokens per chunk. None: chosen by vocabulary and free memory, even for the number of
            tokens; the logger "grpo_kernels" tells at level DEBUG.
        logits_dtype: what a chunk of logits is held in, for bf16 factors: `torch.float32`, in which their
            products are summed, or `torch.bfloat16` for half the traffic at 1e4 times the error.
        compact: order the rows by what they need. The host waits once to learn their number (with two passes
            once more in the backward). False: every row is run where it stands, and the host never waits.
        skip_inactive: rows without a gradient are not even run forward: their `logps`, `ref_logps` and
            `entropy` read 0, and the metrics but `active_fraction` are means over the rest.
        shard: the heads hold these rows of a vocabulary that is split over ranks, each of which has the same
            hidden states (tensor parallelism with its sequences gathered). Loss, outputs and the gradient by
            `hidden`, summed over the ranks, are then the same on all of them; each has the gradients of its
            own rows. The ranks meet at every chunk, whose length they agree upon where it is not given (the
            host waits). A DTensor is taken for its local part (`VocabShard.of(weight)`).

    Returns:
        LossOutput as `grpo_loss`.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    spec = resolve_spec(spec)
    head = check_head(hidden, lm_head_weight, lm_head_bias, shard=shard)
    vocab = Vocabulary.of(vocab_size, head.weight, 0, "rows of lm_head_weight", shard)
    batch = Batch.of(hidden, completion_ids, completion_mask, seq_lens, vocab, name="hidden")
    check_reference(spec, ref_hidden, ref_logps, "ref_hidden")
    ref = check_ref_head(
        ref_hidden,
        ref_lm_head_weight,
        ref_lm_head_bias,
        like=hidden,
        width=vocab.width,
        padded=vocab_size is not None,
        shard=shard,
    )
    batch.look_at(hidden=hidden, ref_hidden=ref_hidden)
    batch.look_at_heads(vocab.width, lm_head_weight=head.weight, lm_head_bias=head.bias)
    if ref is not None:
        parts = {"ref_lm_head_weight": ref.weight, "ref_lm_head_bias": ref.bias}
        batch.look_at_heads(vocab.width, **parts)
    config = linear_config(
        hidden,
        ref,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        compact=compact,
        skip_inactive=skip_inactive,
    )
    rows = RowConfig.of(
        spec,
        logit_transform(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, hidden),
        reference=ref is not None,
        entropy=return_entropy,
        shard=shard,
    )
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
    )
    temperatures = batch.temperatures(temperature)

    active = may_be_active(spec, inputs, batch.layout)
    ran = active if skip_inactive else batch.mask
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    one_pass = learns and fusible(spec, product_dtype(hidden))
    one_pass = one_pass and not traced(hidden)  # there are operators for two passes only
    path = "one pass (loss and gradient in the forward)" if one_pass else two_passes(learns)
    dtypes = {"operands": config.dtype, "logits": config.logits_dtype}
    log_path("linear_grpo_loss", path, rows.backend, **dtypes)
    if one_pass:
        loss, dlogp, stats = linear_loss(
            head, ref, batch.targets, temperatures, inputs, ran, active, spec, config, rows
        )
        derivatives = coefficients(spec, inputs, dlogp)
    else:
        targets = torch.where(ran, batch.targets, MASKED)
        live = linear_row_statistics(head, ref, targets, temperatures, config, rows)
        loss, stats, derivatives = loss_of_statistics(live, spec, inputs, batch.layout, rows.backend)
    return loss_output(spec, batch, loss, stats, inputs, derivatives, rows.backend, ran)


class LinearGRPOLoss(LossModule):
    """`linear_grpo_loss` as a module: the spec and the options that stay the same are given once.

    ```python
    loss_fn = LinearGRPOLoss("dapo", temperature=0.9)
    out = loss_fn(hidden, model.lm_head.weight, completion_ids, advantages, completion_mask=mask)
    ```

    Args:
        spec: as in `grpo_loss`. Options of the loss, such as `eps_high`, go into `LossSpec.preset`.
        options: keyword arguments of `linear_grpo_loss`.

    Raises:
        TypeError: an option that `linear_grpo_loss` does not have; ValueError: an unknown preset.
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
        """As `linear_grpo_loss`; options given here win over the module's."""
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
