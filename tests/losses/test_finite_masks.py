"""Logits that are masked with a finite number, and rows at both ends of the range of fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finite_masks import LOWEST, MASKS, cases
from parity import KLS, Case, assert_parity, oracle, run

from grpo_kernels import LossSpec, PPOClip, grpo_loss, selective_logps

V = 300  # two blocks and a partial one of the interpreter's 128 threads


@pytest.fixture(params=[False, True], ids=["two kernels", "in place"])
def path(request: pytest.FixtureRequest, backend: str) -> dict[str, Any]:
    return {"backend": backend, "inplace": request.param}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kl", ["exact", "exact_forward"])
@pytest.mark.parametrize("value", MASKS)
def test_policy_and_reference(value: float, kl: str, dtype: torch.dtype, path: dict[str, Any]) -> None:
    for what, case in cases(value, ("policy", "reference"), dtype, kl, V):
        assert_parity(oracle(case), what=what, return_entropy=True, **path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", MASKS)
def test_policy_only(value: float, dtype: torch.dtype, path: dict[str, Any]) -> None:
    for what, case in cases(value, ("policy",), dtype, "exact", V):
        assert_parity(oracle(case), what=what, return_entropy=True, **path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [value for value in MASKS if value >= -1e20])
def test_reference_only(value: float, dtype: torch.dtype, path: dict[str, Any]) -> None:
    """The exact KL is the policy's probability of the masked columns times the mask."""
    for what, case in cases(value, ("reference",), dtype, "exact", V):
        assert_parity(oracle(case), what=what, return_entropy=True, **path)


@pytest.mark.parametrize("value", [-1e10, -torch.inf])
def test_forward_kl_to_a_masked_reference(value: float, path: dict[str, Any]) -> None:
    """The forward KL is finite, because tokens without probability in the reference have no weight."""
    for what, case in cases(value, ("reference",), torch.float32, "exact_forward", V):
        assert_parity(oracle(case), what=what, return_entropy=True, **path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [*MASKS, 1e10, 1e20, 1e38, -LOWEST])
def test_a_row_of_one_number(value: float, dtype: torch.dtype, path: dict[str, Any]) -> None:
    """The distribution is uniform for any number."""
    value = min(max(value, torch.finfo(dtype).min), torch.finfo(dtype).max)
    logits = torch.full((1, 2, V), value, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[0, V - 1]])
    out = grpo_loss(logits.clone(), ids, torch.ones(1), return_entropy=True, **path)
    out.loss.backward()
    torch.testing.assert_close(out.logps, torch.full((1, 2), 1 / V).log())
    torch.testing.assert_close(out.entropy, torch.full((1, 2), float(V)).log())
    assert logits.grad is not None
    want = torch.full((1, 2, V), 1 / V).sub_(torch.nn.functional.one_hot(ids, V)) / 2
    torch.testing.assert_close(logits.grad, want.to(dtype))


@pytest.mark.parametrize("top", [1e9, 1e10, 1e20, 1e38])
def test_a_row_far_above_zero(top: float, path: dict[str, Any]) -> None:
    """Only the distances to the maximum count."""
    spacing = torch.tensor(top).nextafter(torch.tensor(torch.inf)) - top
    logits = torch.full((1, 2, V), -1.0)
    logits[..., 7], logits[..., 8] = top, top + spacing
    case = Case(LossSpec(PPOClip()), logits, torch.tensor([[7, 8]]), torch.ones(1), {})
    case = case.with_options(temperature=float(spacing))
    assert_parity(oracle(case), **path)


@pytest.mark.parametrize("value", MASKS)
def test_a_taken_token_that_is_masked(value: float, backend: str) -> None:
    """Its log-probability is the mask's distance from the rest, as in eager PyTorch. Its ratio is 0."""
    logits = torch.randn(1, 2, V, generator=torch.Generator().manual_seed(0))
    logits[..., 5] = value
    ids = torch.full((1, 2), 5)
    got = selective_logps(logits, ids, backend=backend)
    torch.testing.assert_close(got, logits.log_softmax(-1)[..., 5])
    case = Case(LossSpec(PPOClip()), logits, ids, torch.ones(1), {"old_logps": torch.full((1, 2), -3.0)})
    result = run(grpo_loss, case, backend=backend)
    assert float(result.out.loss) == 0
    assert bool((result.grad == 0).all())


def test_equal_rows_have_no_divergence(backend: str) -> None:
    """The KL is exactly 0, also at temperatures whose products with the logits are not representable."""
    logits = 9 * torch.randn(1, 4, V, generator=torch.Generator().manual_seed(0))
    logits[..., 1::5] = -1e10
    case = Case(LossSpec(PPOClip(), KLS["exact"]), logits, torch.tensor([[0, 2, 3, 4]]), torch.ones(1), {})
    for temperature in (1.0, 0.3, 0.7):
        out = run(grpo_loss, case, backend=backend, ref_logits=logits, temperature=temperature).out
        assert float(out.metrics["kl_exact"]) <= 1e-7
        assert torch.equal(out.ref_logps, out.logps)
