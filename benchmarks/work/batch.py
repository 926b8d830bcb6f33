"""Random batches of a workload, with the loss and its gradient in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .workload import BETA, CLIP, SEQUENCES, Workload

CHUNK_ELEMENTS = 2**27  # of logits that are made or checked at a time


class Batch(NamedTuple):
    """`L = T / SEQUENCES` tokens each. Of logits there is one more per sequence, as models return them."""

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


class Truth(NamedTuple):
    """From the very bits of the batch, in fp64."""

    loss: Tensor  # []
    token_loss: Tensor  # [], mean magnitude of a token's loss: what an error of the loss is relative to
    dlogps: Tensor  # [B, L], derivative of the loss by the log-probability of each token
    dhidden: Tensor | None  # [B, L, H], rounded to fp32, as is the next
    dweight: Tensor | None  # [V, H]


def token_losses(
    work: Workload, logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor
) -> Tensor:
    """Of each token, as trainers write it: what providers of log-probabilities are followed by."""
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
    # Not x * mask: what a provider leaves at masked positions may be anything.
    return torch.where(mask, x, 0).sum() / mask.sum()


def make_batch(work: Workload, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """A batch drawn from a peaked policy, one small step after it was sampled.

    One token in 50 has moved far and, if its advantage says so, is clipped. No log-ratio is near a bound of
    the clip, so that the rounding of a provider's log-probabilities does not decide for a branch.
    """
    B, L, V = SEQUENCES, work.T // SEQUENCES, work.V
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    logits = ref_logits = hidden = weight = ref_hidden = ref_weight = None
    # One token of each position stands out: the log-sum-exp of the others, drawn from N(0, 2), is log V + 2.
    favourites = torch.randint(V, (B, L + 1), generator=generator, device=device)
    height = math.log(V) + 4 + 1.5 * normal(B, L + 1)
    if work.form == "logits":
        logits = torch.empty(B, L + 1, V, dtype=work.dtype, device=device)
        ref_logits = torch.empty_like(logits) if work.reference else None
        for b, rows in row_chunks(B, L + 1, V):
            z = 2 * normal(rows.stop - rows.start, V)
            z.scatter_add_(1, favourites[b, rows, None], height[b, rows, None])
            logits[b, rows] = z.to(work.dtype)
            if ref_logits is not None:
                ref_logits[b, rows] = (z + 0.3 * normal(*z.shape)).to(work.dtype)
    else:
        weight = (2 / work.H**0.5 * normal(V, work.H)).to(work.dtype)
        favourite = weight[favourites[:, :L]].float()  # of squared length 4
        hidden = (normal(B, L, work.H) + height[:, :L, None] / 4 * favourite).to(work.dtype)
        if work.reference:
            ref_hidden = (hidden.float() + 0.1 * normal(B, L, work.H)).to(work.dtype)
            ref_weight = weight.clone()

    heads = [None if x is None else x.double() for x in (weight, ref_weight)]
    ids = torch.empty(B, L, dtype=torch.int64, device=device)
    logps = torch.empty(B, L, dtype=torch.float64, device=device)
    ref_logps = torch.empty_like(logps) if work.reference else None
    for b, rows in row_chunks(B, L, V):
        log_p = torch.log_softmax(exact_logits(logits, hidden, heads[0], b, rows), -1)
        ids[b, rows] = torch.multinomial(log_p.exp().float(), 1, generator=generator)[:, 0]
        logps[b, rows] = log_p.gather(-1, ids[b, rows, None])[:, 0]
        if ref_logps is not None:
            ref_log_p = torch.log_softmax(exact_logits(ref_logits, ref_hidden, heads[1], b, rows), -1)
            ref_logps[b, rows] = ref_log_p.gather(-1, ids[b, rows, None])[:, 0]

    lengths = L * (1 - 2 * work.masked * (torch.arange(B, device=device) + 0.5) / B)
    mask = torch.arange(L, device=device) < lengths.round()[:, None]
    advantages = normal(B)
    if work.loss == "cross_entropy":
        advantages = torch.ones(B, device=device)
    # In pairs of a long and a short sequence, so that ragged lengths leave the fraction as it is.
    pair = torch.arange(B, device=device).minimum(torch.arange(B, device=device).flip(0))
    idle = pair * work.inactive % 1 < work.inactive
    advantages = torch.where(idle, 0.0, advantages)
    moved = torch.where(uniform(B, L) < 0.02, 1.0, 0.05) * torch.where(uniform(B, L) < 0.5, -1.0, 1.0)
    old_logps = (logps - moved).float()

    leaf = logps.clone().requires_grad_()
    losses = token_losses(work, leaf, old_logps.double(), ref_logps, advantages.double())
    loss = masked_mean(losses, mask)
    (dlogps,) = torch.autograd.grad(loss, leaf)
    truth = Truth(loss.detach(), masked_mean(losses.detach().abs(), mask), dlogps, None, None)
    given = (logits, ref_logits, hidden, weight, ref_hidden, ref_weight)
    batch = Batch(work, ids, mask, advantages, old_logps, *given, truth)
    if hidden is None:
        return batch
    dhidden, dweight = exact_linear_gradients(batch)
    return batch._replace(truth=truth._replace(dhidden=dhidden, dweight=dweight))


def exact_dlogits(batch: Batch, b: int, rows: slice, weight: Tensor | None = None) -> Tensor:
    """`[rows, V]` fp64: dlogp (1[v = y] - p_v). `weight`: the head's, in fp64."""
    p = torch.softmax(exact_logits(batch.logits, batch.hidden, weight, b, rows), -1)
    dlogps = batch.truth.dlogps[b, rows, None]
    return (-dlogps * p).scatter_add_(-1, batch.ids[b, rows, None], dlogps)


def exact_linear_gradients(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.hidden is not None and batch.weight is not None
    weight = batch.weight.double()
    dhidden, dweight = torch.empty_like(batch.hidden, dtype=torch.float32), torch.zeros_like(weight)
    for b, rows in row_chunks(*batch.ids.shape, batch.work.V):
        dlogits = exact_dlogits(batch, b, rows, weight)
        dhidden[b, rows] = (dlogits @ weight).float()
        dweight += dlogits.t() @ batch.hidden[b, rows].double()
    return dhidden, dweight.float()


def row_chunks(sequences: int, length: int, V: int) -> Iterator[tuple[int, slice]]:
    """A sequence's number and some of its rows, a chunk at a time."""
    step = max(1, CHUNK_ELEMENTS // V)
    for b in range(sequences):
        for start in range(0, length, step):
            yield b, slice(start, min(start + step, length))


def exact_logits(
    logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, b: int, rows: slice
) -> Tensor:
    """`[rows, V]` fp64, of what a batch holds: logits, or hidden states and the head's weight in fp64."""
    if logits is not None:
        return logits[b, rows].double()
    assert hidden is not None and weight is not None
    return hidden[b, rows].double() @ weight.t()


def empty_batch(work: Workload, device: str) -> Batch:
    """Tensors of the right shapes and dtypes, whatever they hold; no row is masked."""
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
    return Batch(work, ids, mask, new(B), new(B, L), *given, truth=None)
