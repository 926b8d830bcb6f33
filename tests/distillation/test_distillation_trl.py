"""The losses equal TRL's code: `ChunkedDivergenceFunction`, and the top-K losses with a tail bucket."""

from __future__ import annotations

import pytest
import torch
from distillation_cases import divergence, log_probs
from torch import Tensor
from torch.nn.functional import linear

from grpo_kernels import distillation_loss, linear_distillation_loss

pytest.importorskip("trl")
chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL before 1.16")

# TRL's beta, and what it means here.
BETAS = {0.0: ("forward_kl", 0.5), 1.0: ("reverse_kl", 0.5), 0.5: ("jsd", 0.5), 0.2: ("jsd", 0.2)}
betas = pytest.mark.parametrize("beta", BETAS)
OPTIONS = [{}, {"temperature": 0.7}, {"scale": 0.5, "softcap": 4.0, "ref_scale": 2.0, "ref_softcap": 5.0}]
N, V, H, TEACHER_H = 9, 700, 12, 20


class Heads:
    """Student and teacher in fp32. TRL computes in fp32 also for fp64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.student = [normal(N, H), normal(V, H), normal(V)]
        self.teacher = [normal(N, TEACHER_H), normal(V, TEACHER_H) / 2, normal(V)]

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in self.student]

    def theirs(self, beta: float, options: dict[str, float]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        leaves = self.leaves()
        value, entropy = chunked.ChunkedDivergenceFunction.apply(
            *leaves, *self.teacher, beta, options.get("temperature", 1.0),
            options.get("scale", 1.0), options.get("softcap"),
            options.get("ref_scale", 1.0), options.get("ref_softcap"),
        )  # fmt: skip
        return value.detach(), entropy, torch.autograd.grad(value.mean(), leaves)

    def truth(self, beta: float, options: dict[str, float]) -> tuple[Tensor, ...]:
        """Return the gradients in eager PyTorch and fp64."""
        leaves = [x.double().requires_grad_() for x in self.student]
        student, teacher = linear(*leaves), linear(*(x.double() for x in self.teacher))
        temperature = options.get("temperature", 1.0)
        p = log_probs(student, options.get("scale", 1.0), options.get("softcap"), temperature, None)
        q = log_probs(teacher, options.get("ref_scale", 1.0), options.get("ref_softcap"), temperature, None)
        return torch.autograd.grad(divergence(p, q, *BETAS[beta]).mean(), leaves)


def renamed(options: dict[str, float]) -> dict[str, float]:
    prefixes = {"scale": "logit_", "softcap": "logit_", "ref_scale": "", "ref_softcap": ""}
    names = {"ref_scale": "ref_logit_scale", "ref_softcap": "ref_logit_softcap"}
    return {names.get(name, prefixes.get(name, "") + name): x for name, x in options.items()}


@betas
@pytest.mark.parametrize("options", OPTIONS, ids=["", "temperature", "softcaps"])
def test_chunked_divergence(beta: float, options: dict[str, float], backend: str) -> None:
    heads = Heads()
    value, entropy, wanted = heads.theirs(beta, options)
    kind, weight = BETAS[beta]
    leaves = heads.leaves()
    out = linear_distillation_loss(
        *leaves[:2], lm_head_bias=leaves[2], teacher_hidden=heads.teacher[0],
        teacher_lm_head_weight=heads.teacher[1], teacher_lm_head_bias=heads.teacher[2],
        divergence=kind, jsd_weight=weight, return_entropy=True, backend=backend, **renamed(options),
    )  # fmt: skip
    torch.testing.assert_close(out.loss.detach(), value.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    exact = heads.truth(beta, options)
    for got, want, truth in zip(torch.autograd.grad(out.loss, leaves), wanted, exact, strict=True):
        size = float(truth.norm())
        ours, theirs = (float((x - truth).norm()) for x in (got, want))
        assert float((got - want).norm()) <= 1e-4 * size
        assert ours <= 2 * theirs + 2e-6 * size


@betas
def test_each_token(beta: float, backend: str) -> None:
    """The divergence of each token, from logits."""
    heads = Heads()
    value, _, _ = heads.theirs(beta, {})
    kind, weight = BETAS[beta]
    student, teacher = (linear(*x) for x in (heads.student, heads.teacher))
    for token in range(N):
        out = distillation_loss(
            student[token : token + 1], teacher_logits=teacher[token : token + 1],
            divergence=kind, jsd_weight=weight, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out.loss, value[token], rtol=1e-5, atol=1e-6)


@betas
@pytest.mark.parametrize("rest", ["bucket", "drop"])
def test_top_k(beta: float, rest: str, backend: str) -> None:
    """`_add_tail_bucket` and `_jsd_divergence`. Eager PyTorch computes the student's log-probabilities."""
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    heads = Heads()
    logits = linear(*heads.student).requires_grad_()
    whole = linear(*heads.teacher).log_softmax(-1)
    logps, ids = whole.topk(6)
    kind, weight = BETAS[beta]
    out = distillation_loss(
        logits, teacher_ids=ids, teacher_logps=logps, divergence=kind, jsd_weight=weight, rest=rest,
        temperature=0.8, backend=backend,
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, logits)
    student = (logits.double() / 0.8).log_softmax(-1).gather(-1, ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    p, q = student, logps.double()
    if rest == "bucket":
        (p, valid), (q, _) = server._add_tail_bucket(p, valid), server._add_tail_bucket(q, valid)
    else:
        p, q = (x - x.logsumexp(-1, keepdim=True) for x in (p, q))
    theirs = server._jsd_divergence(p, q, beta, valid).sum(-1).mean()
    (want,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(out.loss.detach(), theirs.detach().float(), rtol=1e-5, atol=1e-6)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
