"""The training loops of the README and of docs/integrations.md work with left-padded prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import run_workers, session_folder

pytest.importorskip("transformers")

from distributed import docs_loops

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_workers(Path(docs_loops.__file__), 2, session_folder(tmp_path_factory))


@pytest.mark.long
@pytest.mark.parametrize("name", docs_loops.cases)
def test_loops_on_two_ranks(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]


def test_loops_of_the_readme() -> None:
    """Logits and hidden states equal those of each sequence without padding."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## In a training loop") : text.index("## Which function")]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    model, batch = docs_loops.make_model(), docs_loops.make_batch(0)
    names: dict[str, Any] = {
        "model": model,
        "ref_model": docs_loops.make_model(),
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_ids": batch.ids,
        "mask": batch.mask,
        "advantages": batch.advantages,
        "old_logps": None,
        "ref_logits": torch.zeros(docs_loops.B, docs_loops.T, docs_loops.V),
        "ref_hidden": torch.zeros(docs_loops.B, docs_loops.T, 16),
        "log": lambda metrics: None,
    }
    for code in blocks:
        exec(code, names)
    hidden = names["hidden"]
    for row in range(docs_loops.B):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        wanted = model.model(ids[None]).last_hidden_state[0, -docs_loops.T - 1 : -1]
        torch.testing.assert_close(hidden[row], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(names["logits"][row], model.lm_head(wanted), rtol=0, atol=1e-5)
