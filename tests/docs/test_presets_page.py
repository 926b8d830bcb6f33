"""docs/presets.md says of every preset what it is."""

from __future__ import annotations

import re
from pathlib import Path

import grpo_kernels
from grpo_kernels import LossSpec
from grpo_kernels.checks.choices import PRESET_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


def test_every_row_is_the_preset_of_its_name() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(LossSpec\(.*?\))` \|", text, re.MULTILINE))
    assert tuple(rows) == PRESET_NAMES
    for name, code in rows.items():
        options = {"max_tokens": 7} if name == "dr_grpo" else {}
        assert eval(code, {**vars(grpo_kernels), "N": 7}) == LossSpec.preset(name, **options), name
