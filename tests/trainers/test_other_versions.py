"""The adapters of other trainers: their versions, and that this package does not import them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

from grpo_kernels.integrations.versions import require


def test_a_trainer_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that does not say its version has the one that pip installed."""
    monkeypatch.setitem(sys.modules, "a_trainer", ModuleType("a_trainer"))
    assert require("a_trainer", "A trainer", tested="2", distribution="torch") == version("torch")
    with pytest.raises(ImportError, match=r"pip install 'not-installed>=2'"):
        require("a_trainer", "A trainer", tested="2", distribution="not-installed")


def test_package_without_trainers() -> None:
    """`import grpo_kernels` imports no trainer."""
    names = {
        "openrlhf",
        "skyrl",
        "nemo_rl",
        "slime",
        "prime_rl",
        "swift",
        "trl",
        "verl",
        "ray",
        "transformers",
    }
    code = f"import grpo_kernels, sys; assert not {names} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
