"""At INFO the logger reports the path of each kind of call once, as soon as a handler outputs it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import NEEDS_DYNAMO

from grpo_kernels import LossSpec, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from grpo_kernels.log import OnceLogger, log_once, warn_once, would_output
from grpo_kernels.policy_loss import policy_loss

B, T, V, H = 2, 3, 7, 4
LOGGER = logging.getLogger("grpo_kernels")
IDS, ADVANTAGES = torch.zeros(B, T).long(), torch.ones(B)
SEQUENCES = LossSpec(level="sequence")


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    for once in (log_once, warn_once):
        once.cache_clear()
    yield
    for once in (log_once, warn_once):
        once.cache_clear()


@pytest.fixture
def informed(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "grpo_kernels")
    return caplog


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, T, V, dtype=dtype, requires_grad=True) * 1


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, T, H), torch.randn(V, H, requires_grad=True)


def reference() -> dict[str, Any]:
    return {"ref_logits": torch.randn(B, T, V, dtype=torch.bfloat16), "spec": "log_ratio"}


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "fused": (
        lambda: grpo_loss(logits(), IDS, ADVANTAGES, inplace=True, backend="torch"),
        "grpo_loss: fused (loss and gradient in one kernel), torch backend, logits torch.float32",
    ),
    "two kernels": (
        lambda: grpo_loss(logits(torch.bfloat16), IDS, ADVANTAGES, backend="torch"),
        "grpo_loss: two kernels (statistics, then the gradient in the backward), torch backend, "
        "logits torch.bfloat16",
    ),
    "reference": (
        lambda: grpo_loss(logits(), IDS, ADVANTAGES, inplace=True, backend="torch", **reference()),
        "grpo_loss: fused (loss and gradient in one kernel), torch backend, logits torch.float32, "
        "ref_logits torch.bfloat16",
    ),
    "no gradient": (
        lambda: grpo_loss(logits().detach(), IDS, ADVANTAGES, backend="torch"),
        "grpo_loss: one kernel (statistics, no gradient), torch backend, logits torch.float32",
    ),
    "selective_logps": (
        lambda: selective_logps(logits(), IDS, backend="torch"),
        "selective_logps: two kernels (statistics, then the gradient in the backward), torch backend, "
        "logits torch.float32",
    ),
    "selective_logps without gradient": (
        lambda: selective_logps(logits().detach(), IDS, backend="torch"),
        "selective_logps: one kernel (statistics, no gradient), torch backend, logits torch.float32",
    ),
    "one pass": (
        lambda: linear_grpo_loss(*head(), IDS, ADVANTAGES, backend="torch"),
        "linear_grpo_loss: one pass (loss and gradient in the forward), torch backend, "
        "operands torch.float32, logits torch.float32",
    ),
    "two passes": (
        lambda: linear_grpo_loss(*head(), IDS, ADVANTAGES, spec=SEQUENCES, backend="torch"),
        "linear_grpo_loss: two passes (statistics, then logits and gradient in the backward), "
        "torch backend, operands torch.float32, logits torch.float32",
    ),
    "linear_logps": (
        lambda: linear_logps(*head(), IDS, backend="torch"),
        "linear_logps: two passes (statistics, then logits and gradient in the backward), torch backend, "
        "operands torch.float32, logits torch.float32",
    ),
    "linear_logps without gradient": (
        lambda: linear_logps(*(x.detach() for x in head()), IDS, backend="torch"),
        "linear_logps: one pass (statistics, no gradient), torch backend, operands torch.float32, "
        "logits torch.float32",
    ),
    "policy_loss": (
        lambda: policy_loss(torch.zeros(B, T), ADVANTAGES, backend="torch"),
        "policy_loss: PyTorch operations over tokens, torch backend, logps torch.float32",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_kind_of_call(name: str, informed: pytest.LogCaptureFixture) -> None:
    """Repeated calls give one record."""
    call, message = CALLS[name]
    for _ in range(3):
        call()
    assert informed.messages == [message]


def test_each_kind_has_its_own(informed: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        for call, _message in CALLS.values():
            call()
    assert informed.messages == [message for _, message in CALLS.values()]


def test_the_kernels(informed: pytest.LogCaptureFixture, needs_triton: None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    of = torch.zeros(B, T, device=device), ADVANTAGES.to(device)
    policy_loss(*of, spec="bnpo", backend="triton")
    assert informed.messages == ["policy_loss: one kernel over tokens, triton backend, logps torch.float32"]


@NEEDS_DYNAMO
@pytest.mark.parametrize(
    "call",
    [
        lambda z: grpo_loss(z, IDS, ADVANTAGES).loss,
        lambda z: selective_logps(z, IDS).sum(),
        lambda z: linear_logps(z, torch.ones(9, V), IDS).sum(),
        lambda z: linear_grpo_loss(z, torch.ones(9, V), IDS, ADVANTAGES).loss,
        lambda z: policy_loss(z[..., 0], ADVANTAGES).loss,
    ],
)
def test_graphs_say_nothing(
    call: Callable[[torch.Tensor], torch.Tensor], informed: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    torch.compile(call, backend="aot_eager", fullgraph=True)(torch.randn(B, T, V))
    assert informed.messages == []


def test_level_set_later(caplog: pytest.LogCaptureFixture) -> None:
    """At WARNING, the default, no handler outputs the record. It is emitted again at INFO."""
    call, message = CALLS["fused"]
    with caplog.at_level(logging.WARNING, "grpo_kernels"):
        call()
    with caplog.at_level(logging.INFO, "grpo_kernels"):
        call()
        call()
    assert caplog.messages == [message]


# Configurations of logging before the first call. Only the last one outputs the record of that call.
ORDERS = {
    "nothing": "",
    "level alone": "logging.getLogger('grpo_kernels').setLevel(logging.INFO)",
    "a null handler": """
logging.getLogger("grpo_kernels").setLevel(logging.INFO)
logging.getLogger("grpo_kernels").addHandler(logging.NullHandler())
""",
    "a handler of warnings": """
logging.getLogger("grpo_kernels").setLevel(logging.INFO)
logging.getLogger().addHandler(logging.StreamHandler())
logging.getLogger().handlers[0].setLevel(logging.WARNING)
""",
    "disabled": "logging.disable(logging.INFO)",
    "configured": "logging.basicConfig(level=logging.INFO, format='at once: %(message)s')",
}
PROGRAM = """
import logging, torch
from grpo_kernels import grpo_loss
from grpo_kernels.log import warn_once

def call():
    grpo_loss(torch.zeros(2, 3, 7), torch.zeros(2, 3).long(), torch.ones(2), backend="torch")

{before}
call()
logging.disable(logging.NOTSET)
logging.basicConfig(level=logging.INFO, force=True, format="later: %(message)s")
call()
call()
"""


@pytest.mark.parametrize(
    "order", [pytest.param(x, marks=pytest.mark.long) if x == "level alone" else x for x in ORDERS]
)
def test_before_logging_is_configured(order: str) -> None:
    """The program runs in its own process, because pytest configures logging here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.format(before=ORDERS[order])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    when = "at once" if order == "configured" else "later"
    path = "grpo_loss: one kernel (statistics, no gradient), torch backend, logits torch.float32"
    assert [x for x in done.stderr.splitlines() if "grpo_loss" in x] == [f"{when}: {path}"]


def test_warnings_need_no_configuration() -> None:
    """Python itself prints warnings, unless there are handlers that drop them."""
    program = """
import logging
from grpo_kernels.log import warn_once
warn_once("first"), warn_once("first")
quiet = logging.StreamHandler()
quiet.setLevel(logging.ERROR)
logging.getLogger().addHandler(quiet)
warn_once("second")
quiet.setLevel(logging.WARNING)
warn_once("second"), warn_once("second")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["first", "second"]


def test_handlers_in_the_hierarchy(monkeypatch: pytest.MonkeyPatch) -> None:
    child = logging.getLogger("grpo_kernels.test_logging")
    child.setLevel(logging.INFO)
    child.propagate = False
    monkeypatch.setattr(logging, "lastResort", None)
    assert not would_output(child, logging.WARNING)
    child.addHandler(handler := logging.StreamHandler())
    assert would_output(child, logging.INFO) and not would_output(child, logging.DEBUG)
    child.removeHandler(handler)
    child.propagate = True
    assert would_output(child, logging.INFO)  # pytest has handlers


def test_seen_messages_are_not_looked_at_again(
    informed: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call with a known message looks at no handler and formats no text."""
    once = OnceLogger(logging.INFO)
    once("%s and %s", "this", torch.float32)

    def refuse(*args: Any) -> bool:
        raise AssertionError("the handlers were looked at")

    monkeypatch.setattr("grpo_kernels.log.would_output", refuse)
    once("%s and %s", "this", torch.float32)
    assert informed.messages == ["this and torch.float32"]
