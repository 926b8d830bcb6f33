"""Draws random batches for a workload, with the loss and its gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .workload import BETA, CLIP, SEQUENCES, WITH_REFERENCE, Workload

CHUNK_ELEMENTS = 2**27  # logits that are drawn or checked at a time


class Batch(NamedTuple):
    """Tensors of a batch; `L = T / SEQUENCES`. Logits have L + 1 positions, as models return them."""

    work: Workload
    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool
    advantages: Tensor  # [B] fp32
    old_logps: Tensor  # [B, L] fp32, nats
    logits: Tensor | None  # [B, L + 1, V]
    ref_logits: Tensor | None
    hidden: Tensor | None  # [B, L, H]
    weight: Tensor | None  # [V, H]
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    truth: Truth
    ref_logps: Tensor | None = None  # [B, L] fp32, nats; instead of the reference's logits


class Truth(NamedTuple):
    """Loss and gradients, computed in fp64 from the tensors of the batch."""

    loss: Tensor  # []
    token_loss: Tensor  # [], mean magnitude of a token's loss; errors of the loss are relative to it
    dlogps: Tensor  # [B, L], derivative of the loss with respect to each log-probability
    dhidden: Tensor | None  # [B, L, H], rounded to fp32
    dweight: Tensor | None  # [V, H], rounded to fp32


def token_losses(
    work: Workload, logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor
) -> Tensor:
    """The loss of each token, written as in trainers."""
    advantages = advantages[:, None]
    if work.loss == "cross_entropy":
        return -logps
    if work.loss == "log_ratio":
        return -advantages * (logps - ref_logps)
    ratio = torch.exp(logps - old_logps)
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if work.loss == "grpo_kl":
        log_ratio = ref_logps - logps
        losses = losses + BETA * (torch.exp(log_ratio) - log_ratio - 1)
    return losses


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    # Not x * mask: masked positions may hold NaN.
    return torch.where(mask, x, 0).sum() / mask.sum()


def make_batch(work: Workload, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """A batch from a peaked policy that has taken a small step since it was sampled.

    The log-ratio is 0.05 or, for one token in 50, 1, with a random sign. The large ones are clipped if they
    have the sign of the advantage. No log-ratio is near a bound of the clip, so the rounding of a provider's
    log-probabilities does not select another branch.
    """
    B, L, V = SEQUENCES, work.T // SEQUENCES, work.V
    with_reference = work.loss in WITH_REFERENCE
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    logits = ref_logits = hidden = weight = ref_hidden = ref_weight = None
    # One token of each position has a high logit. The log-sum-exp of the others, which have a standard
    # deviation of 2, is log V + 2.
    favourites = torch.randint(V, (B, L + 1), generator=generator, device=device)
    height = math.log(V) + 4 + 1.5 * normal(B, L + 1)
    if work.form == "logits":
        logits = torch.empty(B, L + 1, V, dtype=work.dtype, device=device)
        ref_logits = torch.empty_like(logits) if with_reference else None
        for b, rows in row_chunks(B, L + 1, V):
            z = 2 * normal(rows.stop - rows.start, V)
            z.scatter_add_(1, favourites[b, rows, None], height[b, rows, None])
            logits[b, rows] = z.to(work.dtype)
            if ref_logits is not None:
                ref_logits[b, rows] = (z + 0.3 * normal(*z.shape)).to(work.dtype)
    else:
        weight = (2 / work.H**0.5 * normal(V, work.H)).to(work.dtype)
        favourite = weight[favourites[:, :L]].float()  # its squared norm is 4
        hidden = (normal(B, L, work.H) + height[:, :L, None] / 4 * favourite).to(work.dtype)
        if with_reference:
            ref_hidden = (hidden.float() + 0.1 * normal(B, L, work.H)).to(work.dtype)
            ref_weight = weight.clone()

    heads = [None if x is None else x.double() for x in (weight, ref_weight)]
    ids = torch.empty(B, L, dtype=torch.int64, device=device)
    logps = torch.empty(B, L, dtype=torch.float64, device=device)
    ref_logps = torch.empty_like(logps) if with_reference else None
    for b, rows in row_chunks(B, L, V):
        log_p = torch.log_softmax(exact_logits(logits, hidden, heads[0], b, rows), -1)
        ids[b, rows] = torch.multinomial(log_p.exp().float(), 1, generator=generator)[:, 0]
        logps[b, rows] = log_p.gather(-1, ids[b, rows, None])[:, 0]
        if ref_logps is not None:
            ref_log_p = torch.log_softmax(exact_logits(ref_logits, ref_hidden, heads[1], b, rows), -1)
            ref_logps[b, rows] = ref_log_p.gather(-1, ids[b, rows, None])[:, 0]
    if work.given_ref:
        ref_logps = ref_logps.float()
        ref_logits = ref_hidden = ref_weight = None

    lengths = L * (1 - 2 * work.masked * (torch.arange(B, device=device) + 0.5) / B)
    mask = torch.arange(L, device=device) < lengths.round()[:, None]
    advantages = normal(B)
    if work.loss == "cross_entropy":
        advantages = torch.ones(B, device=device)
    # A long and a short sequence form a pair, so the fraction of tokens does not depend on the mask.
    pair = torch.arange(B, device=device).minimum(torch.arange(B, device=device).flip(0))
    idle = pair * work.inactive % 1 < work.inactive
    advantages = torch.where(idle, 0.0, advantages)
    moved = torch.where(uniform(B, L) < 0.02, 1.0, 0.05) * torch.where(uniform(B, L) < 0.5, -1.0, 1.0)
    old_logps = (logps - moved).float()

    leaf = logps.clone().requires_grad_()
    exact_ref_logps = None if ref_logps is None else ref_logps.double()
    losses = token_losses(work, leaf, old_logps.double(), exact_ref_logps, advantages.double())
    loss = masked_mean(losses, mask)
    (dlogps,) = torch.autograd.grad(loss, leaf)
    truth = Truth(loss.detach(), masked_mean(losses.detach().abs(), mask), dlogps, None, None)
    given = (logits, ref_logits, hidden, weight, ref_hidden, ref_weight)
    given_ref_logps = ref_logps if work.given_ref else None
    batch = Batch(work, ids, mask, advantages, old_logps, *given, truth, given_ref_logps)
    if hidden is None:
        return batch
    dhidden, dweight = exact_linear_gradients(batch)
    return batch._replace(truth=truth._replace(dhidden=dhidden, dweight=dweight))


def exact_dlogits(batch: Batch, b: int, rows: slice, weight: Tensor | None = None) -> Tensor:
    """`[rows, V]` fp64: dlogp (1[v = y] - p_v). `weight` is the head's weight in fp64, if there is one."""
    p = torch.softmax(exact_logits(batch.logits, batch.hidden, weight, b, rows), -1)
    dlogps = batch.truth.dlogps[b, rows, None]
    return (-dlogps * p).scatter_add_(-1, batch.ids[b, rows, None], dlogps)


def exact_linear_gradients(batch: Batch) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weight, accumulated in fp64 and rounded to fp32."""
    assert batch.hidden is not None and batch.weight is not None
    weight = batch.weight.double()
    dhidden, dweight = torch.empty_like(batch.hidden, dtype=torch.float32), torch.zeros_like(weight)
    for b, rows in row_chunks(*batch.ids.shape, batch.work.V):
        dlogits = exact_dlogits(batch, b, rows, weight)
        dhidden[b, rows] = (dlogits @ weight).float()
        dweight += dlogits.t() @ batch.hidden[b, rows].double()
    return dhidden, dweight.float()


def row_chunks(sequences: int, length: int, V: int) -> Iterator[tuple[int, slice]]:
    """Yields the index of a sequence and a slice of its rows, one chunk at a time."""
    step = max(1, CHUNK_ELEMENTS // V)
    for b in range(sequences):
        for start in range(0, length, step):
            yield b, slice(start, min(start + step, length))


def exact_logits(
    logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, b: int, rows: slice
) -> Tensor:
    """`[rows, V]` fp64, from logits if they are given, else from hidden states and the weight in fp64."""
    if logits is not None:
        return logits[b, rows].double()
    assert hidden is not None and weight is not None
    return hidden[b, rows].double() @ weight.t()


def empty_batch(work: Workload, device: str) -> Batch:
    """A batch without values and without `truth`, for compiling. No row is masked."""
    B, L, V, H = SEQUENCES, work.T // SEQUENCES, work.V, work.H

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    logits = ref_logits = hidden = weight = None
    if work.form == "logits":
        logits = new(B, L + 1, V, dtype=work.dtype)
        ref_logits = torch.empty_like(logits) if work.reference else None
    else:
        hidden, weight = new(B, L, H, dtype=work.dtype), new(V, H, dtype=work.dtype)
    ids, mask = new(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool, device=device)
    given = (logits, ref_logits, hidden, weight, None, None)
    ref_logps = new(B, L) if work.given_ref else None
    return Batch(work, ids, mask, new(B), new(B, L), *given, truth=None, ref_logps=ref_logps)
