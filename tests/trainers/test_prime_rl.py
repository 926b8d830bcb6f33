"""prime-rl's custom loss: its own losses as presets, called by its `compute_loss` for each packed sequence.

The real functions are used if prime_rl is installed. The stand-ins have the formulas of prime-rl 0.8.1.dev67
(commit 559b447), `src/prime_rl/trainer/rl/loss.py`, lines 109 to 163 and 285 to 397.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers import Batch, Trainer, batch, gradient, trainer
from torch import Tensor

MODULE = "prime_rl.trainer.rl.loss"


@dataclass
class Inputs:
    """prime-rl's `LossInputs`."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def default_loss_fn(inputs: Any, config: Any) -> Any:
    """-A * ratio inside the region of DPPO, and the squared log-ratio."""
    change = inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    above, below = change > config.dppo_mask_high, change < -config.dppo_mask_low
    inside = ~torch.where(inputs.advantages > 0, above, below)
    gain = inside * config.adv_tau * inputs.advantages * log_ratio.exp()
    value = config.kl_tau * log_ratio**2 - gain
    weights = 1.0 if inputs.loss_weights is None else inputs.loss_weights
    return SimpleNamespace(loss=(value * inputs.loss_mask * weights).sum(), metrics={})


def compute_loss(
    *, rl_loss_fn: Callable[..., Any], rl_scale: int, rl_weights: Any, **lists: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the losses of the sequences, divide by the tokens of the step, and stack the metrics."""
    names = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask")
    found = []
    for i in range(len(lists["advantages"])):
        given = {name: None if lists[name] is None else lists[name][i] for name in names}
        if rl_weights is not None:
            given["loss_mask"] = given["loss_mask"] & (rl_weights[i] != 0)
            if not given["loss_mask"].any():
                continue
        weights = None if rl_weights is None else rl_weights[i]
        found.append(rl_loss_fn(Inputs(**given, loss_weights=weights)))
    metrics = {name: torch.stack([x.metrics[name] for x in found]) for name in found[0].metrics}
    return sum(x.loss for x in found) / rl_scale, metrics


@pytest.fixture(scope="module")
def prime_rl() -> Iterator[Trainer]:
    functions = {"LossInputs": Inputs, "default_loss_fn": default_loss_fn, "compute_loss": compute_loss}
    with trainer(MODULE, "prime_rl", {MODULE: functions}, version="0.8.1") as found:
        yield found


def run(
    prime_rl: Trainer,
    loss: Callable[..., Any],
    given: Batch,
    *,
    rl_weights: Callable[[Tensor], Tensor] | None = None,
    ref: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and metrics of the sequences, as prime-rl's training step splits them."""
    leaf = given.leaf()
    lengths = [5, 7, 7]  # the packed sequences, of which the first has its padding cut off

    def split(x: Tensor) -> list[Tensor]:
        rows = x[1, :5], x[0], x[3]
        assert [len(row) for row in rows] == lengths
        return list(rows)

    scale = {"rl_scale": 40, "ce_scale": 1, "ref_kl_scale": 1}
    value, metrics = prime_rl.theirs.compute_loss(
        trainer_logprobs=split(leaf),
        inference_logprobs=split(given.sampler),
        ref_logprobs=split(given.ref) if ref else None,
        advantages=split(given.advantages),
        loss_mask=split(given.mask > 0),
        rl_weights=None if rl_weights is None else split(rl_weights(given.advantages)),
        ce_weights=None,
        ref_kl_weights=None,
        rl_loss_fn=loss,
        **scale,
    )
    return value, gradient(value, leaf), metrics


def fractions(advantages: Tensor) -> Tensor:
    return 0.5 + advantages.abs()


def ones(advantages: Tensor) -> Tensor:
    """The weights of prime-rl's orchestrator, which takes out tokens without an advantage."""
    return (advantages > -0.5).to(advantages.dtype)


@pytest.mark.parametrize("rl_weights, kl_tau", [(None, 0.1), (fractions, 0.0), (ones, 0.1)])
def test_its_default_loss(prime_rl: Trainer, rl_weights: Any, kl_tau: float) -> None:
    """The gradient is that of prime-rl's default loss, DPPO with a squared log-ratio to the sampler."""
    config = SimpleNamespace(dppo_mask_low=0.05, dppo_mask_high=0.04, adv_tau=1.0, kl_tau=kl_tau)
    options = {"low": 0.05, "high": 0.04, "ratio_cap": 1e9, "kl_tau": kl_tau}
    given = batch(5)
    theirs = run(prime_rl, lambda x: prime_rl.theirs.default_loss_fn(x, config), given, rl_weights=rl_weights)
    value, grad, metrics = run(
        prime_rl, lambda x: prime_rl.ours.prime_rl_loss(x, **options), given, rl_weights=rl_weights
    )
    torch.testing.assert_close(grad, theirs[1], rtol=1e-10, atol=1e-14)
    assert value.isfinite()
    assert len(metrics["clip_fraction"]) == (3 if rl_weights is None else 2), "one sequence has no token"
    assert 0 < metrics["clip_fraction"].mean() < 1, "all tokens are outside of the region, or none"


def test_a_loss_without_the_region(prime_rl: Trainer) -> None:
    """With the region open, the value is that of the preset importance_ratio too."""
    config = SimpleNamespace(dppo_mask_low=2.0, dppo_mask_high=2.0, adv_tau=1.0, kl_tau=0.05)
    options = {"preset": "importance_ratio", "kl_tau": 0.05}
    given = batch(6)
    theirs = run(prime_rl, lambda x: prime_rl.theirs.default_loss_fn(x, config), given)
    ours = run(prime_rl, lambda x: prime_rl.ours.prime_rl_loss(x, **options), given)
    for own, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-14)


def test_a_ratio_of_the_sequence(prime_rl: Trainer) -> None:
    """Each call has one sequence, so a ratio of the sequence is its own; GSPO's loss by hand."""
    given = batch(7)
    _, grad, _ = run(
        prime_rl,
        lambda x: prime_rl.ours.prime_rl_loss(x, preset="gspo", eps_low=0.05, eps_high=0.05),
        given,
    )
    leaf = given.leaf()
    total: Any = 0
    for row in (0, 1):
        mask, advantages = given.mask[row], given.advantages[row]
        ratio = ((leaf - given.sampler)[row] * mask).sum().div(mask.sum()).exp()
        gain = torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
        total = total - (gain * mask).sum() / 40
    torch.testing.assert_close(grad, gradient(total, leaf), rtol=1e-10, atol=1e-14)


def test_a_kl_to_the_reference(prime_rl: Trainer) -> None:
    """`kl` is a penalty to prime-rl's reference, if its algorithm has one."""
    given = batch(8)

    def loss(inputs: Any) -> Any:
        return prime_rl.ours.prime_rl_loss(inputs, preset="reinforce", kl={"kind": "k3", "beta": 0.2})

    value, _, metrics = run(prime_rl, loss, given, ref=True)
    assert metrics["kl"].mean() > 0
    x = given.ref - given.logps
    token = -given.advantages * given.logps + 0.2 * (x.exp() - 1 - x)
    rows = [token[1, :5] * given.mask[1, :5], token[0] * given.mask[0]]
    torch.testing.assert_close(value, sum(row.sum() for row in rows) / 40)
    with pytest.raises(ValueError, match="needs a reference"):
        run(prime_rl, loss, given)


@pytest.mark.parametrize("preset", ["reinforce", "opmd"])
def test_where_the_reference_is_missing(prime_rl: Trainer, preset: Any) -> None:
    """In a packed micro-batch, it is zeros. They are refused, unless the sequence has no tokens."""
    tokens = torch.tensor([False, True, True])
    given = {"trainer_logprobs": torch.tensor([0.0, -1.0, -2.0]), "advantages": torch.ones(3)}
    given |= {"inference_logprobs": torch.tensor([0.0, -1.5, -1.5])}
    options: dict[str, Any] = {"preset": preset} if preset == "opmd" else {"preset": preset, "kl": {}}

    def loss(ref: Tensor | None, mask: Tensor) -> Tensor:
        inputs = prime_rl.theirs.LossInputs(**given, ref_logprobs=ref, loss_mask=mask)
        return prime_rl.ours.prime_rl_loss(inputs, **options).loss

    assert loss(torch.tensor([0.0, -1.0, 0.0]), tokens).isfinite()
    for ref in (None, torch.zeros(3), torch.tensor([-1.0, 0.0, 0.0])):
        with pytest.raises(ValueError, match="needs a reference"):
            loss(ref, tokens)
        assert loss(ref, torch.zeros(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    "options, rl_weights, message",
    [
        ({"kl": {"kind": "k3"}, "kl_tau": 0.1}, None, "give kl or kl_tau"),
        ({"kl": {}, "kl_tau": 0.1}, None, "give kl or kl_tau"),
        ({"kl_tau": -0.1}, None, "kl_tau must be"),
        ({"kl_tau": 0.1}, fractions, "need rl weights of 0 and 1"),
        ({"preset": "log_ratio", "kl_tau": 0.1}, None, "does not pass the reference"),
        ({"preset": "dapo", "clip_eps": 0.2}, None, "has no option clip_eps"),
        ({"entropy_coef": 0.1}, None, "no KL and no entropy bonus"),
    ],
)
def test_what_is_refused(prime_rl: Trainer, options: Any, rl_weights: Any, message: str) -> None:
    """An option that would do nothing, or something else, raises."""
    with pytest.raises(ValueError, match=message):
        run(prime_rl, lambda x: prime_rl.ours.prime_rl_loss(x, **options), batch(), rl_weights=rl_weights)
