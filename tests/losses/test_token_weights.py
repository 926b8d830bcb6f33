"""`token_weights` with one weight per sequence: `[B]`, `[B, 1]`, packed `[S]`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_kernels import GMPO, KL, VESPO, LossSpec, PPOClip, grpo_loss, linear_grpo_loss
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.reference import reference_loss

B, T, V, H = 3, 4, 7, 5
LENGTHS = torch.tensor([2, 4, 1])
SPECS = {
    "ppo": LossSpec(PPOClip(), KL("k2")),
    "vespo": LossSpec(VESPO()),
    "gmpo": LossSpec(GMPO(), aggregation="seq-mean-token-mean"),
}


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(B, T, V, generator=generator, dtype=torch.float64),
        "completion_ids": torch.randint(V, (B, T), generator=generator),
        "advantages": torch.randn(B, generator=generator, dtype=torch.float64),
        "old_logps": torch.randn(B, T, generator=generator, dtype=torch.float64) / 4 - 2,
        "ref_logps": torch.randn(B, T, generator=generator, dtype=torch.float64) / 4 - 2,
        "completion_mask": torch.arange(T) < LENGTHS[:, None],
    }


def packed(x: dict[str, Any]) -> dict[str, Any]:
    """The same batch, packed, without the masked tokens."""
    mask = x["completion_mask"]
    found = {name: value if name == "advantages" else value[mask] for name, value in x.items()}
    return found | {"seq_lens": LENGTHS}


WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("spec", SPECS)
def test_of_sequences(spec: str, backend: str) -> None:
    """Loss and gradient equal the reference's, padded and packed, for both padded shapes."""
    x = batch()
    logits = x.pop("logits").requires_grad_()
    want = reference_loss(logits, spec=SPECS[spec], token_weights=WEIGHTS[:, None], **x)
    (want_grad,) = torch.autograd.grad(want.loss, logits)
    for weights in (WEIGHTS, WEIGHTS[:, None]):
        out = grpo_loss(logits, spec=SPECS[spec], token_weights=weights, backend=backend, **x)
        torch.testing.assert_close(out.loss, want.loss)
        torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], want_grad)
    rows = packed({"logits": logits, **x})
    out = grpo_loss(spec=SPECS[spec], token_weights=WEIGHTS, backend=backend, **rows)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], want_grad)


@pytest.mark.parametrize("spec", SPECS)
def test_other_forms(spec: str) -> None:
    """The losses from hidden states and from log-probabilities take the same shapes."""
    x = batch()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = x.pop("logits") @ weight
    for shape in ((B,), (B, 1)):
        x["token_weights"] = WEIGHTS.view(shape)
        found = linear_grpo_loss(hidden, weight, spec=SPECS[spec], **x)
        want = grpo_loss(hidden @ weight.T, spec=SPECS[spec], **x)
        torch.testing.assert_close(found.loss, want.loss)
        rest = {name: value for name, value in x.items() if name != "completion_ids"}
        torch.testing.assert_close(policy_loss(want.logps, spec=SPECS[spec], **rest).loss, want.loss)


def test_as_many_sequences_as_tokens() -> None:
    """In a packed batch with an empty sequence, `S` may equal `N`. Then `[N]` is one weight per token."""
    x = {
        "logits": torch.randn(2, V, generator=torch.Generator().manual_seed(0)),
        "completion_ids": torch.tensor([1, 2]),
        "advantages": torch.tensor([1.0, 1.0]),
        "spec": "bnpo",
    }
    weights = torch.tensor([0.0, 3.0])
    out = grpo_loss(**x, seq_lens=torch.tensor([2, 0]), token_weights=weights)
    torch.testing.assert_close(out.loss, grpo_loss(**x, token_weights=weights).loss)
    torch.testing.assert_close(out.loss, torch.tensor(-1.5))


def test_packed_needs_seq_lens() -> None:
    x = packed(batch())
    del x["seq_lens"]
    x["advantages"] = torch.ones(7, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"^token_weights must have shape \(7,\) \(or one per sequence, with"
    ):
        grpo_loss(spec=SPECS["ppo"], token_weights=WEIGHTS, **x)
