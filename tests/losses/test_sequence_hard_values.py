"""Hard cases from logits with a sequence-level ratio: extreme values, invalid ids, zero coefficients.

The cases have the numbers of test_hard_values.py. test_coupled_tokens.py has more tests of infinite ratios.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import INF, NAN, Options, assert_same_bits, bounded, dtypes, every_tensor
from parity import Case, Result, run
from sequence_cases import LOSSES, every_term, laid_out, layouts, levels, losses, random_case
from torch import Tensor

from grpo_kernels import DRO, KL, ImportanceRatio, LossSpec, PPOClip, grpo_loss
from grpo_kernels.reference import reference_loss


def with_ratio(log_ratio: float, advantage: float, spec: LossSpec, device: str) -> Case:
    """Return a sequence with the mean log-ratio `log_ratio`, and one that is on-policy without advantage.

    The log-ratios of the first sequence are 0.5, 1 and 1.5 times `log_ratio`. Its fourth token is masked.
    """
    case = random_case(spec, 2, 4, 37, bare=True, device=device)
    logps = run(reference_loss, case._replace(spec=LossSpec(PPOClip()))).out.logps
    off = log_ratio * torch.tensor([[0.5, 1.0, 1.5, -9.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    mask = torch.tensor([[True, True, True, False], [True] * 4], device=device)
    advantages = torch.tensor([advantage, 0.0], device=device)
    return case._replace(advantages=advantages).with_options(old_logps=logps - off, completion_mask=mask)


@levels
@layouts
class TestCases1And2HugeRatio:
    """A mean log-ratio of +200: exp(200) is inf in fp32, and inf * 0 is NaN."""

    @dtypes
    @pytest.mark.parametrize(
        "surrogate, loss",
        [(PPOClip(eps_high=0.28), -1.28), (ImportanceRatio(max_ratio=5.0), -5.0)],
        ids=["PPO", "ratio"],
    )
    def test_case_1_positive_advantage(
        self,
        path: Options,
        device: str,
        dtype: torch.dtype,
        surrogate: Any,
        loss: float,
        packed: bool,
        level: str,
    ) -> None:
        spec = LossSpec(surrogate, level=level, aggregation="seq-mean-token-mean")
        case = with_ratio(200.0, 1.0, spec, device)
        got = run(grpo_loss, laid_out(case._replace(logits=case.logits.to(dtype)), packed), **path)
        assert got.out.loss.item() == pytest.approx(loss / 2, rel=1e-6)
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
        packed: bool,
        level: str,
    ) -> None:
        """The clamp applies to the log-ratio of the sequence."""
        spec = LossSpec(surrogate, level=level, aggregation="seq-mean-token-mean", log_ratio_clamp=clamp)
        got = run(grpo_loss, laid_out(with_ratio(log_ratio, -1.0, spec, device), packed), **path)
        clamped = INF if clamp is None else clamp
        ratio = INF if min(log_ratio, clamped) > 100 else math.exp(min(log_ratio, clamped))
        assert got.out.loss.item() == pytest.approx(min(ratio, bound) / 2, rel=1e-5)
        flat = ratio > bound or log_ratio > clamped
        assert got.out.loss.isinf() or bool(got.grad.any()) != flat


@layouts
class TestCase3ZeroAdvantage:
    """DRO is excluded: its square ignores the advantage."""

    @pytest.mark.parametrize("anchor", [1e4, -INF, NAN])
    @pytest.mark.parametrize(
        "spec",
        [spec for spec in LOSSES.values() if not isinstance(spec.surrogate, DRO)],
        ids=[name for name, spec in LOSSES.items() if not isinstance(spec.surrogate, DRO)],
    )
    def test_any_ratio(self, path: Options, device: str, spec: LossSpec, anchor: float, packed: bool) -> None:
        """The anchor of a sequence without advantage does not affect the other sequence."""
        anchors = torch.full((2, 3), -3.0, device=device)
        case = random_case(spec, 2, 3, 37, bare=True, device=device)
        case = case._replace(advantages=torch.tensor([0.0, 1.0], device=device))
        case = case.with_options(old_logps=anchors, ref_logps=anchors)
        want = run(grpo_loss, laid_out(case, packed), **path)
        anchors[0, 1] = anchor
        got = run(grpo_loss, laid_out(case, packed), **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        grad = got.grad.view(2, 3, 37)
        assert not grad[0].any() and got.out.loss.isfinite()
        assert got.out.metrics["active_fraction"].item() == (grad[1] != 0).any(-1).sum().item() / 6

    @levels
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_logits(self, path: Options, device: str, value: float, level: str, packed: bool) -> None:
        case = random_case(LossSpec(PPOClip(), level=level), 2, 3, 37, bare=True, device=device)
        case.advantages[0] = 0
        want = run(grpo_loss, laid_out(case, packed), **path)
        case.logits[0, 1, 5] = value
        got = run(grpo_loss, laid_out(case, packed), **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        assert got.grad.any() and not got.grad.view(2, 3, 37)[0].any()


@layouts
class TestCase4Poison:
    @dtypes
    @losses
    def test_masked(
        self, backend: str, device: str, spec: LossSpec, dtype: torch.dtype, packed: bool
    ) -> None:
        case = random_case(every_term(spec), 3, 4, 67, dtype=dtype, seed=1, inactive=0, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()

        def filled(values: Tensor) -> Result:
            def fill(name: str, x: Tensor) -> Tensor:
                if not x.is_floating_point() or x.dim() == 1:
                    return x
                there = values.to(x.dtype).expand(3, 4)
                if x.dim() == 2:
                    return torch.where(mask, x, there)
                return torch.where(mask[..., None], x, there[..., None])

            return run(grpo_loss, laid_out(every_tensor(case, fill), packed), backend=backend)

        # The values take turns along the tokens.
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)
        got = filled(poison.roll(1))
        assert_same_bits(got, filled(poison.new_zeros(4)))
        grad = got.grad.view(case.logits.shape)
        assert grad[mask].any() and not grad[~mask].any() and got.out.loss.isfinite()

    @levels
    @pytest.mark.parametrize(
        "name", ["logits", "advantages", "old_logps", "ref_logits", "token_weights", "temperature"]
    )
    def test_unmasked_nan_surfaces(
        self, backend: str, device: str, name: str, level: str, packed: bool
    ) -> None:
        """NaN reaches the gradient of its own sequence and of no other."""
        spec = every_term(LossSpec(ImportanceRatio(), level=level))
        case = random_case(spec, 2, 3, 37, masked=0, inactive=0, device=device)
        (getattr(case, name) if name in case._fields else case.options[name])[0] = NAN
        got = run(grpo_loss, laid_out(case, packed), backend=backend)
        grad = got.grad.view(2, 3, 37)
        assert got.out.loss.isnan()
        assert grad[0].isnan().any() and grad[1].isfinite().all() and grad[1].any()


@levels
@layouts
def test_case_5_zero_beta_reads_no_reference(backend: str, device: str, level: str, packed: bool) -> None:
    case = random_case(LossSpec(PPOClip(), level=level), 2, 3, 37, device=device)
    case = case.with_options(ref_logits=None)
    want = run(grpo_loss, laid_out(case, packed), backend=backend)
    kl = KL("k3", beta=0.0, ratio_corrected=True)
    ref_logps = torch.full((2, 3), NAN, device=device)
    got = case._replace(spec=replace(case.spec, kl=kl)).with_options(ref_logps=ref_logps)
    got = run(grpo_loss, laid_out(got, packed), backend=backend)
    assert_same_bits(Result(got.out._replace(ref_logps=None), got.grad), want)


@levels
@layouts
@pytest.mark.parametrize("on_policy", [False, True])
def test_case_7_a_taken_token_is_impossible(
    backend: str, device: str, on_policy: bool, level: str, packed: bool
) -> None:
    """Off-policy a sequence has ratio exp(-inf) = 0 and gradient 0. On-policy they are 1 and -A."""
    spec = LossSpec(PPOClip(), level=level, aggregation="seq-mean-token-mean")
    case = random_case(spec, 1, 3, 37, bare=True, device=device)
    case = case._replace(advantages=torch.ones(1, device=device))
    case.logits[0, 1, case.completion_ids[0, 1]] = -INF
    if not on_policy:
        case = case.with_options(old_logps=torch.full((1, 3), -3.0, device=device))
    out, grad = run(grpo_loss, laid_out(case, packed), backend=backend)
    assert out.loss.item() == -on_policy
    assert out.metrics["ratio"].item() == on_policy
    assert grad.isfinite().all() and bool(grad.any()) == on_policy


@layouts
class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 2**31])
    @losses
    def test_masked(self, backend: str, device: str, spec: LossSpec, wrong: int, packed: bool) -> None:
        case = random_case(every_term(spec), 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        got = run(grpo_loss, laid_out(case._replace(completion_ids=ids), packed), backend=backend)
        assert_same_bits(got, run(grpo_loss, laid_out(case, packed), backend=backend))

    @levels
    @pytest.mark.parametrize("wrong", [-100, -1, 67, 70, 2**31, 2**40])
    def test_unmasked(
        self,
        backend: str,
        device: str,
        wrong: int,
        level: str,
        packed: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Only 67 of the 72 columns are tokens. Ids 67 and 70 point to memory that could be read."""
        case = random_case(LossSpec(PPOClip(), level=level), 2, 2, 72, bare=True, device=device)
        case = case.with_options(vocab_size=67)
        case.completion_ids.clamp_(max=66)[1, 0] = wrong
        case = laid_out(case, packed)
        out, grad = run(grpo_loss, case, backend=backend)
        grad = grad.view(2, 2, 72)
        assert out.loss.isnan()
        assert out.logps.isnan().flatten().nonzero().tolist() == [[2]]
        assert grad[0].isfinite().all() and grad[0].any()
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
        place = "2" if packed else "1, 0"
        with pytest.raises(ValueError, match=rf"completion_ids\[{place}\] is {wrong}, outside \[0, 67\)"):
            run(grpo_loss, case, backend=backend)
