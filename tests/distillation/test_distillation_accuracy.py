"""Digits of small divergences, and values at the limits of the number formats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distillation_cases import KINDS, assert_gradient, batch, divergence, eager, run

from grpo_kernels import distillation_loss
from grpo_kernels.testing import relative_error

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_equal_rows(kind: str, distance: float, backend: str, device: str) -> None:
    """KLs from 1e-4 down to 1e-10 keep three digits in fp32, and their gradients five."""
    case = batch(kind=kind, distance=distance, device=device)
    got, truth = run(case, backend=backend), eager(case.wide())
    value = float(truth.out.loss.detach())
    assert value < 1e-4
    assert float(got.out.loss.detach()) == pytest.approx(value, rel=1e-3)
    assert float(relative_error(got.grad, truth.grad).max()) <= 1e-5


@kinds
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
@pytest.mark.parametrize(
    "options",
    [{"logit_softcap": 30.0}, {"logit_scale": 1.0, "ref_logit_scale": 1.0 + 1e-4}],
    ids=["softcap", "two scales"],
)
def test_nearly_equal_rounded_rows(
    kind: str, distance: float, options: dict[str, float], backend: str, device: str
) -> None:
    """Softcapped and scaled logits are rounded, by up to 4e-6. A KL of 1e-6 still keeps three digits."""
    case = batch(kind=kind, distance=distance, device=device).with_options(**options)
    got, truth = run(case, backend=backend), eager(case.wide())
    value = float(truth.out.loss.detach())
    assert value < 1e-4
    assert float(got.out.loss.detach()) == pytest.approx(value, rel=1e-3)
    assert float(relative_error(got.grad, truth.grad).max()) <= 4e-6 / distance


@kinds
@pytest.mark.parametrize("offset", [0.5, 3.0, 30.0, -1000.0])
def test_an_offset_of_the_teacher(kind: str, offset: float, backend: str, device: str) -> None:
    """A constant that is added to all logits of a row changes no distribution, and costs no digits."""
    case = batch(kind=kind, distance=1e-2, device=device)
    case = case._replace(teacher=case.teacher + offset)
    got, truth = run(case, backend=backend), eager(case.wide())
    assert float(got.out.loss.detach()) == pytest.approx(float(truth.out.loss.detach()), rel=1e-3)
    assert float(relative_error(got.grad, truth.grad).max()) <= 1e-4


@kinds
def test_the_limit_of_the_second_pass(kind: str, backend: str, device: str) -> None:
    """Values on both sides of it, and at it, are continuous: each keeps four digits."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 40, 600, generator=generator, dtype=torch.float64)
    logits = torch.randn(1, 40, 600, generator=generator, dtype=torch.float64)
    teacher = logits + noise * torch.linspace(0.05, 0.3, 40, dtype=torch.float64)[:, None]
    logits, teacher = logits.float(), teacher.float()
    p, q = logits.double().log_softmax(-1), teacher.double().log_softmax(-1)
    exact = divergence(p, q, kind, 0.5)[0]
    if kind != "jsd":
        assert float(exact.min()) < 1e-2 < float(exact.max())
    for token in range(40):
        mask = (torch.arange(40) == token)[None].to(device)
        out = distillation_loss(
            logits.to(device), teacher_logits=teacher.to(device), divergence=kind,
            completion_mask=mask, backend=backend,
        )  # fmt: skip
        assert float(out.loss.detach()) == pytest.approx(float(exact[token]), rel=1e-4)


@kinds
def test_a_sure_token(kind: str, backend: str, device: str) -> None:
    """Both models give one token all but 1e-9 of the probability. The divergence of the rest counts."""
    case = batch(kind=kind, device=device)
    case.logits[..., 7] += 40.0
    case.teacher[..., 7] += 39.0
    got, truth = run(case, backend=backend), eager(case.wide())
    value = float(truth.out.loss.detach())
    assert value < 1e-6
    assert float(got.out.loss.detach()) == pytest.approx(value, rel=1e-3)
    assert_gradient(got.grad, eager(case).grad, truth.grad, what=kind)


@kinds
@pytest.mark.parametrize("gap", [60.0, 120.0, 1e4])
def test_distant_rows(kind: str, gap: float, backend: str, device: str) -> None:
    """Probabilities that underflow, in either model."""
    case = batch(kind=kind, device=device)
    case.logits[..., 3] += gap
    case.teacher[..., 5] += gap
    got, truth = run(case, backend=backend), eager(case.wide())
    assert float(got.out.loss.detach()) == pytest.approx(float(truth.out.loss.detach()), rel=1e-5)
    assert_gradient(got.grad, eager(case).grad, truth.grad, what=kind)


IMPOSSIBLE: dict[str, tuple[slice, slice, set[str]]] = {
    "in both": (slice(2, 9), slice(2, 9), set()),
    "to the teacher": (slice(0, 0), slice(4, 6), {"reverse_kl"}),
    "to the student": (slice(4, 6), slice(0, 0), {"forward_kl"}),
}


@kinds
@pytest.mark.parametrize("which", IMPOSSIBLE)
def test_impossible_tokens(kind: str, which: str, backend: str, device: str) -> None:
    """Logits of -inf: a KL is infinite if its first distribution needs the token, and the JSD is finite."""
    student, teacher, infinite = IMPOSSIBLE[which]
    case = batch(kind=kind, device=device)
    case.logits[..., student], case.teacher[..., teacher] = -torch.inf, -torch.inf
    got = run(case, backend=backend)
    if kind in infinite:
        assert float(got.out.loss.detach()) == math.inf
        return
    truth = eager(case.wide())
    assert float(got.out.loss.detach()) == pytest.approx(float(truth.out.loss.detach()), rel=1e-5)
    assert_gradient(got.grad, eager(case).grad, truth.grad, what=kind)


@kinds
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan(kind: str, where: str, backend: str, device: str) -> None:
    case = batch(kind=kind, device=device)
    (case.logits if where == "student" else case.teacher)[0, 0, 3] = torch.nan
    assert math.isnan(float(run(case, backend=backend).out.loss.detach()))


@kinds
@pytest.mark.parametrize("offset", [2000.0, -1e10])
def test_large_logits(kind: str, offset: float, backend: str, device: str) -> None:
    """Rows far from zero, and masks of -1e10 in half the columns of both models."""
    case = batch(kind=kind, device=device)
    half: Any = slice(None) if offset > 0 else slice(0, None, 2)
    case.logits[..., half] += offset
    case.teacher[..., half] += offset
    got, truth = run(case, backend=backend), eager(case.wide())
    assert float(got.out.loss.detach()) == pytest.approx(float(truth.out.loss.detach()), rel=1e-4)
    assert_gradient(got.grad, eager(case).grad, truth.grad, what=kind)


@pytest.mark.parametrize("weight, limit", [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_tends_to_the_kls(weight: float, limit: str, backend: str, device: str) -> None:
    """JSD_w / w tends to the forward KL as w tends to 0, and JSD_w / (1 - w) to the reverse KL at 1."""
    case = batch(torch.float64, kind="jsd", distance=0.3, device=device)
    got = run(case.with_options(jsd_weight=weight), backend=backend)
    other = eager(case.with_options(divergence=limit))
    assert float(got.out.loss.detach()) / min(weight, 1 - weight) == pytest.approx(
        float(other.out.loss.detach()), rel=1e-3
    )
