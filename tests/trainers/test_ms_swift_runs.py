"""Whole runs of ms-swift's GRPO, DPO, CPO, ORPO and KTO on the CPU: without a plugin, and with each of ours.

Run by `make test-trainer TRAINER=ms_swift` in ms-swift's environment. The seeds are the same, so both runs
sample the same completions. Errors are relative to the largest value of a run. Both sides are fp32: 1e-6 per
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("swift.rlhf_trainers")

from same_runs import assert_close, assert_same_parameters
from swift.rlhf_trainers import grpo_trainer
from swift_runs import Run, rows, train

from grpo_kernels.integrations import swift as logps
from grpo_kernels.integrations import swift_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"
)

PLUGINS = {
    "logps": "from grpo_kernels.integrations.swift import fuse_swift_logps\n\nfuse_swift_logps()\n",
    "loss": "from grpo_kernels.integrations.swift_loss import fuse_swift_loss\n\nfuse_swift_loss()\n",
}
Runs = Callable[..., Run]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Whether autocast was on, for each call of our functions. ms-swift is restored after the test."""
    found: dict[str, list[Any]] = {}
    functions = [(logps, "selective_logps"), (swift_loss, "linear_logps"), (swift_loss, "linear_grpo_loss")]
    for module, name in functions:
        found[name] = []
        monkeypatch.setattr(module, name, spy(getattr(module, name), found[name]))
    for module in logps.MODULES:
        monkeypatch.setattr(module, "selective_log_softmax", module.selective_log_softmax)
    trainer = grpo_trainer.GRPOTrainer
    monkeypatch.setattr(trainer, "_prepare_liger_loss", trainer._prepare_liger_loss)
    return found


def spy(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        calls.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **options)

    return called


@pytest.fixture
def runs(calls: dict[str, list[Any]], tmp_path: Path) -> Runs:
    """A function that trains, with one of `PLUGINS` or none. A plugin lasts until the end of the test."""

    def run(kind: str, plugin: str | None = None, **options: Any) -> Run:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return train(kind, folder, plugin=PLUGINS[plugin] if plugin else "", **options)

    return run


def assert_same_runs(got: Run, wanted: Run, metrics: Iterable[str] = ()) -> None:
    """Assert that losses, gradient norms, some metrics and the final parameters agree."""
    for key in ("loss", "grad_norm", *metrics):
        assert_close(key, got.column(key), wanted.column(key))
    assert_same_parameters(got.after, wanted.after)


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "KL, evaluated": {"beta": 0.1, "val_dataset": ["rows"], "eval_strategy": "steps", "eval_steps": 2},
    "bnpo": {"loss_type": "bnpo"},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.02},
    "tied": {"model": "tied"},
    "softcap": {"model": "gemma2", "beta": 0.1},
    "scale": {"model": "cohere", "beta": 0.1},
    "LoRA": {"tuner_type": "lora", "target_modules": ["q_proj", "v_proj"], "beta": 0.1},
    "LoRA, head": {"tuner_type": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_grpo(runs: Runs, calls: dict[str, list[Any]], name: str) -> None:
    """Both plugins give the losses and the final parameters of ms-swift's own run."""
    options = OPTIONS[name]
    wanted = runs("grpo", **options)
    assert not any(calls.values())
    assert float(wanted.column("loss").abs().max()) > 1e-4
    metrics = ["reward", "completions/mean_length", *(["kl"] if "beta" in options else [])]
    metrics += ["eval_loss", "eval_kl"] if "val_dataset" in options else []
    assert_same_runs(runs("grpo", "logps", **options), wanted, metrics)
    assert calls["selective_logps"]
    grpo_trainer.selective_log_softmax = None  # nothing computes logits in the run below
    got = runs("grpo", "loss", **options)
    assert_same_runs(got, wanted, metrics)
    assert calls["linear_grpo_loss"] and calls["linear_logps"]
    if name == "sapo":
        assert got.column("clip_ratio").isnan().all()
    else:
        assert_close("clip_ratio", got.column("clip_ratio"), wanted.column("clip_ratio/region_mean"))


@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo", "kto"])
def test_other_trainers(runs: Runs, calls: dict[str, list[Any]], kind: str) -> None:
    """With our log-probabilities, losses and final parameters are those of ms-swift's own run."""
    wanted = runs(kind)
    assert not any(calls.values())
    assert_same_runs(runs(kind, "logps"), wanted)
    assert calls["selective_logps"]


def test_a_kl_in_the_reward(runs: Runs) -> None:
    """The loss has no KL then, and the KL is logged once, with the reward."""
    options = {"beta": 0.1, "kl_in_reward": True}
    wanted = runs("grpo", **options)
    assert_same_runs(runs("grpo", "loss", **options), wanted, ("kl", "reward"))


@pytest.mark.parametrize("options", [{"torch_dtype": "bfloat16"}, {"bf16": True}], ids=str)
def test_bf16(runs: Runs, calls: dict[str, list[Any]], options: dict[str, Any]) -> None:
    """The old log-probabilities round as those of the loss, so in the first step no ratio leaves 1.

    Autocast is on where ms-swift has it on for its own loss.
    """
    level = {"importance_sampling_level": "sequence", "epsilon": 3e-4}
    run = runs("grpo", "loss", **{**options, **level})
    assert run.column("clip_ratio")[0] == 0
    assert run.column("clip_ratio")[1] > 0
    assert set(calls["linear_grpo_loss"]) == set(calls["linear_logps"]) == {"bf16" in options}


REFUSED: dict[str, dict[str, Any]] = {
    "advantage_estimator=rloo": {"advantage_estimator": "rloo"},
    "loss_type=dapo": {"loss_type": "dapo"},
    "overlong_filter": {"overlong_filter": True},
    "log_rollout_offpolicy_metrics": {"log_rollout_offpolicy_metrics": True},
    "an lm_head of .*lora": {"tuner_type": "lora", "target_modules": ["lm_head"]},
    "a teacher": {"rows": [{**row, "teacher_prompt": "1+1="} for row in rows("grpo")]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(runs: Runs, name: str) -> None:
    """An option that this loss would ignore raises before the first step."""
    with pytest.raises(ValueError, match=f"fuse_swift_loss does not support {name}"):
        runs("grpo", "loss", **REFUSED[name])
