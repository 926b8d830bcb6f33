"""Tokens of a probability of nearly 1: their statistics and gradients have small relative errors.

A trained policy is sure of most of its tokens. `logp` is then about -exp(-gap): the gap is the distance
of the taken token's logit from the logsumexp of the others. The gradient of a row is as small.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hard_cases import Options, every_tensor
from parity import Case, Result, assert_parity, oracle, run
from sure_tokens import (
    BOUNDS,
    GAPS,
    SureTokens,
    Truth,
    assert_gradient,
    assert_relative,
    at,
    sure_tokens,
    truth_of,
)
from torch import Tensor

from grpo_kernels import KL, LossSpec, PPOClip, Reinforce, grpo_loss, selective_logps

LOGP = LossSpec(Reinforce(), aggregation="token-sum")
DIVERGENCES = {
    kind: LossSpec(None, KL(kind, beta=1.0), aggregation="token-sum") for kind in ("exact", "exact_forward")
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
V = 300  # in the interpreter: two blocks and a tail
LARGE = 151936
SIZES = [(31, torch.float32), *((V, dtype) for dtype in DTYPES)]
SIZES += [(4113, torch.bfloat16), (LARGE, torch.float32)]
sizes = pytest.mark.parametrize("size, dtype", SIZES, ids=[f"{size}, {dtype}" for size, dtype in SIZES])
TRANSFORMS = {
    "temperature": {"temperature": 0.6},
    "temperature per token": {"temperature": torch.linspace(0.5, 1.5, 6)[None]},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 90.0, "temperature": torch.linspace(0.5, 1.5, 6)[None]},
}


@functools.cache
def shared_batch(size: int, dtype: torch.dtype, device: str) -> tuple[SureTokens, Truth]:
    batch = batch_of(size, dtype, device, sequences=4 if (size, dtype) == (V, torch.float32) else 1)
    return batch, truth_of(batch)


def batch_of(size: int, dtype: torch.dtype, device: str, **options: Any) -> SureTokens:
    """Return a token of each gap. They meet every place, and every kind of reference."""
    return sure_tokens(size, dtype, gaps=GAPS, device=device, **options)


def result_of(batch: SureTokens, spec: LossSpec, path: Options, **options: Any) -> Result:
    case = Case(spec, batch.logits, batch.ids, batch.ones, batch.options)
    return run(grpo_loss, case.with_options(ref_logits=batch.ref_logits), **path, **options)


@torch.no_grad()
def divergences(batch: SureTokens, spec: LossSpec, backend: str) -> Tensor:
    """Return the KL of each token. It is the loss of a batch of one token."""
    found = torch.zeros(batch.ids.shape, dtype=torch.float64, device=batch.ids.device)
    for b, t in torch.cartesian_prod(*map(torch.arange, batch.ids.shape)).tolist():
        logits, ref_logits, ids = (x[b : b + 1, t : t + 1] for x in batch[:3])
        options = {"ref_logits": ref_logits, "spec": spec, "backend": backend}
        found[b, t] = grpo_loss(logits, ids, batch.ones[:1], **options).loss
    return found


def check_logps(batch: SureTokens, truth: Truth, path: Options, *, more: float = 0.0) -> None:
    """Compare the loss -sum(logp). `more` is added to every bound."""
    bounds = BOUNDS[batch.logits.dtype]
    got = result_of(batch, LOGP, path, return_entropy=True)
    for name in ("logps", "ref_logps", "entropy"):
        assert_relative(name, getattr(got.out, name), getattr(truth, name), bounds.statistic + more)
    check_gradient(batch, got.grad, -truth.dlogps, more=more)


def check_gradient(
    batch: SureTokens, got: Tensor, want: Tensor, *, more: float = 0.0, slack: Tensor | float = 0.0
) -> None:
    bounds = BOUNDS[batch.logits.dtype]
    sum_bound = bounds.row_sum if batch.options["logit_softcap"] is None else None
    assert_gradient(
        "gradient", got, want, batch.ids, bound=bounds.gradient + more, sum_bound=sum_bound, slack=slack
    )


def check_divergences(
    batch: SureTokens, truth: Truth, kind: str, path: Options, *, more: float = 0.0
) -> None:
    bounds, spec = BOUNDS[batch.logits.dtype], DIVERGENCES[kind]
    want, gradient = {
        "exact": (truth.kl, truth.dkl),
        "exact_forward": (truth.kl_forward, truth.dkl_forward),
    }[kind]
    got = result_of(batch, spec, path)
    assert_relative("sum of the KL", got.out.loss, want.sum(), bounds.gradient + more)
    slack = truth.slack(batch.logits.dtype) if kind == "exact" else 0.0
    check_gradient(batch, got.grad, gradient, more=more, slack=slack)


@sizes
def test_log_probability_and_entropy(size: int, dtype: torch.dtype, path: Options, device: str) -> None:
    check_logps(*shared_batch(size, dtype, device), path)


@sizes
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_exact_kl(kind: str, size: int, dtype: torch.dtype, path: Options, device: str) -> None:
    check_divergences(*shared_batch(size, dtype, device), kind, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_exact_kl_of_each_token(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    batch, truth = shared_batch(V, dtype, device)
    want = truth.kl if kind == "exact" else truth.kl_forward
    got = divergences(batch, DIVERGENCES[kind], backend)
    assert_relative("KL", got, want, BOUNDS[dtype].gradient)


@sizes
def test_gradient_of_the_entropy(size: int, dtype: torch.dtype, path: Options, device: str) -> None:
    batch, truth = shared_batch(size, dtype, device)
    case = Case(
        LossSpec(Reinforce(), entropy_coef=1.0), batch.logits, batch.ids, 0 * batch.ones, batch.options
    )
    got = run(grpo_loss, case, **path)
    check_gradient(batch, got.grad, -truth.dentropy / batch.ids.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformed_logits(
    transform: dict[str, Any], dtype: torch.dtype, path: Options, device: str
) -> None:
    """A softcap of 90 rounds to a multiple of eps, and so a transformed logit errs by some of these."""
    batch = batch_of(V, dtype, device, **transform)
    truth = truth_of(batch)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    more = 8 * eps * (transform.get("softcap") or 0.0)
    check_logps(batch, truth, path, more=more)
    check_divergences(batch, truth, "exact", path, more=8 * more)


@sizes
def test_selective_logps(size: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Also the log-ratio of two policies that are both sure."""
    batch, truth = shared_batch(size, dtype, device)
    bounds = BOUNDS[dtype]
    leaf = batch.logits.clone().requires_grad_()
    logps, entropy = selective_logps(leaf, batch.ids, return_entropy=True, backend=backend)
    ref_logps = selective_logps(batch.ref_logits, batch.ids, backend=backend)
    assert_relative("logps", logps, truth.logps, bounds.statistic)
    assert_relative("entropy", entropy, truth.entropy, bounds.statistic)
    slack = bounds.statistic * (truth.logps + truth.ref_logps).abs()
    assert_relative("log-ratio", logps - ref_logps, truth.logps - truth.ref_logps, 0.0, slack)
    for value, want in ((logps, truth.dlogps), (entropy, truth.dentropy)):
        (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        check_gradient(batch, grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [31, V])
def test_sure_of_another_token(size: int, dtype: torch.dtype, path: Options, device: str) -> None:
    """The taken token has a probability of nearly 0. Errors are at most those of eager PyTorch."""
    batch = batch_of(size, dtype, device)
    ids = (batch.ids + 1) % size
    old_logps = truth_of(batch._replace(ids=ids)).logps.float()
    case = Case(LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1), batch.logits, ids, batch.ones, {})
    case = case.with_options(ref_logits=batch.ref_logits, old_logps=old_logps)
    given = oracle(every_tensor(case, lambda _, x: x.cpu()))
    assert_parity(given, return_entropy=True, **path)


def test_the_truth() -> None:
    """The truth in fp64 is that of arithmetic with 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    batch = sure_tokens(31, torch.float32, sequences=4)
    truth = truth_of(batch)
    with mpmath.workdps(60):
        for b, t in torch.cartesian_prod(*map(torch.arange, batch.ids.shape)).tolist():
            y = int(batch.ids[b, t])
            z, ref_z = ([mpmath.mpf(x) for x in logits[b, t].tolist()] for logits in batch[:2])
            p, q = ([mpmath.exp(x) / mpmath.fsum(map(mpmath.exp, row)) for x in row] for row in (z, ref_z))
            log_p, log_q = ([mpmath.log(x) for x in row] for row in (p, q))
            entropy = -mpmath.fdot(p, log_p)
            kl = mpmath.fdot(p, [x - y for x, y in zip(log_p, log_q, strict=True)])
            kl_forward = mpmath.fdot(q, [y - x for x, y in zip(log_p, log_q, strict=True)])
            want = {
                "logps": log_p[y],
                "ref_logps": log_q[y],
                "entropy": entropy,
                "kl": kl,
                "kl_forward": kl_forward,
                "dlogps": 1 - p[y],
                "dentropy": -p[y] * (log_p[y] + entropy),
                "dkl": p[y] * (log_p[y] - log_q[y] - kl),
                "dkl_forward": p[y] - q[y],
            }
            for name, exact in want.items():
                found = getattr(truth, name)
                found = (at(found, batch.ids) if name.startswith("d") else found)[b, t]
                assert float(found) == pytest.approx(float(exact), rel=1e-11, abs=0), name
