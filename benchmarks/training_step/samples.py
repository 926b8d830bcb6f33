"""The samples of a step, with its exact loss and gradients."""

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
    ids: Tensor  # [B, P + T]
    old_logps: Tensor  # [B, T]
    advantages: Tensor  # [B]

    def micro_batches(self, sequences: int) -> Iterator[Samples]:
        return (Samples(*parts) for parts in zip(*(x.split(sequences) for x in self), strict=True))


class Truth(NamedTuple):
    loss: float
    token_loss: float  # mean magnitude
    gradients: list[Tensor]  # on the CPU, of model.parameters()


def exact_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """`[B, T]` fp32 of products in fp32, the logits of one sequence at a time."""
    weight = weight.float()

    def of_sequence(hidden: Tensor, ids: Tensor) -> Tensor:
        return eager_logps(hidden.float() @ weight.t(), ids)

    return torch.stack([
        checkpoint(of_sequence, *one, use_reentrant=False) for one in zip(hidden, ids, strict=True)
    ])  # fmt: skip


def make_samples(case: Case) -> tuple[Samples, Truth]:
    """Tokens at random, as of a policy one small step ago, and what the step is to be.

    As in `workload.make_batch`, one token in 50 has moved far, and no ratio is near a bound of the clip.
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
