"""The code of docs/distillation.md runs and does what the page says, and so does examples/distillation.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distillation.md"


def test_the_page_runs() -> None:
    """The blocks before TRL's run in order, and the top K is at most the divergence over all tokens."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text[: text.index("## 8.")], re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for number, code in enumerate(blocks):
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
    hidden, mask, logits = (names[name] for name in ("hidden", "mask", "logits"))
    for x in (hidden, logits):
        assert bool((x.grad[mask] != 0).any(-1).all()) and bool((x.grad[~mask] == 0).all())
    options = {"divergence": "forward_kl", "completion_mask": mask}
    whole = names["distillation_loss"](logits, teacher_logits=names["teacher_logits"], **options)
    top = {name: names[name] for name in ("teacher_ids", "teacher_logps")}
    some = names["distillation_loss"](logits, rest="bucket", **top, **options)
    assert 0.1 < float(some.loss.detach()) < float(whole.loss.detach())


@pytest.mark.long
def test_the_example(tmp_path: Path) -> None:
    """The student's KL falls below a tenth, and most of its samples become right."""
    pytest.importorskip("transformers")
    options = ["--steps", "60", "--teacher-steps", "250", "--output", str(tmp_path / "curves.png")]
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "distillation.py"), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr
    steps = [
        dict(re.findall(r"(\w+) +(-?[\d.]+|nan)(?=\s|$)", line))
        for line in run.stdout.splitlines()
        if line.startswith("step")
    ]
    assert float(steps[-1]["kl"]) < 0.1 * float(steps[0]["kl"])
    before, after = (
        float(re.search(rf"student, {when} +[\d,]+ +([\d.]+)", run.stdout)[1]) for when in ("before", "after")
    )
    assert before < 0.05 and after > 0.5
    if "curves:" in run.stdout:
        assert (tmp_path / "curves.png").stat().st_size > 1000
