"""Whole runs of OpenRLHF's `train_ppo_ray` on the CPU: without edits, and with those of docs/trainers.md.

Run by `make test-trainer TRAINER=openrlhf`. The seeds are the same and the sampler's weights
stay those of the first step, so all runs sample the same completions. Errors are relative to the largest
value of a run. Both sides are fp32: 1e-6 per step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf")

from openrlhf_runs import Edit, Run, documented, section, source_line, train
from same_runs import assert_close, assert_same_parameters

from grpo_kernels import logps
from grpo_kernels.integrations import openrlhf as adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::DeprecationWarning"
)

LOSS, LOGPS = documented()
(SPEC_LINE,) = map(int, re.findall(r"`PolicyLoss\(\.\.\.\)` in line (\d+)", section()))
(LOGPS_LINE,) = map(int, re.findall(r"The call in line (\d+)", section()))
Runs = Callable[..., Run]


def with_spec(spec: str) -> list[Edit]:
    """Return the edits of the docs for another surrogate."""
    return [LOSS, Edit(LOSS.module, SPEC_LINE, "PolicyLoss(", f"PolicyLoss(spec={spec},")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often our loss and our log-probabilities were called."""
    found: dict[str, int] = {}

    def spy(owner: Any, name: str) -> None:
        function, found[name] = getattr(owner, name), 0

        def called(*args: Any, **options: Any) -> Any:
            found[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(owner, name, called)

    spy(adapter, "weighted_loss")
    spy(logps, "differentiable_stats")
    return found


@pytest.fixture
def runs(calls: dict[str, int], tmp_path: Path) -> Runs:
    """A function that trains with edits, or without."""

    def run(edits: Sequence[Edit] = (), **options: Any) -> Run:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return train(folder, edits, **options)

    return run


def assert_same_runs(got: Run, wanted: Run) -> None:
    """Assert that all metrics, the gradient norm among them, and the final parameters agree."""
    assert len(got.logs) == len(wanted.logs)
    for key in {key for log in wanted.logs for key in log}:
        for ours, theirs in zip(got.logs, wanted.logs, strict=True):
            assert (key in ours) == (key in theirs)
        assert_close(key, got.column(key), wanted.column(key))
    assert_same_parameters(got.after, wanted.after)


def distance(a: Run, b: Run) -> float:
    return max(float((a.after[name] - x).abs().max()) for name, x in b.after.items())


CORRECTION = "algo.advantage.is_correction_"
GSPO = {"actor.policy_loss_type": "gspo", "actor.eps_clip": 0.05}
DYNAMIC = {"train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 24}
# Options that change the training.
OPTIONS: dict[str, dict[str, Any]] = {
    "bounds": {"actor.eps_clip_low_high": [0.1, 0.3]},
    "dual clip": {"actor.dual_clip": 1.5},
    "mean per sequence": {"actor.loss_agg_mode": "seq-mean-token-mean"},
    "gspo": GSPO,
    "KL in the loss": {"algo.kl.init_coef": 0.1, "algo.kl.use_loss": True, "algo.kl.estimator": "k3"},
    "KL in the reward": {"algo.kl.init_coef": 0.1},
    "entropy bonus": {"actor.entropy_coef": 0.01},
    "token mask": {f"{CORRECTION}level": "token", f"{CORRECTION}threshold": [0.8, 1.25]},
    "token clip": {f"{CORRECTION}level": "token", f"{CORRECTION}mode": "clip"}
    | {f"{CORRECTION}threshold": [0.8, 1.25]},
    "sequence mask": {f"{CORRECTION}level": "seq", f"{CORRECTION}threshold": [0.95, 1.1]},
    "sequence mask, binary KL": {f"{CORRECTION}level": "seq", f"{CORRECTION}gating": "binary_kl"}
    | {f"{CORRECTION}threshold": [0.05]},
    "token mask, total variation": {f"{CORRECTION}level": "token", f"{CORRECTION}gating": "tv"}
    | {f"{CORRECTION}threshold": [0.1], "actor.loss_agg_mode": "seq-mean-token-mean"},
    "gspo to the sampler": {**GSPO, f"{CORRECTION}level": "token"},
    "dynamic batches": DYNAMIC,
    "dynamic batches, mean per sequence": {**DYNAMIC, "actor.loss_agg_mode": "seq-mean-token-mean"},
    "two epochs": {"train.max_epochs": 2},
    "critic": {"algo.advantage.estimator": "gae"},
    "turns": {"agent": True, "data.max_len": 24},
    "LoRA": {"ds.lora.rank": 4},
}
# Options that do not: the results are those of the default.
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"ds.packing_samples": True},
    "checkpointing": {"actor.gradient_checkpointing_enable": True},
    "ZeRO-3": {"ds.zero_stage": 3},
}


def test_default(runs: Runs, calls: dict[str, int]) -> None:
    """Each edit gives the metrics and the final parameters of OpenRLHF's own run."""
    wanted = runs()
    assert not any(calls.values())
    clipped = wanted.column("ppo_clip_ratio")
    assert 0 < clipped.max() < 1 and clipped[0] == 0
    assert_same_runs(runs([LOSS]), wanted)
    assert calls.pop("weighted_loss") == len(wanted.logs) and not any(calls.values())
    assert_same_runs(runs([LOGPS]), wanted)
    assert calls["differentiable_stats"] > len(wanted.logs)  # also for the old policy


@pytest.mark.parametrize("name", OPTIONS)
def test_options(runs: Runs, calls: dict[str, int], name: str) -> None:
    """With both edits, metrics and final parameters are those of OpenRLHF's own run."""
    options = OPTIONS[name]
    wanted = runs(**options)
    if name == "LoRA":
        assert all("lora" in key for key in wanted.after)
    else:
        assert distance(wanted, runs()) > 1e-3
    if "mask" in name:
        filtered = wanted.column("is_filter_ratio")
        assert 0 < filtered.mean() < 1
    assert not any(calls.values())
    assert_same_runs(runs([LOSS, LOGPS], **options), wanted)
    assert calls["weighted_loss"] == len(wanted.logs) and calls["differentiable_stats"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(runs: Runs, name: str) -> None:
    """As `test_options`. OpenRLHF's own run has the parameters of its default."""
    wanted = runs(**LAYOUTS[name])
    # Where ZeRO-3 loads a model, it draws random numbers, so the batches are shuffled in another way.
    assert distance(wanted, runs()) < 1e-5 or name == "ZeRO-3"
    assert_same_runs(runs([LOSS, LOGPS], **LAYOUTS[name]), wanted)


# A preset, and the options with which OpenRLHF has the same loss.
PRESETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dapo": ("'dapo'", {"actor.eps_clip_low_high": [0.2, 0.28]}, {}),
    "gspo": (
        "'gspo'",
        {"actor.policy_loss_type": "gspo", "actor.eps_clip_low_high": [3e-4, 4e-4]},
        {"actor.loss_agg_mode": "seq-mean-token-mean"},
    ),
    "a LossSpec": (
        "__import__('grpo_kernels').LossSpec(__import__('grpo_kernels').PPOClip(0.1, 0.3, dual_clip=1.5))",
        {"actor.eps_clip_low_high": [0.1, 0.3], "actor.dual_clip": 1.5, **DYNAMIC},
        DYNAMIC,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(runs: Runs, name: str) -> None:
    """A preset's loss is that of OpenRLHF with the same bounds."""
    spec, theirs, ours = PRESETS[name]
    wanted = runs(**theirs)
    assert distance(wanted, runs()) > 1e-3
    assert_same_runs(runs(with_spec(spec), **ours), wanted)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_another_surrogate(runs: Runs, mode: str) -> None:
    """SAPO is summed with OpenRLHF's aggregation and with its weights for the sampler."""
    options = {**OPTIONS["token clip"], "actor.loss_agg_mode": mode}
    oracle = LOSS._replace(new=LOSS.new.replace("grpo_kernels.integrations.openrlhf", "openrlhf_sapo"))
    wanted = runs([oracle], **options)
    assert distance(wanted, runs(**options)) > 1e-3
    got = runs(with_spec("'sapo'"), **options)
    assert_same_runs(got, wanted)


def test_bf16(runs: Runs, calls: dict[str, int]) -> None:
    """OpenRLHF's default dtype: the same, up to parameters that round to the other neighbour."""
    wanted = runs(dtype="bf16")
    assert {x.dtype for x in wanted.after.values()} == {torch.bfloat16}
    got = runs([LOSS, LOGPS], dtype="bf16")
    assert all(calls.values())
    for key in ("policy_loss", "actor_grad_norm", "ppo_kl"):
        torch.testing.assert_close(got.column(key), wanted.column(key), rtol=1e-2, atol=1e-2)
    assert distance(got, wanted) < 2e-2


def test_what_is_refused(runs: Runs) -> None:
    """A surrogate next to GSPO, and one that needs the reference, raise before the first step."""
    with pytest.raises(ValueError, match="spec replaces policy_loss_type, which must be 'ppo'"):
        runs(with_spec("'sapo'"), **GSPO)
    with pytest.raises(ValueError, match="does not pass the reference's log-probabilities"):
        runs(with_spec("'log_ratio'"), **OPTIONS["KL in the loss"])


def test_lines_of_the_docs() -> None:
    """The section says where OpenRLHF calls the two functions. `apply` checks the lines of its code."""
    assert source_line(LOSS.module, SPEC_LINE).endswith("PolicyLoss(")
    assert "log_probs_from_logits(" in source_line(LOGPS.module, LOGPS_LINE)
