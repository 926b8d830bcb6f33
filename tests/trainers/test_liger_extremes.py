"""Infinite ratios, logits far from zero and other extremes, for which Liger's results differ from ours.

The tests also assert what Liger 0.8.5 does, so that they fail when a release changes it.
"""

from __future__ import annotations

import math

import pytest
import torch
from liger_cases import (
    EPS_HIGH,
    EPS_LOW,
    NEEDS_LIGER,
    Result,
    T,
    assert_same,
    liger,
    lone_token,
    ours,
    random_batch,
    spec_of,
)
from liger_heads import Head, from_head, liger_chunked, ours_chunked
from torch import Tensor

from grpo_kernels import KL, LossSpec
from grpo_kernels.reference import reference_logps

pytestmark = NEEDS_LIGER


HUGE = 200.0  # nats: its exponential is infinite in fp32
ratio_losses = pytest.mark.parametrize(
    "loss_type, level", [("grpo", "token"), ("grpo", "sequence"), ("sapo", "token")]
)


def token_gradient(result: Result) -> Tensor:
    """Return the gradient of the lone token's logits `[V]`."""
    return result.grad[0, 0]


@ratio_losses
def test_infinite_ratio_that_is_clipped(loss_type: str, level: str, backend: str, device: str) -> None:
    """The loss of a clipped infinite ratio is right in both, and Liger's gradient is NaN.

    Liger multiplies the ratio by 0.
    """
    batch = lone_token(device, log_ratio=HUGE)
    theirs = liger(batch, loss_type, level=level)
    found = ours(batch, spec_of(loss_type, level=level), backend)
    torch.testing.assert_close(found.loss, theirs.loss)
    assert bool(token_gradient(theirs).isnan().all())
    assert bool((found.grad == 0).all())


@ratio_losses
def test_infinite_ratio_without_advantage(loss_type: str, level: str, backend: str, device: str) -> None:
    """An infinite ratio without advantage has loss and gradient 0 here, and a NaN gradient in Liger."""
    batch = lone_token(device, log_ratio=HUGE, advantage=0.0)
    theirs = liger(batch, loss_type, level=level)
    found = ours(batch, spec_of(loss_type, level=level), backend)
    assert bool(token_gradient(theirs).isnan().all())
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_infinite_ratio_of_weight_zero(level: str, backend: str, device: str) -> None:
    """A weight of 0 removes the token, as an off-policy mask does. Liger computes inf * 0."""
    batch = lone_token(device, log_ratio=HUGE, advantage=-1.0, weights=torch.zeros(1, 1))
    theirs = liger(batch, "grpo", level=level)
    found = ours(batch, spec_of("grpo", level=level), backend)
    assert bool(theirs.loss.isnan())
    assert bool(token_gradient(theirs).isnan().all())
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_infinite_ratio_that_is_not_clipped(level: str, backend: str, device: str) -> None:
    """Both losses are infinite for a negative advantage, which has no upper bound. We offer two bounds."""
    batch = lone_token(device, log_ratio=HUGE, advantage=-1.0)
    spec = spec_of("grpo", level=level)
    for result in (liger(batch, "grpo", level=level), ours(batch, spec, backend)):
        assert float(result.loss) == math.inf
        assert not bool(token_gradient(result).isfinite().any())
    for bounded in (
        spec_of("grpo", level=level, dual_clip=3.0),
        LossSpec(spec.surrogate, level=level, log_ratio_clamp=20.0),
    ):
        found = ours(batch, bounded, backend)
        assert math.isfinite(float(found.loss))
        assert bool((found.grad == 0).all())


def test_infinite_ratio_from_hidden_states(backend: str, device: str) -> None:
    """Liger's chunked loss has the same NaN, and it spreads to the whole gradient of the weight."""
    head = Head.random(0, device)
    batch = from_head(random_batch(0, device), head)
    assert batch.old_logps is not None and batch.mask is not None
    huge = batch.old_logps - HUGE * (batch.advantages > 0)[:, None] * (torch.arange(T, device=device) == 0)
    theirs = liger_chunked(batch._replace(old_logps=huge), head, "grpo")
    found = ours_chunked(batch._replace(old_logps=huge), head, spec_of("grpo"), None, backend)
    assert bool(theirs.grads[1].isnan().all())
    torch.testing.assert_close(found.loss, theirs.loss)
    assert all(bool(grad.isfinite().all()) for grad in found.grads)


def test_sapo_far_out(backend: str, device: str) -> None:
    """At x = 14, Liger's gradient of SAPO keeps two digits in fp32, and ours keeps four.

    Liger's derivative contains 1 - sigmoid(x). Ours contains sigmoid(-x).
    """
    batch = lone_token(device, log_ratio=2.9)
    truth = ours(batch._replace(logits=batch.logits.double()), spec_of("sapo"), "torch").grad
    theirs, found = liger(batch, "sapo").grad, ours(batch, spec_of("sapo"), backend).grad
    assert float((theirs - truth).abs().max() / truth.abs().max()) > 3e-3
    assert float((found - truth).abs().max() / truth.abs().max()) < 1e-4


def test_delta_within_the_clip_range(backend: str, device: str) -> None:
    """With delta inside the clip range, the gradient for A < 0 and delta < r < 1 + eps_high is not 0.

    There min(min(r, delta) * A, clip(r) * A) is r * A. Liger treats the clipped branch as flat, which is
    right only outside the clip range.
    """
    batch = lone_token(device, log_ratio=0.2, advantage=-1.0)
    leaf = batch.logits.clone().requires_grad_()
    ratio = torch.exp(reference_logps(leaf[:, :-1], batch.ids) - batch.old_logps)
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    loss = -torch.min(ratio.clamp(max=1.1) * -1.0, clipped * -1.0)
    (truth,) = torch.autograd.grad(loss.sum(), leaf)
    for level in ("token", "sequence"):
        theirs = liger(batch, "grpo", level=level, delta=1.1)
        found = ours(batch, spec_of("grpo", level=level, delta=1.1), backend)
        torch.testing.assert_close(theirs.loss, loss.sum().detach())
        assert bool((theirs.grad == 0).all())
        torch.testing.assert_close(found.loss, loss.sum().detach())
        torch.testing.assert_close(found.grad, truth)


def test_first_block_at_minus_infinity(backend: str, device: str) -> None:
    """A first block of -inf makes Liger's gradient NaN, and ours is right.

    Liger's running maximum starts at -inf. After such a block it computes -inf - -inf. Its loss is a minimum,
    which passes a NaN on in Triton's interpreter up to 3.7, but not in later ones and not on a GPU.
    """
    batch = random_batch(4, device, vocab=2100)
    logits, ids = batch.logits.clone(), batch.ids % 52
    logits[..., :2048] = -math.inf
    theirs = liger(batch._replace(logits=logits, ids=ids + 2048), "grpo")
    found = ours(batch._replace(logits=logits, ids=ids + 2048), spec_of("grpo"), backend)
    expected = liger(batch._replace(logits=logits[..., 2048:].contiguous(), ids=ids), "grpo")
    assert bool(theirs.grad.isnan().any())
    assert bool((found.grad[..., :2048] == 0).all())
    assert_same(found._replace(grad=found.grad[..., 2048:]), expected)


def test_taken_token_at_minus_infinity(backend: str, device: str) -> None:
    """On-policy the ratio is 1 by definition. Liger computes logp - logp, which is NaN for -inf."""
    batch = lone_token(device, old_logps=None)
    batch.logits[..., 3] = -math.inf
    theirs, found = liger(batch, "grpo"), ours(batch, spec_of("grpo"), backend)
    assert bool(theirs.grad.isnan().any())
    assert float(found.loss) == -1
    assert bool(found.grad.isfinite().all())


def test_logits_far_from_zero(backend: str, device: str) -> None:
    """Next to 1e4, Liger's fp32 logsumexp has few digits left. Ours errs less.

    The shifted logits are exact. The shift costs our kernels, which use powers of two, 1e-4. It costs the
    torch backend nothing.
    """
    batch = random_batch(13, device, on_policy=True)._replace(mask=None)
    batch = batch._replace(logits=torch.round(batch.logits * 64) / 64)
    shifted = batch._replace(logits=batch.logits + 1e4)
    assert torch.equal(shifted.logits - 1e4, batch.logits)
    truth = ours(batch._replace(logits=batch.logits.double()), spec_of("grpo"), "torch").grad

    def error(result: Result) -> float:
        return float(((result.grad - truth).abs().amax(-1) / truth.abs().amax(-1)).nan_to_num(0.0).max())

    assert error(liger(batch, "grpo")) < 1e-5
    assert error(liger(shifted, "grpo")) > 3e-4
    assert error(ours(shifted, spec_of("grpo"), backend)) < (2e-4 if backend == "triton" else 1e-6)


def test_small_kl(backend: str, device: str) -> None:
    """At 1e-4 nats from the reference, Liger's k3 keeps no digit, and ours keeps two.

    k3 is 5e-9 there. In fp32, exp(x) - x - 1 is a multiple of 6e-8.
    """
    batch = lone_token(device, advantage=0.0)
    assert batch.old_logps is not None
    batch = batch._replace(ref_logps=batch.old_logps + 1e-4)
    logps = reference_logps(batch.logits[:, :-1].double(), batch.ids)
    x = batch.ref_logps.double() - logps
    truth = float(torch.expm1(x) - x)
    kl = KL("k3", beta=1.0)
    theirs, found = liger(batch, "grpo", kl=kl), ours(batch, spec_of("grpo", kl=kl), backend)
    assert abs(float(theirs.loss) / truth - 1) > 0.9
    assert abs(float(found.loss) / truth - 1) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_double_precision(dtype: torch.dtype, backend: str, device: str) -> None:
    """fp64 logits are computed in fp64 here, and in fp32 by Liger."""
    batch = random_batch(5, device)
    batch = batch._replace(logits=batch.logits.to(dtype))
    theirs, found = liger(batch, "grpo"), ours(batch, spec_of("grpo"), backend)
    assert theirs.loss.dtype == torch.float32
    assert found.loss.dtype == dtype
    torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    if dtype == torch.float64:
        truth = ours(batch, spec_of("grpo"), "torch").grad
        assert float((theirs.grad - truth).abs().max()) > 1e-10
        assert float((found.grad - truth).abs().max()) < 1e-14
