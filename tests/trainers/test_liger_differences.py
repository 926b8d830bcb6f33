"""Masks, LUSPO and overwritten logits, which Liger treats otherwise.

Liger is quoted as it is, so that a release that mends it is noticed.
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

from grpo_kernels import (
    grpo_loss,
)

pytestmark = NEEDS_LIGER


def test_nan_at_masked_positions(backend: str, device: str) -> None:
    """Liger's kernels skip masked positions at token level. At sequence level its PyTorch part multiplies."""
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
    """Liger's chunked loss multiplies by the mask at token level, too."""
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
    """Liger sums the log-weights of masked tokens, too, and a NaN there becomes phi = 0, in silence.

    So does TRL, but it makes the weights itself, and makes them 1 where masked.
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
    # The last was NaN: sequences with a masked token have no gradient any more, the others theirs.
    assert batch.mask is not None
    whole = (batch.mask != 0).all(-1)
    assert bool((theirs.grad[~whole] == 0).all())


def test_luspo(backend: str, device: str) -> None:
    """TRL 1.16, and we: mean over sequences of sums over tokens. Liger's kernels weigh each by length / T."""
    spec = spec_of("luspo", level="sequence")
    batch = random_batch(9, device)
    assert batch.mask is not None
    found, theirs = ours(batch, spec, backend), liger(batch, "luspo", level="sequence")
    assert float((theirs.loss - found.loss).abs()) > 0.1 * float(found.loss.abs())
    lengths = (batch.mask != 0).sum(-1, keepdim=True)
    assert_same(ours(batch._replace(weights=lengths / T), spec, backend), theirs)
    # Of equal lengths they are one.
    full = batch._replace(mask=torch.ones_like(batch.mask))
    assert_same(ours(full, spec, backend), liger(full, "luspo", level="sequence"))


def test_luspo_at_token_level(backend: str, device: str) -> None:
    """Besides, Liger's gradient is not that of its loss: token t of sequence b gets the length of b + t.

    Its lengths `[B, 1]` have the strides (1, 1), and the backward kernel steps through them by token. Here no
    token has b + t >= B, where it reads what lies behind them.
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
    """Liger's chunked loss is TRL's, unlike its kernels, but forgets the mask where a term is per token."""
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
    """Liger's `inplace=True`, its default, writes past autograd: what needed the logits finds the gradient.

    Here autograd knows, and raises.
    """
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
