"""The output of a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .loss import BatchLoss
from .metrics import metrics
from .statistics import Coefficients, RowStats


class LossOutput(NamedTuple):
    """Output of a loss. `[B, T]` tensors are `[N]` if the batch is packed.

    Attributes:
        loss: 0-dim fp32, fp64 for fp64 inputs; differentiable.
        metrics: detached 0-dim tensors by name. `grpo_loss` lists them.
        logps: `[B, T]`, nats, detached: log-probabilities of the taken tokens under the policy. None in a
            distillation, which has no taken tokens.
        ref_logps: the same under the reference, or None.
        entropy: `[B, T]`, nats, detached: entropies of the policy, or None.

    Examples:
        >>> import torch
        >>> from grpo_kernels import policy_loss
        >>> out = policy_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([1.0]), spec="reinforce")
        >>> out.loss
        tensor(1.5000)
        >>> out.logps
        tensor([[-1., -2.]])
        >>> out.ref_logps is None and out.entropy is None
        True
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor
    ref_logps: Tensor | None
    entropy: Tensor | None


def loss_output(
    value: Tensor,
    batch: Batch,
    loss: BatchLoss,
    stats: RowStats,
    derivatives: Coefficients,
    backend: str,
    known: Tensor | None = None,
) -> LossOutput:
    """Return the output of a loss with the 0-dim `value`, in the caller's shapes.

    `stats` and `derivatives` are detached. `known` is as in `metrics`.
    """
    reference = loss.ref_logps(stats)
    if reference is not None and known is not None:
        reference = torch.where(known, reference, 0.0)
    return LossOutput(
        value,
        metrics(loss, stats, derivatives, backend, known),
        batch.unflatten(stats.logps),
        None if reference is None else batch.unflatten(reference),
        None if stats.entropy is None else batch.unflatten(stats.entropy),
    )
