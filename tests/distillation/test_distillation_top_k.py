"""The distillation losses from the teacher's top K."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distillation_cases import KINDS, batch, divergence, log_probs
from parity import DTYPES
from torch import Tensor
from torch.nn.functional import linear

from grpo_kernels import distillation_loss, linear_distillation_loss, pack_sampling_mask
from grpo_kernels.testing import assert_no_worse_than_eager

kinds = pytest.mark.parametrize("kind", KINDS)
rests = pytest.mark.parametrize("rest", ["bucket", "drop"])
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
V, K = 300, 5


def top_k(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, ids and log-probabilities. A few ids are padding, and one row has no other."""
    case = batch(dtype, vocab=V)
    teacher = case.teacher.double().masked_fill(~MASK[..., None], 0.0)
    logps, ids = teacher.log_softmax(-1).topk(K)
    ids[0, 0, 1], ids[1, 2, 3:], ids[0, 3] = -1, -7, -1
    logps[ids < 0] = torch.nan
    logps[~MASK], ids[~MASK] = torch.inf, 10**6
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return case.logits.to(device), ids.to(device), logps.to(device, wide)


def eager_rows(logits: Tensor, ids: Tensor, logps: Tensor, kind: str, rest: str, **how: Any) -> Tensor:
    """Return the divergence of each position `[B, T]`, one row at a time."""
    values = []
    for z, own, given, here in zip(
        logits.flatten(0, 1), ids.flatten(0, 1), logps.flatten(0, 1), MASK.flatten(), strict=True
    ):
        valid = own >= 0
        if not here or not valid.any():
            values.append(z.new_zeros((), dtype=given.dtype))
            continue
        p = log_probs(z, 1.0, how.get("softcap"), how.get("temperature", 1.0), None)[own[valid]]
        q = given[valid]
        if rest == "bucket":
            p, q = (torch.cat([x, torch.log1p(-x.exp().sum()).view(1)]) for x in (p, q))
        else:
            p, q = (x - x.logsumexp(0) for x in (p, q))
        values.append(divergence(p, q, kind, 0.3))
    return torch.stack(values).view(MASK.shape)


@kinds
@rests
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [{}, {"inplace": True}, {"packed": True}], ids=["", "inplace", "packed"])
def test_parity(kind: str, rest: str, dtype: str, how: dict[str, bool], backend: str, device: str) -> None:
    logits, ids, logps = top_k(DTYPES[dtype], device)
    mask, inplace = MASK.to(device), how.get("inplace", False)
    leaf = logits.clone().requires_grad_()
    shape: Any = (lambda x: x.flatten(0, 1)) if "packed" in how else (lambda x: x)
    out = distillation_loss(
        shape(leaf.clone()), teacher_ids=shape(ids), teacher_logps=shape(logps), divergence=kind,
        jsd_weight=0.3, rest=rest, completion_mask=shape(mask), temperature=0.8, inplace=inplace,
        return_entropy=True, backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, leaf)
    found = []
    for cast in (lambda x: x, lambda x: x.double()):
        z = cast(logits).clone().requires_grad_()
        loss = eager_rows(z, ids, cast(logps), kind, rest, temperature=0.8).sum() / MASK.sum()
        found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    (other, other_grad), (truth, true_grad) = found
    error, bar = abs(float(out.loss.detach() - truth)), abs(float(other - truth))
    assert error <= 2 * bar + (1e-12 if dtype == "fp64" else 1e-6) * (1 + float(truth))
    epsilon = {"fp64": 1e-11, "fp32": 2e-5}.get(dtype, 1.25 * torch.finfo(DTYPES[dtype]).eps)
    assert_no_worse_than_eager(grad, other_grad, true_grad, epsilon=epsilon)
    assert out.metrics.keys() == {"kl", "entropy"}
    assert float(out.metrics["kl"]) == pytest.approx(float(out.loss.detach()))
    assert out.logps is None and out.entropy is not None
    entropy = torch.special.entr((logits.double() / 0.8).softmax(-1)).sum(-1)
    exact = torch.where(mask, entropy, 0.0)
    torch.testing.assert_close(out.entropy.view(mask.shape).double(), exact, rtol=1e-5, atol=1e-5)


@kinds
@rests
def test_from_hidden_states(kind: str, rest: str, backend: str, device: str) -> None:
    """The linear form equals the form from its logits."""
    _, ids, logps = top_k(torch.float64, device)
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((3, 4, 16), (V, 16), (V,))
    )
    options: dict[str, Any] = {
        "teacher_ids": ids, "teacher_logps": logps, "divergence": kind, "rest": rest,
        "completion_mask": MASK.to(device), "return_entropy": True, "backend": backend,
    }  # fmt: skip
    out = linear_distillation_loss(hidden, weight, lm_head_bias=bias, chunk_tokens=2, **options)
    want = distillation_loss(linear(hidden, weight, bias), **options)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.entropy, want.entropy)
    for x, y in zip(*(torch.autograd.grad(o.loss, (hidden, weight, bias)) for o in (out, want)), strict=True):
        torch.testing.assert_close(x, y)


@kinds
def test_all_tokens_are_the_whole_vocabulary(kind: str, backend: str, device: str) -> None:
    """With K = V and nothing dropped, the top-K form with rest="drop" is the full form."""
    case = batch(torch.float64, kind=kind, vocab=30, device=device)
    ids = torch.arange(30, device=device).flip(0).expand(3, 4, 30)
    logps = case.teacher.log_softmax(-1).gather(-1, ids)
    logits = case.logits.clone().requires_grad_()
    outs = [
        distillation_loss(logits, teacher_ids=ids, teacher_logps=logps, rest="drop", **case.options),
        distillation_loss(logits, teacher_logits=case.teacher, backend=backend, **case.options),
    ]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, logits)[0] for x in outs))


@kinds
@rests
def test_a_row_without_ids(kind: str, rest: str, backend: str, device: str) -> None:
    """It contributes 0, gets no gradient, and counts as a token."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    ids = torch.tensor([[3, -1], [-1, -1]], device=device)
    logps = torch.tensor([[-1.0, torch.nan], [torch.nan, torch.inf]], device=device)
    options: dict[str, Any] = {"divergence": kind, "rest": rest, "backend": backend}
    both = distillation_loss(logits, teacher_ids=ids, teacher_logps=logps, **options)
    first = distillation_loss(logits[:1], teacher_ids=ids[:1], teacher_logps=logps[:1], **options)
    torch.testing.assert_close(2 * both.loss, first.loss)
    (grad,) = torch.autograd.grad(both.loss, logits)
    assert bool((grad[1] == 0).all()) and not bool(grad.isnan().any())


@kinds
def test_the_teacher_has_all_probability(kind: str, backend: str, device: str) -> None:
    """The K probabilities sum to 1, or by rounding to more: the loss is finite, and so is its gradient."""
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    ids = torch.tensor([[3, 4], [5, 6]], device=device)
    logps = torch.tensor([[0.5, 0.5], [1.0, 1e-6]], device=device).log()
    out = distillation_loss(logits, teacher_ids=ids, teacher_logps=logps, divergence=kind, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert math.isfinite(float(out.loss.detach())) and bool(grad.isfinite().all())


@kinds
def test_a_sure_student(kind: str, backend: str, device: str) -> None:
    """A bucket of probability 1e-5 keeps its digits, because a sure token's log-probability does."""
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).to(device)
    z[0, 8] += 16.0
    ids = torch.tensor([[8]], device=device)
    logps = torch.tensor([[-1e-3]], device=device)
    leaf = z.clone().requires_grad_()
    out = distillation_loss(leaf, teacher_ids=ids, teacher_logps=logps, divergence=kind, backend=backend)
    p = z.double().log_softmax(-1)[0]
    others = torch.cat([p[:8], p[9:]]).logsumexp(0)
    q = logps.double()[0, 0]
    pair = torch.stack([p[8], others]), torch.stack([q, torch.log(-torch.expm1(q))])
    exact = divergence(*pair, kind, 0.5)
    assert float(out.loss.detach()) == pytest.approx(float(exact), rel=1e-5)


@kinds
@rests
def test_impossible_tokens(kind: str, rest: str, backend: str, device: str) -> None:
    """A token that the student cannot take: only the forward KL is infinite. No gradient is NaN."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0, 4] = -torch.inf
    logits.requires_grad_()
    ids = torch.tensor([[3, 4, 5]], device=device)
    logps = torch.tensor([[0.5, 0.2, 0.0]], device=device).log()
    out = distillation_loss(
        logits, teacher_ids=ids[:, :2], teacher_logps=logps[:, :2], divergence=kind, rest=rest,
        backend=backend,
    )  # fmt: skip
    assert math.isinf(float(out.loss.detach())) == (kind == "forward_kl")
    out = distillation_loss(
        logits, teacher_ids=ids[:, ::2], teacher_logps=logps[:, ::2], divergence=kind, rest=rest,
        backend=backend,
    )  # fmt: skip
    assert math.isinf(float(out.loss.detach())) == (kind == "reverse_kl")
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert kind == "reverse_kl" or bool(grad.isfinite().all())


def test_an_id_outside_the_vocabulary_is_nan(backend: str, device: str) -> None:
    logits = torch.randn(1, 40, device=device)
    ids, logps = torch.tensor([[3, 40]], device=device), torch.tensor([[-1.0, -2.0]], device=device)
    out = distillation_loss(logits, teacher_ids=ids, teacher_logps=logps, backend=backend)
    assert math.isnan(float(out.loss))


def test_sampling_mask(backend: str, device: str) -> None:
    """The student is renormalized over the kept tokens, the teacher is not."""
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)).to(device)
    keep = (torch.arange(70) % 3 != 1).expand(4, 70).to(device)
    ids = torch.tensor([[0, 2]] * 4, device=device)
    logps = torch.tensor([[-1.0, -2.0]] * 4, device=device)
    options: dict[str, Any] = {"teacher_ids": ids, "teacher_logps": logps, "backend": backend}
    out = distillation_loss(logits, sampling_mask=pack_sampling_mask(keep), **options)
    want = distillation_loss(logits.masked_fill(~keep, -torch.inf), **options)
    torch.testing.assert_close(out.loss, want.loss)


@kinds
def test_no_token_of_the_teacher_is_possible(kind: str, backend: str, device: str) -> None:
    """The student's mask drops all of them in one row. With "bucket", loss and gradient are finite."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(1, 4, 40, dtype=torch.bool)
    keep[0, 0, 3] = False
    logits = torch.randn(1, 4, 40, generator=generator).to(device).requires_grad_()
    ids, logps = torch.full((1, 4, 1), 3, device=device), torch.full((1, 4, 1), -0.51, device=device)
    out = distillation_loss(
        logits,
        teacher_ids=ids,
        teacher_logps=logps,
        divergence=kind,
        sampling_mask=pack_sampling_mask(keep).to(device),
        backend=backend,
    )
    out.loss.backward()
    if kind == "forward_kl":  # the teacher's token is impossible for the student
        assert math.isinf(out.loss)
    else:
        assert math.isfinite(out.loss) and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("gap", [16.0, 20.0, 23.5, 30.0])
def test_a_student_that_is_too_sure_has_a_gradient(gap: float, backend: str, device: str) -> None:
    """The teacher gives 0.6 to the token of which the student is sure."""
    logits = torch.zeros(1, 1, 40)
    logits[..., 3] = gap
    leaf = logits.to(device).requires_grad_()
    out = distillation_loss(
        leaf,
        teacher_ids=torch.full((1, 1, 1), 3, device=device),
        teacher_logps=torch.full((1, 1, 1), math.log(0.6), device=device),
        divergence="forward_kl",
        backend=backend,
    )
    out.loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(float(leaf.grad[0, 0, 3]), 0.4, rtol=1e-3, atol=0)
