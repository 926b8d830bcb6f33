"""The import of the integration: which verl it accepts, what it logs, and how verl starts it."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from verl_head import tiny_model
from verl_imported import MODULE, VERLS_CROSS_ENTROPY, VERLS_FUNCTION

pytest.importorskip("verl.trainer.ppo.core_algos")

import verl
from verl.models.transformers import monkey_patch
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module
from verl.workers.config import HFModelConfig

pytestmark = pytest.mark.usefixtures("integration")


def imported_anew(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the integration again."""
    monkeypatch.delitem(sys.modules, MODULE)
    return importlib.import_module(MODULE)


def test_without_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verl, the import names the package to install."""
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"pip install 'verl>=0\.9\.1'"):
        imported_anew(monkeypatch)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1.dev0", "0.8"])
def test_older_verl(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older verl is refused."""
    monkeypatch.setattr(verl, "__version__", version)
    with pytest.raises(ImportError, match=f"needs verl 0.9.1 or later, found {version}"):
        imported_anew(monkeypatch)


def test_newer_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer verl gives one warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported_anew(monkeypatch)
    monkeypatch.setattr(verl, "__version__", "0.10.0.dev")
    with pytest.warns(UserWarning, match="tested with verl 0.9.1; verl 0.10.0.dev is newer") as caught:
        imported_anew(monkeypatch)
    assert len(caught) == 1


def test_verl_with_other_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verl without the function that we replace is refused."""
    for name in (f"{MODULE}.logps", f"{MODULE}.heads"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(monkey_patch, "patch_forward_with_backends")
    with pytest.raises(ImportError, match=r"other fused kernels than verl 0\.9\.1.*patch_forward"):
        imported_anew(monkeypatch)


def test_import_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The import logs one message with what it has registered."""
    caplog.set_level(logging.INFO, logger="grpo_kernels")
    imported_anew(monkeypatch)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.message.startswith(
        "verl 0.9.1: registered log_ratio and"
    )


def test_fused_kernels_left_to_verl(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GRPO_KERNELS_VERL_FUSE=0 leaves verl's fused kernels as they are."""
    caplog.set_level(logging.INFO, logger="grpo_kernels")
    monkeypatch.setenv("GRPO_KERNELS_VERL_FUSE", "0")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    monkeypatch.setattr(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    imported_anew(monkeypatch)
    assert torch_functional.FusedLinearForPPOFunction is VERLS_FUNCTION
    assert cross_entropy_module.linear_cross_entropy is VERLS_CROSS_ENTROPY
    assert "left as they are" in caplog.records[0].message


def test_external_lib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`external_lib` in verl's model config imports the integration."""
    config = tiny_model(tied=False).config
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE)
    options = {"load_tokenizer": False, "override_config": {"attn_implementation": "eager"}}
    HFModelConfig(path=str(tmp_path), **options)
    assert MODULE not in sys.modules
    HFModelConfig(path=str(tmp_path), external_lib=MODULE, **options)
    assert MODULE in sys.modules


def test_external_modules() -> None:
    """VERL_USE_EXTERNAL_MODULES imports the integration during `import verl`.

    `import grpo_kernels` does not import it.
    """
    script = (
        "import sys, grpo_kernels\n"
        "assert not any(name.partition('.')[0] == 'verl' for name in sys.modules)\n"
        "import verl\n"
        f"assert '{MODULE}' in sys.modules\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction\n"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy\n"
        "from verl.workers.utils.losses import ppo_loss\n"
        "for x in (get_policy_loss_fn('log_ratio'), FusedLinearForPPOFunction, linear_cross_entropy):\n"
        f"    assert x.__module__.startswith('{MODULE}'), x\n"
        "assert ppo_loss.__wrapped__.__module__ == 'verl.workers.utils.losses'\n"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": MODULE}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
