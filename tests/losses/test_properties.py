"""Properties of the losses from logits on random layouts, strides, masks, dtypes, values and losses."""

from __future__ import annotations

import pytest
import torch
from parity import Case, run
from problems import (
    Problem,
    assert_close,
    assert_same_bits,
    assert_scaled,
    explore,
    flat,
    for_any,
    problems,
    spoilt,
    spoilt_options,
)
from torch import Tensor

from grpo_kernels import grpo_loss
from grpo_kernels.reference import reference_loss


@for_any(problems)
def test_equals_the_reference(problem: Problem, backend: str) -> None:
    truth = run(reference_loss, problem.case.wide(), problem.view)
    eager = run(reference_loss, problem.case, problem.view)
    slack = 2 * (eager.grad.double() - truth.grad).norm()
    assert_close(problem.run(backend), truth, problem, slack=slack)


@pytest.mark.usefixtures("needs_triton")
def test_backends_agree(device: str) -> None:
    def agree(problem: Problem, backend: str) -> None:
        assert_close(problem.run(backend), problem.run("torch"), problem)

    explore(agree, problems(device), "triton", device)


@for_any(problems)
def test_what_is_masked_never_matters(problem: Problem, backend: str) -> None:
    """NaN, infinities and invalid ids at masked positions do not change a bit."""
    case, mask = problem.case, problem.mask
    logits = case.logits.clone()
    problem.view(logits).copy_(spoilt(problem.view(case.logits), mask))
    tensors = (spoilt(x, mask) for x in (case.completion_ids, case.advantages))
    bad = Case(case.spec, logits, *tensors, spoilt_options(case.options, mask))
    expected, got = problem.run(backend), problem._replace(case=bad).run(backend)
    assert_same_bits(got.grad, expected.grad, "gradient")
    assert bool((problem.view(got.grad)[~mask] == 0).all())
    wanted = flat(expected.out)
    for name, value in flat(got.out).items():
        assert_same_bits(value, wanted[name], name)


@for_any(problems, callables=False)
def test_permuting_sequences_permutes_results(problem: Problem, backend: str) -> None:
    """Bits are equal, except in sums over tokens."""
    count = len(problem.sequences)
    order = list(reversed(range(count)))
    straight, permuted = problem.select(list(range(count))), problem.select(order)
    index = torch.cat([problem.sequences[number] for number in order])
    expected, got = straight.run(backend), permuted.run(backend)
    assert_same_bits(got.grad, expected.grad[index], "gradient")
    for name in ("logps", "ref_logps", "entropy"):
        value, wanted = getattr(got.out, name), getattr(expected.out, name)
        if value is not None:
            assert_same_bits(value, wanted[index], name)
    torch.testing.assert_close(got.out.loss, expected.out.loss, rtol=1e-4, atol=1e-4)


@for_any(problems, callables=False)
def test_a_split_batch_adds_up(problem: Problem, backend: str) -> None:
    """With a common normalizer, losses and gradients of the parts add up to those of the batch."""
    count = len(problem.sequences)
    halves = [part for part in (range(count // 2), range(count // 2, count)) if part]
    whole = problem.select(list(range(count)), normalizer=6.5).run(backend)
    results = [problem.select(list(part), normalizer=6.5).run(backend) for part in halves]
    joined = torch.cat([result.grad for result in results])
    if backend == "torch" and joined.device.type != "cpu":
        torch.testing.assert_close(joined, whole.grad)  # PyTorch's sums there depend on the number of rows
    else:
        assert_same_bits(joined, whole.grad, "gradient")
    total = sum(result.out.loss for result in results)
    torch.testing.assert_close(total, whole.out.loss, rtol=1e-4, atol=1e-4)


@for_any(problems)
def test_a_scaled_loss_scales_the_gradient(problem: Problem, backend: str) -> None:
    once, more = problem.run(backend).grad, problem.run(backend, upstream=64.0).grad
    assert_scaled(more, once, 64.0, "gradient")


@for_any(problems)
def test_inputs_stay_as_they_are(problem: Problem, backend: str) -> None:
    """No input changes a bit. With inplace=True only the logits change, not the memory between them."""
    case = problem.case
    before = {name: x.clone() for name, x in case.options.items() if isinstance(x, Tensor)}
    ids, advantages = case.completion_ids.clone(), case.advantages.clone()
    allocated = case.logits.clone().requires_grad_().clone()
    logits = problem.view(allocated)
    out = grpo_loss(
        logits, case.completion_ids, case.advantages, spec=case.spec, **case.options,
        backend=backend, inplace=problem.inplace,
    )  # fmt: skip
    out.loss.backward()
    after = allocated.detach()
    if problem.inplace:
        problem.view(after).copy_(problem.view(case.logits))
    assert_same_bits(after, case.logits, "logits")
    assert_same_bits(case.completion_ids, ids, "completion_ids")
    assert_same_bits(case.advantages, advantages, "advantages")
    for name, value in before.items():
        assert_same_bits(case.options[name], value, name)


@for_any(problems)
def test_any_number_of_rows_at_a_time(problem: Problem, backend: str) -> None:
    """The number of rows that the torch backend computes at once does not change a bit."""
    expected = problem.run(backend)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("THREAD_ELEMENTS", "CHUNK_ELEMENTS"):
            patch.setattr(f"grpo_kernels.vocab.row_chunks.{name}", 2 * problem.case.logits.shape[-1])
        got = problem.run(backend)
    assert_same_bits(got.grad, expected.grad, "gradient")
    wanted = flat(expected.out)
    for name, value in flat(got.out).items():
        assert_same_bits(value, wanted[name], name)
