"""The loss that a model's forward computes instead of TRL's log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...linear_losses import linear_grpo_loss
from ...tokens.differentiation import outside_graphs
from ...tokens.output import LossOutput
from .head import PerToken, cast_head


class ForwardLoss:
    """The loss of one batch. A model with `add_fused_loss` computes it in its forward.

    It counts the calls of the model, because the loss of the whole batch is right only if exactly one call
    computed it.

    This is not a dataclass, because FSDP casts the tensors in dataclasses among a model's arguments.

    Attributes:
        completion_ids: `[B, T]`.
        labelled: `[B, T]` bool: the tokens to which TRL gives labels.
        advantages: as `linear_grpo_loss` takes them.
        arguments: keyword arguments of both `linear_grpo_loss` and `policy_loss`.
        options: further keyword arguments of `linear_grpo_loss`.
        calls: the calls of the model with this loss.
        computed: the calls that computed the loss.
        sequences: the number of sequences in the last call.
        output: the result of `linear_grpo_loss`.
        other_tokens: 0-dim bool, on the device: the call that computed the loss had labels of other tokens.
    """

    output: LossOutput
    other_tokens: Tensor

    def __init__(
        self,
        completion_ids: Tensor,
        labelled: Tensor,
        advantages: Tensor,
        arguments: dict[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.completion_ids = completion_ids
        self.labelled = labelled.bool()
        self.advantages = advantages
        self.arguments = arguments
        self.options = options
        self.calls = 0
        self.computed = 0
        self.sequences = 0

    def takes(self, labels: Tensor | None) -> bool:  # [B, L]
        """Count a call of the model, and return whether it has as many sequences as the batch."""
        B, T = self.completion_ids.shape
        self.calls += 1
        self.sequences = 0 if labels is None else len(labels)
        if labels is None or len(labels) != B or labels.shape[1] <= T:
            return False
        expected = self.completion_ids.masked_fill(~self.labelled, -100)
        self.other_tokens = (labels[:, -T:] != expected).any()
        self.computed += 1
        return True

    @outside_graphs  # inside of a graph, the loss would take two passes
    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> PerToken:
        """Compute `output`. Return zeros, which `add_fused_loss` replaces."""
        weight, bias = cast_head(hidden, weight, bias)
        self.output = linear_grpo_loss(
            self.completions(hidden),
            weight,
            self.completion_ids,
            self.advantages,
            lm_head_bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=True,
            **self.arguments,
            **self.options,
        )
        return PerToken(self.output.logps.new_zeros(len(hidden)))

    def completions(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of the completions, `[B, T, H]`.

        TRL passes the rows of all positions of all sequences, or only those with labels if it uses its
        Triton kernel.
        """
        rows = self.completion_ids.numel()
        if len(hidden) >= rows:
            B, T = self.completion_ids.shape
            return hidden.view(B, -1, hidden.shape[-1])[:, -T:]
        # Syncs with the device to read the number of labels. TRL picked its rows in the same way.
        padded = hidden.new_zeros(rows, hidden.shape[-1]).index_put((self.labelled.flatten(),), hidden)
        return padded.view(*self.completion_ids.shape, -1)
