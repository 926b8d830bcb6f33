"""The token-loss kernels give the loss and metrics that PyTorch computes from the same statistics."""

from __future__ import annotations

import itertools

import pytest
import torch

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    KL,
    SAPO,
    ImportanceRatio,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    Reinforce,
    linear_grpo_loss,
)
from grpo_kernels.policy_loss import policy_loss

pytestmark = pytest.mark.usefixtures("needs_triton")

SURROGATES = [
    None,
    LogRatio(),
    Reinforce(),
    ImportanceRatio(),
    ImportanceRatio(max_ratio=1.2),
    PPOClip(eps_low=0.1, eps_high=0.4, delta=2.0, dual_clip=1.5),
    CISPO(ratio_max=1.4, ratio_min=0.9),
    SAPO(),
    DRO(beta=0.3),
    DPPO("tv", low=0.01, high=0.02),
    DPPO("kl", low=0.002, high=0.005),
]
KLS = [
    None,
    KL("k3", 0.3),
    KL("k3", 0.3, ratio_corrected=True),
    KL("abs", 0.2),
    KL("k2", 0.2, output_clamp=0.1),
]
PAIRS = [pair for pair in itertools.product(SURROGATES, KLS) if any(pair)]
B, T = 3, 101  # more tokens than two programs process


def assert_same(got: LossOutput, want: LossOutput) -> None:
    """Compare up to roundings of exponentials and of sums in another order."""
    assert got.metrics.keys() == want.metrics.keys()
    for name, x in (("loss", want.loss), *want.metrics.items()):
        found = got.loss if name == "loss" else got.metrics[name]
        torch.testing.assert_close(
            found, x, rtol=3e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("surrogate, kl", PAIRS, ids=str)
def test_of_log_probabilities(surrogate: object, kl: KL | None, device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    logps = normal(B, T).abs().neg()
    given = {
        "old_logps": logps + 0.3 * normal(B, T),
        "ref_logps": logps + 0.5 * normal(B, T),
        "token_weights": normal(B, T).abs() * (normal(B, T) > -1),
        "completion_mask": normal(B, T) > -1,
    }
    for x in (given["old_logps"], given["ref_logps"], logps):
        x[~given["completion_mask"]] = torch.nan
    advantages = normal(B, T) * (normal(B, T) > -0.5)
    # More advantages are positive than negative, so that the two clip fractions differ.
    advantages = torch.where(normal(B, T) > 0, advantages.abs(), advantages)
    spec = LossSpec(surrogate, kl, entropy_coef=0.1, log_ratio_clamp=1.0)
    found = {}
    for backend in ("triton", "torch"):
        leaves = logps.clone().requires_grad_(), logps.exp().requires_grad_()
        out = policy_loss(
            leaves[0], advantages, spec=spec, entropy=leaves[1], normalizer=70.0, backend=backend, **given
        )
        found[backend] = out, torch.autograd.grad(out.loss, leaves)
    assert_same(found["triton"][0], found["torch"][0])
    for got, want in zip(found["triton"][1], found["torch"][1], strict=True):
        torch.testing.assert_close(got, want, rtol=3e-5, atol=1e-7)
    if "clip_fraction_low" in found["torch"][0].metrics:
        low, high = (found["torch"][0].metrics[f"clip_fraction_{side}"] for side in ("low", "high"))
        assert 0 < low < high


def test_of_tokens_that_did_not_run(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=generator).to(device) for s in ((B, T, 8), (37, 8)))
    ids = torch.randint(37, (B, T), generator=generator).to(device)
    mask = torch.rand(B, T, generator=generator).to(device) > 0.2
    advantages = torch.tensor([1.5, 0.0, -1.0], device=device)
    old_logps = -3 + torch.randn(B, T, generator=generator).to(device)
    out = [
        linear_grpo_loss(
            hidden,
            weight,
            ids,
            advantages,
            completion_mask=mask,
            old_logps=old_logps,
            skip_inactive=True,
            backend=backend,
        )
        for backend in ("triton", "torch")
    ]
    assert_same(*out)
    assert 0.3 < out[0].metrics["active_fraction"] < 0.9
