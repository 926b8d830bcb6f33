"""The distillation losses in autograd: gradcheck, second derivatives, in place, torch.compile, logging."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distillation_cases import KINDS, batch, run
from parity import NEEDS_DYNAMO
from torch import Tensor
from torch.autograd import gradcheck

from grpo_kernels import distillation_loss, linear_distillation_loss
from grpo_kernels.log import log_once

kinds = pytest.mark.parametrize("kind", KINDS)
MASK = torch.tensor([[1, 1, 1], [1, 0, 1]])
V, H = 13, 5


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def top_k(device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    logps, ids = normal(2, 3, V, seed=8, dtype=dtype).log_softmax(-1).topk(3)
    ids[0, 0, 2] = -1
    return {"teacher_ids": ids.to(device), "teacher_logps": logps.to(device)}


def heads(device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((2, 3, H), (V, H), (V,))
    return [normal(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(shapes)]


def teacher(device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = ("teacher_hidden", "teacher_lm_head_weight", "teacher_lm_head_bias")
    shapes = ((2, 3, H + 1), (V, H + 1), (V,))
    parts = (normal(*shape, seed=3 + i, dtype=dtype).to(device) for i, shape in enumerate(shapes))
    return dict(zip(names, parts, strict=True))


@kinds
@pytest.mark.parametrize("form", ["whole", "bucket", "drop"])
@pytest.mark.parametrize(
    "options", [{}, {"logit_softcap": 3.0, "temperature": 0.7, "ref_logit_scale": 0.5}], ids=["", "softcap"]
)
def test_gradcheck(kind: str, form: str, options: dict[str, float], backend: str, device: str) -> None:
    given: dict[str, Any] = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend}
    if form == "whole":
        given["teacher_logits"] = normal(2, 3, V, seed=1).to(device)
    else:
        given |= {"rest": form, **top_k(device)}
    logits = normal(2, 3, V, seed=2).to(device).requires_grad_()
    assert gradcheck(lambda z: distillation_loss(z, **given, **options).loss, logits, fast_mode=True)


@kinds
@pytest.mark.parametrize("form", ["whole", "bucket", "drop"])
def test_gradcheck_from_hidden_states(kind: str, form: str, backend: str, device: str) -> None:
    given: dict[str, Any] = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend}
    given |= teacher(device) if form == "whole" else {"rest": form, **top_k(device)}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_distillation_loss(hidden, weight, lm_head_bias=bias, chunk_tokens=2, **given).loss

    assert gradcheck(loss, [x.requires_grad_() for x in heads(device)], fast_mode=True)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_a_second_derivative_raises(form: str, backend: str, device: str) -> None:
    leaf = normal(2, 3, V if form == "logits" else H, seed=0).to(device).requires_grad_()
    if form == "logits":
        out = distillation_loss(leaf, teacher_logits=leaf.detach() + 0.1, backend=backend)
    else:
        weight = heads(device)[1].requires_grad_()
        out = linear_distillation_loss(leaf, weight, backend=backend, **teacher(device))
    (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_two_backwards(form: str, backend: str, device: str) -> None:
    """A graph that is kept gives the same gradient again."""
    leaf = normal(2, 3, V if form == "logits" else H, seed=0).to(device).requires_grad_()
    if form == "logits":
        other = normal(2, 3, V, seed=1).to(device)
        loss = distillation_loss(leaf, teacher_logits=other, backend=backend).loss
    else:
        loss = linear_distillation_loss(leaf, heads(device)[1], backend=backend, **teacher(device)).loss
    (once,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))
    assert torch.equal(once, again)


def test_in_place_misuse(backend: str, device: str) -> None:
    logits, other = normal(2, 3, V, seed=0).to(device), normal(2, 3, V, seed=1).to(device)
    with pytest.raises(RuntimeError, match="overwrite a leaf that requires grad"):
        distillation_loss(logits.clone().requires_grad_(), teacher_logits=other, inplace=True)
    both = normal(4, 3, V, seed=0).to(device)
    with pytest.raises(ValueError, match="would overwrite teacher_logits"):
        distillation_loss(both[:2], teacher_logits=both[1:3], inplace=True, backend=backend)
    # Another operation that saved the logits must not see the gradient.
    z = logits.clone().requires_grad_()
    y = z * 2
    loss = distillation_loss(y, teacher_logits=other, inplace=True, backend=backend).loss + y.exp().sum()
    square = (y * y).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_the_gradient_is_in_place(backend: str, device: str) -> None:
    case = batch(kind="jsd", device=device)
    leaf = case.logits.clone().requires_grad_()
    logits = leaf.clone()
    out = distillation_loss(
        logits, teacher_logits=case.teacher, inplace=True, backend=backend, **case.options
    )
    out.loss.backward()
    assert torch.equal(logits.detach(), leaf.grad)  # type: ignore[arg-type]
    assert torch.equal(logits.detach(), run(case, backend=backend).grad)


@NEEDS_DYNAMO
class TestCompile:
    """One graph without a break gives the results of eager execution."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    def assert_equal(
        self, function: Callable[..., Any], leaves: list[Tensor], options: dict[str, Any]
    ) -> None:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for call in (function, compiled):
            own = [x.detach().clone().requires_grad_() for x in leaves]
            out = call(*own[:2], **({"lm_head_bias": own[2]} if len(own) > 2 else {}), **options)
            results.append((out, torch.autograd.grad(out.loss, own)))
        (eager, grads), (graph, graph_grads) = results
        torch.testing.assert_close(graph.loss, eager.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(graph.metrics, eager.metrics, rtol=1e-6, atol=0)
        torch.testing.assert_close(graph.entropy, eager.entropy, rtol=0, atol=0)
        for x, y in zip(graph_grads, grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)

    @kinds
    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits(self, kind: str, inplace: bool, backend: str, device: str) -> None:
        case = batch(kind=kind, device=device, packed=inplace).with_options(temperature=0.9)
        options = {**case.options, "teacher_logits": case.teacher, "backend": backend}

        def loss(z: Tensor, **options: Any) -> Any:
            return distillation_loss(z * 1.0, inplace=inplace, **options)

        self.assert_equal(loss, [case.logits], {**options, "return_entropy": True})

    @pytest.mark.parametrize("rest", ["bucket", "drop"])
    def test_top_k(self, rest: str, backend: str, device: str) -> None:
        logits = normal(2, 3, V, seed=2, dtype=torch.float32).to(device)
        options = {"rest": rest, "return_entropy": True, "backend": backend, **top_k(device, torch.float32)}
        self.assert_equal(distillation_loss, [logits], options)

    @kinds
    def test_hidden_states(self, kind: str, backend: str, device: str) -> None:
        options = {"divergence": kind, "return_entropy": True, "backend": backend, "chunk_tokens": 2}
        options |= {"completion_mask": MASK.to(device), **teacher(device, torch.float32)}
        self.assert_equal(linear_distillation_loss, heads(device, torch.float32), options)


def test_meta_tensors() -> None:
    """Tensors without data give shapes."""
    z = torch.empty(2, 3, V, device="meta", requires_grad=True)
    out = distillation_loss(z, teacher_logits=torch.empty(2, 3, V, device="meta"), return_entropy=True)
    out.loss.backward()
    assert out.loss.shape == () and out.entropy is not None and out.entropy.shape == (2, 3)
    assert z.grad is not None and z.grad.shape == z.shape
    parts = [x.to("meta").requires_grad_() for x in heads("cpu")]
    given = {name: x.to("meta") for name, x in teacher("cpu").items()}
    out = linear_distillation_loss(*parts[:2], lm_head_bias=parts[2], **given)
    out.loss.backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in parts)


def test_logging(backend: str, device: str, caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    z = normal(2, 3, V, seed=0, dtype=torch.float32).to(device).requires_grad_()
    with caplog.at_level(logging.INFO, logger="grpo_kernels"):
        distillation_loss(z, teacher_logits=z.detach().bfloat16(), backend=backend)
        distillation_loss(z, backend=backend, **top_k(device, torch.float32))
        parts = heads(device, torch.float32)[:2]
        linear_distillation_loss(*parts, backend=backend, **teacher(device, torch.float32))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0].startswith("distillation_loss: three kernels")
    assert messages[0].endswith(f"{backend} backend, logits torch.float32, teacher_logits torch.bfloat16")
    assert messages[1].startswith("distillation_loss: two kernels")
    assert messages[2].startswith("linear_distillation_loss: one pass (statistics, no gradient)")
