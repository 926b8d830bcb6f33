"""The code of docs/advantages.md runs, and every call in its table does what the page says."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from grpo_kernels import group_advantages
from grpo_kernels.checks.choices import ADVANTAGE_ESTIMATORS

TEXT = (Path(__file__).parents[2] / "docs" / "advantages.md").read_text(encoding="utf-8")


def test_the_page_runs() -> None:
    """The blocks run in order, with their own assertions."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for number, (_, code) in enumerate(blocks):
        exec(compile(textwrap.dedent(code), f"advantages.md, block {number}", "exec"), names)
    assert len(names["losses"]) == 2


def test_the_table() -> None:
    """Every call runs, and every estimator is in the table."""
    calls = re.findall(r"^\| [^|]+ \| [^|]+ \| `(group_advantages\(.*\))` \|$", TEXT, re.MULTILINE)
    assert len(calls) == TEXT.count("| `group_advantages(") == 20
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 3.0, 1.0, 0.0, 0.0])
    names = {
        "group_advantages": group_advantages,
        "r": rewards,
        "R": torch.stack([rewards, rewards.flip(0)], 1),
        "w": [1.0, 0.5],
        "l": torch.arange(1, 9),
        "by": {"group_size": 4},
    }
    for call in calls:
        found = eval(call, dict(names))
        assert found.shape == (8,) and found.isfinite().all() and found.any(), call
    used = set(re.findall(r'estimator="(\w+)"', " ".join(calls)))
    assert used | {"grpo"} == set(ADVANTAGE_ESTIMATORS)
