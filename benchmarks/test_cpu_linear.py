"""The loss from hidden states on a CPU: forward and backward of PPO-clip, against eager PyTorch in one run.

    make bench

4096 tokens, 512 hidden dimensions, 32,000 words, fp32. Each provider is first held to eager's gradients,
then timed. `extra_memory` is the largest growth of the process during one call, in MiB, of which 71 are the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from grpo_kernels import linear_grpo_loss
from grpo_kernels.testing import peak_memory, relative_error

B, T, H, V = 8, 512, 512, 32000
ROUNDS = 5

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old_logps: Tensor) -> Tensor:
    """As a trainer writes it: head, log_softmax, gather, clipped ratio, mean."""
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, ids[..., None])[..., 0]
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()


def fused(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor,
    *,
    skip_inactive: bool = False,
) -> Tensor:
    out = linear_grpo_loss(
        *(hidden, weight, ids, advantages), spec="bnpo", old_logps=old_logps, skip_inactive=skip_inactive
    )
    return out.loss


PROVIDERS: dict[str, tuple[Loss, float]] = {
    "eager": (eager, 0.0),
    "fused": (fused, 0.0),
    "fused, half without advantage": (fused, 0.5),
    "fused, half skipped": (partial(fused, skip_inactive=True), 0.5),
}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, ...]:
    """Hidden states, weight, ids, and their log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3 / H**0.5
    ids, old_logps = torch.empty(B, T, dtype=torch.long), torch.empty(B, T)
    for row in range(B):
        log_p = torch.log_softmax(hidden[row] @ weight.t(), -1)
        ids[row] = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
        old_logps[row] = log_p.gather(-1, ids[row][:, None])[:, 0]
    return hidden.requires_grad_(), weight.requires_grad_(), ids, old_logps


def gradients(
    loss: Loss, hidden: Tensor, weight: Tensor, ids: Tensor, old_logps: Tensor, advantages: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, ids, advantages, old_logps), (hidden, weight))


@pytest.mark.parametrize("name", PROVIDERS)
def test_forward_and_backward(benchmark, batch: tuple[Tensor, ...], name: str) -> None:
    loss, idle = PROVIDERS[name]
    advantages = torch.where(torch.arange(B) < idle * B, 0.0, 1.0)
    pairs = zip(gradients(loss, *batch, advantages), gradients(eager, *batch, advantages), strict=True)
    error = max(float(relative_error(x.flatten(), y.flatten())) for x, y in pairs)
    assert error < 1e-4, f"{name} is wrong by {error:.2g}, and so not timed"

    extra = peak_memory(lambda: gradients(loss, *batch, advantages)) / 2**20
    benchmark.extra_info["extra_memory"] = round(extra)
    benchmark.pedantic(gradients, args=(loss, *batch, advantages), rounds=ROUNDS, warmup_rounds=1)
    print(f"\n{name}: median {1e3 * benchmark.stats['median']:.0f} ms, extra memory {extra:.0f} MiB")
