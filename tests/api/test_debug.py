"""GRPO_KERNELS_DEBUG=1 turns a silent NaN into an error with argument, position and value."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import KL, LossSpec, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from grpo_kernels.mismatch import mismatch_metrics
from grpo_kernels.normalizers import global_normalizer
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.weights import importance_weights, off_policy_sequence_mask, rejection_mask

B, T, V, H = 2, 3, 7, 4
FORMS = ["padded", "packed"]
SPEC = LossSpec(kl=KL("k3"))


@pytest.fixture(autouse=True)
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")


def given(form: str = "padded") -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {
        "logits": torch.randn(B, T, V),
        "ref_logits": torch.randn(B, T, V),
        "completion_ids": torch.randint(V, (B, T)),
        "advantages": torch.randn(B, T),
        "old_logps": -torch.rand(B, T),
        "token_weights": torch.rand(B, T),
        "temperature": 0.5 + torch.rand(B, T),
        "completion_mask": torch.ones(B, T),
    }
    return found if form == "padded" else {name: x.flatten(0, 1) for name, x in found.items()}


def linear() -> dict[str, Tensor]:
    """Arguments of `linear_grpo_loss`, with a reference."""
    found = {name: x for name, x in given().items() if not name.endswith("logits")}
    for prefix in ("", "ref_"):
        found[f"{prefix}hidden"] = torch.randn(B, T, H)
        found[f"{prefix}lm_head_weight"] = torch.randn(V, H)
        found[f"{prefix}lm_head_bias"] = torch.randn(V)
    return found


def wrong_at(x: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[position] = value
    return x


def raises(call: Any, message: str, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(**arguments)


@pytest.mark.parametrize("value", [-100, V, 2**31])
def test_ids(value: int) -> None:
    outside = f"is {value}, outside [0, {V})"
    x = given()
    x["completion_ids"] = wrong_at(x["completion_ids"], (1, 2), value)
    raises(grpo_loss, f"completion_ids[1, 2] {outside}", spec=SPEC, **x)
    raises(selective_logps, f"ids[1, 2] {outside}", logits=x["logits"], ids=x["completion_ids"])
    x = given("packed")
    x["completion_ids"] = wrong_at(x["completion_ids"], (3,), value)
    raises(grpo_loss, f"completion_ids[3] {outside}", spec=SPEC, **x)


def test_padding_columns_are_outside() -> None:
    x = given()
    x["completion_ids"] = wrong_at(x["completion_ids"].clamp(max=4), (0, 1), 5)
    raises(grpo_loss, "completion_ids[0, 1] is 5, outside [0, 5)", spec=SPEC, vocab_size=5, **x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["old_logps", "advantages", "token_weights", "temperature"])
def test_per_token(name: str, form: str) -> None:
    x = given(form)
    at = (1, 2) if form == "padded" else (4,)
    x[name] = wrong_at(x[name], at, torch.nan)
    raises(grpo_loss, f"{name}{list(at)} is nan, and not masked", spec=SPEC, **x)


def test_ref_logps() -> None:
    x = given()
    x["ref_logps"] = wrong_at(-x.pop("ref_logits").abs()[..., 0], (0, 1), torch.nan)
    raises(grpo_loss, "ref_logps[0, 1] is nan, and not masked", spec=SPEC, **x)


def test_per_sequence() -> None:
    """The error of an advantage per sequence names the sequence's first token."""
    x = given() | {"advantages": torch.tensor([1.0, torch.nan])}
    raises(grpo_loss, "advantages[1, 0] is nan, and not masked", spec=SPEC, **x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["logits", "ref_logits"])
def test_logits(name: str, value: float) -> None:
    x = given()
    x[name] = wrong_at(x[name], (0, 2, 5), value)
    raises(grpo_loss, f"{name}[0, 2, 5] is {value}, and not masked", spec=SPEC, **x)
    assert grpo_loss(
        spec=SPEC, vocab_size=5, **x | {"completion_ids": x["completion_ids"] % 5}
    ).loss.isfinite()
    if name == "logits":
        message = f"logits[0, 2, 5] is {value}, and not masked"
        raises(selective_logps, message, logits=x["logits"], ids=x["completion_ids"])


def test_minus_infinity_is_no_mistake() -> None:
    x = given()
    taken = int(x["completion_ids"][0, 2])
    x["logits"] = wrong_at(x["logits"], (0, 2, (taken + 1) % V), -torch.inf)
    assert grpo_loss(spec=SPEC, **x).loss.isfinite()


@pytest.mark.parametrize("name", ["hidden", "ref_hidden"])
def test_hidden_states(name: str) -> None:
    x = given()
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    states = {"hidden": hidden, "ref_hidden": hidden.clone()}
    states[name] = wrong_at(hidden, (1, 0, 3), torch.nan)
    x = {k: v for k, v in x.items() if not k.endswith("logits")}
    heads = {"lm_head_weight": weight, "ref_lm_head_weight": weight}
    raises(linear_grpo_loss, f"{name}[1, 0, 3] is nan, and not masked", spec=SPEC, **states, **heads, **x)
    if name == "hidden":
        head = {"hidden": states["hidden"], "lm_head_weight": weight}
        raises(linear_logps, "hidden[1, 0, 3] is nan, and not masked", ids=x["completion_ids"], **head)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["hidden", "ref_hidden", "lm_head_weight", "ref_lm_head_weight"])
def test_infinite_operands(name: str, value: float) -> None:
    """Products with infinity of either sign are infinite or NaN."""
    x = linear()
    x[name] = wrong_at(x[name], (1, 0, 3) if name.endswith("hidden") else (5, 2), value)
    at, masked = ("[1, 0, 3]", ", and not masked") if name.endswith("hidden") else ("[5, 2]", "")
    raises(linear_grpo_loss, f"{name}{at} is {value}{masked}", spec=SPEC, **x)
    if not name.startswith("ref_"):
        of = {"hidden": x["hidden"], "lm_head_weight": x["lm_head_weight"], "ids": x["completion_ids"]}
        raises(linear_logps, f"{name}{at} is {value}{masked}", **of)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["lm_head_bias", "ref_lm_head_bias"])
def test_bias(name: str, value: float) -> None:
    x = linear()
    x[name] = wrong_at(x[name], (6,), value)
    raises(linear_grpo_loss, f"{name}[6] is {value}", spec=SPEC, **x)
    if name == "lm_head_bias":
        of = {key: x[key] for key in ("hidden", "lm_head_weight", "lm_head_bias")}
        raises(linear_logps, f"{name}[6] is {value}", ids=x["completion_ids"], **of)


def test_what_is_right_in_a_head() -> None:
    """A bias of -inf excludes a vocabulary entry, as a logit of -inf does. Padding never matters."""
    x = linear()
    x["completion_ids"] %= 5
    for name in ("lm_head_bias", "ref_lm_head_bias"):
        x[name] = wrong_at(x[name], (5,), -torch.inf)
    assert linear_grpo_loss(spec=SPEC, **x).loss.isfinite()
    for name in ("lm_head_weight", "ref_lm_head_weight", "lm_head_bias", "ref_lm_head_bias"):
        x[name][5:] = torch.nan
    assert linear_grpo_loss(spec=SPEC, vocab_size=5, **x).loss.isfinite()
    of = {key: x[key] for key in ("hidden", "lm_head_weight", "lm_head_bias")}
    assert linear_logps(ids=x["completion_ids"], vocab_size=5, **of).isfinite().all()


def test_a_head_without_unmasked_tokens_does_not_matter() -> None:
    x = linear() | {"completion_mask": torch.zeros(B, T)}
    x["lm_head_weight"] = x["lm_head_weight"] * torch.nan
    assert linear_grpo_loss(spec=SPEC, **x).loss == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, -0.5, torch.nan, torch.inf, -torch.inf])
def test_temperatures(form: str, value: float) -> None:
    at = (1, 2) if form == "padded" else (4,)
    x = given(form)
    x["temperature"] = wrong_at(x["temperature"], at, value)
    unmasked = f"is {value}, and not masked" if value in (torch.inf, -torch.inf) or value != value else None
    message = f"temperature{list(at)} {unmasked or f'must be > 0, got {value}'}"
    raises(grpo_loss, message, spec=SPEC, **x)
    raises(
        selective_logps, message, logits=x["logits"], ids=x["completion_ids"], temperature=x["temperature"]
    )
    x["completion_mask"] = wrong_at(x["completion_mask"], at, 0)
    assert grpo_loss(spec=SPEC, **x).loss.isfinite()


def test_one_temperature_in_a_tensor() -> None:
    x = given() | {"temperature": torch.tensor(-1.0)}
    raises(grpo_loss, "temperature[0, 0] must be > 0, got -1.0", spec=SPEC, **x)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["advantages", "token_weights"])
@pytest.mark.parametrize("form", FORMS)
def test_infinite(name: str, value: float, form: str) -> None:
    x, at = given(form), (1, 2) if form == "padded" else (4,)
    x[name] = wrong_at(x[name], at, value)
    raises(grpo_loss, f"{name}{list(at)} is {value}, and not masked", spec=SPEC, **x)
    x["completion_mask"] = wrong_at(x["completion_mask"], at, 0)
    assert grpo_loss(spec=SPEC, **x).loss.isfinite()


@pytest.mark.parametrize("name", ["old_logps", "ref_logps"])
def test_infinite_log_probabilities(name: str) -> None:
    """-inf is the log-probability of a token that the model excludes. +inf is never one."""
    x = given()
    del x["ref_logits"]
    x = {"ref_logps": -torch.rand(B, T)} | x
    raises(
        grpo_loss,
        f"{name}[0, 1] is inf, and not masked",
        spec=SPEC,
        **x | {name: wrong_at(x[name], (0, 1), torch.inf)},
    )
    grpo_loss(spec=SPEC, **x | {name: wrong_at(x[name], (0, 1), -torch.inf)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_normalizer(value: float) -> None:
    """A tensor must be as valid as a number."""
    message = f"normalizer must be finite and >= 0, got {value}"
    raises(grpo_loss, message, spec=SPEC, normalizer=torch.tensor(value), **given())


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, torch.nan])
def test_float_masks(value: float) -> None:
    """Anything but 0 would count as 1, which is wrong for a tensor of weights."""
    x = given()
    mask = wrong_at(x["completion_mask"], (1, 2), value)
    said = f"[1, 2] is {value}, but a mask holds only 0 and 1"
    raises(grpo_loss, f"completion_mask{said}", spec=SPEC, **x | {"completion_mask": mask})
    logps, ids = -torch.rand(B, T), x["completion_ids"]
    raises(policy_loss, f"completion_mask{said}", logps=logps, advantages=torch.ones(B), completion_mask=mask)
    raises(selective_logps, f"mask{said}", logits=x["logits"], ids=ids, mask=mask)
    head = {"hidden": torch.randn(B, T, H), "lm_head_weight": torch.randn(V, H)}
    raises(linear_logps, f"mask{said}", ids=ids, mask=mask, **head)
    raises(global_normalizer, f"mask{said}", mask=mask)
    for helper in (importance_weights, rejection_mask, mismatch_metrics):
        raises(helper, f"mask{said}", logps=logps, sampler_logps=logps, mask=mask)
    drift = {"advantages": torch.ones(B), "logps": logps, "sampler_logps": logps, "threshold": 1.0}
    raises(off_policy_sequence_mask, f"mask{said}", mask=mask, **drift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_masks_of_0_and_1(dtype: torch.dtype) -> None:
    x = given() | {"completion_mask": torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)}
    assert grpo_loss(spec=SPEC, **x).loss.isfinite()


@pytest.mark.parametrize("name", ["logps", "entropy"])
def test_policy_loss(name: str) -> None:
    x = {"logps": -torch.rand(B, T), "entropy": torch.rand(B, T)}
    x[name] = wrong_at(x[name], (1, 1), torch.nan)
    spec = LossSpec(entropy_coef=0.1)
    raises(policy_loss, f"{name}[1, 1] is nan, and not masked", spec=spec, advantages=torch.ones(B), **x)


def test_masked_positions_do_not_matter() -> None:
    x = given()
    for name, value in x.items():
        if name == "completion_ids":
            x[name] = wrong_at(value, (1, 2), -100)
        elif name != "completion_mask":
            value[1, 2] = torch.nan
    x["completion_mask"][1, 2] = 0
    assert grpo_loss(spec=SPEC, **x).loss.isfinite()


def test_nothing_left(caplog: pytest.LogCaptureFixture) -> None:
    x = given() | {"completion_mask": torch.zeros(B, T)}
    with caplog.at_level(logging.WARNING, "grpo_kernels"):
        assert grpo_loss(spec=SPEC, **x).loss == 0
    assert "completion_mask masks all of (2, 3): the loss and its gradient are 0" in caplog.messages


@pytest.mark.parametrize("setting", [None, "", "0"])
def test_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str | None) -> None:
    monkeypatch.delenv("GRPO_KERNELS_DEBUG")
    if setting is not None:
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", setting)
    x = given()
    assert grpo_loss(
        spec=SPEC, **x | {"completion_ids": wrong_at(x["completion_ids"], (1, 2), V)}
    ).loss.isnan()
    assert grpo_loss(spec=SPEC, **x | {"advantages": x["advantages"] * torch.nan}).loss.isnan()
    grpo_loss(spec=SPEC, **x | {"completion_mask": torch.zeros(B, T)})
    assert not any("masks all" in message for message in caplog.messages)
