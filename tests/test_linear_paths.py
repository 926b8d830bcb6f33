"""How the linear form works: its operations, chunks and precision, and how it stands to autograd."""

from __future__ import annotations

import importlib
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import LinearCase, assert_gradients, from_logits, linear_oracle, run_linear
from parity import NEEDS_DYNAMO, every_branch, user_loss
from products import assert_same_products, lengths, magnitudes, on_a_grid
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import KL, LossOutput, LossSpec, PPOClip, heads, linear, linear_grpo_loss, linear_logps
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import relative_error

PPO = LossSpec(PPOClip())
LOCAL_AND_NOT = {"token-local": PPO, "callable": LossSpec(user_loss)}
local_and_not = pytest.mark.parametrize("spec", LOCAL_AND_NOT.values(), ids=LOCAL_AND_NOT)


def random_case(
    spec: LossSpec = PPO,
    *,
    shape: tuple[int, int] = (4, 16),
    H: int = 24,
    V: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> LinearCase:
    """Nothing masked, every token with an advantage; the products are exact."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return on_a_grid(torch.randn(*size, generator=generator)).to(device, dtype)

    ids = torch.randint(V, shape, generator=generator).to(device)
    advantages = torch.linspace(-1.0, 1.5, shape[0], device=device)
    return LinearCase(
        spec, normal(*shape, H), normal(V, H) / 2 ** (math.log2(H) // 2), None, ids, advantages, {}
    )


class TestOperations:
    """In units of T V H, T the number of tokens."""

    def units(self, case: LinearCase, frozen: str = "", **options: Any) -> float:
        hidden, weight = (
            x.clone().requires_grad_(name != frozen)
            for name, x in (("hidden", case.hidden), ("weight", case.weight))
        )
        tokens, (V, H) = case.completion_ids.numel(), weight.shape
        with FlopCounterMode(display=False) as counter:
            out = linear_grpo_loss(
                *(hidden, weight, case.completion_ids, case.advantages),
                spec=case.spec,
                chunk_tokens=7,
                **{**case.options, **options},
            )
            if out.loss.requires_grad:
                out.loss.backward()
        return counter.get_total_flops() / (tokens * V * H)

    def test_one_pass(self) -> None:
        assert self.units(random_case()) == 6
        assert self.units(random_case(), "weight") == 4
        assert self.units(random_case(), "hidden") == 4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_two_passes(self, dtype: torch.dtype) -> None:
        """For callables; in fp16, whose gradients wait for a GradScaler; in fp64, which is for gradcheck."""
        for case in (random_case(LOCAL_AND_NOT["callable"]), random_case(dtype=dtype)):
            assert self.units(case) == 8
            assert self.units(case, "weight") == 6

    @local_and_not
    def test_without_gradient(self, spec: LossSpec) -> None:
        with torch.no_grad():
            assert self.units(random_case(spec)) == 2

    @local_and_not
    def test_reference(self, spec: LossSpec) -> None:
        """Its logits are made once, and once more only where the exact KL has a gradient in the backward."""
        case = random_case(spec)
        options = {"ref_hidden": case.hidden, "ref_lm_head_weight": case.weight}
        assert self.units(case, **options) == self.units(case) + 2
        exact = LossSpec(spec.surrogate, KL("exact"))
        extra = 2 if spec.uses_callable else 0
        assert self.units(case._replace(spec=exact), **options) == self.units(case) + 2 + extra

    @local_and_not
    def test_masked_tokens_cost_nothing(self, spec: LossSpec) -> None:
        case = random_case(spec)
        mask = torch.arange(64).view(4, 16) % 4 == 0
        assert self.units(case, completion_mask=mask) == self.units(case) / 4
        assert self.units(case, completion_mask=mask, compact=False) == self.units(case)

    def test_tokens_without_gradient_run_forward_only(self) -> None:
        case = random_case()
        case.advantages[:2] = 0
        assert self.units(case) == (6 + 2) / 2
        assert self.units(case, skip_inactive=True) == 6 / 2
        assert self.units(case, compact=False) == 6
        weights = torch.ones(4, 16)
        weights[2] = 0
        assert self.units(case, token_weights=weights) == (1 * 6 + 3 * 2) / 4
        # A KL term and an entropy bonus give every token a gradient.
        assert self.units(case._replace(spec=LossSpec(PPOClip(), entropy_coef=0.1))) == 6
        assert (
            self.units(case._replace(spec=LossSpec(PPOClip(), KL("k3"))), ref_logps=torch.zeros(4, 16)) == 6
        )

    def test_two_passes_leave_out_what_turned_out_flat(self) -> None:
        """The backward knows every derivative, and so of clipped tokens as well."""
        case = random_case(dtype=torch.float64)
        case.advantages[:] = 1
        old_logps = torch.full((4, 16), -100.0, dtype=torch.float64)
        assert self.units(case, old_logps=old_logps) == 2

    def test_logps(self) -> None:
        case = random_case()
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            logps = linear_logps(hidden, weight, case.completion_ids)
            logps[:2].sum().backward()
        assert counter.get_total_flops() == (2 + 6 / 2) * case.hidden.numel() * weight.shape[0]


class TestChunks:
    def test_the_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        # Even chunks, the longest a power of two.
        assert linear.choose_chunk_tokens(2048, 4 * 32000, cpu) == 512
        assert linear.choose_chunk_tokens(600, 4 * 32000, cpu) == 300
        assert linear.choose_chunk_tokens(10, 4 * 32000, cpu) == 10
        assert linear.choose_chunk_tokens(5, 1 << 40, cpu) == 1
        monkeypatch.setattr(linear, "free_memory", lambda device: 80 << 30)
        assert linear.choose_chunk_tokens(16384, 6 * 151936, gpu) == 8192
        assert linear.choose_chunk_tokens(9000, 6 * 151936, gpu) == 4608
        monkeypatch.setattr(linear, "free_memory", lambda device: 4 << 30)
        assert linear.choose_chunk_tokens(16384, 6 * 151936, gpu) == 1024
        monkeypatch.setattr(linear, "free_memory", lambda device: 0)
        assert linear.choose_chunk_tokens(16384, 6 * 151936, gpu) == 128

    def test_it_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        case = random_case()
        case.advantages[0] = 0
        with caplog.at_level(logging.DEBUG, "grpo_kernels"):
            run_linear(case, chunk_tokens=24)
        assert "64 of 64 tokens run, 48 with a gradient, in chunks of 24" in caplog.text

    @local_and_not
    def test_logits_are_never_held(self, spec: LossSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not for the backward either."""
        case = random_case(spec, shape=(4, 64), V=512)
        largest = 0

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    largest = max(largest, out.untyped_storage().nbytes())
                return out

        with Sizes():
            run_linear(case, chunk_tokens=16)
        assert largest == 4 * max(case.weight.numel(), case.hidden.numel(), 16 * 512)

    def test_no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With compact=False nothing reads a value. On "meta" there is none, so reading one would fail."""
        monkeypatch.setattr("grpo_kernels.backend.has_data", lambda x: True)
        case = random_case(LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1))

        def meta(x: Tensor) -> Tensor:
            return x.to("meta")

        for spec in (case.spec, LOCAL_AND_NOT["callable"]):
            arguments = [meta(x).requires_grad_() for x in (case.hidden, case.weight)]
            options: dict[str, Any] = {
                "spec": spec,
                "completion_mask": meta(torch.ones(4, 16)),
                "ref_hidden": meta(case.hidden),
                "ref_lm_head_weight": meta(case.weight),
            }
            arguments += [meta(case.completion_ids), meta(case.advantages)]
            linear_grpo_loss(*arguments, **options, compact=False).loss.backward()
            assert arguments[1].grad is not None
            with pytest.raises((RuntimeError, NotImplementedError)):
                linear_grpo_loss(*arguments, **options)  # counts rows


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, 16-bit factors stay what they are; on a CPU each product then widens its own."""
    monkeypatch.setattr(heads, "multiplies_mixed", lambda device: True)


class TestPrecision:
    def test_the_weights_gradient_is_rounded_once(self) -> None:
        """A hundred chunks of bf16 factors leave the error of one rounding."""
        case = random_case(dtype=torch.bfloat16, shape=(4, 50))
        truth = run_linear(case.to(torch.float64)).grads[1]
        got = run_linear(case, chunk_tokens=2).grads[1]
        rounded = relative_error(truth.bfloat16(), truth)
        assert float((relative_error(got, truth) / rounded).mean()) < 1.5

    @pytest.mark.parametrize(
        "spec", [PPO, LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1), LossSpec(user_loss)]
    )
    def test_mixed_products(self, spec: LossSpec, backend: str, device: str, mixed: None) -> None:
        """The gradient of the logits is then held in bf16 as well."""
        case = from_logits(every_branch(spec, 1025, torch.bfloat16, device=device))
        expected = linear_oracle(case)
        for compact in (True, False):
            got = run_linear(case, chunk_tokens=5, compact=compact, backend=backend)
            exact = expected.by_logits.truth.out.logps
            torch.testing.assert_close(got.out.logps.double(), exact, rtol=0, atol=1e-5)
            assert_gradients(
                got.grads, expected.eager, expected.truth, expected.terms, expected.lengths, f"{compact = }"
            )

    def test_accuracy_tables(self, mixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of docs/kernels.md, on fewer tokens."""
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "figures")
        tables = importlib.import_module("linear_accuracy")
        logps = tables.logp_errors(N=64)
        for ours, eager in zip(logps["linear_logps"], logps["eager, bf16 throughout"], strict=True):
            assert 50 * ours < eager
        weights = tables.weight_gradient_errors(tokens=2, H=64, V=1000)
        whole, rows = weights["linear_grpo_loss, 64 chunks"]
        best = weights["fp64, rounded to bf16"]
        summed = weights["64 chunks, summed in bf16"]
        assert whole < 1.5 * best[0] and rows < 2 * best[1]
        assert whole < summed[0] / 1.5 and rows < summed[1] / 1.5

    @local_and_not
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(
        self, dtype: torch.dtype, spec: LossSpec, backend: str, device: str, mixed: None
    ) -> None:
        """fp32 parameters, 16-bit factors, as in autocast's linear layer; gradients in fp32."""
        case = random_case(spec, device=device)
        with torch.autocast(device, dtype):
            got = run_linear(case, backend=backend)
        want = run_linear(case.to(dtype), backend=backend)
        assert all(x.dtype == torch.float32 for x in got.grads)
        assert torch.equal(got.out.logps, want.out.logps)
        for x, y in zip(got.grads, want.grads, strict=True):
            assert relative_error(x.flatten(), y.flatten()) < torch.finfo(dtype).eps

    @local_and_not
    def test_a_scaler_saves_fp16(self, spec: LossSpec, backend: str, device: str) -> None:
        """Gradients far below the smallest fp16 number arrive scaled."""
        case = random_case(spec, dtype=torch.float16, device=device).with_options(normalizer=2.0**20)
        got = run_linear(case, upstream=2.0**18, backend=backend)
        wide = run_linear(case.to(torch.float64), upstream=2.0**18, backend=backend)
        for x, y in zip(got.grads, wide.grads, strict=True):
            assert relative_error(x.flatten(), y.flatten()) < 2e-3


def assert_same_gradients(
    got: Sequence[Tensor | None], want: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], tokens: int
) -> None:
    """Of hidden states and weight, to the order of their sums. `again` computes them once more."""
    with magnitudes():
        sizes = again()
    terms = lengths(tokens, vocab=128)
    for name, x, y, size in zip(terms, got, want, sizes, strict=False):
        assert x is not None
        assert_same_products(x, y, size, terms[name], name)


@local_and_not
class TestAutograd:
    def test_upstream_factors_and_second_backwards(self, spec: LossSpec, backend: str, device: str) -> None:
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
            x.fill_(torch.nan)  # it is the caller's now
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
        """Non-contiguous ones too; and the hidden states may be used after the loss."""
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
        """A weight that is computed, `W + s B A`, with `W` frozen."""
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
    """A step that holds the loss is one graph. It takes two passes, which round otherwise than one."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Not here: Dynamo cannot look into an allocation that fills what it allocates."""
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
    """A DTensor is gathered, and its shards get the mean over the ranks, whose batches differ: FSDP2's."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DTENSOR, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors.decode()
