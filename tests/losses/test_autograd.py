"""The losses from logits under autograd: upstream gradients, second backwards, `inplace`, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import EVERYTHING, Case, run, small, user_loss
from products import assert_same_products, on_a_grid
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_kernels import KL, LogRatio, LossOutput, LossSpec, PPOClip, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import relative_error

IN_PLACE = "modified by an inplace operation"

both_paths = pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def loss_of(logits: Tensor, case: Case, **options: Any) -> Tensor:
    out = grpo_loss(logits, case.completion_ids, case.advantages, spec=case.spec, **case.options, **options)
    return out.loss


def head(case: Case) -> tuple[Tensor, Tensor]:
    """Return hidden states `[B, T, 5]` and a weight `[37, 5]` of a linear layer that computes logits.

    The products are exact (products.py), in bf16 too.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (*case.completion_ids.shape, 5), (37, 5)
    hidden, weight = (on_a_grid(torch.randn(shape, generator=generator)) for shape in shapes)
    return hidden.to(case.logits.device), weight.to(case.logits.device)


def assert_same_weight_gradients(
    got: Tensor, want: Tensor, case: Case, hidden: Tensor, weight: Tensor, **options: Any
) -> None:
    """Compare gradients of a linear layer's weight up to the order of the sums over tokens."""
    logits = (hidden @ weight.t()).requires_grad_()
    (dlogits,) = torch.autograd.grad(loss_of(logits, case, **options), logits)
    rows, dlogits = hidden.abs().flatten(0, -2), dlogits.abs().flatten(0, -2).to(hidden.dtype)
    assert_same_products(got, want, dlogits.t() @ rows, len(rows), "gradient of the weight")


def scaled(factor: float) -> Callable[..., LossOutput]:
    """Return `grpo_loss` with its loss multiplied by `factor`."""

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
        # 1/3 is no power of two. In place it rounds once more to the dtype, in two steps once in each term.
        torch.testing.assert_close(
            many, factor * once, rtol=torch.finfo(dtype).eps, atol=1e-7 * float(once.abs().max())
        )

    def test_fp16_does_not_underflow_before_the_gradient_scaler(self, device: str, backend: str) -> None:
        """A mean over 10^6 tokens has gradients below 6e-8, the smallest fp16 number. A scale saves them."""
        case = small(device, dtype=torch.float16).with_options(normalizer=1e6)
        got = run(scaled(65536.0), case, backend=backend, inplace=True).grad.double() / 65536
        want = run(reference_loss, case.wide()).grad
        assert want.abs().max() < 1e-5
        # The smallest elements are subnormal even with the scale.
        assert float(relative_error(got, want).max()) < 4 * torch.finfo(torch.float16).eps


class TestBackward:
    def test_twice(self, device: str, backend: str) -> None:
        """The gradients are equal, and each is a tensor of its own."""
        case = small(device)
        loss = loss_of(case.logits.requires_grad_(), case, backend=backend) / 3
        (first,) = torch.autograd.grad(loss, case.logits, retain_graph=True)
        kept = first.clone()
        first.zero_()
        second, third = (torch.autograd.grad(loss, case.logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(kept, second) and torch.equal(kept, third) and kept.any()

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
    )
    def test_twice_in_place_raises(self, device: str, backend: str, dtype: torch.dtype) -> None:
        """The first backward hands its buffer to autograd, so the second one has none."""
        case = small(device, dtype=dtype)
        loss = loss_of(case.logits.requires_grad_().clone(), case, backend=backend, inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()

    @both_paths
    def test_double_raises(self, device: str, backend: str, inplace: bool) -> None:
        """A second derivative raises even if the loss has another, smooth term."""
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
        """The losses of two batches are added before one backward."""
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
        """A linear layer does not save its output, so `inplace` may overwrite it."""
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
        """Like PyTorch's in-place operations, `inplace` refuses a leaf."""
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
        """The logits become the gradient in one pass if loss and dtype permit it, else in two."""
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
        # Allow one rounding to the gradient's dtype. In fp32 the two paths sum in different orders.
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
        with pytest.raises(ValueError, match=r"inplace=True needs rows that do not overlap.*\(0, 37, 1\)"):
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
        if inplace:
            assert large == {logits.data_ptr()}
        elif backend == "torch" and device == "cpu":  # the forward has computed the gradient
            assert len(large) == 1 and not large & {logits.data_ptr(), reference}
        else:
            assert large == {logits.data_ptr(), reference}


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
    """The layer gives bf16 logits, and the loss casts nothing."""
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
        results.append((loss.detach(), leaf.grad.bfloat16()))  # both were computed in bf16
    assert torch.equal(results[0][0], results[1][0])
    grads = [grad for _, grad in results]
    assert_same_weight_gradients(*grads, case, hidden.bfloat16(), weight.bfloat16(), backend=backend)


@both_paths
def test_accumulation_over_uneven_micro_batches(device: str, backend: str, inplace: bool) -> None:
    """Micro-batches with a common normalizer accumulate the gradient of the whole batch."""
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
