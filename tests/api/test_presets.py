"""The constants of presets, and the spec of a call that names none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import NEEDS_SPECS_IN_GRAPHS

import grpo_kernels
from grpo_kernels import GRPOLoss, LinearGRPOLoss, LossSpec, PPOClip, grpo_loss


@pytest.mark.parametrize(
    "name, level, aggregation",
    [
        ("gspo", "sequence", "seq-mean-token-mean"),
        ("gspo_token", "sequence-token", "seq-mean-token-mean"),
        ("luspo", "sequence", "seq-mean-token-sum"),
    ],
)
def test_gspo_has_the_bounds_of_its_paper(name: Any, level: Any, aggregation: Any) -> None:
    """arXiv:2507.18071v2, section 5.1; LUSPO is GSPO with another aggregation."""
    clip = PPOClip(eps_low=3e-4, eps_high=4e-4)
    assert LossSpec.preset(name) == LossSpec(clip, level=level, aggregation=aggregation)


def test_gspo_clips_a_sequence_that_has_hardly_moved() -> None:
    """A mean log-ratio of 5e-4 is above the bound of 4e-4: positive advantages get no gradient."""
    logits = torch.zeros(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    old_logps = logits.detach().log_softmax(-1)[..., 0] - torch.tensor([[5e-4], [3.5e-4]])
    out = grpo_loss(logits, ids, torch.ones(2), spec="gspo", old_logps=old_logps)
    out.loss.backward()
    assert logits.grad is not None
    assert not logits.grad[0].any() and logits.grad[1].all()
    assert float(out.metrics["clip_fraction"]) == 0.5


FUNCTIONS = ("grpo_loss", "linear_grpo_loss", "policy_loss", "GRPOLoss", "LinearGRPOLoss")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_default_spec_is_ppo_clip_with_token_mean(name: str) -> None:
    default = inspect.signature(getattr(grpo_kernels, name)).parameters["spec"].default
    assert default == LossSpec() == LossSpec(PPOClip(0.2, 0.2), aggregation="token-mean")


def test_calls_without_a_spec() -> None:
    """Sequences of unequal length, on which the mean over tokens differs from the mean over sequences."""
    torch.manual_seed(0)
    logits, hidden, weight = torch.randn(2, 3, 7), torch.randn(2, 3, 4), torch.randn(7, 4)
    ids, advantages = torch.randint(7, (2, 3)), torch.tensor([1.0, -2.0])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    calls: list[Callable[..., Any]] = [
        lambda **how: GRPOLoss()(logits, ids, advantages, completion_mask=mask, **how),
        lambda **how: grpo_loss(logits, ids, advantages, completion_mask=mask, **how),
        lambda **how: LinearGRPOLoss()(hidden, weight, ids, advantages, completion_mask=mask, **how),
    ]
    for call in calls:
        torch.testing.assert_close(call().loss, torch.tensor(-(1.0 * 3 - 2.0 * 1) / 4))
        torch.testing.assert_close(call(spec="grpo").loss, torch.tensor(-(1.0 - 2.0) / 2))


@pytest.mark.parametrize("tokens", [3, 5])
def test_max_tokens_and_not_the_padded_width(tokens: int) -> None:
    """The same sequence padded to two widths has the same loss."""
    advantages, ids = torch.ones(1), torch.zeros(1, tokens, dtype=torch.long)
    mask = torch.arange(tokens)[None] < 2
    spec = LossSpec.preset("dr_grpo", max_tokens=8)
    out = grpo_loss(torch.zeros(1, tokens, 7), ids, advantages, spec=spec, completion_mask=mask)
    assert float(out.loss) == -2 / 8


@NEEDS_SPECS_IN_GRAPHS
def test_a_preset_made_inside_a_compiled_step() -> None:
    torch.manual_seed(0)
    logits, ids, advantages = torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.tensor([1.0, -2.0])

    def step(logits: torch.Tensor) -> torch.Tensor:
        spec = LossSpec.preset("dr_grpo", max_tokens=8, eps_high=0.3)
        return grpo_loss(logits, ids, advantages, spec=spec).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), step(logits))
