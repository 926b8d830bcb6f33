"""Several tokens per position: cases, and their log-probabilities in eager PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.testing import assert_no_worse_than_eager


class TokenCase(NamedTuple):
    """`[B, T, V]` logits with `[B, T, K]` tokens, some of them repeated and some -1, which is padding."""

    logits: Tensor
    ids: Tensor
    mask: Tensor  # [B, T] bool
    upstream: Tensor  # [B, T, K]
    by_entropy: Tensor  # [B, T]


def token_case(
    batch: int = 2, time: int = 5, vocab: int = 67, tokens: int = 4, *, dtype: torch.dtype = torch.float32
) -> TokenCase:
    generator = torch.Generator().manual_seed(vocab * tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(-1, vocab, (batch, time, tokens), generator=generator)
    ids[0, 0] = ids[0, 0, :1]  # one token K times
    ids[0, 1, 1:] = -1
    ids[-1, -1] = -1
    mask = torch.ones(batch, time, dtype=torch.bool)
    mask[-1, 0] = False
    logits = (3 * normal(batch, time, vocab)).to(dtype)
    return TokenCase(logits, ids, mask, normal(batch, time, tokens), 0.1 * normal(batch, time))


def eager(case: TokenCase, logits: Tensor, temperature: Any = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy in the dtype of `logits`, with gathers from the whole log-softmax."""
    log_p = torch.log_softmax(logits / temperature, -1)
    given = (case.ids >= 0) & case.mask[..., None]
    logps = torch.where(given, log_p.gather(-1, case.ids.clamp(min=0)), 0.0)
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return logps, torch.where(case.mask, -(log_p.exp() * finite).sum(-1), 0.0)


def loss_of(case: TokenCase, logps: Tensor, entropy: Tensor) -> Tensor:
    """A loss with a gradient for each log-probability and entropy."""
    finite = torch.where(logps == -torch.inf, 0.0, logps)
    return (case.upstream * finite).sum() + (case.by_entropy * entropy).sum()


def assert_tokens(
    case: TokenCase, logps: Tensor, entropy: Tensor, grad: Tensor, temperature: Any = 1.0
) -> None:
    """Compare log-probabilities, entropies and the gradient of `loss_of` with fp64 and with eager PyTorch."""
    truth = case.logits.double().clone().requires_grad_()
    wanted = eager(case, truth, temperature)
    loss_of(case, *wanted).backward()
    leaf = case.logits.clone().requires_grad_()
    loss_of(case, *(x.double() for x in eager(case, leaf, temperature))).backward()
    bound = 1e-12 if case.logits.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps.double(), wanted[0], rtol=bound, atol=bound)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=bound, atol=bound)
    assert_no_worse_than_eager(grad, leaf.grad, truth.grad, what="gradient")
