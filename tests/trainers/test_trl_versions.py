"""The import of the TRL integration checks which TRL is installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from trl_runs import TRAINER_MARKS

import grpo_kernels

pytest.importorskip("trl", minversion="1.16")

import trl
from trl.trainer import utils

from grpo_kernels.integrations.trl import head as trl_head

pytestmark = TRAINER_MARKS


@pytest.fixture
def import_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A function that imports the TRL integration again."""
    name = "grpo_kernels.integrations.trl.head"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(grpo_kernels.integrations.trl, "head", trl_head)  # restored after the test
    yield lambda: importlib.import_module(name)


def test_trl_missing(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRL, the import names the package to install."""
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16'"):
        import_anew()


def test_trl_too_old(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An older TRL is refused."""
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with pytest.raises(ImportError, match=r"needs TRL 1\.16 or later, found 1\.15\.0"):
        import_anew()


@pytest.mark.filterwarnings("default::UserWarning")
def test_trl_newer(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer TRL gives a warning."""
    monkeypatch.setattr(trl, "__version__", "1.17.1")
    with pytest.warns(UserWarning, match=r"tested with TRL 1\.16; TRL 1\.17\.1 is newer"):
        import_anew()


def test_trl_with_another_head(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A TRL without the function that we replace is refused."""
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match="needs a newer grpo_kernels"):
        import_anew()


def test_package_without_trl() -> None:
    """The package itself imports neither TRL nor transformers."""
    code = "import grpo_kernels, sys; assert not {'trl', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
