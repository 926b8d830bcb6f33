"""Times sampling masks, several tokens per position and distillation on a CPU, in fp32, forward and backward.

    make bench

There are 2048 tokens and 32,000 vocabulary entries. Distillation is also timed from hidden states of 512
dimensions. The reference is eager PyTorch, with which each result is compared first. TRL's function for
distillation is a Triton kernel, which does not run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    pack_sampling_mask,
    selective_logps,
)
from grpo_kernels.testing import relative_error

T, V, H, K = 2048, 32000, 512, 64
ROUNDS = 7


class Work(NamedTuple):
    """A loss of `leaf`, by this package and in eager PyTorch."""

    leaf: Tensor
    ours: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampling_mask(kept: int | None) -> Work:
    """PPO-clip over the `kept` likeliest tokens, or without a mask."""
    logits, advantages, old_logps = 2 * normal(8, T // 8, V), normal(8), normal(8, T // 8, seed=1) / 10 - 8
    likeliest = logits.topk(64, -1).indices
    ids = likeliest[..., 5]
    keep = torch.ones_like(logits, dtype=torch.bool)
    mask = None
    if kept is not None:
        keep = torch.zeros_like(keep).scatter_(-1, likeliest[..., :kept], True)
        mask = pack_sampling_mask(keep)

    def ours(x: Tensor) -> Tensor:
        return grpo_loss(x, ids, advantages, old_logps=old_logps, sampling_mask=mask).loss

    def eager(x: Tensor) -> Tensor:
        z = x if kept is None else x.masked_fill(~keep, -torch.inf)
        logps = torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]
        ratio = (logps - old_logps).exp()
        a = advantages[:, None]
        return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()

    return Work(logits, ours, eager)


def several_tokens() -> Work:
    ids = torch.randint(V, (8, T // 8, K), generator=torch.Generator().manual_seed(0))
    weights = normal(8, T // 8, K, seed=2)
    return Work(
        2 * normal(8, T // 8, V),
        lambda x: (weights * selective_logps(x, ids)).sum(),
        lambda x: (weights * torch.log_softmax(x, -1).gather(-1, ids)).sum(),
    )


def divergence_of(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    p, q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1).mean()
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1).mean()
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)).mean()


def distillation(kind: str) -> Work:
    student = 2 * normal(8, T // 8, V)
    teacher = student + 0.3 * normal(8, T // 8, V, seed=3)
    return Work(
        student,
        lambda x: distillation_loss(x, teacher_logits=teacher, divergence=kind).loss,
        lambda x: divergence_of(x, teacher, kind),
    )


def linear_distillation(kind: str) -> Work:
    hidden, weight = normal(8, T // 8, H), 2 / H**0.5 * normal(V, H, seed=4)
    teacher_hidden = hidden + 0.1 * normal(8, T // 8, H, seed=5)

    def ours(x: Tensor) -> Tensor:
        teacher = {"teacher_hidden": teacher_hidden, "teacher_lm_head_weight": weight}
        return linear_distillation_loss(x, weight, **teacher, divergence=kind).loss

    return Work(hidden, ours, lambda x: divergence_of(x @ weight.t(), teacher_hidden @ weight.t(), kind))


KINDS = ("reverse_kl", "forward_kl", "jsd")
WORKS: dict[str, Callable[[], Work]] = {
    "no sampling mask": lambda: sampling_mask(None),
    "sampling mask, 64 of 32,000 tokens kept": lambda: sampling_mask(64),
    f"{K} tokens per position": several_tokens,
    **{f"{kind}, logits": lambda kind=kind: distillation(kind) for kind in KINDS},
    **{f"{kind}, hidden states": lambda kind=kind: linear_distillation(kind) for kind in KINDS},
}


@pytest.fixture(scope="module", params=WORKS)
def work(request: pytest.FixtureRequest) -> Work:
    return WORKS[request.param]()


@pytest.mark.parametrize("provider", ["eager", "grpo_kernels"])
def test_step(benchmark, work: Work, provider: str) -> None:
    function = work.ours if provider == "grpo_kernels" else work.eager

    def step() -> tuple[Tensor, Tensor]:
        leaf = work.leaf.detach().requires_grad_()
        loss = function(leaf)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    loss, grad = step()
    leaf = work.leaf.detach().clone().requires_grad_()
    wanted = work.eager(leaf)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-3, atol=1e-5)
    assert float(relative_error(grad, leaf.grad).median()) < 1e-3
    del loss, grad, leaf, wanted
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
