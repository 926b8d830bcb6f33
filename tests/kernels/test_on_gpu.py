"""What a GPU runs in another way than the interpreter: captured graphs and compiled graphs.

Without a GPU the same code runs in the interpreter: a "graph" is then the call itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import NEEDS_DYNAMO
from torch import Tensor

from grpo_kernels import KL, LossSpec, PPOClip, grpo_loss, linear_grpo_loss, selective_logps
from grpo_kernels.testing import make_batch

pytestmark = pytest.mark.usefixtures("needs_triton")

SPEC = LossSpec(PPOClip(), KL("k3", beta=0.04))
SHAPE = (2, 5, 1500)  # a block and a rest


def captured(call: Callable[[], None], device: str) -> Callable[[], None]:
    """Return a function that replays what `call` launches."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what stays
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> None:
    """Turn the fixture off: Dynamo cannot trace allocations that fill their memory, and graphs replay it."""


def inputs(device: str, seed: int, shape: tuple[int, int, int] = SHAPE) -> dict[str, Tensor]:
    batch = make_batch(*shape, dtype=torch.bfloat16, device=device, seed=seed)
    names = ("logits", "completion_ids", "advantages", "completion_mask", "old_logps", "ref_logits")
    return {name: getattr(batch, name).detach().clone() for name in names}


def from_logits(
    given: dict[str, Tensor], loss: Callable[..., Any] = grpo_loss, **how: Any
) -> tuple[Tensor, ...]:
    leaf = given["logits"].detach().requires_grad_()
    logits = leaf.clone() if how.get("inplace") else leaf
    options = {name: given[name] for name in ("completion_mask", "old_logps", "ref_logits")}
    out = loss(
        logits, given["completion_ids"], given["advantages"], spec=SPEC, backend="triton", **options, **how
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), out.logps, grad


def from_hidden(given: dict[str, Tensor], **how: Any) -> tuple[Tensor, ...]:
    """The hidden states are the first columns of the logits, and so is the head."""
    hidden = given["logits"][..., :64].detach().requires_grad_()
    weight = (given["logits"].flatten(0, 1)[:, :64] / 8).detach().requires_grad_()
    out = linear_grpo_loss(
        *(hidden, weight, given["completion_ids"] % 10, given["advantages"]),
        completion_mask=given["completion_mask"],
        spec="bnpo",
        chunk_tokens=4,
        compact=False,
        backend="triton",
        **how,
    )
    return out.loss.detach(), out.logps, *torch.autograd.grad(out.loss, [hidden, weight])


def log_probabilities(
    given: dict[str, Tensor], logps: Callable[..., Any] = selective_logps
) -> tuple[Tensor, ...]:
    leaf = given["logits"].detach().requires_grad_()
    ids, mask = given["completion_ids"], given["completion_mask"]
    found = logps(leaf, ids, mask=mask, return_entropy=True, backend="triton")
    (grad,) = torch.autograd.grad(found[0].sum() - found[1].sum(), leaf)
    return *(x.detach() for x in found), grad


FORMS = {
    "logits": (from_logits, {}),
    "in place": (from_logits, {"inplace": True}),
    "hidden states": (from_hidden, {}),
    "log-probabilities": (log_probabilities, {}),
}


@pytest.mark.parametrize("form, how", FORMS.values(), ids=FORMS)
def test_a_graph_replays_with_new_inputs(
    form: Callable[..., tuple[Tensor, ...]], how: dict[str, Any], device: str
) -> None:
    """Forward and backward are captured once and replayed on other numbers. The host decided nothing."""
    given, other = inputs(device, 0), inputs(device, 1)
    found: dict[str, tuple[Tensor, ...]] = {}

    def call() -> None:
        out = form(given, **how)
        if "out" not in found:
            found["out"] = tuple(torch.empty_like(x) for x in out)
        for place, x in zip(found["out"], out, strict=True):
            place.copy_(x)

    replay = captured(call, device)
    for numbers in (other, inputs(device, 2)):
        for name, x in given.items():
            x.copy_(numbers[name])
        replay()
        # From logits the bits are the same; products of hidden states may be summed in another order.
        near = {"rtol": 0, "atol": 0} if form is not from_hidden else {"rtol": 2e-2, "atol": 1e-4}
        want = form(numbers, **how)
        torch.testing.assert_close(found["out"], want, equal_nan=False, **near)


@NEEDS_DYNAMO
@pytest.mark.parametrize(
    "form, function",
    [(from_logits, grpo_loss), (log_probabilities, selective_logps)],
    ids=["logits", "log-probabilities"],
)
def test_compiled_with_dynamic_shapes(
    form: Callable[..., tuple[Tensor, ...]], function: Callable[..., Any], device: str
) -> None:
    """On a GPU the default compiler runs the kernels. Three shapes need one graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    counts = []
    for seed, shape in enumerate([(2, 3, 37), (3, 5, 37), (4, 7, 41)]):
        given = inputs(device, seed, shape)
        want, got = form(given), form(given, compiled)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)  # a 16-bit rounding of a gradient
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1
