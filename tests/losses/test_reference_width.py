"""A reference whose vocabulary is padded to another width. `vocab_size` is the common part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import KL, LogRatio, LossSpec, grpo_loss, linear_grpo_loss
from grpo_kernels.reference import reference_loss

B, T, V, H = 2, 3, 37, 5
WIDTHS = [V - 4, V + 1, 2 * V]  # of the reference
SPECS = {"log_ratio": LossSpec(LogRatio()), "exact": LossSpec(kl=KL("exact", beta=0.5))}


def batch(width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(B, T, H, generator=generator),
        "weight": torch.randn(V, H, generator=generator),
        "ref_weight": torch.randn(width, H, generator=generator),
        "ref_hidden": torch.randn(B, T, H, generator=generator),
        "ids": torch.randint(V - 6, (B, T), generator=generator),
        "advantages": torch.randn(B, T, generator=generator),
    }


def logits_of(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return (x["hidden"] @ x["weight"].T).requires_grad_(), x["ref_hidden"] @ x["ref_weight"].T


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_from_logits(width: int, spec: str, inplace: bool, backend: str) -> None:
    x, size = batch(width), V - 6
    logits, ref_logits = logits_of(x)
    want = reference_loss(
        logits[..., :size], x["ids"], x["advantages"], spec=SPECS[spec], ref_logits=ref_logits[..., :size]
    )
    (want_grad,) = torch.autograd.grad(want.loss, logits)
    ref_logits[..., size:] = torch.nan  # padding is never read
    out = grpo_loss(
        logits * 1,
        x["ids"],
        x["advantages"],
        spec=SPECS[spec],
        ref_logits=ref_logits,
        vocab_size=size,
        inplace=inplace,
        backend=backend,
    )
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.ref_logps, want.ref_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_from_hidden_states(width: int, spec: str, backend: str) -> None:
    x, size = batch(width), V - 6
    weight = x["weight"].requires_grad_()
    logits, ref_logits = x["hidden"] @ weight.T, x["ref_hidden"] @ x["ref_weight"].T
    want = reference_loss(
        logits[..., :size], x["ids"], x["advantages"], spec=SPECS[spec], ref_logits=ref_logits[..., :size]
    )
    (want_grad,) = torch.autograd.grad(want.loss, weight)
    x["ref_weight"][size:] = torch.nan
    out = linear_grpo_loss(
        x["hidden"],
        weight,
        x["ids"],
        x["advantages"],
        spec=SPECS[spec],
        ref_hidden=x["ref_hidden"],
        ref_lm_head_weight=x["ref_weight"],
        vocab_size=size,
        backend=backend,
    )
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out.loss, weight)[0], want_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_without_vocab_size(width: int) -> None:
    """The error says how to fix it."""
    x = batch(width)
    logits, ref_logits = logits_of(x)
    with pytest.raises(ValueError, match=rf"^ref_logits must .*37\), got .*{width}\): give vocab_size"):
        grpo_loss(logits, x["ids"], x["advantages"], spec=SPECS["exact"], ref_logits=ref_logits)
    heads = {"ref_hidden": x["ref_hidden"], "ref_lm_head_weight": x["ref_weight"]}
    with pytest.raises(
        ValueError, match=f"^ref_lm_head_weight has {width} rows, lm_head_weight 37: give vocab_size"
    ):
        linear_grpo_loss(x["hidden"], x["weight"], x["ids"], x["advantages"], spec=SPECS["exact"], **heads)


def test_narrower_than_vocab_size() -> None:
    x = batch(V - 4)
    logits, ref_logits = logits_of(x)
    options = {"spec": SPECS["exact"], "vocab_size": V - 2}
    with pytest.raises(ValueError, match=r"^ref_logits has 33 columns, fewer than the 35 of the vocabulary"):
        grpo_loss(logits, x["ids"], x["advantages"], ref_logits=ref_logits, **options)
    heads = {"ref_hidden": x["ref_hidden"], "ref_lm_head_weight": x["ref_weight"]}
    with pytest.raises(ValueError, match=r"^ref_lm_head_weight has 33 rows, fewer than the 35 of the vocab"):
        linear_grpo_loss(x["hidden"], x["weight"], x["ids"], x["advantages"], **heads, **options)
