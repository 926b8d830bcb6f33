"""One test for each failure that random search has found."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    DPPO,
    GMPO,
    KL,
    VESPO,
    ImportanceRatio,
    LossSpec,
    PPOClip,
    group_advantages,
    grpo_loss,
    selective_logps,
)
from grpo_kernels.linear import config
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.weights import importance_weights

OneToken = Callable[[float, float, float], tuple[float, float]]


def normalized(rewards: Tensor) -> Tensor:
    """Return the advantages of one group in fp64."""
    r = rewards.double()
    return (r - r.mean()) / (r.std() + 1e-4)


class TestRewards:
    """Rewards of one group in fp32."""

    def test_whose_squares_overflow(self) -> None:
        """The standard deviation was inf, so every advantage was 0, without an error."""
        rewards = torch.tensor([3e20, -1e20, 1e20])
        got = group_advantages(rewards, group_size=3)
        torch.testing.assert_close(got.double(), normalized(rewards), rtol=1e-5, atol=0)

    def test_far_from_zero_with_a_small_spread(self) -> None:
        """The mean was rounded to fp32, which changed every advantage by 0.013."""
        rewards = torch.tensor([100.0, 100.001, 100.002, 100.0015]).repeat(4)
        got = group_advantages(rewards, group_size=16)
        torch.testing.assert_close(got.double(), normalized(rewards), rtol=1e-5, atol=1e-5)

    def test_whose_squares_underflow(self) -> None:
        rewards = torch.tensor([0.0, 1e-25])
        got = group_advantages(rewards, group_size=2, eps=0.0)
        torch.testing.assert_close(got, torch.tensor([-1.0, 1.0]) / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_importance_weights_in_the_dtype_of_logps(dtype: torch.dtype) -> None:
    """The weights had the sampler's dtype if that was wider."""
    logps, sampler = torch.tensor([[-1.0]], dtype=dtype), torch.tensor([[-1.5]], dtype=torch.float64)
    for level in ("token", "sequence"):
        assert importance_weights(logps, sampler, torch.ones(1, 1), level=level).dtype == dtype


class TestCorrectedK3:
    """`ratio * (exp(x) - 1 - x)` with `x = ref_logp - logp`. d/dlogp is `-ratio * x`."""

    @pytest.fixture(params=["two steps", "in place"])
    def of_one_token(self, request: pytest.FixtureRequest, backend: str, device: str) -> OneToken:
        def run(logp: float, old_logp: float, ref_logp: float) -> tuple[float, float]:
            """Return the loss of one token without advantage, and its derivative with respect to logp."""
            leaf = torch.tensor([[[logp, 0.0]]], device=device, requires_grad=True)
            spec = LossSpec(PPOClip(), KL("k3", beta=1.0, ratio_corrected=True))
            inplace = request.param == "in place"
            ids, zero = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, device=device)
            old_logps, ref_logps = (torch.full((1, 1), x, device=device) for x in (old_logp, ref_logp))
            out = grpo_loss(
                leaf.clone(), ids, zero, spec=spec, old_logps=old_logps, ref_logps=ref_logps,
                backend=backend, inplace=inplace,
            )  # fmt: skip
            out.loss.backward()
            assert leaf.grad is not None
            return out.loss.item(), leaf.grad[0, 0, 0].item()  # 1 - p is 1 at these logits

        return run

    @pytest.mark.parametrize("x", [17.0, 20.0, 40.0])
    def test_gradient_far_from_the_reference(self, of_one_token: OneToken, x: float) -> None:
        """The gradient was the difference of exp(x) and exp(x) - x, which is -32 at x = 20."""
        loss, slope = of_one_token(-x - 0.5, -x - 0.5, -0.5)
        assert loss == pytest.approx(math.exp(x) - 1 - x, rel=1e-4)
        assert slope == pytest.approx(-x, rel=1e-4)

    @pytest.mark.parametrize(
        "logp, old_logp, ref_logp", [(-110.0, -5.0, -5.0), (-95.0, -60.0, -40.0), (-200.0, -120.0, -100.0)]
    )
    def test_of_a_token_that_the_policy_has_all_but_ruled_out(
        self, of_one_token: OneToken, logp: float, old_logp: float, ref_logp: float
    ) -> None:
        """The product of ratio and k3 was 0 * inf = NaN. It is exp(ref_logp - old_logp)."""
        loss, slope = of_one_token(logp, old_logp, ref_logp)
        ratio, x = math.exp(logp - old_logp), ref_logp - logp
        assert loss == pytest.approx(math.exp(ref_logp - old_logp) - ratio * (1 + x), rel=1e-4)
        assert slope == pytest.approx(-ratio * x, rel=1e-3, abs=1e-37)


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_a_ratio_that_vanishes_is_not_outside_of_the_region(kind: str) -> None:
    """A change from 5e-5 to 0 is below the bound of 0.5, but its weight of 0 counted as clipped."""
    logps, old_logps = torch.tensor([[-210.0]]), torch.tensor([[-10.0]])
    out = policy_loss(logps, torch.ones(1), old_logps=old_logps, spec=LossSpec(DPPO(kind, 0.5, 0.5)))
    assert out.metrics["clip_fraction"] == 0


def test_bf16_logits_of_a_reference_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies 16-bit operands into fp32 or their own dtype, but not fp16 into bf16."""
    monkeypatch.setattr(config, "multiplies_mixed", lambda device: True)
    operands, logits = config.held_dtypes(torch.empty(1, dtype=torch.float16), torch.bfloat16)
    assert logits in (operands, torch.float32)


class TestOracle:
    """Failures of `reference_loss` itself."""

    @pytest.mark.parametrize("surrogate", [VESPO(), GMPO()], ids=["VESPO", "GMPO"])
    def test_knows_the_clamp_of_log_ratios(self, surrogate: object) -> None:
        self.compare(LossSpec(surrogate, log_ratio_clamp=0.05))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "spec",
        [
            LossSpec(PPOClip(0.0, 0.0)),
            LossSpec(PPOClip(0.0, 0.0, delta=1.0)),
            LossSpec(PPOClip(0.0, 0.0), level="sequence"),
            LossSpec(ImportanceRatio(max_ratio=1.0)),
            LossSpec(GMPO(0.0, 0.0)),
        ],
        ids=["clip", "clip, delta", "clip, sequence", "importance ratio", "GMPO"],
    )
    def test_a_ratio_on_its_bound_keeps_its_gradient(self, spec: LossSpec) -> None:
        """By `Tensor.clamp` it had none from torch 2.14 on."""
        self.compare(spec, old_logps=None)

    def test_counts_the_weight_of_a_sequence_once(self) -> None:
        """The weight scales VESPO's ratio once. It was counted once per token."""
        self.compare(LossSpec(VESPO()), token_weights=torch.tensor([[0.5], [0.8]]))

    @staticmethod
    def compare(spec: LossSpec, **options: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
        ids, advantages = torch.randint(7, (2, 3), generator=generator), torch.tensor([1.0, -1.0])
        logps = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
        options.setdefault("old_logps", logps - torch.tensor([[0.1, 0.2, -0.05], [-0.1, 0.2, -0.3]]))
        found = []
        for loss in (grpo_loss, reference_loss):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, ids, advantages, spec=spec, **options).loss  # type: ignore[operator]
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_the_tail_of_a_peaked_row(backend: str, device: str, return_entropy: bool) -> None:
    """PyTorch's log_softmax on a CPU, which was used here, drops small terms and errs by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, 32000, generator=generator)
    ids = torch.randint(32000, (64,), generator=generator)
    logits[torch.arange(64), ids] = 14.0
    truth = torch.log_softmax(logits.double(), -1)[torch.arange(64), ids]
    options = {"return_entropy": return_entropy, "backend": backend}
    found = selective_logps(logits.to(device), ids.to(device), **options)
    logps = found[0] if return_entropy else found
    assert float((logps.cpu().double() - truth).abs().max()) < 2e-6
