"""GRPO_KERNELS_DEBUG=1 names what would otherwise show as a NaN: argument, position and value."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import KL, LossSpec, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from grpo_kernels.policy_loss import policy_loss

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
    """At the sequence's first token."""
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
