"""`accumulate_into`: the backward adds the weight's gradient to a buffer, and autograd gets none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import LinearCase, linear_oracle, local_and_not, random_case
from parity import NEEDS_SPECS_IN_GRAPHS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grpo_kernels import LinearGRPOLoss, LossOutput, LossSpec, linear_grpo_loss, linear_logps
from grpo_kernels.linear import products

CHUNK = 9  # tokens: 8 chunks of 64 tokens
START = 3.0  # what a buffer holds before


def leaves(case: LinearCase) -> tuple[Tensor, Tensor]:
    return case.hidden.detach().clone().requires_grad_(), case.weight.detach().clone().requires_grad_()


def loss_of(case: LinearCase, hidden: Tensor, weight: Tensor, into: Tensor, **options: Any) -> LossOutput:
    return linear_grpo_loss(
        *(hidden, weight, case.completion_ids, case.advantages),
        spec=case.spec,
        **{"chunk_tokens": CHUNK, "accumulate_into": into, **case.options, **options},
    )


def started(case: LinearCase, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full_like(case.weight, START, dtype=dtype)


def assert_added(case: LinearCase, into: Tensor, factor: float = 1.0, *, sums: int = 8) -> None:
    """`into` has grown by `factor` times the gradient in fp64, up to the rounding of the terms and sums.

    A term is rounded a few times, and in 16-bit operands once more. Each of `sums` additions rounds to the
    dtype of the buffer a sum that is no larger than the start and the magnitudes of all terms.
    """
    want = linear_oracle(case)
    truth, terms = factor * want.truth[1], abs(factor) * want.terms[1]
    eps, operand = torch.finfo(into.dtype).eps, torch.finfo(case.hidden.dtype).eps
    allowed = (
        128 * torch.finfo(torch.float32).eps * terms + 2 * operand * terms + sums * eps * (START + terms)
    )
    error = (into.double() - START - truth).abs()
    assert bool((error <= allowed).all()), float((error / allowed).max())
    # The bound is far below the gradient itself, at least where the operands are wide.
    assert into.dtype != torch.float32 or float(allowed.max()) < 0.1 * float(truth.abs().max())


BUFFERS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float64),
]


@local_and_not
@pytest.mark.parametrize("dtype, buffer", BUFFERS, ids=lambda x: str(x)[6:])
def test_parity(spec: LossSpec, dtype: torch.dtype, buffer: torch.dtype, backend: str, device: str) -> None:
    """With a factor of 1024, as from a GradScaler, and a buffer that is not empty."""
    case = random_case(spec, dtype=dtype, device=device)
    hidden, weight = leaves(case)
    into = started(case, buffer)
    out = loss_of(case, hidden, weight, into, backend=backend)
    assert bool((into == START).all())  # the forward adds nothing
    (1024 * out.loss).backward()
    assert weight.grad is None
    assert_added(case, into, 1024.0)
    plain_hidden, plain_weight = leaves(case)
    plain = loss_of(case, plain_hidden, plain_weight, into=None, backend=backend)
    (1024 * plain.loss).backward()
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    near = {"rtol": 0, "atol": 4 * max(eps, 1e-6) * float(plain_hidden.grad.abs().max())}
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, **near)


@local_and_not
def test_a_block_at_a_time(spec: LossSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is wider than the buffer is added in blocks of rows, the last of which is shorter."""
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 24 * 50)
    case = random_case(spec)
    hidden, weight = leaves(case)
    into = started(case, torch.bfloat16)
    loss_of(case, hidden, weight, into).loss.backward()
    assert_added(case, into)


@local_and_not
@pytest.mark.parametrize("interleaved", [False, True])
def test_micro_batches(spec: LossSpec, interleaved: bool) -> None:
    """Uneven micro-batches with a common normalizer add up to one batch, in either order of their steps."""
    case = random_case(spec)
    hidden, weight = leaves(case)
    weight.grad = started(case)
    parts = [slice(0, 1), slice(1, 4)]

    def part(rows: slice) -> Tensor:
        few = case._replace(completion_ids=case.completion_ids[rows], advantages=case.advantages[rows])
        return loss_of(few, hidden[rows], weight, weight.grad, normalizer=64.0).loss

    if interleaved:
        for loss in [part(rows) for rows in parts]:
            loss.backward()
    else:
        for rows in parts:
            part(rows).backward()
    assert_added(case.with_options(normalizer=64.0), weight.grad, sums=9)


def test_every_backward_adds_once(device: str) -> None:
    case = random_case(device=device)
    hidden, weight = leaves(case)
    weight.grad = started(case)
    loss = loss_of(case, hidden, weight, weight.grad).loss
    loss.backward(retain_graph=True)
    assert_added(case, weight.grad)
    (3 * loss).backward()
    assert_added(case, weight.grad, 4.0, sums=16)


def test_other_uses_of_the_weight_go_through_autograd() -> None:
    """A tied embedding adds its gradient to the same `grad`."""
    case = random_case()
    hidden, weight = leaves(case)
    weight.grad = started(case)
    total = weight.grad
    loss = loss_of(case, hidden, weight, weight.grad).loss
    (loss + 2 * weight.sum()).backward()
    assert weight.grad is total
    assert_added(case, total - 2.0, sums=10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_adds_once(reentrant: bool) -> None:
    """A checkpoint runs the forward twice."""
    case = random_case()
    hidden, weight = leaves(case)
    into = started(case)
    checkpoint(
        lambda *head: loss_of(case, *head, into).loss, hidden, weight, use_reentrant=reentrant
    ).backward()
    assert weight.grad is None
    assert_added(case, into)


@local_and_not
def test_nothing_to_add(spec: LossSpec) -> None:
    """Without a backward, tokens, or a factor, the buffer keeps its bits, and its padding does always."""
    case = random_case(spec)
    hidden, weight = leaves(case)
    into = started(case)
    with torch.no_grad():
        assert loss_of(case, hidden, weight, into).loss.grad_fn is None
    loss_of(case, hidden, weight, into, completion_mask=torch.zeros(4, 16)).loss.backward()
    assert bool((into == START).all())
    into[100:] = torch.nan
    few = case._replace(completion_ids=case.completion_ids % 100)
    loss_of(few, hidden, weight, into, vocab_size=100).loss.backward()
    assert bool(into[100:].isnan().all()) and bool((into[:100] != START).any(1).all())


def test_frozen_hidden_states_and_a_bias() -> None:
    case = random_case()
    hidden, weight = leaves(case)
    bias, into = torch.zeros(128, requires_grad=True), started(case)
    out = loss_of(case, hidden.detach(), weight, into, lm_head_bias=bias)
    out.loss.backward()
    assert_added(case, into)
    terms = linear_oracle(case._replace(bias=torch.zeros(128)))
    torch.testing.assert_close(bias.grad.double(), terms.truth[2], rtol=0, atol=1e-5)


def test_autocast_adds_to_fp32() -> None:
    """The operands are bf16, the weight and its gradient fp32."""
    case = random_case()  # on a grid that bf16 holds
    hidden, weight = leaves(case)
    into = started(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(case, hidden, weight, into).loss
    loss.backward()
    assert_added(case, into)


def test_module_and_log_probabilities(backend: str, device: str) -> None:
    case = random_case(device=device)
    hidden, weight = leaves(case)
    into = started(case)
    module = LinearGRPOLoss(case.spec, accumulate_into=into, chunk_tokens=CHUNK)
    module(hidden, weight, case.completion_ids, case.advantages).loss.backward()
    assert_added(case, into)

    wanted = [x.clone() for x in leaves(case)]
    for name, total in (("plain", None), ("added", torch.zeros_like(case.weight))):
        hidden, weight = leaves(case)
        how = {"chunk_tokens": CHUNK, "backend": backend, "accumulate_into": total}
        logps, entropy = linear_logps(hidden, weight, case.completion_ids, return_entropy=True, **how)
        (logps.sum() - 0.1 * entropy.sum()).backward()
        if name == "plain":
            wanted = [hidden.grad, weight.grad]
    assert weight.grad is None and total is not None
    near = {"rtol": 0, "atol": 1e-5 * float(wanted[1].abs().max())}
    torch.testing.assert_close(total, wanted[1], **near)
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest storage that an operator returns, apart from `known` ones, in bytes."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@local_and_not
@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_the_weights_size_is_allocated(
    spec: LossSpec, buffer: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of logits, hidden states and blocks of a product are smaller than the weight."""
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 256 * 64)
    case = random_case(spec, shape=(4, 64), H=256, V=512)
    case = case._replace(hidden=case.hidden / 16)
    size = case.weight.numel() * 4
    assert 2 * 4 * max(64 * 256, CHUNK * 512, case.hidden.numel()) <= size

    def peak(into: Tensor | None) -> int:
        hidden, weight = leaves(case)
        with Largest(hidden, weight, *([] if into is None else [into])) as largest:
            loss_of(case, hidden, weight, into).loss.backward()
        return largest.bytes

    assert peak(started(case, buffer)) <= size // 2
    assert peak(None) == size  # without a buffer, the gradient is held


@NEEDS_SPECS_IN_GRAPHS
@local_and_not
def test_compiled(spec: LossSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph breaks at the pass, and the backward still adds once."""
    torch._dynamo.reset()
    case = random_case(spec)
    compiled: Callable[..., LossOutput] = torch.compile(linear_grpo_loss, backend="aot_eager")
    hidden, weight = leaves(case)
    into = started(case)
    for count in (1, 2):
        out = compiled(
            *(hidden, weight, case.completion_ids, case.advantages),
            spec=spec,
            chunk_tokens=CHUNK,
            accumulate_into=into,
        )
        out.loss.backward()
        assert weight.grad is None
        assert_added(case, into, count, sums=8 * count)


def test_without_data() -> None:
    """Meta tensors give shapes, and a buffer on "meta" is accepted."""
    case = random_case()
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in (case.hidden, case.weight))
    ids, advantages = case.completion_ids.to("meta"), case.advantages.to("meta")
    into = torch.empty(weight.shape, device="meta")
    linear_grpo_loss(hidden, weight, ids, advantages, accumulate_into=into).loss.backward()
    assert weight.grad is None and hidden.grad.shape == hidden.shape


REFUSED = {
    "shape": (torch.zeros(128, 23), r"accumulate_into must be \[V, H\] = \(128, 24\).*got \(128, 23\)"),
    "transposed": (torch.zeros(24, 128), r"accumulate_into must be \[V, H\] = \(128, 24\)"),
    "dtype": (torch.zeros(128, 24).double(), "torch.bfloat16 or torch.float32 for.*got torch.float64"),
    "fp16 for fp32": (
        torch.zeros(128, 24).half(),
        "for a lm_head_weight of torch.float32, got torch.float16",
    ),
    "device": (torch.zeros(128, 24, device="meta"), "accumulate_into is on meta, hidden on cpu"),
    "a parameter": (torch.zeros(128, 24, requires_grad=True), "accumulate_into requires a gradient"),
}


@pytest.mark.parametrize("into, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("function", ["loss", "logps"])
def test_refused(function: str, into: Tensor, message: str) -> None:
    case = random_case()
    hidden, weight = leaves(case)
    with pytest.raises(ValueError, match=message):
        if function == "loss":
            loss_of(case, hidden, weight, into)
        else:
            linear_logps(hidden, weight, case.completion_ids, accumulate_into=into)


def test_refused_weights_and_types() -> None:
    case = random_case(dtype=torch.float64)
    hidden, weight = leaves(case)
    with pytest.raises(ValueError, match=r"must be torch\.float64 for.*got torch\.float32"):
        loss_of(case, hidden, weight, torch.zeros(128, 24))
    with pytest.raises(ValueError, match="lm_head_weight requires no gradient"):
        loss_of(case, hidden, weight.detach(), started(case, torch.float64))
    with pytest.raises(TypeError, match="accumulate_into must be a tensor, got bool"):
        loss_of(case, hidden, weight, True)


@pytest.mark.parametrize("case", ["the weight itself", "shared entries"])
def test_a_buffer_that_cannot_be_added_to(case: str) -> None:
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    buffer = weight.data if case == "the weight itself" else torch.zeros(1, 4).expand(5, 4)
    with pytest.raises(ValueError, match="accumulate_into has"):
        linear_grpo_loss(
            hidden, weight, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1), accumulate_into=buffer
        )
