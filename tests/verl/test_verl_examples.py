"""The examples in the docstrings of the integration of verl run."""

from __future__ import annotations

from types import ModuleType

import pytest
from docstring_examples import run_examples

pytest.importorskip("verl.trainer.ppo.core_algos")


@pytest.mark.parametrize("name", ["fuse_verl_logps", "register_loss"])
def test_examples(integration: ModuleType, name: str) -> None:
    run_examples(getattr(integration, name), name)


def test_every_name_has_an_example(integration: ModuleType) -> None:
    assert sorted(integration.__all__) == ["fuse_verl_logps", "register_loss"]
