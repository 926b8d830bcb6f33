"""Hard cases from logits at the token level: extreme values, invalid ids, zero coefficients.

The tests of hard cases share the numbering of the cases. They compare with the fp64 reference, unless the
case states a rule such as "the gradient is exactly 0". The fixture `path` runs each of them on both backends
and with the gradient written in the forward and in the backward.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hard_cases import (
    INF,
    NAN,
    SUM,
    TWO_BLOCKS,
    Options,
    assert_right,
    assert_same_bits,
    bounded,
    by_ratio,
    dtypes,
    every_tensor,
    random_case,
    specs,
)
from parity import SURROGATES, Case, Result, oracle, run
from torch import Tensor

from grpo_kernels import KL, ImportanceRatio, LossSpec, PPOClip, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.spec.surrogates import Surrogate
from grpo_kernels.testing import assert_no_worse_than_eager, relative_error


def with_ratio(log_ratio: float, surrogate: Any, advantage: float, *, device: str, **spec: Any) -> Case:
    """Return a batch of one token with this log-ratio to the behavior policy."""
    case = random_case(LossSpec(surrogate, **spec), 1, 1, 37, bare=True, device=device)
    logps = run(reference_loss, case._replace(spec=LossSpec(Reinforce()))).out.logps
    return case._replace(advantages=torch.full_like(logps, advantage)).with_options(
        old_logps=logps - log_ratio
    )


class TestCases1And2HugeRatio:
    """Log-ratio +200: exp(200) is inf in fp32, and inf * 0 is NaN."""

    @dtypes
    @pytest.mark.parametrize(
        "surrogate, loss",
        [(PPOClip(eps_high=0.28), -1.28), (ImportanceRatio(max_ratio=5.0), -5.0)],
        ids=["PPO", "ratio"],
    )
    def test_case_1_positive_advantage(
        self, path: Options, device: str, dtype: torch.dtype, surrogate: Any, loss: float
    ) -> None:
        case = with_ratio(200.0, surrogate, 1.0, device=device)
        got = run(grpo_loss, case._replace(logits=case.logits.to(dtype)), **path)
        assert got.out.loss.item() == pytest.approx(loss, rel=1e-6)
        assert not got.grad.any()

    @pytest.mark.parametrize("log_ratio", [200.0, 3.0])
    @bounded
    def test_case_2_negative_advantage(
        self,
        path: Options,
        device: str,
        surrogate: PPOClip,
        clamp: float | None,
        bound: float,
        log_ratio: float,
    ) -> None:
        case = with_ratio(log_ratio, surrogate, -1.0, device=device, log_ratio_clamp=clamp)
        got = run(grpo_loss, case, **path)
        clamped = INF if clamp is None else clamp
        ratio = INF if min(log_ratio, clamped) > 100 else math.exp(min(log_ratio, clamped))
        assert got.out.loss.item() == pytest.approx(min(ratio, bound), rel=1e-5)
        flat = ratio > bound or log_ratio > clamped
        assert got.out.loss.isinf() or bool(got.grad.any()) != flat

    @pytest.mark.parametrize("log_ratio", [1.0, -1.0])
    @pytest.mark.parametrize("clamp", [0.5, 1.5])
    def test_the_clamp_bites_beyond_itself_only(
        self, path: Options, device: str, log_ratio: float, clamp: float
    ) -> None:
        case = with_ratio(log_ratio, ImportanceRatio(), 1.0, device=device, log_ratio_clamp=clamp)
        got = run(grpo_loss, case, **path)
        assert got.out.loss.item() == pytest.approx(
            -math.exp(math.copysign(min(1.0, clamp), log_ratio)), rel=1e-5
        )
        assert bool(got.grad.any()) == (clamp > 1)


class TestCase3ZeroAdvantage:
    """An advantage of 0 gives loss 0 and gradient 0, except in DRO, whose square ignores the advantage."""

    @specs(
        *(
            name
            for name, surrogate in SURROGATES.items()
            if isinstance(surrogate, Surrogate) and surrogate.zero_without_advantage
        )
    )
    def test_any_ratio(self, path: Options, device: str, spec: LossSpec) -> None:
        anchors = torch.tensor([[0.0, -1e4, 1e4, -INF, INF, NAN]], device=device)
        case = random_case(spec, 1, 6, 37, bare=True, device=device).with_options(
            old_logps=anchors, ref_logps=anchors
        )
        got = run(grpo_loss, case._replace(advantages=torch.zeros(1, device=device)), **path)
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert got.out.metrics["active_fraction"].item() == 0

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_logits(self, path: Options, device: str, value: float) -> None:
        case = random_case(LossSpec(Reinforce()), 2, 3, 37, bare=True, device=device)
        case.advantages[0] = 0
        want = run(grpo_loss, case, **path)
        case.logits[0, :, 5] = value
        got = run(grpo_loss, case, **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        assert got.grad.any() and not got.grad[0].any()


class TestCase4Poison:
    """Values at masked positions have no effect, and NaN at an unmasked position reaches the loss."""

    @dtypes
    @specs()
    def test_masked(self, path: Options, device: str, spec: LossSpec, dtype: torch.dtype) -> None:
        case = random_case(spec, 3, 4, 67, dtype=dtype, seed=1, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)  # in turn along the tokens

        def fill(name: str, x: Tensor, values: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            values = values.to(x.dtype).expand(3, 4)
            return (
                torch.where(mask, x, values)
                if x.dim() == 2
                else torch.where(mask[..., None], x, values[..., None])
            )

        got = run(grpo_loss, every_tensor(case, lambda name, x: fill(name, x, poison.roll(1))), **path)
        want = run(grpo_loss, every_tensor(case, lambda name, x: fill(name, x, poison.new_zeros(4))), **path)
        assert_same_bits(got, want)
        assert got.grad[mask].any() and not got.grad[~mask].any()
        assert got.out.loss.isfinite()

    @specs()
    def test_nan_logits_surface(self, path: Options, device: str, spec: LossSpec) -> None:
        case = random_case(spec, 2, 2, 37, masked=0, inactive=0, device=device)
        case.logits[0, 0, 3] = NAN
        got = run(grpo_loss, case, **path)
        assert got.out.loss.isnan()
        assert got.grad[0, 0].isnan().any() and not got.grad[1].isnan().any()

    @by_ratio
    def test_nan_logits_surface_on_policy(self, path: Options, device: str, surrogate: Any) -> None:
        """On-policy the ratio is 1 for every log-probability, but NaN is not a log-probability."""
        case = random_case(LossSpec(surrogate), 1, 1, 37, bare=True, device=device)
        case.logits[..., 3] = NAN
        assert run(grpo_loss, case, **path).out.loss.isnan()

    @pytest.mark.parametrize(
        "name", ["advantages", "old_logps", "ref_logits", "token_weights", "temperature"]
    )
    def test_nan_elsewhere_surfaces(self, path: Options, device: str, name: str) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 2, 2, 37, masked=0, inactive=0, device=device)
        (case.advantages if name == "advantages" else case.options[name])[0, 0] = NAN
        assert run(grpo_loss, case, **path).out.loss.isnan()


def test_case_5_zero_beta_reads_no_reference(path: Options, device: str) -> None:
    case = random_case(LossSpec(PPOClip()), 2, 3, 37, device=device).with_options(ref_logits=None)
    want = run(grpo_loss, case, **path)
    for kl, ref_logps in [
        (KL("k3", beta=0.0), None),
        (KL("exact", beta=0.0), None),
        (KL("k3", beta=0.0, ratio_corrected=True), torch.full((2, 3), NAN, device=device)),
    ]:
        got = run(
            grpo_loss, case._replace(spec=LossSpec(PPOClip(), kl)).with_options(ref_logps=ref_logps), **path
        )
        assert_same_bits(Result(got.out._replace(ref_logps=None), got.grad), want)


@dtypes
# Trainers suppress tokens with these values: one token, or a first block of a kernel.
@pytest.mark.parametrize("value", [-INF, -1e4, -3e38])
@pytest.mark.parametrize("blocked", [1, 2048, 4096])
@specs("Reinforce", "entropy", "exact KL", "forward KL")
def test_case_6_suppressed_tokens(
    path: Options, device: str, spec: LossSpec, blocked: int, value: float, dtype: torch.dtype
) -> None:
    """A running maximum that starts at -inf gives NaN here. One that starts at -3e38 overflows if scaled."""
    vocab = 37 if blocked == 1 else 5000
    case = random_case(spec, 1, 2, vocab, dtype=dtype, bare=True, device=device)
    if spec.kl is not None:
        case = case.with_options(
            ref_logits=case.logits + torch.linspace(-1, 1, vocab, device=device).to(dtype)
        )
        case.options["ref_logits"][..., :blocked] = value
    case.logits[..., :blocked] = value
    assert_right(case._replace(completion_ids=case.completion_ids.clamp(min=blocked)), **path)


class TestCase7Degenerate:
    @dtypes
    @specs("Reinforce", "entropy")
    @pytest.mark.parametrize("vocab, target", [(37, 5), (TWO_BLOCKS, 0), (TWO_BLOCKS, TWO_BLOCKS - 1)])
    def test_only_the_taken_token_is_finite(
        self, path: Options, device: str, spec: LossSpec, vocab: int, target: int, dtype: torch.dtype
    ) -> None:
        case = random_case(spec, 1, 1, vocab, bare=True, dtype=dtype, device=device)
        case.logits.fill_(-INF)[..., target] = 3.0
        out, grad = run(
            grpo_loss, case._replace(completion_ids=torch.full_like(case.completion_ids, target)), **path
        )
        assert out.loss.item() == out.logps.item() == 0
        assert out.entropy is None or out.entropy.item() == 0
        assert not grad.any()

    @by_ratio
    @pytest.mark.parametrize("on_policy", [False, True])
    def test_the_taken_token_is_impossible(
        self, path: Options, device: str, surrogate: Any, on_policy: bool
    ) -> None:
        """Off-policy the ratio is exp(-inf) = 0 and so is the gradient. On-policy they are 1 and -A."""
        case = with_ratio(0.0, surrogate, 1.0, device=device)
        case.logits.scatter_(-1, case.completion_ids[..., None], -INF)
        out, grad = run(grpo_loss, case.with_options(old_logps=None) if on_policy else case, **path)
        assert out.loss.item() == -on_policy
        assert out.metrics["ratio"].item() == on_policy
        assert grad.isfinite().all()
        assert bool(grad.any()) == on_policy


@pytest.mark.parametrize("shift", [-120.0, 1e4])
@pytest.mark.parametrize("vocab", [37, TWO_BLOCKS])
@specs("Reinforce", "entropy")
def test_case_8_shifted_logits(path: Options, device: str, spec: LossSpec, shift: float, vocab: int) -> None:
    """The error is the rounding of the fp32 logits. A difference of two large logarithms would lose more."""
    case = random_case(spec, 2, 2, vocab, bare=True, device=device)
    case.logits.add_(shift)
    # The entropy of this row is 1e-14. Rounding must not make it negative.
    case.logits[1] = shift + 40.0 * (torch.arange(vocab, device=device) == 7)
    case.completion_ids[1] = 7
    got, want = run(grpo_loss, case, **path), run(reference_loss, case.wide())
    precision = torch.finfo(torch.float32).eps * abs(shift) + 1e-5
    torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=0, atol=precision)
    if spec.entropy_coef:
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=precision)
        assert (got.out.entropy >= 0).all()
    assert float(relative_error(got.grad[0], want.grad[0]).max()) < precision


class TestCase9HalfPrecision:
    def test_large_fp16_logits(self, path: Options, device: str) -> None:
        """Scaled, or divided by the temperature, these logits exceed the range of fp16."""
        case = random_case(LossSpec(Reinforce()), 2, 3, 67, bare=True, device=device)
        logits = (case.logits * 1000).clamp(-6e4, 6e4)
        logits[..., 11:13] = 6e4
        case.completion_ids[0] = 12
        case = case._replace(logits=logits.half()).with_options(temperature=0.5, logit_scale=2.0)
        got, want = run(grpo_loss, case, return_entropy=True, **path), run(reference_loss, case.wide())
        # Log-probabilities of unlikely tokens are near -1e5, where fp32 has two digits after the point.
        torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=1e-5)
        assert float(relative_error(got.grad, want.grad).max()) < 2 * torch.finfo(torch.float16).eps

    def test_bf16_gradient_at_a_likely_token(self, path: Options, device: str) -> None:
        """If p is near 0.999, `1 - p` cancels and `-expm1(logp)` does not."""
        rows = 64  # the probabilities of the taken tokens lie between 0.998 and 0.9995
        case = random_case(LossSpec(Reinforce()), 1, rows, 37, dtype=torch.bfloat16, bare=True, device=device)
        column = case.completion_ids[..., None]
        rest = case.logits.float().scatter(-1, column, -INF).logsumexp(-1, keepdim=True)
        likely = rest + torch.linspace(6.2, 7.6, rows, device=device)[None, :, None]
        case.logits.scatter_(-1, column, likely.bfloat16())
        expected = oracle(case)
        taken = [
            x.gather(-1, column)
            for x in (run(grpo_loss, case, **path).grad, expected.eager.grad, expected.truth.grad)
        ]
        assert_no_worse_than_eager(*taken, factor=4, what="gradient at the taken token")


class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 67, 2**31])
    @specs("PPOClip", "exact KL")
    def test_masked(self, path: Options, device: str, spec: LossSpec, wrong: int) -> None:
        case = random_case(spec, 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        assert_same_bits(
            run(grpo_loss, case._replace(completion_ids=ids), **path), run(grpo_loss, case, **path)
        )

    @pytest.mark.parametrize("wrong", [-100, -1, 67, 70, 2**31, 2**40])
    @specs("PPOClip", "Reinforce")
    def test_unmasked(self, path: Options, device: str, spec: LossSpec, wrong: int) -> None:
        """Only 67 of the 72 columns are tokens. Ids 67 and 70 point to memory that could be read."""
        case = random_case(spec, 2, 2, 72, bare=True, device=device).with_options(vocab_size=67)
        ids = case.completion_ids.clamp(max=66)
        ids[1, 0] = wrong
        out, grad = run(grpo_loss, case._replace(completion_ids=ids), **path)
        assert out.loss.isnan()
        assert out.logps.isnan().nonzero().tolist() == [[1, 0]]
        assert grad[0].isfinite().all() and grad[0].any()


@pytest.mark.parametrize("x", [1e-4, -1e-4])
def test_case_21_k3_near_zero(path: Options, device: str, x: float) -> None:
    """At x = 1e-4 `exp(x) - x - 1` is noise in fp32. `expm1(x) - x` is 5e-9, accurate to a percent."""
    case = random_case(LossSpec(Reinforce()), 1, 8, 37, bare=True, device=device)
    logps = run(grpo_loss, case, **path).out.logps
    ref_logps = logps + x
    exact = ref_logps.double() - logps.double()
    spec = LossSpec(None, KL("k3", beta=1.0), aggregation=SUM)
    got = run(grpo_loss, case._replace(spec=spec).with_options(ref_logps=ref_logps), **path)
    assert got.out.loss.item() == pytest.approx((torch.expm1(exact) - exact).sum().item(), rel=1e-2)
    # dk3/dlogp = -expm1(x). Reinforce has the gradient -A, so A = expm1(x) gives the same.
    linear = case._replace(spec=LossSpec(Reinforce(), aggregation=SUM), advantages=torch.expm1(exact))
    assert float(relative_error(got.grad, run(reference_loss, linear.wide()).grad).max()) < 1e-2
