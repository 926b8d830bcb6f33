"""The loss on a CPU: forward and backward of PPO-clip from fp32 logits, against eager PyTorch in one run.

    make bench

Each provider is first held to eager's gradient, then timed. `extra_memory` is the largest growth of the
process during one call, in units of the logits' size; the gradient itself is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels import grpo_loss
from grpo_kernels.testing import peak_memory, relative_error

T, V = 2048, 32000
ROUNDS = 7


def eager(logits: Tensor, ids: Tensor, advantages: Tensor, old_logps: Tensor) -> Tensor:
    """As a trainer writes it: log_softmax, gather, clipped ratio, mean."""
    logps = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()


def fused(logits: Tensor, ids: Tensor, advantages: Tensor, old_logps: Tensor) -> Tensor:
    return grpo_loss(logits, ids, advantages, spec="bnpo", old_logps=old_logps).loss


def fused_inplace(logits: Tensor, ids: Tensor, advantages: Tensor, old_logps: Tensor) -> Tensor:
    return grpo_loss(logits, ids, advantages, spec="bnpo", old_logps=old_logps, inplace=True).loss


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, ...]:
    """Logits, ids, advantages, old log-probabilities: every token has a gradient."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, T, V)
    ids = torch.distributions.Categorical(logits=logits).sample()
    old_logps = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    return logits, ids, torch.ones(1), old_logps


def gradient(loss: Callable[..., Tensor], logits: Tensor, *rest: Tensor) -> Tensor:
    return torch.autograd.grad(loss(logits, *rest), logits)[0]


@pytest.mark.parametrize("provider", [eager, fused, fused_inplace])
def test_forward_and_backward(benchmark, batch: tuple[Tensor, ...], provider: Callable[..., Tensor]) -> None:
    logits, *rest = batch
    source = logits.requires_grad_()

    def fresh() -> Tensor:
        """As a model computes them: unlike a leaf, these may be overwritten."""
        return source.clone()

    error = relative_error(gradient(provider, fresh(), *rest), gradient(eager, fresh(), *rest)).max()
    assert error < 1e-4, f"{provider.__name__} is wrong by {error:.2g}, and so not timed"

    size = logits.numel() * logits.element_size()
    mine = fresh()
    extra = peak_memory(lambda: gradient(provider, mine, *rest), logits.device) / size
    benchmark.extra_info["extra_memory"] = round(extra, 3)
    benchmark.pedantic(
        gradient, setup=lambda: ((provider, fresh(), *rest), {}), rounds=ROUNDS, warmup_rounds=1
    )
    print(f"\n{provider.__name__}: median {1e3 * benchmark.stats['median']:.0f} ms, extra memory {extra:.2f}")
