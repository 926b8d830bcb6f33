"""Draws the samples of a step, and computes its exact loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..work.batch import token_losses
from ..work.providers import eager_logps
from ..work.workload import SEQUENCES
from .case import Case, hidden_of, make_models


class Samples(NamedTuple):
    """The tensors of a step that a trainer gets by generating and scoring."""

    ids: Tensor  # [B, P + T]
    old_logps: Tensor  # [B, T]
    advantages: Tensor  # [B]

    def micro_batches(self, sequences: int) -> Iterator[Samples]:
        return (Samples(*parts) for parts in zip(*(x.split(sequences) for x in self), strict=True))


class Truth(NamedTuple):
    """Loss and gradients of the first step, computed with a head in fp32."""

    loss: float
    token_loss: float  # mean magnitude of a token's loss
    gradients: list[Tensor]  # of model.parameters(), on the CPU


def exact_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """`[B, T]` fp32, from matrix products in fp32. Holds the logits of one sequence at a time."""
    weight = weight.float()

    def of_sequence(hidden: Tensor, ids: Tensor) -> Tensor:
        return eager_logps(hidden.float() @ weight.t(), ids)

    return torch.stack([
        checkpoint(of_sequence, *one, use_reentrant=False) for one in zip(hidden, ids, strict=True)
    ])  # fmt: skip


def make_samples(case: Case) -> tuple[Samples, Truth]:
    """Random tokens with old log-probabilities near the policy's, and the exact step.

    As in `work.batch.make_batch`, one token in 50 has a large log-ratio, and no ratio is near a bound of the
    clip.
    """
    generator = torch.Generator().manual_seed(2)
    shape = SEQUENCES, case.completion
    ids = torch.randint(case.work.V, (SEQUENCES, case.prompt + case.completion), generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    advantages[: round(case.inactive * SEQUENCES)] = 0.0
    moved = torch.where(torch.rand(shape, generator=generator) < 0.02, 1.0, 0.05)
    moved *= torch.randn(shape, generator=generator).sign()
    ids, advantages, moved = (x.to(case.device) for x in (ids, advantages, moved))

    model, reference = make_models(case)
    targets = ids[:, case.prompt :]
    logps = exact_logps(hidden_of(model, ids, case.completion), model.lm_head.weight, targets)
    ref_logps = None
    if reference is not None:
        ref_logps = exact_logps(hidden_of(reference, ids, case.completion), reference.lm_head.weight, targets)
    old_logps = logps.detach() - moved
    losses = token_losses(case.work, logps, old_logps, ref_logps, advantages)
    losses.mean().backward()
    loss, token_loss = losses.mean().item(), losses.abs().mean().item()
    return Samples(ids, old_logps, advantages), Truth(
        loss, token_loss, [p.grad.cpu() for p in model.parameters()]
    )
