"""The losses in PyTorch and in Triton are the same functions, at ties as well."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from grpo_kernels import (  # noqa: E402
    CISPO,
    DPPO,
    DRO,
    KL,
    SAPO,
    ImportanceRatio,
    LogRatio,
    PPOClip,
    Reinforce,
    reference,
)
from grpo_kernels.checks.choices import SAMPLED_KL  # noqa: E402
from grpo_kernels.kernels import kl as triton_kl  # noqa: E402
from grpo_kernels.kernels import surrogates as twins  # noqa: E402
from grpo_kernels.spec.formula import TokenLoss, log_ratio_to, unbounded  # noqa: E402
from grpo_kernels.spec.kl import ESTIMATORS, Estimate  # noqa: E402
from grpo_kernels.spec.surrogates import Surrogate  # noqa: E402

INF, NAN = math.inf, math.nan
SURROGATES = [
    LogRatio(),
    Reinforce(),
    ImportanceRatio(),
    ImportanceRatio(max_ratio=1.4),
    ImportanceRatio(max_ratio=1.0),  # equals a ratio of 1
    PPOClip(),
    PPOClip(eps_low=0.1, eps_high=0.28, dual_clip=3.0),
    PPOClip(eps_low=0.0, eps_high=0.0),  # both bounds equal a ratio of 1
    PPOClip(eps_low=1.0, eps_high=3.0),  # the lower bound equals a ratio of 0
    PPOClip(delta=4.0),
    PPOClip(delta=1.0),  # within the clip band
    PPOClip(delta=0.5),  # below the clip band
    CISPO(ratio_max=1.25),
    CISPO(ratio_max=1.25, ratio_min=0.75),
    CISPO(ratio_max=1.0),  # equals a ratio of 1
    SAPO(),
    SAPO(tau_pos=2.0, tau_neg=0.5),
    DRO(beta=0.3),
    DRO(beta=0.3, anchor="ref"),
    DPPO("tv", low=0.01, high=0.02),
    DPPO("tv", low=0.0, high=0.0),  # equals an unchanged probability
    DPPO("kl", low=0.002, high=0.005, ratio_cap=1.2),
    DPPO("kl", low=0.0, high=0.0),
    DPPO("tv", low=0.01, high=0.02, ratio_cap=None),
    DPPO("kl", low=0.002, high=0.005, ratio_cap=None),
]
KLS = [
    KL(kind, 1.0, ratio_corrected, straight_through, clamp, output_clamp)
    for kind in SAMPLED_KL
    for clamp, output_clamp in ((None, None), (0.5, None), (None, 0.1), (1.0, 0.3))
    for ratio_corrected, straight_through in itertools.product((False, True), repeat=2)
]
CLAMPS = (INF, 2.0)
ADVANTAGES = (-2.0, -0.0, 0.0, 1.0)
# Values on both sides of every bound above, on the clamps, and beyond the range of exp in fp32.
MAGNITUDES = (1e-4, 0.15, 0.21, 0.25, 0.26, 0.5, 0.75, 1.0, 1.5, 2.0, 8.0)
MODERATE = (0.0, *MAGNITUDES, *(-x for x in MAGNITUDES))
EXTREME = (-INF, -200.0, 200.0, INF, NAN)

surrogates = pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
kls = pytest.mark.parametrize("kl", KLS, ids=str)
log_ratio_clamps = pytest.mark.parametrize("clamp", CLAMPS)
on_policy = pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])


@triton.jit
def surrogate_kernel(
    logp_ptr, anchor_ptr, advantage_ptr, value_ptr, by_logp_ptr, by_log_ratio_ptr, clamp, surrogate_params, n,
    SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < n
    anchor = None
    if anchor_ptr is not None:
        anchor = tl.load(anchor_ptr + i, mask=inside)
    logp, advantage = tl.load(logp_ptr + i, mask=inside), tl.load(advantage_ptr + i, mask=inside)
    log_ratio = twins.log_ratio_to(logp, anchor)
    value, by_logp, by_log_ratio = SURROGATE(logp, log_ratio, advantage, clamp, surrogate_params)
    tl.store(value_ptr + i, value, mask=inside)
    tl.store(by_logp_ptr + i, by_logp, mask=inside)
    tl.store(by_log_ratio_ptr + i, by_log_ratio, mask=inside)


@triton.jit
def kl_kernel(
    logp_ptr, old_logp_ptr, ref_logp_ptr, value_ptr, slope_ptr,
    clamp, output_clamp, log_ratio_clamp, n,
    ESTIMATOR: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, RATIO_CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < n
    old_logp = None
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + i, mask=inside)
    logp, ref_logp = tl.load(logp_ptr + i, mask=inside), tl.load(ref_logp_ptr + i, mask=inside)
    value, slope = triton_kl.kl_estimate(
        logp,
        twins.log_ratio_to(logp, old_logp),
        ref_logp,
        ESTIMATOR,
        clamp,
        output_clamp,
        STRAIGHT_THROUGH,
        RATIO_CORRECTED,
        log_ratio_clamp,
    )
    tl.store(value_ptr + i, value, mask=inside)
    tl.store(slope_ptr + i, slope, mask=inside)


def surrogate_in_triton(
    surrogate: Surrogate, logp: Tensor, anchor: Tensor | None, advantage: Tensor, clamp: float
) -> TokenLoss:
    found = TokenLoss(*(torch.empty_like(logp) for _ in TokenLoss._fields))
    n, BLOCK = logp.numel(), triton.next_power_of_2(logp.numel())
    surrogate_kernel[(1,)](
        logp, anchor, advantage, *found, clamp, surrogate.params, n,
        SURROGATE=getattr(twins, str(surrogate.kernel)), BLOCK=BLOCK,
    )  # fmt: skip
    return found


def surrogate_in_torch(
    surrogate: Surrogate, logp: Tensor, anchor: Tensor | None, advantage: Tensor, clamp: float
) -> TokenLoss:
    return with_zeros(surrogate.token_loss(logp, log_ratio_to(logp, anchor), advantage, clamp))


def kl_in_triton(kl: KL, logp: Tensor, old_logp: Tensor | None, ref_logp: Tensor, clamp: float) -> TokenLoss:
    value, slope = torch.empty_like(logp), torch.empty_like(logp)
    kl_kernel[(1,)](
        logp, old_logp, ref_logp, value, slope,
        unbounded(kl.clamp), unbounded(kl.output_clamp), clamp, logp.numel(),
        ESTIMATOR=triton_kl.ESTIMATORS[kl.kind], STRAIGHT_THROUGH=kl.straight_through,
        RATIO_CORRECTED=kl.ratio_corrected, BLOCK=triton.next_power_of_2(logp.numel()),
    )  # fmt: skip
    return with_zeros(TokenLoss(value, slope, None))


def kl_in_torch(kl: KL, logp: Tensor, old_logp: Tensor | None, ref_logp: Tensor, clamp: float) -> TokenLoss:
    log_ratio = log_ratio_to(logp, old_logp)
    return with_zeros(kl.estimate(logp, ref_logp, log_ratio, clamp))


def with_zeros(loss: TokenLoss) -> TokenLoss:
    return TokenLoss(*(torch.zeros_like(loss.value) if x is None else x for x in loss))


def at_token_level(loss: TokenLoss) -> Estimate:
    """Return the total derivative, for equal changes of log-probability and log-ratio."""
    value, by_logp, by_log_ratio = with_zeros(loss)
    assert by_logp is not None and by_log_ratio is not None
    return Estimate(value, by_logp + by_log_ratio)


def grid(*axes: tuple[float, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return list(torch.tensor(list(itertools.product(*axes)), dtype=dtype, device=device).T.contiguous())


def assert_same(got: Any, expected: Any, rtol: float = 2e-6) -> None:
    """Compare up to a few roundings, and exactly if a value is zero, infinite or NaN.

    The derivative of a ratio-corrected KL is a difference of two terms of the size of the value, and has
    their rounding errors.
    """
    for name, one, other in zip(expected._fields, got, expected, strict=True):
        scale = other.abs() + (0 if name == "value" else expected.value.abs().nan_to_num(0, 0, 0))
        same = (one == other) | (one.isnan() & other.isnan())
        near = ((one - other).abs() <= rtol * scale) & other.isfinite() & (one != 0) & (other != 0)
        wrong = (~(same | near)).nonzero().view(-1).tolist()
        assert not wrong, f"{name} at {wrong}: {one[wrong].tolist()}, expected {other[wrong].tolist()}"


def test_every_surrogate_is_compared() -> None:
    """SURROGATES has every surrogate of the package that does not couple tokens."""
    classes = {cls for cls in Surrogate.__subclasses__() if cls.__module__.startswith("grpo_kernels.")}
    coupled = {cls for cls in classes if cls.couples_tokens}
    assert {type(surrogate) for surrogate in SURROGATES} == classes - coupled
    assert coupled and all(cls.kernel is None for cls in coupled)


def test_every_estimator_has_a_twin() -> None:
    """The KL estimators have the same names in PyTorch and in Triton."""
    in_torch = {kind: function.__name__ for kind, function in ESTIMATORS.items()}
    assert set(SAMPLED_KL) == in_torch.keys()
    assert in_torch == {kind: function.__name__ for kind, function in triton_kl.ESTIMATORS.items()}


@pytest.mark.usefixtures("needs_triton")
@log_ratio_clamps
@on_policy
@surrogates
def test_surrogates(surrogate: Surrogate, on_policy: bool, clamp: float, device: str) -> None:
    if on_policy and surrogate.anchor == "ref":
        pytest.skip("the reference is always given")
    log_ratio, advantage = grid(MODERATE + EXTREME, ADVANTAGES, device=device)
    # An anchor of -3 gives log-ratios on the clamps, -2 and 2. An anchor of -inf gives log-ratios of NaN.
    for base in (-3.0, -INF):
        anchor = torch.full_like(log_ratio, base)
        logp = log_ratio - 3.0
        args = (surrogate, logp, None if on_policy else anchor, advantage, clamp)
        assert_same(surrogate_in_triton(*args), surrogate_in_torch(*args))


@pytest.mark.usefixtures("needs_triton")
@log_ratio_clamps
@on_policy
@kls
def test_kl_estimates(kl: KL, on_policy: bool, clamp: float, device: str) -> None:
    x, log_ratio = grid(MODERATE + EXTREME, (-INF, -2.5, -2.0, -0.3, 0.0, 2.0, 5.0, 200.0), device=device)
    logp = torch.full_like(x, -3.0)
    args = (kl, logp, None if on_policy else logp - log_ratio, logp + x, clamp)
    assert_same(kl_in_triton(*args), kl_in_torch(*args))


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("language", [surrogate_in_triton, surrogate_in_torch])
@pytest.mark.parametrize("log_ratio", [-0.22, 0.0, 0.18])
def test_a_tie_counts_as_unclipped(language: Any, log_ratio: float, device: str) -> None:
    """The bounds equal the exponential of the log-ratio in this language to the last bit."""
    logp, anchor = torch.tensor([log_ratio], device=device), torch.zeros(1, device=device)
    one = torch.ones(1, device=device)

    def of(surrogate: Surrogate, advantage: Tensor) -> TokenLoss:
        return at_token_level(language(surrogate, logp, anchor, advantage, INF))

    ratio = -of(ImportanceRatio(), one).value
    eps = abs(float(ratio) - 1)  # exact: both are within a factor of two
    gain, loss = Estimate(-ratio, -ratio), Estimate(ratio, ratio)
    assert_same(of(ImportanceRatio(max_ratio=float(ratio)), one), gain)
    assert_same(of(PPOClip(eps_low=eps, eps_high=eps), one), gain)
    assert_same(of(PPOClip(eps_low=eps, eps_high=eps), -one), loss)
    assert_same(of(PPOClip(delta=float(ratio)), -one), loss)
    # A lower delta selects the clipped branch, and the tie is with its bound.
    assert_same(of(PPOClip(eps_low=eps, eps_high=eps, delta=0.5), -one), loss)
    if eps:
        tight = PPOClip(eps_low=eps - 1e-6, eps_high=eps - 1e-6)
        assert float(of(tight, one if log_ratio > 0 else -one).dlogp) == 0


@log_ratio_clamps
@on_policy
@surrogates
def test_surrogates_are_the_references(surrogate: Surrogate, on_policy: bool, clamp: float) -> None:
    """Value and derivative equal those of the oracle, on finite inputs."""
    if on_policy and surrogate.anchor == "ref":
        pytest.skip("the reference is always given")
    log_ratio, advantage = grid(MODERATE, ADVANTAGES, dtype=torch.float64)
    anchor = None if on_policy else torch.full_like(log_ratio, -3.0)
    logp = (log_ratio - 3.0).requires_grad_()
    ratio = clamped(logp - (logp.detach() if anchor is None else anchor), clamp)
    value = reference._surrogate(surrogate, logp, anchor, advantage, lambda anchor: ratio)
    (dlogp,) = torch.autograd.grad(value.sum(), logp)
    got = surrogate_in_torch(surrogate, logp.detach(), anchor, advantage, clamp)
    # The oracle squares the logarithm of a ratio near 1.
    assert_same(at_token_level(got), Estimate(value.detach(), dlogp), rtol=1e-11)


@log_ratio_clamps
@on_policy
@kls
def test_kl_estimates_are_the_references(kl: KL, on_policy: bool, clamp: float) -> None:
    x, log_ratio = grid(MODERATE, (-2.5, -2.0, -0.3, 0.0, 2.0, 5.0), dtype=torch.float64)
    logp = torch.full_like(x, -3.0)
    old, ref = None if on_policy else logp - log_ratio, logp + x
    logp.requires_grad_()
    ratio = clamped(logp - (logp.detach() if old is None else old), clamp)
    value = reference._sampled_kl(kl, logp, ref, ratio)
    (dlogp,) = torch.autograd.grad(value.sum(), logp)
    got = kl_in_torch(kl, logp.detach(), old, ref, clamp)
    assert_same(at_token_level(got), Estimate(value.detach(), dlogp), rtol=1e-12)


def clamped(log_ratio: Tensor, clamp: float) -> Tensor:
    return reference._bounded(log_ratio, -clamp, clamp).exp()
