"""Precision of the linear form: 16-bit operands, autocast, and fp16 with a gradient scaler."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from linear_cases import (
    PPO,
    assert_gradients,
    from_logits,
    linear_oracle,
    local_and_not,
    random_case,
    run_linear,
)
from parity import every_branch, user_loss

from grpo_kernels import KL, LossSpec, PPOClip
from grpo_kernels.checks.tensors import arithmetic_dtype
from grpo_kernels.linear import config
from grpo_kernels.linear.gradients import GradientSums
from grpo_kernels.testing import relative_error
from grpo_kernels.vocab.dispatch import scale_rows


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep 16-bit operands as on a GPU. On a CPU each product then widens its operands."""
    monkeypatch.setattr(config, "multiplies_mixed", lambda device: True)


class TestPrecision:
    def test_the_weights_gradient_is_rounded_once(self) -> None:
        """A hundred chunks of bf16 operands give the error of one rounding."""
        case = random_case(dtype=torch.bfloat16, shape=(4, 50))
        truth = run_linear(case.to(torch.float64)).grads[1]
        got = run_linear(case, chunk_tokens=2).grads[1]
        rounded = relative_error(truth.bfloat16(), truth)
        assert float((relative_error(got, truth) / rounded).mean()) < 1.5

    @pytest.mark.parametrize(
        "spec", [PPO, LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1), LossSpec(user_loss)]
    )
    def test_mixed_products(self, spec: LossSpec, backend: str, device: str, mixed: None) -> None:
        """With 16-bit operands the gradient of the logits is held in bf16 as well."""
        case = from_logits(every_branch(spec, 1025, torch.bfloat16, device=device))
        expected = linear_oracle(case)
        for compact in (True, False):
            got = run_linear(case, chunk_tokens=5, compact=compact, backend=backend)
            exact = expected.by_logits.truth.out.logps
            torch.testing.assert_close(got.out.logps.double(), exact, rtol=0, atol=1e-5)
            assert_gradients(
                got.grads, expected.eager, expected.truth, expected.terms, expected.lengths, f"{compact = }"
            )

    @pytest.mark.parametrize("upstream", [1.0, 1 / 3])
    def test_the_weights_gradient_of_a_single_chunk(
        self, upstream: float, backend: str, device: str, mixed: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is never held in fp32, and rounded once, or once more if the backward multiplies it."""
        dtypes: list[torch.dtype] = []
        start = GradientSums.start

        def spy(self: GradientSums, vocab: int) -> None:
            assert self.out.dhidden is not None and self.out.dweight is not None
            dtypes.extend((self.out.dhidden.dtype, self.out.dweight.dtype))
            start(self, vocab)

        monkeypatch.setattr(GradientSums, "start", spy)
        case = random_case(dtype=torch.bfloat16, shape=(4, 50), device=device)
        options = {"upstream": upstream, "backend": backend, "vocab_size": 120}
        case.completion_ids.clamp_(max=119)
        truth = run_linear(case.to(torch.float64), upstream=upstream, vocab_size=120).grads[1]
        several, single = (run_linear(case, chunk_tokens=n, **options).grads[1] for n in (150, 200))
        wide, narrow = torch.float32, torch.bfloat16
        assert dtypes[-4:] == [wide, wide, wide, narrow]
        assert single.dtype == narrow and not single[120:].any()
        errors = [float(relative_error(x[:120], truth[:120]).mean()) for x in (several, single)]
        assert errors[1] < (1.1 if upstream == 1 else 2) * errors[0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_scaling(self, dtype: torch.dtype, backend: str, device: str) -> None:
        """A gradient times its upstream factor errs by a rounding in its own dtype."""
        x = torch.rand(1, 5, 70, dtype=dtype, device=device)
        factor = torch.tensor(1 / 3, dtype=arithmetic_dtype(x), device=device)
        want = (x.double() / 3).to(dtype)
        scale_rows(x, factor, backend)
        torch.testing.assert_close(x, want, rtol=torch.finfo(dtype).eps, atol=0)

    def test_accuracy_tables(self, mixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """The accuracy tables of docs/kernels.md hold on fewer tokens."""
        monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs" / "figures")
        tables = importlib.import_module("linear_accuracy")
        logps = tables.logp_errors(N=64)
        for ours, eager in zip(logps["linear_logps"], logps["eager, bf16 throughout"], strict=True):
            assert 50 * ours < eager
        weights = tables.weight_gradient_errors(tokens=2, H=64, V=1000)
        whole, rows = weights["linear_grpo_loss, 64 chunks"]
        best = weights["fp64, rounded to bf16"]
        summed = weights["64 chunks, summed in bf16"]
        assert whole < 1.5 * best[0] and rows < 2 * best[1]
        assert whole < summed[0] / 1.5 and rows < summed[1] / 1.5

    @local_and_not
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(
        self, dtype: torch.dtype, spec: LossSpec, backend: str, device: str, mixed: None
    ) -> None:
        """Parameters and gradients are fp32, and operands 16-bit, as in autocast's linear layer."""
        case = random_case(spec, device=device)
        with torch.autocast(device, dtype):
            got = run_linear(case, backend=backend)
        want = run_linear(case.to(dtype), backend=backend)
        assert all(x.dtype == torch.float32 for x in got.grads)
        assert torch.equal(got.out.logps, want.out.logps)
        for x, y in zip(got.grads, want.grads, strict=True):
            assert relative_error(x.flatten(), y.flatten()) < torch.finfo(dtype).eps

    @local_and_not
    def test_a_scaler_saves_fp16(self, spec: LossSpec, backend: str, device: str) -> None:
        """A scaler preserves gradients far below the smallest fp16 number."""
        case = random_case(spec, dtype=torch.float16, device=device).with_options(normalizer=2.0**20)
        got = run_linear(case, upstream=2.0**18, backend=backend)
        wide = run_linear(case.to(torch.float64), upstream=2.0**18, backend=backend)
        for x, y in zip(got.grads, wide.grads, strict=True):
            assert relative_error(x.flatten(), y.flatten()) < 2e-3
