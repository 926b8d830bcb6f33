"""`distillation_loss` over the whole vocabulary equals eager PyTorch, in every form of its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation_cases import KINDS, Case, V, assert_parity, batch, run
from parity import DTYPES

from grpo_kernels import distillation_loss, pack_sampling_mask

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new gradient", "inplace"])
def test_parity(kind: str, dtype: str, packed: bool, inplace: bool, backend: str, device: str) -> None:
    case = batch(DTYPES[dtype], kind=kind, packed=packed, device=device)
    assert_parity(case, backend=backend, inplace=inplace, what=kind)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"logit_scale": 0.4, "ref_logit_scale": 0.5},
        {"logit_softcap": 5.0, "ref_logit_softcap": 7.0, "temperature": 1.3},
        {"logit_softcap": 6.0, "logit_scale": 1.5},
        {"jsd_weight": 0.9},
        {"jsd_weight": 0.01},
        {"normalizer": 3.5},
        {"aggregation": "token-sum"},
    ],
    ids=str,
)
def test_options(kind: str, options: dict[str, Any], backend: str, device: str) -> None:
    assert_parity(batch(kind=kind, device=device).with_options(**options), backend=backend, what=str(options))


@kinds
@pytest.mark.parametrize("shape", [(3, 1), (3, 4)], ids=["per sequence", "per token"])
def test_temperatures(kind: str, shape: tuple[int, int], backend: str, device: str) -> None:
    temperatures = torch.linspace(0.5, 1.5, shape[0] * shape[1], device=device).view(shape)
    assert_parity(batch(kind=kind, device=device).with_options(temperature=temperatures), backend=backend)


@kinds
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
def test_sampling_mask(kind: str, inplace: bool, softcap: float | None, backend: str, device: str) -> None:
    """Dropped columns are NaN in one of the models, and their gradient is zero."""
    case = batch(kind=kind, device=device)
    keep = torch.rand(3, 4, V, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[..., 0] = True
    keep = keep.to(device)
    case.logits[..., 1:4].masked_fill_(~keep[..., 1:4], torch.nan)
    case.teacher[..., 4:9].masked_fill_(~keep[..., 4:9], torch.nan)
    case = case.with_options(sampling_mask=pack_sampling_mask(keep), logit_softcap=softcap)
    got = assert_parity(case, backend=backend, inplace=inplace)
    assert bool((got.grad[~keep] == 0).all())


@kinds
def test_padding_columns(kind: str, backend: str, device: str) -> None:
    case = batch(kind=kind, device=device)
    wide = torch.cat([case.logits, torch.full((3, 4, 11), torch.nan, device=device)], -1)
    teacher = torch.cat([case.teacher, torch.full((3, 4, 3), torch.inf, device=device)], -1)
    padded = Case(wide, teacher, {**case.options, "vocab_size": V})
    got = assert_parity(padded, backend=backend)
    assert bool((got.grad[..., V:] == 0).all())


@kinds
def test_a_view(kind: str, backend: str, device: str) -> None:
    """The first tokens of longer sequences, with a stride between rows. The rest gets no gradient."""
    case = batch(torch.bfloat16, kind=kind, device=device)
    longer = torch.cat([case.logits, case.logits[:, :1]], 1)
    assert_parity(case._replace(logits=longer), lambda x: x[:, :-1], backend=backend)


@kinds
@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float16], ids=str)
def test_a_teacher_of_another_dtype(kind: str, teacher: torch.dtype, backend: str, device: str) -> None:
    case = batch(kind=kind, device=device)
    assert_parity(case._replace(teacher=case.teacher.to(teacher)), backend=backend)


@kinds
@pytest.mark.parametrize("vocab", [1, 2, 5, 128, 1024, 1025])
def test_widths(kind: str, vocab: int, backend: str, device: str) -> None:
    case = batch(torch.float64, kind=kind, vocab=vocab, device=device)
    assert_parity(case, backend=backend)


@kinds
def test_the_teacher_may_be_the_student(kind: str, backend: str, device: str) -> None:
    """The same memory in place: loss and gradient are exactly zero."""
    case = batch(kind=kind, device=device)
    logits = case.logits.clone().requires_grad_()
    own = logits.clone()
    out = distillation_loss(own, teacher_logits=own.detach(), **case.options, backend=backend, inplace=True)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert logits.grad is not None and bool((logits.grad == 0).all())


@kinds
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_aggregations(kind: str, packed: bool, aggregation: str, backend: str, device: str) -> None:
    """Aggregations are weights of the tokens, whose losses "token-sum" adds one at a time."""
    case = batch(torch.float64, kind=kind, packed=packed, device=device)
    mask = case.options["completion_mask"]
    unit = case.with_options(aggregation="token-sum")
    tokens = []
    for number in range(mask.numel()):
        one = torch.zeros_like(mask).view(-1)
        one[number] = mask.view(-1)[number]
        tokens.append(run(unit.with_options(completion_mask=one.view(mask.shape)), backend=backend).out.loss)
    values = torch.stack(tokens).detach().view(3, 4)
    lengths = mask.view(3, 4).sum(1)
    weights = {
        "seq-mean-token-mean": 1 / lengths.clamp(min=1).double(),
        "seq-mean-token-sum": torch.ones(3, device=device).double(),
        "seq-mean-token-sum-norm": torch.full((3,), 1 / 7, device=device, dtype=torch.float64),
    }[aggregation]
    out = run(case.with_options(aggregation=aggregation, max_tokens=7), backend=backend).out
    torch.testing.assert_close(out.loss, (values.sum(1) * weights).sum() / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient(inplace: bool, backend: str, device: str) -> None:
    case = batch(kind="jsd", device=device)
    once, more = (run(case, upstream=x, backend=backend, inplace=inplace) for x in (1.0, -4.0))
    assert torch.equal(more.grad, -4 * once.grad)


def test_an_empty_batch(backend: str, device: str) -> None:
    logits = torch.randn(0, 5, 7, device=device, requires_grad=True)
    out = distillation_loss(logits, teacher_logits=logits.detach(), backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and logits.grad is not None and logits.grad.shape == (0, 5, 7)


@kinds
def test_without_unmasked_tokens(kind: str, backend: str, device: str) -> None:
    case = batch(kind=kind, device=device)
    case = case.with_options(completion_mask=torch.zeros_like(case.options["completion_mask"]))
    got = run(case, backend=backend)
    assert float(got.out.loss.detach()) == 0 and bool((got.grad == 0).all())
    assert float(got.out.metrics["kl"]) == 0
