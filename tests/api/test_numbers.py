"""A number may be any real scalar: the package computes with the Python number that it equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    ImportanceRatio,
    LossSpec,
    PPOClip,
    VocabShard,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    selective_logps,
)
from grpo_kernels.checks.scalars import check_integer, check_number
from grpo_kernels.mismatch import mismatch_metrics
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.spec import LogitTransform
from grpo_kernels.weights import importance_weights, off_policy_sequence_mask, rejection_mask

B, T, V, H = 2, 3, 20, 4


class Index:
    """An integer that has `__index__` and nothing else."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


# All of them hold 0.75 and 1.5 exactly.
REALS: dict[str, Callable[[float], Any]] = {
    "np.float16": np.float16,
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.longdouble": np.longdouble,
    "0-dim array": np.array,
    "0-dim tensor": torch.tensor,
    "0-dim bf16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "leaf": lambda x: torch.tensor(x, requires_grad=True),
    "Fraction": Fraction,
}
INTEGERS: dict[str, Callable[[int], Any]] = {
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "0-dim array": np.array,
    "0-dim tensor": torch.tensor,
    "Index": Index,
}
REFUSED: dict[str, Any] = {
    "bool": True,
    "np.bool_": np.bool_(True),
    "bool tensor": torch.tensor(True),
    "complex": 1j,
    "np.complex64": np.complex64(1),
    "complex tensor": torch.tensor(1j),
    "string": "1",
    "Decimal": Decimal(1),
    "list": [1.0],
    "array": np.ones(1),
    "tensor": torch.ones(1),
    "tensor on a device": torch.tensor(1.0, device="meta"),
}


@pytest.mark.parametrize("kind", REALS)
def test_reals(kind: str) -> None:
    for value in (0.75, 1.5):
        found = check_number("x", REALS[kind](value))
        assert type(found) is float and found == value


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers(kind: str) -> None:
    for check in (check_number, check_integer):
        found = check("x", INTEGERS[kind](7))
        assert type(found) is int and found == 7


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_number(kind: str) -> None:
    with pytest.raises(TypeError, match=r"^x must be a number, got "):
        check_number("x", REFUSED[kind])
    with pytest.raises(TypeError, match=r"^x must be an integer, got "):
        check_integer("x", REFUSED[kind])


@pytest.mark.parametrize("value", [1.0, np.float32(1), np.array(1.0), torch.tensor(1.0), Fraction(1)])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^x must be an integer, got "):
        check_integer("x", value)


@pytest.mark.parametrize("make", REALS.values(), ids=REALS)
def test_bounds_hold_for_all(make: Callable[[float], Any]) -> None:
    with pytest.raises(ValueError, match=r"^x must be finite and >= 0, got -0\.5$"):
        check_number("x", make(-0.5))
    with pytest.raises(ValueError, match=r"^x must be finite and > 0\.5, got 0\.5$"):
        check_number("x", make(0.5), low=0.5, strict=True)
    if make is not Fraction:
        with pytest.raises(ValueError, match=r"^x must be finite and >= 0, got nan$"):
            check_number("x", make(float("nan")))


def test_symbolic_integers_stay_symbolic() -> None:
    """`make_fx` traces with SymInt: a number that depends on a shape must not become a constant."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def scaled(x: Tensor) -> Tensor:
        return x * check_number("n", check_integer("n", x.shape[0]))

    traced = make_fx(scaled, tracing_mode="symbolic")(torch.ones(3))
    assert torch.equal(traced(torch.ones(5)), torch.full((5,), 5.0))


DESCRIBED = [
    KL(beta=0.75, clamp=1.5, output_clamp=1.5),
    LossSpec(max_tokens=7, entropy_coef=0.75, log_ratio_clamp=1.5),
    PPOClip(0.75, 1.5, 1.5, 1.5),
    ImportanceRatio(max_ratio=1.5),
    CISPO(ratio_max=1.5, ratio_min=0.75),
    SAPO(1.5, 0.75),
    DRO(0.75),
    DPPO(low=0.75, high=1.5, ratio_cap=1.5),
    VESPO(0.75, 1.5, 0.75, 1.5),
    GMPO(0.75, 1.5),
    LogitTransform(7, 0.75, 1.5, 0.75, 1.5, 0.75),
]


@pytest.mark.parametrize("kind", REALS)
@pytest.mark.parametrize("described", DESCRIBED, ids=lambda x: type(x).__name__)
def test_descriptions_hold_python_numbers(described: Any, kind: str) -> None:
    values = {f.name: getattr(described, f.name) for f in fields(described)}
    given = {name: REALS[kind](x) if type(x) is float else x for name, x in values.items()}
    if "max_tokens" in given:
        given["max_tokens"] = np.int64(7)
    found = type(described)(**given)
    assert found == described and hash(found) == hash(described) and repr(found) == repr(described)
    for name, value in values.items():
        assert type(getattr(found, name)) is type(value), name


def test_shard_bounds() -> None:
    shard = VocabShard(np.int64(3), torch.tensor(7))
    assert shard == VocabShard(3, 7)
    assert type(shard.start) is type(shard.stop) is int


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "logits": torch.randn(B, T, V, requires_grad=True),
        "completion_ids": torch.randint(V - 3, (B, T)),
        "advantages": torch.randn(B),
    }


def logits_form(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    out = grpo_loss(**x, spec=LossSpec(entropy_coef=0.5), ref_logits=x["logits"].detach().roll(1), **options)
    return out.loss, x["logits"]


def linear_form(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(B, T, H, generator=generator) for _ in range(2))
    weight = torch.randn(V, H, generator=generator).requires_grad_()
    out = linear_grpo_loss(
        hidden,
        weight,
        x["completion_ids"],
        x["advantages"],
        spec=LossSpec(kl=KL("k2"), entropy_coef=0.5),
        ref_hidden=ref_hidden,
        ref_lm_head_weight=weight.detach().roll(1, 0),
        chunk_tokens=options.pop("chunk_tokens", None),
        **options,
    )
    return out.loss, weight


def logps(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return selective_logps(x["logits"], x["completion_ids"], **options).sum(), x["logits"]


def linear(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return linear_logps(torch.ones(B, T, H), weight, x["completion_ids"], **options).sum(), weight


def of_logps(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    given = x["logits"].detach()[..., 0].requires_grad_()
    return policy_loss(given, x["advantages"], **options).loss, given


SCALED: dict[str, float] = {"temperature": 0.75, "logit_scale": 1.5, "logit_softcap": 1.5}
REFERENCE = {"ref_logit_scale": 0.75, "ref_logit_softcap": 1.5}
CALLS: dict[Callable[..., tuple[Tensor, Tensor]], dict[str, float]] = {
    logits_form: {**SCALED, **REFERENCE, "normalizer": 1.5, "vocab_size": V - 3},
    linear_form: {**SCALED, **REFERENCE, "normalizer": 1.5, "vocab_size": V - 3, "chunk_tokens": 2},
    logps: {**SCALED, "vocab_size": V - 3},
    linear: {**SCALED, "vocab_size": V - 3, "chunk_tokens": 2},
    of_logps: {"normalizer": 1.5},
}


@pytest.mark.parametrize("call", CALLS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", ["np.float32", "np.float64", "0-dim array", "0-dim tensor", "Fraction"])
def test_calls(call: Callable[..., tuple[Tensor, Tensor]], kind: str, backend: str) -> None:
    """Loss and gradient are those of the Python numbers."""
    integer = INTEGERS.get(kind, np.int64)
    given = {name: REALS[kind](x) if type(x) is float else integer(x) for name, x in CALLS[call].items()}
    (want, want_of), (got, got_of) = (
        call(inputs(), backend=backend, **options) for options in (CALLS[call], given)
    )
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(loss, x)[0] for loss, x in ((got, got_of), (want, want_of)))
    torch.testing.assert_close(*grads)


def test_normalizer_counted_by_numpy() -> None:
    """Data loaders pass the mask's sum like this."""
    x, mask = inputs(), np.array([[1, 1, 0], [1, 0, 0]])
    options = {"completion_mask": torch.from_numpy(mask), "spec": "bnpo"}
    want = grpo_loss(**x, **options).loss
    torch.testing.assert_close(grpo_loss(**x, **options, normalizer=mask.sum()).loss, want)


def test_zero_normalizer() -> None:
    for zero in (np.int64(0), np.float32(0), Fraction(0), torch.tensor(0)):
        assert grpo_loss(**inputs(), spec="bnpo", normalizer=zero).loss == 0


def test_scalar_tensors_of_the_cpu_go_to_the_device() -> None:
    """These arguments may be tensors, which are not converted to Python numbers."""
    x = {name: value.detach().to("meta") for name, value in inputs().items()}
    out = grpo_loss(**x, temperature=torch.tensor(0.75), normalizer=torch.tensor(3))
    assert out.loss.device.type == "meta" and out.loss.shape == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scalar_tensors_of_the_cpu_do_not_sync(device: str) -> None:
    x = {name: value.to(device) for name, value in inputs().items()}
    options = {
        "temperature": torch.tensor(0.75),
        "normalizer": torch.tensor(3.0),
        "logit_scale": torch.tensor(1.5),
    }
    want = grpo_loss(**x, temperature=0.75, normalizer=3.0, logit_scale=1.5).loss
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = grpo_loss(**x, **options).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", REALS)
def test_helpers(kind: str) -> None:
    number = REALS[kind]
    rewards = torch.tensor([0.0, 1.0, 5.0, 2.0])
    want = group_advantages(rewards, group_size=2, eps=0.75)
    assert torch.equal(group_advantages(rewards, group_size=np.int32(2), eps=number(0.75)), want)
    logps, sampler, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0]]), torch.ones(1, 2)
    want = importance_weights(logps, sampler, mask, low=0.75, high=1.5)
    assert torch.equal(importance_weights(logps, sampler, mask, low=number(0.75), high=number(1.5)), want)
    bounds, plain = {"low": number(0.75), "high": number(1.5)}, {"low": 0.75, "high": 1.5}
    kept = rejection_mask(logps, sampler, mask, **plain)
    assert torch.equal(rejection_mask(logps, sampler, mask, **bounds), kept)
    assert mismatch_metrics(logps, sampler, mask, **bounds) == mismatch_metrics(logps, sampler, mask, **plain)
    of = torch.tensor([-1.0]), logps, sampler, mask
    kept = off_policy_sequence_mask(*of, threshold=-0.75)
    assert torch.equal(off_policy_sequence_mask(*of, threshold=number(-0.75)), kept)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic: bool | None) -> None:
    """torch.compile treats np.float64 as a float, which becomes symbolic when its value changes."""
    torch._dynamo.reset()
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value in (0.5, 0.75, 1.25):
        x, numbers = inputs(), {"temperature": np.float64(value), "normalizer": np.float64(value)}
        got = compiled(**x, **numbers)
        want = grpo_loss(**x, temperature=value, normalizer=value)
        torch.testing.assert_close(got.loss, want.loss)
