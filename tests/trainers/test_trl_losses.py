"""The loss of TRL's GRPOTrainer is one of our losses, for all settings of TRL."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import (
    CLIPPED,
    DELTAS,
    GLOBAL,
    LENGTHS,
    MAX_COMPLETION,
    PENALTIES,
    TEMPERATURE,
    B,
    Rollout,
    Settings,
    T,
    assert_same,
    assert_same_by_logits,
    levels,
    logits_for_model,
    loss_types,
    ours,
    per_token_advantages,
    rollout,
    theirs,
)

from grpo_kernels import LossSpec, grpo_loss, linear_grpo_loss

pytest.importorskip("trl", minversion="1.16")

import trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def settings_with_every_delta(settings: Settings) -> list[Settings]:
    return [
        replace(settings, delta=delta) for delta in (DELTAS if settings.loss_type in CLIPPED else (None,))
    ]


def skip_vespo_at_sequence_level(loss_type: str, level: str, penalty: str) -> None:
    """Skip the one case in which the two differ."""
    if (loss_type, level, penalty) == ("vespo", "sequence", "KL, corrected"):
        pytest.skip("differs: test_vespo_at_sequence_level")


def test_batch_takes_every_branch(trainer: Any) -> None:
    """The batch of these tests has tokens in every branch of the losses.

    At either level and for either sign, there are ratios in every interval between the bounds.
    """
    batch = rollout(trainer, logits_for_model(torch.float64))
    settings, mask = Settings(), batch.mask.bool()
    log_ratio = (batch.logps - batch.inputs["old_per_token_logps"]).where(mask, 0)
    by_sequence = log_ratio.sum(-1) / batch.mask.sum(-1).clamp(min=1)
    assert not mask[LENGTHS == 0].any()
    assert float(log_ratio.abs().max()) > 4
    per_token = per_token_advantages(batch).inputs["advantages"]
    for ratio, advantages in (
        (log_ratio[mask].exp(), batch.inputs["advantages"][:, None].expand(B, T)[mask]),
        (log_ratio[mask].exp(), per_token[mask]),
        (by_sequence.exp(), batch.inputs["advantages"]),
    ):
        edges = [0, 1 - settings.epsilon, 1.1, 1 + settings.epsilon_high, 4.0, torch.inf]
        for low, high in itertools.pairwise(edges):
            inside = (ratio > low) & (ratio < high)
            assert {-1.0, 1.0} <= set(advantages[inside].sign().tolist()), (low, high)


@pytest.mark.parametrize("penalty", PENALTIES)
@levels
@loss_types
def test_every_loss(trainer: Any, loss_type: str, level: str, penalty: str) -> None:
    """Loss and gradient with respect to the logits agree in fp64.

    On-policy and off-policy, with advantages per sequence and per token.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    skip_vespo_at_sequence_level(loss_type, level, penalty)
    for settings in settings_with_every_delta(Settings.of(loss_type, level, penalty)):
        for off_policy in (batch, per_token_advantages(batch)):
            for each in (off_policy, off_policy.without("old_per_token_logps")):
                assert_same_by_logits(trainer, settings, each, model)


@pytest.mark.parametrize("penalty", PENALTIES)
@levels
@loss_types
def test_every_loss_of_a_model(trainer: Any, loss_type: str, level: str, penalty: str) -> None:
    """Every parameter of a model gets the same gradient from TRL and from our losses, in fp32.

    TRL runs its model and its own head. Our losses start from logits and from hidden states, in chunks that
    split sequences.
    """
    model = trainer.model
    batch = rollout(trainer, model)
    skip_vespo_at_sequence_level(loss_type, level, penalty)
    for settings in settings_with_every_delta(Settings.of(loss_type, level, penalty)):
        for each in (per_token_advantages(batch), batch.without("old_per_token_logps")):
            wanted = theirs(trainer, model, settings, each)
            head = model.lm_head.weight
            for got in (
                ours(grpo_loss, (completion_logits(model, each),), settings, each),
                ours(
                    linear_grpo_loss, (completion_states(model, each), head), settings, each, chunk_tokens=5
                ),
            ):
                assert_same_by_parameters(str(settings), model, got.loss, wanted)


def assert_same_by_parameters(what: str, model: Any, got: Tensor, wanted: Tensor) -> None:
    """Assert that losses and the gradients of all parameters agree."""
    assert_same(f"{what}: loss", got, wanted, 1e-5, scale=1 + wanted.abs())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (got, wanted))
    for name, grad, wanted_grad in zip(names, *grads, strict=True):
        assert_same(f"{what}: {name}", grad, wanted_grad, 1e-5)


def model_inputs(batch: Rollout) -> dict[str, Any]:
    return {
        "input_ids": torch.cat([batch.inputs["prompt_ids"], batch.inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([batch.inputs["prompt_mask"], batch.inputs["completion_mask"]], 1),
        "use_cache": False,
    }


def completion_logits(model: Any, batch: Rollout) -> Tensor:
    return model(**model_inputs(batch)).logits[:, -T - 1 : -1]


def completion_states(model: Any, batch: Rollout) -> Tensor:
    return model.base_model(**model_inputs(batch)).last_hidden_state[:, -T - 1 : -1]


@levels
@loss_types
def test_packed(trainer: Any, loss_type: str, level: str) -> None:
    """Packed tokens have the same loss. TRL's loss has no packed form.

    The empty sequence has length 0.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", entropy_coef=0.0 if loss_type in GLOBAL else 0.03)
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    kept = batch.mask.bool()
    logits = model.logits.detach()[kept].requires_grad_()
    packed = batch.having(**{name: x[kept] for name, x in batch.inputs.items() if x.shape == kept.shape})
    got = ours(grpo_loss, (logits,), settings, packed, seq_lens=LENGTHS).loss
    (got_grad,) = torch.autograd.grad(got, logits)
    assert_same("loss", got, wanted, 1e-10)
    assert_same("gradient", got_grad, wanted_grad[kept], 1e-10)


@pytest.mark.parametrize("scale, softcap", [(0.6, None), (1.0, 1.5), (0.6, 1.5)])
def test_logit_transforms(trainer: Any, scale: float, softcap: float | None) -> None:
    """A scale of the logits (Cohere) and a softcap (Gemma 2) agree. TRL reads both from the config."""
    from trl.trainer.utils import add_fused_lm_head

    model = copy.deepcopy(trainer.model)
    model.config.logit_scale, model.config.final_logit_softcapping = scale, softcap
    model.forward = type(model).forward.__get__(model)  # without the fused head of the original
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    batch = rollout(trainer, model)
    settings = Settings.of("grpo", penalty="KL", entropy_coef=0.03)
    wanted = theirs(trainer, model, settings, batch)
    sources = (completion_states(model, batch), model.lm_head.weight)
    got = ours(linear_grpo_loss, sources, settings, batch, logit_scale=scale, logit_softcap=softcap)
    assert_same_by_parameters("", model, got.loss, wanted)


@pytest.mark.parametrize("rates", [(2.75, 1.5), (0.0, 1.5), (2.75, 0.0)])
def test_bounds_of_vespo(trainer: Any, rates: tuple[float, float]) -> None:
    """VESPO's bounds agree.

    Log-ratios are bounded to ±20, their sum over a sequence to the range from log(1e-8) to 20, and a rate of
    0 counts as 1e-4.
    """
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    # Sequences of +25 and -19.5 (0.5 after bounding), of +25 alone, of -25 alone, and of -30 and 19.8.
    log_ratio = torch.zeros(B, T, dtype=torch.float64)
    log_ratio[:2, :2] = torch.tensor([25.0, -19.5])
    log_ratio[[4, 5], 0], log_ratio[[6, 7], 0] = 25.0, -25.0
    log_ratio[8:10, :2] = torch.tensor([-30.0, 19.8])
    batch = batch.having(old_per_token_logps=(batch.logps - log_ratio) * batch.mask)
    for each in (batch, per_token_advantages(batch)):
        settings = Settings.of("vespo", vespo=(1.875, rates[0], 2.625, rates[1]))
        assert_same_by_logits(trainer, settings, each, model)


DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "sapo_temperatures": (1.0, 1.05),
    "vespo": (2.0, 3.0, 3.0, 2.0),
}
GSPO = {"epsilon": 3e-4, "epsilon_high": 4e-4}  # arXiv:2507.18071v2, section 5.1
PRESETS = {
    "grpo": Settings("grpo", **DEFAULTS),
    "bnpo": Settings("bnpo", **DEFAULTS),
    "dapo": Settings("dapo", **{**DEFAULTS, "epsilon_high": 0.28}),
    "dr_grpo": Settings("dr_grpo", **DEFAULTS),
    "gspo": Settings("grpo", "sequence", **{**DEFAULTS, **GSPO}),
    "luspo": Settings("luspo", "sequence", **{**DEFAULTS, **GSPO}),
    "sapo": Settings("sapo", **DEFAULTS),
    "vespo": Settings("vespo", **DEFAULTS),
    "cispo": Settings("cispo", **{**DEFAULTS, "epsilon_high": 5.0}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    """Our presets have TRL's defaults, except for two bounds.

    TRL sets no upper bound for `dapo` and `cispo`. It documents GSPO's bounds, but does not set them.
    """
    defaults = trl.GRPOConfig.__dataclass_fields__
    assert (defaults["epsilon"].default, defaults["epsilon_high"].default) == (DEFAULTS["epsilon"], None)
    for key, names in (
        ("sapo_temperatures", ("sapo_temperature_pos", "sapo_temperature_neg")),
        ("vespo", ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    ):
        assert tuple(defaults[name].default for name in names) == DEFAULTS[key]
    spec = replace(PRESETS[name].spec(), kl=None)
    assert LossSpec.preset(name, **({"max_tokens": MAX_COMPLETION} if name == "dr_grpo" else {})) == spec
