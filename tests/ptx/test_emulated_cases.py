"""Finite masks and sure tokens in the compiled kernels, which the emulator runs.

The interpreter runs the same masks in tests/losses/test_finite_masks.py. It does not contract products and
sums, and so it is right where a GPU may be wrong.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from finite_masks import LOWEST, MASKS, batch_of_masks, masked
from parity import KLS, Case, assert_parity, every_branch, oracle, run
from sure_tokens import BOUNDS, assert_gradient, assert_relative, sure_tokens, truth_of

from grpo_kernels import KL, LossSpec, PPOClip, Reinforce, grpo_loss, selective_logps

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
pytest.importorskip("triton")

from emulator import Mode, emulated  # noqa: E402

V = 600  # a block of 512 columns and a part of one in fp32
SIZES = {"fp32": V, "bf16": 1100}  # in bf16, a block has 1024 columns
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# From 1e20 on, a mask in the reference alone makes the KL overflow.
REFERENCE_MASKS = [value for value in MASKS if value >= -1e20]
BOTH = ("policy", "reference")


def check(case: Case, mode: Mode | None = None, **options: Any) -> None:
    given = oracle(case)
    for inplace in (False, True):
        what = "in place" if inplace else "two kernels"
        with emulated(mode=mode):
            assert_parity(given, what=what, backend="triton", return_entropy=True, inplace=inplace, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("names", "kl", "values"),
    [
        pytest.param(BOTH, "exact", MASKS, id="both"),
        pytest.param(BOTH, "exact_forward", MASKS, id="both, forward KL"),
        pytest.param(("policy",), "exact", MASKS, id="policy"),
        pytest.param(("reference",), "exact", REFERENCE_MASKS, id="reference"),
        pytest.param(("reference",), "exact_forward", [-1e10, -torch.inf], id="reference, forward KL"),
    ],
)
def test_finite_masks(names: tuple[str, ...], kl: str, values: list[float], dtype: str) -> None:
    """One batch has all these masks in every pattern, at temperatures of 0.1 to 1."""
    check(batch_of_masks(values, names, DTYPES[dtype], kl, SIZES[dtype]))


def test_finite_masks_if_the_assembler_contracts() -> None:
    check(batch_of_masks(MASKS, BOTH, torch.float32, "exact", V), Mode(contract=True))


def test_finite_masks_at_one_temperature() -> None:
    """The temperature of a whole batch is a parameter of the kernel instead of a tensor."""
    case = every_branch(LossSpec(PPOClip(), KLS["exact"], entropy_coef=0.1), V, torch.float32)
    case = case._replace(logits=0.3 * case.logits)
    case = case.with_options(ref_logits=0.3 * case.options["ref_logits"], temperature=0.3)
    for value in (-1e9, -1e10):
        check(masked(case, value, "the front", *BOTH))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_number(dtype: str) -> None:
    """The distribution is uniform for any number."""
    limits = torch.finfo(DTYPES[dtype])
    values = torch.tensor([*MASKS, 1e10, 1e20, 1e38, -LOWEST], dtype=torch.float64).clamp(
        limits.min, limits.max
    )
    rows = values.to(DTYPES[dtype])[:, None, None].expand(-1, 2, V)
    ids = torch.tensor([0, V - 1]).expand(len(values), 2)
    want = torch.full(rows.shape, 1 / V).sub_(torch.nn.functional.one_hot(ids, V)) / ids.numel()
    for inplace in (False, True):
        logits = rows.clone().requires_grad_()
        with emulated():
            how: dict[str, Any] = {"backend": "triton", "return_entropy": True, "inplace": inplace}
            out = grpo_loss(logits.clone(), ids, torch.ones(len(values)), **how)
            out.loss.backward()
        torch.testing.assert_close(out.logps, torch.full(ids.shape, 1 / V).log())
        torch.testing.assert_close(out.entropy, torch.full(ids.shape, float(V)).log())
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, want.to(DTYPES[dtype]))


def test_rows_far_above_zero() -> None:
    """Only the distances to the maximum count."""
    top = torch.tensor([1e9, 1e10, 1e20, 1e38])
    spacing = top.nextafter(torch.tensor(torch.inf)) - top
    logits = torch.full((len(top), 2, V), -1.0)
    logits[..., 7], logits[..., 8] = top[:, None], (top + spacing)[:, None]
    ids = torch.tensor([7, 8]).expand(len(top), 2)
    case = Case(LossSpec(PPOClip()), logits, ids, torch.ones(len(top)), {"temperature": spacing[:, None]})
    check(case)


def test_taken_tokens_that_are_masked() -> None:
    """The log-probability is the mask's distance from the rest, as in eager PyTorch. The ratio is 0."""
    logits = torch.randn(len(MASKS), 2, V, generator=torch.Generator().manual_seed(0))
    logits[..., 5] = torch.tensor(MASKS)[:, None]
    ids = torch.full(logits.shape[:2], 5)
    options = {"old_logps": torch.full(ids.shape, -3.0)}
    case = Case(LossSpec(PPOClip()), logits, ids, torch.ones(len(MASKS)), options)
    with emulated():
        got = selective_logps(logits, ids, backend="triton")
        result = run(grpo_loss, case, backend="triton")
    torch.testing.assert_close(got, logits.log_softmax(-1)[..., 5])
    assert float(result.out.loss.detach()) == 0
    assert bool((result.grad == 0).all())


def test_equal_rows_have_no_divergence() -> None:
    """The KL is exactly 0, also at temperatures whose products with the logits are not representable."""
    logits = 9 * torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0))
    logits[..., 1::5] = -1e10
    ids = torch.tensor([0, 2, 3, 4]).expand(3, 4)
    options = {"ref_logits": logits, "temperature": torch.tensor([[1.0], [0.3], [0.7]])}
    case = Case(LossSpec(PPOClip(), KLS["exact"]), logits, ids, torch.ones(3), options)
    with emulated():
        out = run(grpo_loss, case, backend="triton").out
    assert float(out.metrics["kl_exact"]) <= 1e-7
    assert torch.equal(out.ref_logps, out.logps)


SURE = {
    "logp": LossSpec(Reinforce(), aggregation="token-sum"),
    "exact": LossSpec(None, KL("exact", beta=1.0), aggregation="token-sum"),
    "exact_forward": LossSpec(None, KL("exact_forward", beta=1.0), aggregation="token-sum"),
}
# `ex2.approx` errs by 2 ulp, 2^-22, in a term of a sum, and in the factor that rescales the sum to another
# maximum. A quotient of two such sums errs by twice that.
APPROXIMATE = 2.0**-20


@pytest.mark.parametrize("mode", [Mode(), Mode(perturb=True)], ids=["exact", "perturbed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SURE)
def test_sure_tokens(name: str, dtype: str, mode: Mode) -> None:
    """If the taken token has nearly all the probability, relative errors are small."""
    batch = sure_tokens(SIZES[dtype], DTYPES[dtype])
    truth, bounds = truth_of(batch), BOUNDS[DTYPES[dtype]]
    more = APPROXIMATE if mode.perturb else 0.0
    case = Case(SURE[name], batch.logits, batch.ids, batch.ones, {"ref_logits": batch.ref_logits})
    gradient = {"logp": -truth.dlogps, "exact": truth.dkl, "exact_forward": truth.dkl_forward}[name]
    value = {"logp": -truth.logps, "exact": truth.kl, "exact_forward": truth.kl_forward}[name].sum()
    for inplace in (False, True):
        with emulated(mode=mode):
            got = run(grpo_loss, case, backend="triton", return_entropy=True, inplace=inplace)
        for field in ("logps", "ref_logps", "entropy"):
            assert_relative(field, getattr(got.out, field), getattr(truth, field), bounds.statistic + more)
        assert_relative("loss", got.out.loss, value, bounds.gradient + more)
        assert_gradient(
            name,
            got.grad,
            gradient,
            batch.ids,
            bound=bounds.gradient + more,
            sum_bound=bounds.row_sum + more,
            slack=truth.slack(batch.logits.dtype) if name == "exact" else 0.0,
        )
