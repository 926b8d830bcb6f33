"""Hard cases from hidden states: relations between several calls, and side effects of one call.

A row has the same results in every batch up to rounding only, because a matrix product chooses its order of
summation by the shape of the batch (case 20).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hard_cases import SUM, dtypes
from linear_cases import (
    LinearResult,
    assert_same,
    assert_same_gradients,
    local_and_not,
    random_case,
    run_linear,
)
from linear_hard_cases import assert_right, every_option, every_tensor, every_term, laid_out, layouts
from parity import AGGREGATIONS
from products import assert_same_products, lengths, magnitudes
from torch import Tensor

from grpo_kernels import LossSpec, PPOClip, linear_grpo_loss
from grpo_kernels.testing import relative_error


@local_and_not
@layouts
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_case_17_uneven_micro_batches(
    spec: LossSpec, aggregation: str, packed: bool, backend: str, device: str
) -> None:
    """With a common normalizer, losses and gradients of the parts add up to those of the batch."""
    spec = replace(every_term(spec), aggregation=aggregation, max_tokens=4)
    if packed and spec.uses_callable:  # a callable couples all tokens of a packed batch
        spec = replace(spec, surrogate=PPOClip(), level="sequence")
    case = every_option(spec, 4, 3, 37, seed=1, device=device).with_options(normalizer=4.0)
    case = case.with_options(prompt_ids=torch.tensor([5, 7, 8, 7], device=device))  # none is in two parts

    def part(rows: slice) -> LinearResult:
        return run_linear(laid_out(every_tensor(case, lambda x: x[rows]), packed), backend=backend)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    by_hidden, *by_head = zip(*(x.grads for x in parts), strict=True)
    found = [torch.cat(by_hidden), *(torch.stack(grads).sum(0) for grads in by_head)]
    for x, y in zip(found, whole.grads, strict=True):
        assert relative_error(x.flatten(), y.flatten()) < 1e-5


@local_and_not
def test_case_18_inputs_are_never_written(spec: LossSpec, backend: str, device: str) -> None:
    """The hidden states are a leaf, then the output of a tanh. Both have another use after the loss."""
    case = every_option(every_term(spec), 2, 3, 37, device=device)
    leaf, weight, bias = (x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    hidden = torch.tanh(leaf)
    tensors = [leaf, hidden, weight, bias, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, hidden):
        out = linear_grpo_loss(
            *(x, weight, case.completion_ids, case.advantages),
            lm_head_bias=bias,
            spec=case.spec,
            backend=backend,
            **case.options,
        )
        (out.loss + x.square().sum() + weight.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


@local_and_not
@layouts
@dtypes
def test_case_19_loss_times_1024(
    spec: LossSpec, dtype: torch.dtype, packed: bool, backend: str, device: str
) -> None:
    """The gradient scales exactly up to the order of sums. test_linear_autograd.py has other factors."""
    case = laid_out(every_option(every_term(spec), 2, 3, 37, dtype=dtype, device=device), packed)
    once, many = (run_linear(case, upstream=factor, backend=backend) for factor in (1.0, 1024.0))
    assert all(x.any() for x in once.grads)
    scaled = once._replace(grads=tuple(1024 * x for x in once.grads))
    assert_same_gradients(many, scaled, case, upstream=1024.0, backend=backend)


@local_and_not
class TestCase20SameResults:
    @pytest.mark.long
    def test_a_hundred_times(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, shape=(1, 1), V=37, device=device)
        first, *others = (run_linear(case, backend=backend) for _ in range(100))
        for other in others[:: len(others) // 9]:
            assert_same(other, first, case, backend=backend)

    def test_neighbors(self, spec: LossSpec, backend: str, device: str) -> None:
        """A row has the same results alone, in a batch, in a permuted batch and among masked rows."""
        rows, row = 7, 4
        spec = replace(every_term(spec), aggregation=SUM)
        case = every_option(spec, rows, 1, 37, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)

        def call(index: list[int], masked: bool = False) -> list[Tensor]:
            chosen = every_tensor(case, lambda x: x[index] if x.dim() else x)
            if masked:
                chosen.options["completion_mask"][:row] = chosen.options["completion_mask"][row + 1 :] = False
            got = run_linear(chosen, chunk_tokens=3, backend=backend)
            with magnitudes():
                size = run_linear(chosen, chunk_tokens=3, backend=backend).grads[0]
            return [x[index.index(row)] for x in (got.grads[0], got.out.logps, got.out.entropy, size)]

        want = call(list(range(rows)))
        for index, masked in [
            (list(range(rows)), True),
            ([row], False),
            ([0, row], False),
            ([6, 0, 1, 5, 3, 2, row], False),
            ([row] * 5, False),
        ]:
            what = f"{index}, {masked = }"
            grad, logps, entropy, size = call(index, masked)
            assert torch.equal(logps, want[1]) and torch.equal(entropy, want[2]), what
            assert_same_products(grad, want[0], size, lengths(rows, 37)["hidden"], what)


@local_and_not
class TestCase22:
    """Contexts of a call: no_grad, and another current device."""

    def test_no_grad_saves_nothing(self, spec: LossSpec, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 2, 3, 37, device=device)
        want = run_linear(case, backend=backend)
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        saved: list[Tensor] = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            out = linear_grpo_loss(
                *(hidden, weight, case.completion_ids, case.advantages),
                lm_head_bias=case.bias,
                spec=case.spec,
                backend=backend,
                **case.options,
            )
        assert not saved and out.loss.grad_fn is None
        torch.testing.assert_close(out.loss, want.out.loss)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self, spec: LossSpec) -> None:
        """The loss runs on the device of its tensors. Triton would launch on the current device."""
        case = every_option(every_term(spec), 2, 3, 37, device="cuda:1")
        with torch.cuda.device(0):
            assert_right(case, backend="triton")
