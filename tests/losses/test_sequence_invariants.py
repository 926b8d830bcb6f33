"""Hard cases from logits with a sequence-level ratio: relations between calls, and side effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import SUM, assert_same_bits, every_tensor
from parity import AGGREGATIONS, Case, Result, run
from sequence_cases import every_term, laid_out, layouts, levels, losses, random_case
from torch import Tensor

from grpo_kernels import ImportanceRatio, LossSpec, PPOClip, grpo_loss


@layouts
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@levels
def test_case_17_uneven_micro_batches(
    device: str, backend: str, level: str, aggregation: str, packed: bool
) -> None:
    """With a common normalizer, losses and gradients of the parts add up to those of the batch."""
    spec = LossSpec(ImportanceRatio(), level=level, aggregation=aggregation, max_tokens=3)
    case = random_case(every_term(spec), 4, 3, 37, seed=1, device=device).with_options(normalizer=4.0)
    case = case.with_options(prompt_ids=torch.tensor([5, 7, 8, 7], device=device))  # none is in two parts

    def part(rows: slice) -> Result:
        chosen = every_tensor(case, lambda _, x: x[rows])
        return run(grpo_loss, laid_out(chosen, packed), backend=backend)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-6, atol=0)


@levels
def test_case_18_inputs_are_never_written(device: str, backend: str, level: str) -> None:
    """The logits are a leaf, then the output of a tanh. Both have another use after the loss."""
    spec = every_term(LossSpec(PPOClip(), level=level))
    case = random_case(spec, 2, 3, 37, device=device)
    leaf = case.logits.requires_grad_()
    logits = torch.tanh(leaf)
    tensors = [leaf, logits, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, logits):
        out = grpo_loss(x, case.completion_ids, case.advantages, spec=spec, backend=backend, **case.options)
        (out.loss + x.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


@levels
@layouts
class TestCase19Backwards:
    @staticmethod
    def loss(case: Case, backend: str) -> Tensor:
        return grpo_loss(
            case.logits,
            case.completion_ids,
            case.advantages,
            spec=case.spec,
            backend=backend,
            **case.options,
        ).loss

    @pytest.fixture
    def case(self, level: str, packed: bool, device: str) -> Case:
        spec = every_term(LossSpec(ImportanceRatio(), level=level))
        case = laid_out(random_case(spec, 2, 3, 37, inactive=0, device=device), packed)
        return case._replace(logits=case.logits.clone().requires_grad_())

    def test_twice_and_times_1024(self, case: Case, backend: str) -> None:
        """The gradient scales exactly, because 1024 is a power of two."""
        loss = self.loss(case, backend)
        once, again, many = (
            torch.autograd.grad(x, case.logits, retain_graph=True)[0] for x in (loss, loss, 1024 * loss)
        )
        assert once.any() and torch.equal(once, again) and torch.equal(1024 * once, many)

    def test_double_backward_raises(self, case: Case, backend: str) -> None:
        (grad,) = torch.autograd.grad(self.loss(case, backend), case.logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


@layouts
class TestCase20SameBits:
    """The bits of a sequence depend on that sequence alone, because it is summed in fp64 in one order."""

    @losses
    def test_neighbors(self, backend: str, device: str, spec: LossSpec, packed: bool) -> None:
        sequences, one = 5, 3
        spec = replace(every_term(spec), aggregation=SUM)
        case = random_case(spec, sequences, 3, 37, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)

        def call(index: list[int], change: Callable[[Tensor], Any] = lambda mask: None) -> list[Tensor]:
            chosen = every_tensor(case, lambda _, x: x[index])
            change(chosen.options["completion_mask"])
            out, grad = run(grpo_loss, laid_out(chosen, packed), backend=backend)
            per_token = (x.view(len(index), 3, -1) for x in (grad, out.logps, out.ref_logps, out.entropy))
            return [x[[place for place, which in enumerate(index) if which == one]] for x in per_token]

        def mask_others(mask: Tensor) -> None:
            mask[:one] = mask[one + 1 :] = False

        want = call([0, 1, 2, one, 4])
        for index, change in [
            ([0, 1, 2, one, 4], mask_others),
            ([one], lambda mask: None),
            ([0, one], lambda mask: None),
            ([4, one, 0, 2, 1], lambda mask: None),
            ([one] * 3, lambda mask: None),
        ]:
            for got, whole in zip(call(index, change), want, strict=True):
                assert torch.equal(got, whole.expand_as(got)), index

    @pytest.mark.long
    @levels
    def test_a_hundred_times(self, device: str, backend: str, level: str, packed: bool) -> None:
        case = laid_out(random_case(LossSpec(PPOClip(), level=level), 1, 1, 37, device=device), packed)
        first, *others = (run(grpo_loss, case, backend=backend) for _ in range(100))
        for other in others:
            assert_same_bits(other, first)
