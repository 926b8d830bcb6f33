"""The training loop in plain PyTorch learns, and two processes give the same losses as one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed.launch import torchrun

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_torch.py"
STEPS, COMPARED = 30, 3


def logs(output: str) -> dict[str, torch.Tensor]:
    """Return the numbers that were printed for each step, by name."""
    steps = [
        dict(re.findall(r"(\w+) +(-?[\d.]+|nan)(?=\s|$)", line))
        for line in output.splitlines()
        if line.startswith("step")
    ]
    assert steps, output
    return {name: torch.tensor([float(x[name]) for x in steps]) for name in steps[0]}


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    command = [sys.executable, str(SCRIPT), "--steps", str(STEPS)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    return logs(run.stdout)


@pytest.mark.long
def test_it_learns(one_process: dict[str, torch.Tensor]) -> None:
    """The reward rises from below 0.1 to above 0.4 in half of the default number of steps."""
    reward = one_process["reward"]
    assert len(reward) == STEPS
    assert reward[:3].max() < 0.1 and reward[-3:].min() > 0.4
    assert all(values.isfinite().all() for values in one_process.values())


@pytest.mark.long
def test_two_processes(one_process: dict[str, torch.Tensor]) -> None:
    """Samples, losses and metrics are equal to the printed digits.

    The test compares a few steps only, because a different rounding changes a sample sooner or later.
    """
    output = torchrun(SCRIPT, 2, "--steps", str(COMPARED))
    found = logs(output)
    assert found.keys() == one_process.keys()
    for name, values in found.items():
        torch.testing.assert_close(
            values, one_process[name][:COMPARED], rtol=0, atol=2e-5, msg=f"{name}\n{output}"
        )
