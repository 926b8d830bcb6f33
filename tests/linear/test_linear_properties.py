"""Properties of the losses from hidden states on random heads, chunks, layouts, dtypes and losses."""

from __future__ import annotations

import pytest
import torch
from linear_cases import linear_oracle, logits_of
from problems import assert_outputs_close, assert_same_bits, for_any, sequences_of, spoilt, spoilt_options
from torch import Tensor
from torch.nn.functional import linear

from grpo_kernels import grpo_loss, linear_grpo_loss, linear_logps
from grpo_kernels.logps import linear_token_stats

pytest.importorskip("hypothesis")
from linear_problems import (
    PARTS,
    LinearProblem,
    assert_gradient_close,
    assert_near,
    assert_same,
    assert_same_gradients,
    linear_problems,
    precision,
    without_skipped,
)


@for_any(linear_problems)
def test_equals_the_reference(problem: LinearProblem, backend: str) -> None:
    problem = problem._replace(frozen=(), how=problem.how | {"logits_dtype": torch.float32})
    expected, got = linear_oracle(problem.plain()), problem.run(backend)
    size = sum(float(x.norm()) for x in expected.truth)
    for name, eager, exact in zip(PARTS, expected.eager, expected.truth, strict=False):
        grad = problem.view(got.grads[name]) if name == "hidden" else got.grads[name]
        assert_gradient_close(name, grad, exact, size, problem, bar=float((eager.double() - exact).norm()))
    outside = torch.ones_like(got.grads["hidden"])
    problem.view(outside).zero_()
    assert not got.grads["hidden"][outside == 1].any()
    truth = expected.by_logits.truth
    outs = (without_skipped(out, problem) for out in (got.out, truth.out))
    assert_outputs_close(*outs, precision(problem), float(truth.grad.abs().sum()))


@for_any(linear_problems)
def test_equals_the_logits_form(problem: LinearProblem, backend: str) -> None:
    """The logits are fp32, as in the linear form."""
    problem = problem._replace(frozen=(), how=problem.how | {"logits_dtype": torch.float32})
    case, got = problem.plain(), problem.run(backend)
    case = case if case.hidden.dtype == torch.float64 else case.to(torch.float32)
    # Padding rows are NaN, and the gradient of the hidden states would contain 0 * NaN.
    parts = [x.nan_to_num(neginf=-torch.inf) for x in (case.hidden, case.weight, case.bias) if x is not None]
    leaves = [x.requires_grad_() for x in parts]
    logits = logits_of(case, leaves[0], leaves[1], leaves[2] if leaves[2:] else None)
    want = grpo_loss(
        logits.logits, case.completion_ids, case.advantages, spec=case.spec, backend=backend, **logits.options
    )
    grads = torch.autograd.grad(want.loss, leaves)
    size = sum(float(x.double().norm()) for x in grads)
    for name, theirs in zip(PARTS, grads, strict=False):
        ours = problem.view(got.grads[name]) if name == "hidden" else got.grads[name]
        assert_gradient_close(name, ours, theirs, size, problem)
    outs = (without_skipped(out, problem) for out in (got.out, want))
    assert_outputs_close(*outs, precision(problem), size)


@for_any(linear_problems, exact=True)
def test_what_is_masked_never_matters(problem: LinearProblem, backend: str) -> None:
    """NaN, infinities and invalid ids at masked positions have no effect."""
    case, mask = problem.case, problem.mask
    hidden = case.hidden.clone()
    problem.view(hidden).copy_(spoilt(problem.view(case.hidden), mask))
    bad = case._replace(
        hidden=hidden,
        completion_ids=spoilt(case.completion_ids, mask),
        advantages=spoilt(case.advantages, mask),
        options=spoilt_options(case.options, mask),
    )
    expected, got = problem.run(backend), problem._replace(case=bad).run(backend)
    assert_same(got, expected, problem, backend)
    if "hidden" in got.grads:
        assert not problem.view(got.grads["hidden"])[~mask].any()


@for_any(linear_problems, exact=True)
def test_the_same_again(problem: LinearProblem, backend: str) -> None:
    assert_same(problem.run(backend), problem.run(backend), problem, backend)


@for_any(linear_problems, exact=True)
def test_what_is_frozen_changes_no_other_gradient(problem: LinearProblem, backend: str) -> None:
    everything = problem._replace(frozen=()).run(backend)
    grads = {name: x for name, x in everything.grads.items() if name not in problem.frozen}
    assert_same(problem.run(backend), everything._replace(grads=grads), problem, backend)


@for_any(linear_problems)
def test_chunks_and_order_do_not_matter(problem: LinearProblem, backend: str) -> None:
    """Another chunk length, another order of rows and skipped rows give the same results."""
    other = {"chunk_tokens": 2, "compact": not problem.how["compact"], "skip_inactive": False}
    got, expected = problem.run(backend), problem.run(backend, **other)
    assert_near(got.grads, expected.grads, problem)
    size = sum(float(x.double().norm()) for x in expected.grads.values())
    outs = (without_skipped(out, problem) for out in (got.out, expected.out))
    # Another order of the sums may round a bf16 logit to a neighbor.
    rounding = 0.5 if problem.how["logits_dtype"] == torch.bfloat16 else precision(problem)
    assert_outputs_close(*outs, rounding, size)


@for_any(linear_problems, callables=False)
def test_a_split_batch_adds_up(problem: LinearProblem, backend: str) -> None:
    """With a common normalizer, losses and gradients of the parts add up to those of the batch."""
    count = len(sequences_of(problem.case.completion_ids, problem.case.options))
    halves = [part for part in (range(count // 2), range(count // 2, count)) if part]
    whole = problem.select(list(range(count)), normalizer=6.5)
    expected, results = (
        whole.run(backend),
        [problem.select(list(part), normalizer=6.5).run(backend) for part in halves],
    )
    joined = {
        name: (torch.cat if name == "hidden" else sum)([result.grads[name] for result in results])
        for name in expected.grads
    }
    assert_near(joined, expected.grads, whole)
    total = sum(result.out.loss for result in results)
    torch.testing.assert_close(total, expected.out.loss, rtol=1e-4, atol=1e-4)


@for_any(linear_problems, exact=True)
def test_a_scaled_loss_scales_the_gradient(problem: LinearProblem, backend: str) -> None:
    """A power of two scales gradients exactly, except subnormal ones, which have lost digits."""
    once, more = problem.run(backend).grads, problem.run(backend, upstream=64.0).grads
    large = {name: x.abs() > 64 * torch.finfo(x.dtype).smallest_normal for name, x in once.items()}
    kept = {name: torch.where(large[name], x, 0.0) for name, x in more.items()}
    wanted = {name: torch.where(large[name], 64 * x, 0.0) for name, x in once.items()}
    assert_same_gradients(kept, wanted, problem, backend, upstream=64.0)
    for name, x in more.items():
        small = x[~large[name]]
        assert bool((small.abs() <= 2 * 64**2 * torch.finfo(x.dtype).smallest_normal).all()), name


@for_any(linear_problems)
def test_inputs_stay_as_they_are(problem: LinearProblem, backend: str) -> None:
    case = problem.case
    tensors = {**case._asdict(), **case.options}
    before = {name: x.clone() for name, x in tensors.items() if isinstance(x, Tensor)}
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]
    out = linear_grpo_loss(
        problem.view(case.hidden), case.weight, case.completion_ids, case.advantages,
        spec=case.spec, lm_head_bias=case.bias, backend=backend, **case.options, **problem.how,
    )  # fmt: skip
    torch.autograd.grad(out.loss, leaves)
    for name, value in before.items():
        assert_same_bits(tensors[name].detach(), value, name)


@for_any(linear_problems, callables=False, exact=True)
def test_statistics_of_tokens(problem: LinearProblem, backend: str) -> None:
    """Test log-probabilities, entropies, top1 and gradients. Some upstream gradients are 0."""
    case, mask = problem.plain(), problem.mask
    names = ("temperature", "logit_scale", "logit_softcap", "vocab_size")
    transform = {name: case.options[name] for name in names if name in case.options}
    if isinstance(transform["temperature"], Tensor) and transform["temperature"].shape != mask.shape:
        transform["temperature"] = transform["temperature"].expand(mask.shape)
    parts = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    generator = torch.Generator().manual_seed(case.completion_ids.numel())
    by_logps, by_entropy = (
        (torch.randn(mask.shape, generator=generator) * torch.randint(2, mask.shape, generator=generator))
        .to(mask.device) for _ in range(2)
    )  # fmt: skip

    def eager(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(dtype).nan_to_num(neginf=-torch.inf).requires_grad_() for x in parts]
        logits = linear(*leaves)
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        z = wide[..., : transform.get("vocab_size")] * transform["logit_scale"]
        if (softcap := transform["logit_softcap"]) is not None:
            z = softcap * torch.tanh(z / softcap)
        t = transform["temperature"]
        log_p = torch.log_softmax(z / (t[..., None] if isinstance(t, Tensor) else t), -1)
        logps = log_p.gather(-1, case.completion_ids.long()[..., None])[..., 0]
        entropy = -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(-1)
        found = [torch.where(mask, x, 0.0) for x in (logps, entropy)]
        total = sum((x * g.to(x.dtype)).sum() for x, g in zip(found, (by_logps, by_entropy), strict=True))
        return [x.detach() for x in (*found, z)], list(torch.autograd.grad(total, leaves))

    (logps, entropy, z), truth = eager(torch.float64)
    _, theirs = eager(case.hidden.dtype)
    leaves = [x.detach().clone().requires_grad_() for x in parts]
    how = {name: x for name, x in problem.how.items() if name in ("chunk_tokens", "compact")}
    options = {**transform, **how, "mask": case.options["completion_mask"], "backend": backend}
    options["lm_head_bias"] = leaves[2] if leaves[2:] else None
    got = linear_token_stats(*leaves[:2], case.completion_ids, entropy=True, top1=True, **options)
    assert got.entropy is not None and got.top1 is not None
    rounding = precision(problem)
    for x, y in ((got.logps, logps), (got.entropy, entropy)):
        assert bool(((x.double() - y).abs() <= rounding * (1 + y.abs())).all())
    # Rounding decides between logits that are nearly equal.
    taken = z.gather(-1, case.completion_ids.long()[..., None])
    others = z.scatter(-1, case.completion_ids.long()[..., None], -torch.inf).amax(-1)
    margin = taken[..., 0] - others
    clear = margin.abs() > 100 * rounding
    assert torch.equal(got.top1[clear], ((margin > 0) & mask)[clear])
    assert not got.top1[~mask].any()
    total = (got.logps * by_logps).sum() + (got.entropy * by_entropy).sum()
    size = sum(float(x.norm()) for x in truth)
    for name, x, y, exact in zip(PARTS, torch.autograd.grad(total, leaves), theirs, truth, strict=False):
        assert_gradient_close(name, x, exact, size, problem, bar=float((y.double() - exact).norm()))
    again = linear_logps(*leaves[:2], case.completion_ids, return_entropy=True, **options)
    for x, y in zip(again, (got.logps, got.entropy), strict=True):
        assert_same_bits(x, y, "linear_logps")
