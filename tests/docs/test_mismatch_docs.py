"""docs/mismatch.md: its program runs, and every line of its table of options is a valid call."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_kernels import importance_weights, rejection_mask
from grpo_kernels.weights import off_policy_sequence_mask

PAGE = (Path(__file__).parents[2] / "docs" / "mismatch.md").read_text(encoding="utf-8")
FUNCTIONS = "importance_weights|rejection_mask|off_policy_sequence_mask"
CALLS = sorted(set(re.findall(rf"`((?:{FUNCTIONS})\((?:\*tokens|advantages)[^`]*\))`", PAGE)))


def names() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator)
    old_logps = -torch.rand(2, 3, generator=generator)
    return {
        "logits": logits.requires_grad_(),
        "completion_ids": torch.randint(7, (2, 3), generator=generator),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_logps": old_logps,
        "logps": old_logps,
        "sampler_logps": old_logps + 0.1 * torch.randn(2, 3, generator=generator),
    }


def test_program() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = names()
    exec(compile(program, "mismatch.md", "exec"), found)
    assert found["out"].loss.isfinite() and "reject_fraction" in found["metrics"]


@pytest.mark.parametrize("call", CALLS)
def test_line(call: str) -> None:
    given = names()
    found = eval(
        call,
        {
            **given,
            "tokens": (given["old_logps"], given["sampler_logps"], given["completion_mask"]),
            "log": math.log,
            **{"a": 0.5, "b": 2.0, "c": 0.1},
            "importance_weights": importance_weights,
            "rejection_mask": rejection_mask,
            "off_policy_sequence_mask": off_policy_sequence_mask,
        },
    )
    assert found.shape in ((2, 3), (2, 1)) and found.isfinite().all()


def test_lines_are_found() -> None:
    assert len(CALLS) > 15
