"""A wrong backend, spec, preset or option raises at the call, before the logits are read."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from wrong_calls import B, T, V, check, ids, logps, padded, zeros

from grpo_kernels import GRPOLoss, LinearGRPOLoss, LossSpec, PPOClip, log_ratio_loss


@pytest.mark.usefixtures("nothing_runs")
class TestChoices:
    @pytest.mark.parametrize("value", ["cuda", None, ""])
    def test_backend(self, value: Any) -> None:
        for call in (padded, logps):
            check(
                call,
                {"backend": value},
                ValueError,
                "backend must be one of 'auto', 'triton', 'torch'",
                f"{value!r}",
            )

    @pytest.mark.parametrize("value", [PPOClip(), PPOClip, LossSpec, None, 1])
    def test_spec_of_another_type(self, value: Any) -> None:
        check(
            padded, {"spec": value}, TypeError, "spec must be a LossSpec or the name of a preset", repr(value)
        )
        check(
            GRPOLoss,
            {"spec": value},
            TypeError,
            "spec must be a LossSpec or the name of a preset",
            repr(value),
        )

    def test_unknown_preset(self) -> None:
        for call in (padded, GRPOLoss):
            check(call, {"spec": "gppo"}, ValueError, "spec must be one of", "'dapo'", "got 'gppo'")

    def test_a_preset_by_name_that_needs_max_tokens(self) -> None:
        for call in (padded, GRPOLoss, LinearGRPOLoss):
            check(
                call,
                {"spec": "dr_grpo"},
                ValueError,
                "preset 'dr_grpo' divides by max_tokens",
                "LossSpec.preset('dr_grpo', max_tokens=...)",
            )

    def test_unknown_options(self) -> None:
        listed = "The options are ", "ref_logits", "temperature"
        check(GRPOLoss, {"temprature": 1.0}, TypeError, "GRPOLoss has no option temprature. ", *listed)
        check(
            LinearGRPOLoss,
            {"temprature": 1.0, "x": 2},
            TypeError,
            "LinearGRPOLoss has no option temprature, x. The options are lm_head_bias, ",
            "chunk_tokens",
        )
        at_the_call = {"logits": zeros(B, T, V), "completion_ids": ids(B, T), "advantages": zeros(B)}
        check(GRPOLoss(), {**at_the_call, "maskk": 1}, TypeError, "GRPOLoss has no option maskk. ", *listed)
        of_the_loss = "GRPOLoss has no option eps_high, kl: give options of the loss in its spec, "
        for where, preset in (({"spec": "dapo"}, "'dapo'"), ({"spec": LossSpec()}, "name"), ({}, "name")):
            given = {**where, "eps_high": 0.3, "kl": None}
            advice = f"{of_the_loss}LossSpec.preset({preset}, eps_high=..., kl=...). "
            check(GRPOLoss, given, TypeError, advice, *listed)
            check(GRPOLoss(), {**at_the_call, **given}, TypeError, advice, *listed)
        check(
            padded,
            {"temprature": 1.0},
            TypeError,
            "grpo_loss() got an unexpected keyword argument 'temprature'",
        )
        fixed = {
            "logits": zeros(B, T, V),
            "ref_logits": zeros(B, T, V),
            "completion_ids": ids(B, T),
            "rewards": zeros(B),
        }
        check(log_ratio_loss, {**fixed, "spec": "grpo"}, TypeError, "log_ratio_loss has a fixed spec")
        check(
            log_ratio_loss,
            {**fixed, "aggregation": "mean"},
            ValueError,
            "aggregation must be one of",
            "'mean'",
        )


def test_kernels_on_cpu_tensors_without_the_interpreter() -> None:
    """The program runs in its own process, because Triton reads TRITON_INTERPRET once."""
    program = """
import torch, grpo_kernels
ids = torch.zeros(2, 3).long()
for call in (
    lambda **how: grpo_kernels.grpo_loss(torch.zeros(2, 3, 7), ids, torch.zeros(2), **how),
    lambda **how: grpo_kernels.selective_logps(torch.zeros(2, 3, 7), ids, **how),
):
    call()
    try:
        call(backend="triton")
    except ValueError as error:
        print(error)
"""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("backend='triton' needs GPU tensors, got logits on cpu")
        assert "TRITON_INTERPRET=1" in message
