"""Tensors without values, on "meta" or under FakeTensorMode: every form gives the shapes of a real call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meta_forms import (
    EVERYTHING,
    FAKE_CUDA,
    FORMS,
    META,
    REAL,
    B,
    Found,
    H,
    Place,
    T,
    V,
    bf16,
    from_hidden,
    from_logits,
    needs_gpu,
    places,
)
from parity import user_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from grpo_kernels import (
    LossSpec,
    grpo_loss,
    linear_grpo_loss,
    selective_logps,
)
from grpo_kernels.checks.tensors import has_data
from grpo_kernels.linear import products


def described(found: Found) -> list[Any]:
    """Shape and dtype of every tensor, by name."""

    def of(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: of(value) for key, value in x.items()}
        if isinstance(x, tuple):
            return tuple(map(of, x))
        return None if x is None else (tuple(x.shape), x.dtype)

    return [of(found.outputs), [of(x.grad) for x in found.leaves]]


def tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@places
@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: str, place: Place) -> None:
    outputs, grads = described(FORMS[form](REAL))
    assert None not in grads
    with place.mode():
        found = FORMS[form](place)
        assert described(found) == [outputs, grads]
    for x in (*tensors(found.outputs), *(leaf.grad for leaf in found.leaves)):
        assert x is not None and x.device.type == place.device and isinstance(x, FakeTensor) == place.fake


@places
@pytest.mark.parametrize("form", ["default", "in place", "packed", "linear, one pass, packed"])
def test_under_debug(form: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no values to check."""
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    with place.mode():
        FORMS[form](place)


@pytest.mark.parametrize("form", ["default", "in place", "linear, one pass, everything", "callable"])
@pytest.mark.usefixtures("needs_triton")
def test_triton_launches_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a launch would be an illegal access, because the address of a tensor on "meta" is 0."""
    import triton

    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "__getitem__", launched)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launched)
    call = {
        "default": from_logits(backend="triton"),
        "in place": from_logits(EVERYTHING, reference="logits", inplace=True, backend="triton"),
        "linear, one pass, everything": from_hidden(EVERYTHING, reference=True, backend="triton"),
        "callable": from_logits(LossSpec(user_loss), backend="triton"),
    }[form]
    want = described(FORMS[form](REAL)) if form == "default" else None
    found = call(META)
    assert want is None or described(found) == want


@pytest.mark.parametrize("place", [META, pytest.param(FAKE_CUDA, marks=needs_gpu)], ids=lambda p: p.name)
def test_no_device_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a fake tensor may be absent, so nothing asks for its free memory or its products."""

    def asked(*args: Any) -> None:
        raise AssertionError(f"the device was asked: {args}")

    monkeypatch.setattr(products, "device_multiplies_mixed", asked)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    with place.mode():
        from_hidden(EVERYTHING, reference=True, dtype=bf16)(place)


def test_errors_are_those_of_real_tensors() -> None:
    """Shapes are checked without values."""
    with FakeTensorMode():
        logits, ids = torch.empty(B, T, V), torch.zeros(B, T + 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"completion_ids must have shape \(2, 6\)"):
            grpo_loss(logits, ids, torch.ones(B))


def test_has_data() -> None:
    real = torch.ones(2)
    assert has_data(real) and has_data(torch.nn.Parameter(real)) and has_data(real.detach())
    meta = real.to("meta")
    assert not has_data(meta) and not has_data(torch.nn.Parameter(meta))
    with FakeTensorMode() as mode:
        assert not has_data(torch.ones(2)) and not has_data(torch.nn.Parameter(torch.ones(2)))
        assert not has_data(torch.empty(2, device="meta"))
    assert not has_data(mode.from_tensor(real))


@pytest.mark.parametrize("form", ["logits", "logits in place", "hidden states", "log-probabilities"])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_graph_traced_on_fake_tensors_computes(form: str, mode: str) -> None:
    """A tracer runs on fake tensors, and the operators that it records run on real ones."""
    linear = form == "hidden states"
    given = (REAL.new(B, T, H), REAL.new(V, H)) if linear else (REAL.new(B, T, V),)
    ids = REAL.new(B, T, dtype=torch.int64)

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        *inputs, ids, advantages = args
        leaves = [x.detach().requires_grad_() for x in inputs]
        if linear:
            loss = linear_grpo_loss(*leaves, ids, advantages).loss
        elif form == "log-probabilities":
            loss = selective_logps(*leaves, ids).sum()
        else:
            loss = grpo_loss(leaves[0] * 1, ids, advantages, inplace=form == "logits in place").loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    args = (*given, ids, REAL.new(B))
    graph = make_fx(call, tracing_mode=mode)(*args)
    for got, want in zip(graph(*args), call(*args), strict=True):
        torch.testing.assert_close(got, want)
