"""Hard cases from hidden states: extreme values, invalid ids, zero coefficients.

The cases have the numbers of losses/test_hard_values.py. Each test runs a loss whose gradient is computed in
the forward pass and a loss that couples tokens and takes two passes. A test reaches extreme logits through
the bias of the head (-inf, shifts), through a head that is the identity, or through `from_logits`.

Tests that compare bits use logits that are exact products. They compare gradients up to the order of
summation: see products.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import INF, NAN, SUM, TWO_BLOCKS, by_ratio, dtypes
from hard_cases import random_case as logits_case
from linear_cases import (
    LinearCase,
    assert_same,
    assert_same_gradients,
    linear_oracle,
    local_and_not,
    random_case,
    run_linear,
)
from linear_hard_cases import (
    V,
    assert_no_gradient,
    assert_right,
    compacts,
    every_option,
    every_tensor,
    every_term,
    laid_out,
    layouts,
)
from parity import SURROGATES, Case, Oracle, oracle, run
from torch import Tensor

from grpo_kernels import KL, LossSpec, PPOClip, Reinforce
from grpo_kernels.reference import reference_loss
from grpo_kernels.spec.surrogates import Surrogate
from grpo_kernels.testing import assert_no_worse_than_eager, relative_error

# The two levels take one pass and two. They are equal if a sequence has one token.
levels = pytest.mark.parametrize("level", ["token", "sequence"])


def reinforce(logps: Tensor, old: Any, ref: Any, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * logps


def nothing(logps: Tensor, old: Any, ref: Any, advantages: Tensor, mask: Tensor) -> Tensor:
    return 0 * logps


def through_identity(case: Case, scale: float = 1.0) -> LinearCase:
    """Return a case whose logits are exactly the hidden states times `scale`."""
    width = case.logits.shape[-1]
    weight = scale * torch.eye(width, dtype=case.logits.dtype, device=case.logits.device)
    return LinearCase(
        case.spec, case.logits, weight, None, case.completion_ids, case.advantages, case.options
    )


def one_token(log_ratio: float, advantage: float, device: str, spec: LossSpec) -> LinearCase:
    """Return a batch of one token with this log-ratio to the behavior policy."""
    case = random_case(spec, shape=(1, 1), device=device)
    logps = run_linear(case._replace(spec=LossSpec(Reinforce()))).out.logps
    return case._replace(advantages=torch.full((1,), advantage, device=device)).with_options(
        old_logps=logps - log_ratio
    )


class TestCases1And2HugeRatio:
    """exp(200) is inf in fp32, and inf * 0 is NaN."""

    @layouts
    @levels
    @dtypes
    def test_case_1_positive_advantage(
        self, dtype: torch.dtype, level: str, packed: bool, backend: str, device: str
    ) -> None:
        case = one_token(200.0, 1.0, device, LossSpec(PPOClip(eps_high=0.28), level=level)).to(dtype)
        got = run_linear(laid_out(case, packed), backend=backend)
        assert got.out.loss.item() == pytest.approx(-1.28)
        assert_no_gradient(got)

    @layouts
    @levels
    @pytest.mark.parametrize(
        "surrogate, clamp, loss",
        [
            (PPOClip(), None, INF),
            (PPOClip(), 20.0, math.exp(20.0)),
            (PPOClip(dual_clip=3.0), None, 3.0),
            (PPOClip(delta=4.0), None, 4.0),
        ],
        ids=["as TRL", "clamp 20", "dual_clip", "delta"],
    )
    def test_case_2_negative_advantage(
        self,
        surrogate: PPOClip,
        clamp: float | None,
        loss: float,
        level: str,
        packed: bool,
        backend: str,
        device: str,
    ) -> None:
        spec = LossSpec(surrogate, level=level, log_ratio_clamp=clamp)
        got = run_linear(laid_out(one_token(200.0, -1.0, device, spec), packed), backend=backend)
        assert got.out.loss.item() == pytest.approx(loss)
        if math.isfinite(loss):
            assert_no_gradient(got)


RESTING = {
    **{
        name: LossSpec(surrogate)
        for name, surrogate in SURROGATES.items()
        if isinstance(surrogate, Surrogate) and surrogate.zero_without_advantage
    },
    "PPOClip, sequence": LossSpec(PPOClip(), level="sequence"),
}


@compacts
class TestCase3ZeroAdvantage:
    @pytest.mark.parametrize("spec", RESTING.values(), ids=RESTING)
    def test_any_ratio(self, spec: LossSpec, compact: bool, backend: str, device: str) -> None:
        anchors = torch.tensor([[0.0, -1e4, 1e4, -INF, INF, NAN]], device=device)
        case = random_case(spec, shape=(1, 6), device=device).with_options(
            old_logps=anchors, ref_logps=anchors
        )
        case = case._replace(advantages=torch.zeros(1, device=device))
        got = run_linear(case, compact=compact, backend=backend)
        assert not got.out.loss and not got.out.metrics["active_fraction"]
        assert_no_gradient(got)

    @layouts
    @levels
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_hidden_states(
        self, value: float, level: str, packed: bool, compact: bool, backend: str, device: str
    ) -> None:
        """The gradient of the weight must not contain 0 * NaN."""
        case = random_case(LossSpec(PPOClip(), level=level), shape=(3, 4), device=device)
        case.advantages[0] = 0
        clean = laid_out(case._replace(hidden=case.hidden.clone()), packed)
        want = run_linear(clean, compact=compact, backend=backend)
        case.hidden[0, :, 5] = value
        got = run_linear(laid_out(case, packed), compact=compact, backend=backend)
        assert torch.equal(got.out.loss, want.out.loss)
        assert_same_gradients(got, want, clean, compact=compact, backend=backend)
        assert got.grads[1].any()


@local_and_not
class TestCase4Poison:
    @compacts
    @layouts
    @dtypes
    def test_masked(
        self, spec: LossSpec, dtype: torch.dtype, packed: bool, compact: bool, backend: str, device: str
    ) -> None:
        case = every_option(every_term(spec), 3, 4, 67, dtype=dtype, seed=1, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()

        def filled(values: Tensor) -> LinearCase:
            def fill(x: Tensor) -> Tensor:
                if not x.is_floating_point():
                    return x
                there = values.to(x.dtype).expand(3, 4)
                if x.dim() == 2:
                    return torch.where(mask, x, there)
                return torch.where(mask[..., None], x, there[..., None])

            return laid_out(every_tensor(case, fill), packed)

        # The values take turns along the tokens.
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)
        clean, how = filled(poison.new_zeros(4)), {"compact": compact, "backend": backend}
        got, want = (run_linear(x, **how) for x in (filled(poison.roll(1)), clean))
        assert_same(got, want, clean, **how)
        assert all(x.isfinite().all() and x.any() for x in (got.out.loss, *got.grads))
        assert not got.grads[0].view(case.hidden.shape)[~mask].any()

    @pytest.mark.parametrize(
        "name",
        [
            "hidden",
            "weight",
            "bias",
            "advantages",
            "old_logps",
            "ref_hidden",
            "ref_lm_head_weight",
            "ref_lm_head_bias",
            "token_weights",
            "temperature",
        ],
    )
    def test_unmasked_nan_surfaces(self, spec: LossSpec, name: str, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 2, 2, 37, masked=0, inactive=0, device=device)
        assert run_linear(case, backend=backend).out.loss.isfinite()
        (getattr(case, name) if name in case._fields else case.options[name]).view(-1)[3] = NAN
        assert run_linear(case, backend=backend).out.loss.isnan()


@layouts
def test_case_5_zero_beta_reads_no_reference(packed: bool, backend: str, device: str) -> None:
    case = random_case(shape=(2, 3), device=device)
    case = laid_out(case, packed)
    want = run_linear(case, backend=backend)
    for kl, ref_logps in [
        (KL("k3", beta=0.0), None),
        (KL("exact", beta=0.0), None),
        (
            KL("k3", beta=0.0, ratio_corrected=True),
            torch.full(case.completion_ids.shape, NAN, device=device),
        ),
    ]:
        without = case._replace(spec=LossSpec(PPOClip(), kl)).with_options(ref_logps=ref_logps)
        got = run_linear(without, backend=backend)
        assert_same(got._replace(out=got.out._replace(ref_logps=None)), want, case, backend=backend)


@local_and_not
@dtypes
@pytest.mark.parametrize("full", [False, True], ids=["surrogate", "every term"])
@pytest.mark.parametrize("value", [-INF, -1e4, -3e38])
# Trainers suppress tokens by the bias: one token, or a first block of a kernel.
@pytest.mark.parametrize("suppressed", [1, 2048, 4096])
def test_case_6_suppressed_tokens(
    spec: LossSpec,
    full: bool,
    value: float,
    suppressed: int,
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    """The expected results use -1e4, which gives a probability of 0 in fp64, instead of -inf."""
    vocab = 37 if suppressed == 1 else 5000
    case = random_case(every_term(spec) if full else spec, shape=(2, 1), V=vocab, device=device, dtype=dtype)
    case = case._replace(completion_ids=case.completion_ids.clamp(min=suppressed))

    def with_bias(value: float) -> LinearCase:
        bias = torch.zeros(vocab, device=device, dtype=dtype)
        bias[:suppressed] = value
        if not full:
            return case._replace(bias=bias)
        ref = {"ref_hidden": case.hidden.roll(1, -1), "ref_lm_head_weight": case.weight}
        return case._replace(bias=bias).with_options(**ref, ref_lm_head_bias=bias)

    assert_right(with_bias(value), with_bias(-1e4), backend=backend)


class TestCase7Degenerate:
    @local_and_not
    @dtypes
    @pytest.mark.parametrize("vocab, target", [(37, 5), (TWO_BLOCKS, 0), (TWO_BLOCKS, TWO_BLOCKS - 1)])
    def test_only_the_taken_token_is_finite(
        self, spec: LossSpec, vocab: int, target: int, dtype: torch.dtype, backend: str, device: str
    ) -> None:
        spec = replace(spec, entropy_coef=0.1)
        case = random_case(spec, shape=(1, 2), V=vocab, device=device, dtype=dtype)
        bias = torch.full((vocab,), -INF, device=device, dtype=dtype)
        bias[target] = 3.0
        case = case._replace(bias=bias, completion_ids=torch.full_like(case.completion_ids, target))
        got = run_linear(case, backend=backend)
        assert got.out.loss.isfinite() and not got.out.logps.any() and not got.out.entropy.any()
        assert_no_gradient(got)

    @by_ratio
    @levels
    @pytest.mark.parametrize("on_policy", [False, True])
    def test_the_taken_token_is_impossible(
        self, surrogate: Any, level: str, on_policy: bool, backend: str, device: str
    ) -> None:
        """Off-policy the ratio is exp(-inf) = 0 and so is the gradient. On-policy they are 1 and -A."""
        case = one_token(0.0, 1.0, device, LossSpec(surrogate, level=level))
        bias = torch.zeros(V, device=device)
        bias[case.completion_ids] = -INF
        case = case._replace(bias=bias)
        got = run_linear(case.with_options(old_logps=None) if on_policy else case, backend=backend)
        assert got.out.loss.item() == -on_policy
        assert got.out.metrics["ratio"].item() == on_policy
        for x in got.grads:
            assert x.isfinite().all() and bool(x.any()) == on_policy


@local_and_not
@pytest.mark.parametrize("shift", [-120.0, 1e4])
@pytest.mark.parametrize("peak", [0.0, 40.0])
def test_case_8_shifted_logits(spec: LossSpec, shift: float, peak: float, backend: str, device: str) -> None:
    """With the peak the entropy is 1e-15. Rounding must not make it negative."""
    case = random_case(replace(spec, entropy_coef=0.1), shape=(2, 4), device=device)
    bias = shift + peak * (torch.arange(V, device=device) == 7)
    case = case._replace(bias=bias, completion_ids=torch.full_like(case.completion_ids, 7))
    got, want = run_linear(case, backend=backend), linear_oracle(case)
    precision = torch.finfo(torch.float32).eps * abs(shift) + 1e-5
    for name in ("logps", "entropy"):
        value, exact = (getattr(out, name) for out in (got.out, want.by_logits.truth.out))
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=precision)
    assert (got.out.entropy >= 0).all()
    if not peak:
        for x, exact in zip(got.grads, want.truth, strict=True):
            assert relative_error(x.flatten(), exact.flatten()) < precision


@pytest.mark.parametrize("surrogate", [Reinforce(), reinforce], ids=["one pass", "two passes"])
class TestCase9HalfPrecision:
    def test_large_fp16_logits(self, surrogate: Any, backend: str, device: str) -> None:
        """Hidden states reach 6e4, so the logits exceed the range of fp16."""
        case = logits_case(LossSpec(surrogate), 2, 3, 67, bare=True, device=device)
        logits = (case.logits * 1000).clamp(-6e4, 6e4)
        logits[..., 11:13] = 6e4
        case.completion_ids[0] = 12
        case = case._replace(logits=logits.half()).with_options(temperature=0.5)
        got = run_linear(through_identity(case, scale=2.0), return_entropy=True, backend=backend)
        want = run(reference_loss, case.with_options(logit_scale=2.0).wide())
        # Log-probabilities of unlikely tokens are near -1e5, where fp32 has two digits after the point.
        torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=1e-5)
        assert float(relative_error(got.grads[0], want.grad).max()) < 2 * torch.finfo(torch.float16).eps

    def test_bf16_gradient_at_a_likely_token(self, surrogate: Any, backend: str, device: str) -> None:
        """If p is near 0.999, `1 - p` cancels and `-expm1(logp)` does not."""
        rows = 64  # the probabilities of the taken tokens lie between 0.998 and 0.9995
        case = logits_case(LossSpec(surrogate), 1, rows, 37, dtype=torch.bfloat16, bare=True, device=device)
        column = case.completion_ids[..., None]
        rest = case.logits.float().scatter(-1, column, -INF).logsumexp(-1, keepdim=True)
        likely = rest + torch.linspace(6.2, 7.6, rows, device=device)[None, :, None]
        case.logits.scatter_(-1, column, likely.bfloat16())
        expected: Oracle = oracle(case)
        grad = run_linear(through_identity(case), backend=backend).grads[0]
        taken = [x.gather(-1, column) for x in (grad, expected.eager.grad, expected.truth.grad)]
        assert_no_worse_than_eager(*taken, factor=4, what="gradient at the taken token")


@local_and_not
@layouts
class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 67, 2**31])
    def test_masked(self, spec: LossSpec, wrong: int, packed: bool, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        got = run_linear(laid_out(case._replace(completion_ids=ids), packed), backend=backend)
        clean = laid_out(case, packed)
        assert_same(got, run_linear(clean, backend=backend), clean, backend=backend)

    @pytest.mark.parametrize("wrong", [-100, -1, 123, 125, 2**31, 2**40])
    def test_unmasked(
        self,
        spec: LossSpec,
        wrong: int,
        packed: bool,
        backend: str,
        device: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Only 123 of the 128 rows are tokens. Ids 123 and 125 point to memory that could be read."""
        case = random_case(spec, shape=(2, 4), device=device).with_options(vocab_size=123)
        case.completion_ids.clamp_(max=122)[1, 2] = wrong
        case = laid_out(case, packed)
        got = run_linear(case, backend=backend)
        assert got.out.loss.isnan()
        assert got.out.logps.isnan().flatten().nonzero().tolist() == [[6]]
        if not spec.uses_callable:  # a callable couples tokens
            grad = got.grads[0].flatten(0, -2)
            assert grad[:6].isfinite().all() and grad[7:].isfinite().all() and grad[:6].any()
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
        place = "6" if packed else "1, 2"
        with pytest.raises(ValueError, match=rf"completion_ids\[{place}\] is {wrong}, outside \[0, 123\)"):
            run_linear(case, backend=backend)


@pytest.mark.parametrize("surrogate", [None, nothing], ids=["one pass", "two passes"])
@pytest.mark.parametrize("x", [1e-4, -1e-4])
def test_case_21_k3_near_zero(surrogate: Any, x: float, backend: str, device: str) -> None:
    """At x = 1e-4 `exp(x) - x - 1` is noise in fp32. `expm1(x) - x` is 5e-9, accurate to a percent."""
    case = random_case(LossSpec(Reinforce()), shape=(1, 8), device=device)
    logps = run_linear(case, backend=backend).out.logps
    ref_logps = logps + x
    exact = ref_logps.double() - logps.double()
    spec = LossSpec(surrogate, KL("k3", beta=1.0), aggregation=SUM)
    got = run_linear(case._replace(spec=spec).with_options(ref_logps=ref_logps), backend=backend)
    assert got.out.loss.item() == pytest.approx((torch.expm1(exact) - exact).sum().item(), rel=1e-2)
    # dk3/dlogp = -expm1(x). Reinforce has the gradient -A, so A = expm1(x) gives the same.
    linear = case._replace(spec=LossSpec(Reinforce(), aggregation=SUM), advantages=torch.expm1(exact))
    for grad, truth in zip(got.grads, linear_oracle(linear).truth, strict=True):
        assert float(relative_error(grad.flatten(), truth.flatten())) < 1e-2
