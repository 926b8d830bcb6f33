"""The losses under autograd: factors, second backwards, gradients in place, checkpoints, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from parity import NEEDS_DYNAMO, Case, Result, every_branch, run, user_loss
from products import assert_same_products, on_a_grid
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    KL,
    GRPOLoss,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    log_ratio_loss,
    selective_logps,
)
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import make_batch, relative_error

EVERYTHING = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1)
IN_PLACE = "modified by an inplace operation"

both_paths = pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def small(
    device: str, spec: LossSpec = EVERYTHING, dtype: torch.dtype = torch.float32, V: int = 37, **how: Any
) -> Case:
    return every_branch(spec, V, dtype, device=device, **how)


def loss_of(logits: Tensor, case: Case, **options: Any) -> Tensor:
    out = grpo_loss(logits, case.completion_ids, case.advantages, spec=case.spec, **case.options, **options)
    return out.loss


def head(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states `[B, T, 5]` and a weight `[37, 5]`: a linear layer that makes logits for the case.

    Exact ones (products.py), in bf16 too.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (*case.completion_ids.shape, 5), (37, 5)
    hidden, weight = (on_a_grid(torch.randn(shape, generator=generator)) for shape in shapes)
    return hidden.to(case.logits.device), weight.to(case.logits.device)


def assert_same_weight_gradients(
    got: Tensor, want: Tensor, case: Case, hidden: Tensor, weight: Tensor, **options: Any
) -> None:
    """`weight`'s gradients under a linear layer, to the order in which the layer sums over the tokens."""
    logits = (hidden @ weight.t()).requires_grad_()
    (dlogits,) = torch.autograd.grad(loss_of(logits, case, **options), logits)
    rows, dlogits = hidden.abs().flatten(0, -2), dlogits.abs().flatten(0, -2).to(hidden.dtype)
    assert_same_products(got, want, dlogits.t() @ rows, len(rows), "gradient of the weight")


def scaled(factor: float) -> Callable[..., LossOutput]:
    """`grpo_loss` whose loss is then multiplied."""

    def loss(*args: Any, **options: Any) -> LossOutput:
        out = grpo_loss(*args, **options)
        return out._replace(loss=factor * out.loss)

    return loss


class TestUpstreamFactor:
    @both_paths
    @half_and_single
    @pytest.mark.parametrize("factor", [1024.0, 1 / 3, -2.0, 0.0])
    def test_scales_the_gradient(
        self, device: str, backend: str, inplace: bool, dtype: torch.dtype, factor: float
    ) -> None:
        case = small(device, dtype=dtype)
        once = run(grpo_loss, case, backend=backend, inplace=inplace).grad
        many = run(scaled(factor), case, backend=backend, inplace=inplace).grad
        assert once.any()
        if factor != 1 / 3:
            assert torch.equal(many, factor * once)
            return
        # Not a power of two: in place a rounding more to the dtype, in two steps one in each term of a sum.
        torch.testing.assert_close(
            many, factor * once, rtol=torch.finfo(dtype).eps, atol=1e-7 * float(once.abs().max())
        )

    def test_fp16_does_not_underflow_before_the_gradient_scaler(self, device: str, backend: str) -> None:
        """A mean over 10^6 tokens makes gradients below its smallest number, 6e-8; 65536 is to save them."""
        case = small(device, dtype=torch.float16).with_options(normalizer=1e6)
        got = run(scaled(65536.0), case, backend=backend, inplace=True).grad.double() / 65536
        want = run(reference_loss, case.wide()).grad
        assert want.abs().max() < 1e-5
        # The smallest elements are subnormal even so.
        assert float(relative_error(got, want).max()) < 4 * torch.finfo(torch.float16).eps


class TestBackward:
    def test_twice(self, device: str, backend: str) -> None:
        case = small(device)
        loss = loss_of(case.logits.requires_grad_(), case, backend=backend)
        first, second = (torch.autograd.grad(loss, case.logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.any()

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
    )
    def test_twice_in_place_raises(self, device: str, backend: str, dtype: torch.dtype) -> None:
        """The first has handed the buffer out; fp16 takes the path that fills it in the backward."""
        case = small(device, dtype=dtype)
        loss = loss_of(case.logits.requires_grad_().clone(), case, backend=backend, inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()

    @both_paths
    def test_double_raises(self, device: str, backend: str, inplace: bool) -> None:
        """Also where another term of the loss would let it pass in silence."""
        case = small(device)
        leaf = case.logits.requires_grad_()
        loss = loss_of(leaf.clone(), case, backend=backend, inplace=inplace)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"once_differentiable|differentiable once|differentiated twice"
        ):
            (leaf.nan_to_num().square().sum() + grad.square().sum()).backward()

    def test_outputs_but_the_loss_are_constants(self, device: str, backend: str) -> None:
        case = small(device)
        leaf = case.logits.requires_grad_()
        out = grpo_loss(
            leaf, case.completion_ids, case.advantages, spec=case.spec, backend=backend, **case.options
        )
        constants = [out.logps, out.ref_logps, out.entropy, *out.metrics.values()]
        assert out.loss.requires_grad and not any(x.requires_grad for x in constants)

    @both_paths
    def test_backward_of_two_losses(self, device: str, backend: str, inplace: bool) -> None:
        """Of two batches, added before one backward."""
        cases = [small(device), small(device, LossSpec(Reinforce()), V=41)]
        want = [run(grpo_loss, case, backend=backend).grad for case in cases]
        leaves = [case.logits.requires_grad_() for case in cases]
        losses = [
            loss_of(x.clone(), c, backend=backend, inplace=inplace)
            for x, c in zip(leaves, cases, strict=True)
        ]
        sum(losses).backward()
        for leaf, grad in zip(leaves, want, strict=True):
            torch.testing.assert_close(leaf.grad, grad)


class TestOtherUsesOfTheLogits:
    def test_a_second_use_after_the_loss(self, device: str, backend: str) -> None:
        case = small(device, LossSpec(Reinforce()))
        want = run(grpo_loss, case, backend=backend).grad
        leaf = case.logits.nan_to_num().requires_grad_()
        logits = leaf.clone()
        (loss_of(logits, case, backend=backend) + logits.square().sum()).backward()
        torch.testing.assert_close(leaf.grad, want + 2 * leaf.detach())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    @pytest.mark.parametrize("upstream", [torch.tanh, torch.exp, torch.sigmoid])
    def test_in_place_over_what_upstream_has_saved_raises(
        self, device: str, backend: str, upstream: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        case = small(device, dtype=dtype)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss_of(upstream(case.logits.requires_grad_()), case, backend=backend, inplace=True).backward()

    def test_in_place_over_what_another_term_has_saved_raises(self, device: str, backend: str) -> None:
        case = small(device)
        logits = case.logits.requires_grad_().clone()
        other = logits.square().sum()
        loss = loss_of(logits, case, backend=backend, inplace=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            (loss + other).backward()

    def test_in_place_behind_a_linear_layer(self, device: str, backend: str) -> None:
        """Which has not saved its output: the use that `inplace` is for."""
        case = small(device)
        hidden, start = head(case)
        grads = []
        for inplace in (False, True):
            weight = start.clone().requires_grad_()
            loss_of(hidden @ weight.t(), case, backend=backend, inplace=inplace).backward()
            grads.append(weight.grad)
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_in_place_over_a_leaf_raises(self, device: str, backend: str, dtype: torch.dtype) -> None:
        """As PyTorch's own in-place operations: else the leaf and its gradient would be one memory."""
        case = small(device, dtype=dtype)
        with pytest.raises(RuntimeError, match=r"inplace.*leaf"):
            loss_of(case.logits.requires_grad_(), case, backend=backend, inplace=True)


class TestInPlace:
    CALLABLE = LossSpec(user_loss, KL("k2"))

    @pytest.mark.parametrize(
        "spec", [LossSpec(LogRatio()), EVERYTHING, CALLABLE], ids=["LogRatio", "everything", "callable"]
    )
    @pytest.mark.parametrize(
        "dtype",
        [torch.float16, torch.bfloat16, torch.float32, torch.float64],
        ids=["fp16", "bf16", "fp32", "fp64"],
    )
    def test_equals_two_steps(self, device: str, backend: str, spec: LossSpec, dtype: torch.dtype) -> None:
        """In one pass where loss and dtype permit, else in two; the logits become the gradient either way."""
        case = small(device, spec, dtype)
        want = run(grpo_loss, case, backend=backend)
        leaf = case.logits.requires_grad_()
        logits = leaf.clone()
        loss = loss_of(logits, case, backend=backend, inplace=True)
        one_pass = dtype in (torch.bfloat16, torch.float32) and spec is not self.CALLABLE
        active = case.options["completion_mask"]
        assert torch.equal(logits[active], leaf[active]) != one_pass
        loss.backward()
        assert torch.equal(logits, leaf.grad)
        torch.testing.assert_close(loss.detach(), want.out.loss.detach())
        # A rounding to the gradient's dtype; in fp32 the two sum in different orders where terms cancel.
        torch.testing.assert_close(leaf.grad, want.grad, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-8)

    def test_overwrites_the_view_it_was_given_only(self, device: str, backend: str) -> None:
        case = small(device, LossSpec(Reinforce()))
        wide = torch.cat([case.logits, torch.full_like(case.logits[:, :2], 7.0)], 1).requires_grad_()
        logits = wide.clone()
        loss_of(logits[:, :3], case, backend=backend, inplace=True).backward()
        assert torch.equal(logits[:, :3], wide.grad[:, :3]) and wide.grad[:, :3].any()
        assert (logits[:, 3:] == 7).all() and not wide.grad[:, 3:].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_expanded_logits_raise(self, device: str, backend: str, dtype: torch.dtype) -> None:
        case = small(device, dtype=dtype)
        one = case.logits[:1].requires_grad_().clone()
        with pytest.raises(ValueError, match=r"inplace=True needs rows of their own.*\(0, 37, 1\)"):
            loss_of(one.expand(4, 3, 37), case, backend=backend, inplace=True)
        loss_of(one.expand(4, 3, 37), case, backend=backend).backward()


class TestNoGradient:
    @staticmethod
    def saved(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        tensors: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            tensors.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return call(), tensors

    @both_paths
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_saves_nothing(self, device: str, backend: str, inplace: bool, mode: Callable[[], Any]) -> None:
        case = small(device)
        want = run(grpo_loss, case, backend=backend).out.loss.item()
        leaf = case.logits.requires_grad_()
        before = leaf.detach().clone()
        with mode():
            loss, saved = self.saved(lambda: loss_of(leaf, case, backend=backend, inplace=inplace))
        assert loss.item() == want and not loss.requires_grad
        assert not saved
        assert torch.equal(before.nan_to_num(), leaf.nan_to_num())

    def test_logits_without_gradient(self, device: str, backend: str) -> None:
        case = small(device)
        loss, saved = self.saved(lambda: loss_of(case.logits, case, backend=backend, inplace=True))
        assert not loss.requires_grad and not saved

    @both_paths
    def test_what_the_backward_needs_is_saved_by_reference(
        self, device: str, backend: str, inplace: bool
    ) -> None:
        case = small(device)
        logits = case.logits.requires_grad_().clone()
        _, saved = self.saved(lambda: loss_of(logits, case, backend=backend, inplace=inplace))
        large = {x.data_ptr() for x in saved if x.numel() >= logits.numel()}
        reference = case.options["ref_logits"].data_ptr()
        assert large == ({logits.data_ptr()} if inplace else {logits.data_ptr(), reference})


@both_paths
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device: str, backend: str, reentrant: bool, inplace: bool) -> None:
    case = small(device)
    hidden, start = head(case)

    def loss(weight: Tensor) -> Tensor:
        return loss_of(hidden @ weight.t(), case, backend=backend, inplace=inplace)

    grads = []
    for call in (loss, lambda weight: checkpoint(loss, weight, use_reentrant=reentrant)):
        weight = start.clone().requires_grad_()
        call(weight).backward()
        grads.append(weight.grad)
    assert_same_weight_gradients(*grads, case, hidden, start, backend=backend)


@both_paths
def test_autocast(device: str, backend: str, inplace: bool) -> None:
    """The layer gives bf16 logits; inside the loss nothing is cast."""
    case = small(device)
    hidden, weight = head(case)
    results = []
    for enabled in (True, False):
        leaf = weight.clone().requires_grad_()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled):
            x, w = (hidden, leaf) if enabled else (hidden.bfloat16(), leaf.bfloat16())
            logits = torch.nn.functional.linear(x, w)
            assert logits.dtype == torch.bfloat16
            loss = loss_of(logits, case, backend=backend, inplace=inplace)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append((loss.detach(), leaf.grad.bfloat16()))  # as which both were computed
    assert torch.equal(results[0][0], results[1][0])
    grads = [grad for _, grad in results]
    assert_same_weight_gradients(*grads, case, hidden.bfloat16(), weight.bfloat16(), backend=backend)


@both_paths
def test_accumulation_over_uneven_micro_batches(device: str, backend: str, inplace: bool) -> None:
    """Into one parameter's `.grad`, under a normalizer for them all."""
    case = small(device, LossSpec(PPOClip(), KL("k3"), entropy_coef=0.1))
    case = case.with_options(normalizer=case.options["completion_mask"].sum())
    hidden, start = head(case)

    def gradient(*parts: slice) -> Tensor:
        weight = start.clone().requires_grad_()
        for rows in parts:
            options = {name: x[rows] if x.dim() else x for name, x in case.options.items()}
            part = Case(case.spec, hidden[rows], case.completion_ids[rows], case.advantages[rows], options)
            loss_of(part.logits @ weight.t(), part, backend=backend, inplace=inplace).backward()
        return weight.grad

    torch.testing.assert_close(gradient(slice(0, 1), slice(1, 4)), gradient(slice(0, 4)))


@NEEDS_DYNAMO
class TestCompile:
    """One graph without a break, forward and backward, and equal bits; of Triton's kernels but for roundings
    of the loss itself, which a graph states in PyTorch and eager code in one launch.
    """

    ROUNDINGS: ClassVar = {"torch": {"rtol": 0, "atol": 0}, "triton": {"rtol": 1e-6, "atol": 1e-8}}

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Not here: Dynamo cannot look into an allocation that fills what it allocates."""
        torch._dynamo.reset()

    def assert_equal_to_eager(self, case: Case, **options: Any) -> None:
        eager = run(grpo_loss, case, **options)
        compiled = run(torch.compile(grpo_loss, fullgraph=True, backend="aot_eager"), case, **options)
        near = self.ROUNDINGS[options["backend"]]
        torch.testing.assert_close(compiled.grad, eager.grad, **near)
        torch.testing.assert_close(tuple(compiled.out), tuple(eager.out), **near)

    @pytest.mark.parametrize(
        "spec, how",
        [
            (LossSpec.preset("grpo"), {"ref": None}),
            (LossSpec.preset("log_ratio"), {}),
            (LossSpec.preset("importance_ratio"), {"ref": "logps"}),
            (LossSpec.preset("dr_grpo", max_tokens=3, kl=KL("k3")), {"packed": True, "ref": "logps"}),
            (LossSpec.preset("grpo", kl=KL("k1")), {"packed": True}),
            (LossSpec.preset("gspo", kl=KL("k3", ratio_corrected=True)), {"packed": True}),
            (LossSpec.preset("gmpo"), {"ref": None}),
            (LossSpec.preset("vespo"), {"packed": True, "ref": None}),
            (EVERYTHING, {}),
            (LossSpec(PPOClip(), KL("exact")), {}),
            (LossSpec(Reinforce(), KL("exact_forward")), {"packed": True}),
            (LossSpec(Reinforce(), entropy_coef=0.1), {"ref": None}),
            (LossSpec(user_loss), {"ref": None}),
        ],
        ids=[
            "grpo",
            "log_ratio",
            "ratio",
            "dr_grpo",
            "packed",
            "gspo",
            "gmpo",
            "vespo",
            "everything",
            "exact KL",
            "forward KL",
            "entropy",
            "callable",
        ],
    )
    def test_losses(self, device: str, spec: LossSpec, how: dict[str, Any]) -> None:
        self.assert_equal_to_eager(small(device, spec, **how), backend="torch")

    def test_kernels(self, device: str, backend: str) -> None:
        self.assert_equal_to_eager(small(device), backend=backend, return_entropy=True)

    def test_options_per_token(self, device: str) -> None:
        tokens = torch.linspace(0.5, 1.5, 12, device=device).view(4, 3)
        case = small(device).with_options(
            token_weights=tokens, temperature=tokens, logit_softcap=5.0, vocab_size=36
        )
        case.completion_ids.clamp_(max=35)
        self.assert_equal_to_eager(case, backend="torch")

    def test_in_place_takes_two_steps(self, device: str, backend: str) -> None:
        case = small(device)
        eager = run(grpo_loss, case, backend=backend)
        compiled = run(
            torch.compile(grpo_loss, fullgraph=True, backend="aot_eager"), case, backend=backend, inplace=True
        )
        torch.testing.assert_close(compiled.grad, eager.grad, **self.ROUNDINGS[backend])

    def test_dynamic_shapes_compile_once(self, device: str) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(grpo_loss, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for shape in ((2, 3, 37), (3, 5, 37), (4, 7, 41)):
            batch = make_batch(*shape, device=device)
            options = {name: getattr(batch, name) for name in ("completion_mask", "old_logps", "ref_logits")}
            case = Case(LossSpec(PPOClip(), KL("exact")), *batch[:3], options)
            eager, got = (run(loss, case, backend="torch") for loss in (grpo_loss, compiled))
            torch.testing.assert_close(got.grad, eager.grad, rtol=0, atol=0)
            torch.testing.assert_close(tuple(got.out), tuple(eager.out), rtol=0, atol=0)
            counts.append(counter.frame_count)
        assert counts[0] > 0 and len(set(counts)) == 1

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_selective_logps(self, device: str, dynamic: bool) -> None:
        batch = make_batch(2, 3, 37, device=device)
        compiled = torch.compile(selective_logps, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        results = []
        for call in (selective_logps, compiled):
            leaf = batch.logits.clone().requires_grad_()
            logps, entropy = call(leaf, batch.completion_ids, return_entropy=True, backend="torch")
            (logps - 0.1 * entropy).sum().backward()
            results.append((logps.detach(), entropy.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)


class TestOtherFaces:
    """The functions and modules that are `grpo_loss` by another name."""

    @staticmethod
    def assert_same(got: Result, want: Result) -> None:
        torch.testing.assert_close(tuple(got.out), tuple(want.out), rtol=0, atol=0)
        assert torch.equal(got.grad, want.grad)

    def test_module(self, device: str, backend: str) -> None:
        case = small(device)
        want = run(grpo_loss, case.with_options(temperature=0.7), backend=backend)

        def call(module: GRPOLoss, **more: Any) -> Result:
            return run(lambda *args, spec, **options: module(*args, **options, **more), case)

        self.assert_same(call(GRPOLoss(case.spec, temperature=0.7, backend=backend)), want)
        # What the call says wins over what the module was given.
        self.assert_same(call(GRPOLoss(case.spec, temperature=2.0), temperature=0.7, backend=backend), want)
        self.assert_same(call(GRPOLoss("dapo"), spec=case.spec, temperature=0.7, backend=backend), want)

    def test_module_has_no_state_and_says_what_it_is(self) -> None:
        module = GRPOLoss("dapo", temperature=0.7)
        assert not list(module.parameters()) and not module.state_dict()
        assert "eps_high=0.28" in repr(module) and "temperature=0.7" in repr(module)

    @pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
    def test_log_ratio_loss(self, device: str, backend: str, aggregation: str) -> None:
        case = small(device, LossSpec(LogRatio(), aggregation=aggregation))

        def by_name(
            logits: Tensor, ids: Tensor, rewards: Tensor, *, spec: Any, ref_logits: Tensor, **options: Any
        ) -> Any:
            return log_ratio_loss(logits, ref_logits, ids, rewards, aggregation=aggregation, **options)

        self.assert_same(run(by_name, case, backend=backend), run(grpo_loss, case, backend=backend))

    def test_log_ratio_loss_by_hand(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 37, device=device)
        args = (batch.logits, batch.ref_logits, batch.completion_ids, batch.advantages)
        out = log_ratio_loss(*args, completion_mask=batch.completion_mask, backend=backend)
        ids = batch.completion_ids[..., None]
        policy, reference = (
            x.log_softmax(-1).gather(-1, ids)[..., 0] for x in (batch.logits, batch.ref_logits)
        )
        terms = batch.advantages[:, None] * (policy - reference)
        torch.testing.assert_close(out.loss, -terms[batch.completion_mask].mean())


class TestSelectiveLogps:
    @staticmethod
    def eager(logits: Tensor, ids: Tensor, temperature: Any = 1.0) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"]
    )
    @pytest.mark.parametrize(
        "upstream", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["logps", "entropy", "both"]
    )
    def test_values_and_gradients(
        self, device: str, backend: str, dtype: torch.dtype, upstream: tuple[float, float]
    ) -> None:
        batch = make_batch(2, 3, 67, dtype=dtype, device=device)
        temperature = torch.tensor([[0.7], [1.5]], device=device, dtype=torch.float64)
        weights = torch.tensor([[1.0, 0.0, -2.5], [0.3, 0.0, 1e-3]], device=device, dtype=torch.float64)
        by_logps, by_entropy = upstream
        leaf = batch.logits.clone().requires_grad_()
        got = selective_logps(
            leaf, batch.completion_ids, temperature=temperature, return_entropy=True, backend=backend
        )
        (weights * (by_logps * got[0] + by_entropy * got[1])).sum().backward()
        wide = batch.logits.double().requires_grad_()
        want = self.eager(wide, batch.completion_ids, temperature[..., None])
        (weights * (by_logps * want[0] + by_entropy * want[1])).sum().backward()
        exact = dtype == torch.float64
        for value, truth in zip(got, want, strict=True):
            assert value.dtype == (torch.float64 if exact else torch.float32)
            torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-12 if exact else 1e-5)
        bound = 1e-11 if exact else 2 * torch.finfo(dtype).eps + 1e-5
        assert float(relative_error(leaf.grad, wide.grad).max()) < bound
        assert not leaf.grad[:, 1].any()

    def test_rows_without_upstream_gradient_are_not_read(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 67, device=device)
        leaf = batch.logits.clone().requires_grad_()
        logps, entropy = selective_logps(leaf, batch.completion_ids, return_entropy=True, backend=backend)
        wanted = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 2.0]], device=device)
        # Behind autograd's back: who reads these rows now finds NaN.
        leaf.data[wanted == 0] = torch.nan
        (grad,) = torch.autograd.grad((wanted * (logps + entropy)).sum(), leaf)
        assert not grad[wanted == 0].any()
        assert grad[wanted != 0].isfinite().all() and (grad[wanted != 0] != 0).any(-1).all()

    def test_mask(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 67, device=device, seed=2)
        mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
        logits = batch.logits.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
        logps, entropy = selective_logps(
            logits, batch.completion_ids, mask=mask, return_entropy=True, backend=backend
        )
        (logps + entropy).sum().backward()
        want = self.eager(batch.logits, batch.completion_ids)
        for value, truth in zip((logps, entropy), want, strict=True):
            torch.testing.assert_close(value, truth * mask, rtol=1e-5, atol=1e-5)
        assert not logits.grad[mask == 0].any() and logits.grad[mask != 0].any()

    def test_transform_of_the_logits(self, device: str, backend: str) -> None:
        """Padding columns, scale and softcap, on a packed batch."""
        batch = make_batch(1, 5, 67, device=device)
        ids, leaf = batch.completion_ids[0].clamp(max=59), batch.logits[0].clone().requires_grad_()
        logps = selective_logps(
            leaf, ids, vocab_size=60, logit_scale=1.5, logit_softcap=4.0, temperature=0.9, backend=backend
        )
        logps.sum().backward()
        wide = batch.logits[0].double().requires_grad_()
        want, _ = self.eager(4 * torch.tanh(wide[:, :60] * 1.5 / 4), ids, 0.9)
        want.sum().backward()
        torch.testing.assert_close(logps.double(), want, rtol=0, atol=1e-5)
        assert float(relative_error(leaf.grad, wide.grad).max()) < 1e-5
        assert not leaf.grad[:, 60:].any()

    def test_gradcheck(self, device: str, backend: str) -> None:
        batch = make_batch(1, 2, 5, dtype=torch.float64, device=device)

        def call(logits: Tensor) -> tuple[Tensor, ...]:
            return selective_logps(
                logits, batch.completion_ids, logit_softcap=3.0, return_entropy=True, backend=backend
            )

        assert torch.autograd.gradcheck(call, batch.logits.requires_grad_())
