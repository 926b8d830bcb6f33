"""Masks, LUSPO and overwritten logits, for which Liger's results differ from ours.

The tests also assert what Liger 0.8.5 does, so that they fail when a release changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from liger_cases import (
    KLS,
    NEEDS_LIGER,
    B,
    T,
    V,
    assert_rows,
    assert_same,
    liger,
    masked_to,
    ours,
    random_batch,
    spec_of,
)
from liger_heads import Head, assert_same_linear, from_head, liger_chunked, ours_chunked
from products import assert_same_products, lengths, magnitudes
from torch import Tensor

from grpo_kernels import grpo_loss

pytestmark = NEEDS_LIGER


def test_nan_at_masked_positions(backend: str, device: str) -> None:
    """NaN at masked positions never reaches our result. At sequence level it reaches Liger's.

    Liger's kernels skip masked positions at token level. At sequence level its PyTorch code multiplies by the
    mask.
    """
    batch = random_batch(6, device, weights="token")
    kl = KLS["k3"]
    for level, names in (
        ("token", ("old_logps", "ref_logps", "weights")),
        ("sequence", ("ref_logps",)),
        ("sequence", ("old_logps",)),
        ("sequence", ("weights",)),
    ):
        holed = masked_to(batch, math.nan, *names)
        spec = spec_of("grpo", level=level, kl=kl)
        found, expected = ours(holed, spec, backend), ours(masked_to(batch, 0.0, *names), spec, backend)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad, expected.grad)
        theirs = liger(holed, "grpo", level=level, kl=kl)
        spoilt = level == "sequence" and names != ("ref_logps",)
        assert bool(theirs.grad.isnan().any()) == spoilt, names


def test_nan_at_masked_positions_of_hidden_states(backend: str, device: str) -> None:
    """NaN at masked positions reaches Liger's chunked loss at token level, too.

    The chunked loss multiplies by the mask.
    """
    head = Head.random(6, device)
    batch = from_head(random_batch(6, device), head)
    holed = masked_to(batch, math.nan, "old_logps")
    clean = masked_to(batch, 0.0, "old_logps")
    found, expected = (ours_chunked(x, head, spec_of("grpo"), None, backend) for x in (holed, clean))
    with magnitudes():
        sizes = ours_chunked(clean, head, spec_of("grpo"), None, backend).grads
    theirs = liger_chunked(holed, head, "grpo")
    assert bool(theirs.loss.isnan())
    assert torch.equal(found.loss, expected.loss)
    grads = zip(found.grads, expected.grads, sizes, strict=True)
    for (name, terms), (got, wanted, size) in zip(lengths(B * T, V).items(), grads, strict=True):
        assert_same_products(got, wanted, size, terms, f"gradient of {name}")


def test_vespo_weights_at_masked_positions(backend: str, device: str) -> None:
    """With VESPO, Liger also sums the log-weights of masked tokens, and ours ignores them.

    A NaN among them makes the sequence's weight 0 without a message. TRL sums them as well, but it computes
    the weights itself and sets them to 1 at masked positions.
    """
    batch = random_batch(7, device, weights="token")
    spec = spec_of("vespo")
    expected = ours(batch, spec, backend)
    assert_same(expected, liger(batch, "vespo"))
    for value in (0.5, math.nan):
        holed = masked_to(batch, value, "weights")
        found, theirs = ours(holed, spec, backend), liger(holed, "vespo")
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad, expected.grad)
        assert float((theirs.loss - expected.loss).abs() / expected.loss.abs()) > 1e-2
    # The last value was NaN. In Liger, sequences with a masked token have lost their gradient.
    assert batch.mask is not None
    whole = (batch.mask != 0).all(-1)
    assert bool((theirs.grad[~whole] == 0).all())


def test_luspo(backend: str, device: str) -> None:
    """LUSPO is a mean over sequences of sums over tokens here and in TRL 1.16.

    Liger's kernels weight each sequence by length / T. If all lengths are equal, the two agree.
    """
    spec = spec_of("luspo", level="sequence")
    batch = random_batch(9, device)
    assert batch.mask is not None
    found, theirs = ours(batch, spec, backend), liger(batch, "luspo", level="sequence")
    assert float((theirs.loss - found.loss).abs()) > 0.1 * float(found.loss.abs())
    lengths = (batch.mask != 0).sum(-1, keepdim=True)
    assert_same(ours(batch._replace(weights=lengths / T), spec, backend), theirs)
    # If all lengths are equal, the two agree.
    full = batch._replace(mask=torch.ones_like(batch.mask))
    assert_same(ours(full, spec, backend), liger(full, "luspo", level="sequence"))


def test_luspo_gradient_at_token_level(backend: str, device: str) -> None:
    """At token level, Liger's gradient of LUSPO is not that of its loss.

    Token t of sequence b gets the length of sequence b + t. Its lengths `[B, 1]` have strides (1, 1), and the
    backward kernel steps through them by token. In this batch no token has b + t >= B, for which it would
    read out of bounds.
    """
    batch = random_batch(9, device)
    b, t = torch.arange(B, device=device)[:, None], torch.arange(T + 1, device=device)
    batch = batch._replace(mask=(b + t < B)[:, :T].contiguous())
    lengths = B - b
    found = ours(batch._replace(weights=lengths / T), spec_of("luspo"), backend)
    theirs = liger(batch, "luspo")
    torch.testing.assert_close(found.loss, theirs.loss)
    strayed = found.grad * ((lengths - t).clamp(min=0) / lengths)[..., None]
    assert_rows(strayed, theirs.grad, "strayed")
    assert float((found.grad - theirs.grad).abs().max()) > 0.1 * float(found.grad.abs().max())


def test_luspo_from_hidden_states(backend: str, device: str) -> None:
    """Liger's chunked LUSPO is TRL's, unlike its kernels.

    It ignores the mask if a term is per token.
    """
    head = Head.random(10, device)
    batch = from_head(random_batch(11, device), head)
    assert batch.mask is not None
    masked = batch.mask == 0
    found = ours_chunked(batch, head, spec_of("luspo", level="sequence"), None, backend)
    assert_same_linear(found, liger_chunked(batch, head, "luspo", level="sequence"))
    for level, kl in (("sequence", "k3"), ("token", "no KL")):
        theirs = liger_chunked(batch, head, "luspo", level=level, kl=KLS[kl])
        spec = spec_of("luspo", level=level, kl=KLS[kl])
        found = ours_chunked(batch, head, spec, None, backend)
        assert bool((theirs.grads[0][masked] != 0).any())
        assert bool((found.grads[0][masked] == 0).all())


def test_logits_overwritten(backend: str, device: str) -> None:
    """Liger's default, `inplace=True`, overwrites logits that autograd needs. Ours raises an error."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch = random_batch(12, device)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = batch.logits.clone().requires_grad_()
        loss(torch.tanh(leaf)).backward()  # tanh keeps its output for its derivative
        assert leaf.grad is not None
        return leaf.grad

    def theirs(logits: Tensor, inplace: bool) -> Tensor:
        args = (logits, batch.old_logps, None, batch.ids, batch.advantages, batch.mask, 1.0, 0.0)
        return triton_grpo_loss(*args, inplace=inplace, loss_type="grpo", reduce=True)[0]

    def found(logits: Tensor, inplace: bool) -> Tensor:
        return grpo_loss(
            logits[:, :-1],
            batch.ids,
            batch.advantages,
            spec=spec_of("grpo"),
            completion_mask=batch.mask,
            old_logps=batch.old_logps,
            inplace=inplace,
            backend=backend,
        ).loss

    right = gradient(lambda logits: theirs(logits, False))
    assert_rows(gradient(lambda logits: found(logits, False)), right, "two buffers")
    wrong = gradient(lambda logits: theirs(logits, True))
    assert float((wrong - right).abs().max()) > 0.1 * float(right.abs().max())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda logits: found(logits, True))
