"""The linear form under autograd: second backwards, checkpoints, computed weights, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import local_and_not, random_case, run_linear
from parity import NEEDS_DYNAMO
from products import assert_same_products, lengths, magnitudes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_kernels import KL, LossOutput, LossSpec, linear_grpo_loss, linear_logps
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import relative_error


def assert_same_gradients(
    got: Sequence[Tensor | None], want: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], tokens: int
) -> None:
    """Compare gradients up to the order of their sums. `again` computes them once more."""
    with magnitudes():
        sizes = again()
    terms = lengths(tokens, vocab=128)
    for name, x, y, size in zip(terms, got, want, sizes, strict=False):
        assert x is not None
        assert_same_products(x, y, size, terms[name], name)


@local_and_not
class TestAutograd:
    def test_upstream_gradients_and_second_backwards(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, device=device)
        inputs = [case.hidden.requires_grad_(), case.weight.requires_grad_()]

        def run() -> Tensor:
            given = (*inputs, case.completion_ids, case.advantages)
            return linear_grpo_loss(*given, spec=spec, chunk_tokens=9, backend=backend).loss

        def again(factor: float = 1.0) -> tuple[Tensor, ...]:
            return torch.autograd.grad(factor * run(), inputs)

        loss, tokens = run(), case.completion_ids.numel()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        kept = [x.clone() for x in first]
        for x in first:
            x.fill_(torch.nan)  # the caller may overwrite them
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert_same_gradients(second, kept, again, tokens)
        scaled = torch.autograd.grad(loss * 1024, inputs, retain_graph=True)
        assert_same_gradients(scaled, [1024 * x for x in kept], lambda: again(1024.0), tokens)
        for x, y in zip(torch.autograd.grad(loss / 3, inputs), kept, strict=True):
            torch.testing.assert_close(x, y / 3)

    def test_double_backward_raises(self, spec: LossSpec) -> None:
        case = random_case(spec)
        hidden = case.hidden.requires_grad_()
        loss = linear_grpo_loss(hidden, case.weight, case.completion_ids, case.advantages, spec=spec).loss
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, spec: LossSpec, reentrant: bool) -> None:
        case = random_case(spec)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_grpo_loss(
                hidden, weight, case.completion_ids, case.advantages, spec=case.spec, chunk_tokens=9
            ).loss

        inputs = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
        want = torch.autograd.grad(loss(*inputs), inputs)
        checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
        found = [x.grad for x in inputs]
        assert_same_gradients(
            found, want, lambda: torch.autograd.grad(loss(*inputs), inputs), case.completion_ids.numel()
        )

    def test_inputs_stay_as_they_are(self, spec: LossSpec, backend: str, device: str) -> None:
        """Inputs are unchanged, non-contiguous ones too. The hidden states may be used after the loss."""
        case = random_case(spec, device=device)
        wide = torch.cat([case.hidden, case.hidden], 1).requires_grad_()
        weight = case.weight.t().contiguous().requires_grad_()  # [H, V]
        before = [x.detach().clone() for x in (wide, weight)]
        arguments = (case.completion_ids, case.advantages)
        loss = linear_grpo_loss(wide[:, 16:], weight.t(), *arguments, spec=spec, backend=backend).loss
        (loss + wide.square().sum()).backward()
        want = run_linear(case, backend=backend).grads
        assert wide.grad is not None and weight.grad is not None
        torch.testing.assert_close(
            wide.grad[:, 16:] - 2 * wide.detach()[:, 16:], want[0], atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(weight.grad.t(), want[1])
        assert all(torch.equal(x, y) for x, y in zip((wide, weight), before, strict=True))

    def test_lora(self, spec: LossSpec, backend: str, device: str) -> None:
        """The weight is computed as `W + s B A` with a frozen `W`."""
        case = random_case(spec, device=device)
        B, A = torch.randn(128, 3, device=device), torch.randn(3, 24, device=device)

        def grads(loss: Callable[..., Any]) -> tuple[Tensor, ...]:
            leaves = [x.clone().requires_grad_() for x in (B, A)]
            return torch.autograd.grad(loss(case.weight + 0.1 * leaves[0] @ leaves[1]), leaves)

        arguments = (case.completion_ids, case.advantages)
        got = grads(lambda w: linear_grpo_loss(case.hidden, w, *arguments, spec=spec, backend=backend).loss)
        want = grads(lambda w: reference_loss(case.hidden @ w.t(), *arguments, spec=spec).loss)
        for x, y in zip(got, want, strict=True):
            assert relative_error(x.flatten(), y.flatten()) < 1e-5

    def test_tied_embeddings(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, device=device)
        table = case.weight.clone().requires_grad_()

        def grad(loss: Callable[..., Tensor]) -> Tensor:
            hidden = torch.tanh(table[case.completion_ids.roll(1, -1)])
            return torch.autograd.grad(loss(hidden), table)[0]

        arguments = (case.completion_ids, case.advantages)
        got = grad(lambda h: linear_grpo_loss(h, table, *arguments, spec=spec, backend=backend).loss)
        want = grad(lambda h: reference_loss(h @ table.t(), *arguments, spec=spec).loss)
        assert relative_error(got.flatten(), want.flatten()) < 1e-5

    def test_only_the_bias_learns(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, device=device)
        bias = torch.randn(128, device=device, requires_grad=True)
        arguments = (case.completion_ids, case.advantages)
        out = linear_grpo_loss(
            case.hidden, case.weight, *arguments, lm_head_bias=bias, spec=spec, backend=backend
        )
        (got,) = torch.autograd.grad(out.loss, bias)
        want = reference_loss(case.hidden @ case.weight.t() + bias, *arguments, spec=spec).loss
        assert relative_error(got, torch.autograd.grad(want, bias)[0]) < 1e-5


@local_and_not
@NEEDS_DYNAMO
class TestCompile:
    """A step that contains the loss is one graph. It takes two passes, which round unlike one pass."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    @pytest.mark.long
    @pytest.mark.parametrize("options", [{}, {"compact": False}, {"skip_inactive": True}], ids=str)
    def test_loss(self, spec: LossSpec, options: dict[str, Any], backend: str) -> None:
        case = random_case(spec)
        inputs = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
        bias = torch.randn(case.weight.shape[0])
        full = replace(spec, kl=KL("exact"), entropy_coef=0.01)

        def step(hidden: Tensor, weight: Tensor) -> LossOutput:
            hidden = 2 * hidden
            return linear_grpo_loss(
                *(hidden, weight, case.completion_ids, case.advantages),
                spec=full,
                lm_head_bias=bias,
                ref_hidden=hidden.detach().roll(1, 0),
                ref_lm_head_weight=weight.detach(),
                backend=backend,
                **options,
            )

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=not options)
        want, got = step(*inputs), compiled(*inputs)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.metrics, want.metrics, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(out.loss, inputs) for out in (got, want)]
        for one, other in zip(*gradients, strict=True):
            assert relative_error(one.flatten(), other.flatten()) < 1e-5

    def test_logps(self, spec: LossSpec, backend: str) -> None:
        case = random_case(spec)
        hidden = case.hidden.requires_grad_()

        def total(hidden: Tensor) -> Tensor:
            options = {
                "mask": case.advantages.view(-1, 1) * torch.arange(16) > 0,
                "return_entropy": True,
                "backend": backend,
            }
            logps, entropy = linear_logps(2 * hidden, case.weight, case.completion_ids, **options)
            return (logps * case.advantages.view(-1, 1)).sum() + entropy.square().sum()

        compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
        want, got = (torch.autograd.grad(f(hidden), hidden) for f in (total, compiled))
        assert_same_gradients(
            got, want, lambda: torch.autograd.grad(total(hidden), hidden), case.completion_ids.numel()
        )


DTENSOR = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from grpo_kernels import linear_grpo_loss

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
weight, ids, advantages = torch.randn(11, 6), torch.randint(11, (2, 3)), torch.randn(2)
hidden = torch.randn(2, 2, 3, 6)  # each rank's own batch
grads = []
for batch in hidden:
    leaf = weight.clone().requires_grad_()
    linear_grpo_loss(batch, leaf, ids, advantages).loss.backward()
    grads.append(leaf.grad)
sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
linear_grpo_loss(hidden[rank], sharded, ids, advantages).loss.backward()
torch.testing.assert_close(sharded.grad.full_tensor(), torch.stack(grads).mean(0))
dist.destroy_process_group()
"""


@pytest.mark.long
def test_sharded_weights(tmp_path: Any) -> None:
    """A DTensor is gathered. Its shards get the mean of the ranks' gradients, as in FSDP2."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DTENSOR, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors.decode()
