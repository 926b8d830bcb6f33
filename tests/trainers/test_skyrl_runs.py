"""Whole runs of SkyRL's GRPO on the CPU: with its own losses, and with ours in its registry.

`skyrl_cpu.py` replaces CUDA, flash-attn and vLLM. Most tests call SkyRL's trainer and its FSDP workers in
this process. One runs the main file of docs/trainers.md with two workers of Ray. The seeds are the same, so
all runs see the same completions. Errors are relative to the largest value of a run. Both sides are fp32:
1e-6 per update.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("skyrl")

import skyrl_cpu  # noqa: F401  (SkyRL can be imported after it)
import transformers
from same_runs import TOLERANCE, assert_close, assert_same_parameters
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.backends.skyrl_train.workers import model_wrapper
from skyrl_runs import Run, command_line, train

from grpo_kernels import LossSpec, PPOClip, selective_logps
from grpo_kernels.integrations.skyrl import register_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "trainers.md"
CLIP_RATIO = "policy/loss_metrics/clip_ratio"
Runs = Callable[..., Run]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """A function that trains with a loss of SkyRL, or with a spec, which is registered for the test."""
    names: list[str] = []

    def run(loss: str, spec: Any = None, **options: Any) -> Run:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if spec is not None:
            loss = f"run{len(names)}"
            register_loss(loss, spec)
            names.append(loss)
        return train(folder, loss, **options)

    yield run
    for name in names:
        PolicyLossRegistry.unregister(name)


def assert_same_runs(
    got: Run, wanted: Run, skipped: Iterable[str] = (), tolerance: float = TOLERANCE
) -> None:
    """Assert that all that SkyRL logs about the policy agrees, and the final parameters."""
    assert len(wanted.logs) == 3
    assert float(wanted.column("policy/grad_norm").min()) > 0.1
    for key in wanted.logs[0]:
        if key.startswith("policy/") and key not in skipped:
            assert_close(key, got.column(key), wanted.column(key), tolerance)
    assert_same_parameters(got.after, wanted.after, tolerance)


DUAL = LossSpec(PPOClip(eps_low=0.004, eps_high=0.006, dual_clip=1.01), log_ratio_clamp=20.0)
# SkyRL's loss, ours, and SkyRL's options.
LOSSES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "regular": ("regular", "dapo", {}),
    "dual_clip": ("dual_clip", DUAL, {"clip_ratio_c": 1.01}),
    "gspo": ("gspo", "gspo_token", {"loss_reduction": "sequence_mean"}),
    "cispo": ("cispo", "cispo", {"cispo.cispo_eps_clip_low": 0.005, "cispo.cispo_eps_clip_high": 0.01}),
    "sapo": ("sapo", "sapo", {"sapo.tau_neg": 1.7, "loss_reduction": "sequence_mean"}),
    "dppo, TV": ("dppo", "dppo_tv", {"dppo.delta_low": 0.003, "dppo.delta_high": 0.002}),
    "dppo, KL": (
        "dppo",
        "dppo_kl",
        {"dppo.dppo_type": "binary_kl", "dppo.delta_low": 2e-4, "dppo.delta_high": 1e-4},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(runs: Runs, name: str) -> None:
    """Each loss gives SkyRL's metrics and final parameters, with the bounds of SkyRL's command line."""
    loss, spec, options = LOSSES[name]
    wanted, got = runs(loss, **options), runs(loss, spec, **options)
    skipped: list[str] = []
    if loss == "dppo":  # the same gradient, another value
        skipped += ["policy/final_loss", "policy/policy_loss"]
    if loss in ("cispo", "sapo"):
        skipped += [CLIP_RATIO]
    assert_same_runs(got, wanted, skipped)
    if loss == "sapo":  # clips nothing: SkyRL reports 0
        assert CLIP_RATIO not in got.logs[0]
    else:  # SkyRL's cispo also counts ratios outside the bounds whose advantage has the other sign
        assert (got.column(CLIP_RATIO) > 0).all()
        assert (got.column(CLIP_RATIO) <= wanted.column(CLIP_RATIO)).all()


CORRECTION = "off_policy_correction."
OPTIONS: dict[str, dict[str, Any]] = {
    "KL, entropy": {
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "use_entropy_loss": True,
        "entropy_loss_coef": 0.1,
        "temperature": 0.7,
        "loss_reduction": "sequence_mean",
    },
    "KL in the reward": {
        "use_kl_in_reward": True,
        "kl_loss_coef": 0.1,
        "advantage_estimator": "reinforce++",
        "loss_reduction": "token_mean_legacy",
    },
    "microbatches of tokens": {"trainer.max_tokens_per_microbatch": 20},
    "no padding": {"packed": True, "use_entropy_loss": True, "trainer.max_tokens_per_microbatch": 20},
    "ratio of a token": {
        f"{CORRECTION}tis_ratio_type": "token",
        f"{CORRECTION}token_tis_ratio_clip_high": 1.1,
        f"{CORRECTION}token_mask_is_threshold_low": 0.8,
        f"{CORRECTION}token_mask_is_threshold_high": 1.3,
        "loss_reduction": "seq_mean_token_sum_norm",
        "max_seq_len": 16,
    },
    "ratio of a sequence": {
        f"{CORRECTION}tis_ratio_type": "sequence",
        f"{CORRECTION}sequence_tis_ratio_clip_high": 1.1,
        f"{CORRECTION}sequence_mask_metric": "product",
        "loss_reduction": "prompt_mean",
    },
    "masked sequences": {
        f"{CORRECTION}sequence_mask_metric": "geometric",
        f"{CORRECTION}geo_mask_low": 0.9,
        f"{CORRECTION}geo_mask_high": 1.1,
        f"{CORRECTION}outlier_token_is_threshold_low": 0.6,
    },
    "use_tis": {"use_tis": True, "tis_imp_ratio_cap": 1.1, "trainer.update_epochs_per_batch": 2},
    "no sampler": {"generator.sampling_params.logprobs": "null", "zero_variance_filter": True},
    "LoRA": {"trainer.policy.model.lora.rank": 4, "trainer.policy.optimizer_config.lr": 5e-3},
}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("default"), "regular")


@pytest.mark.parametrize("name", OPTIONS)
def test_options(runs: Runs, default: Run, name: str) -> None:
    """What SkyRL computes around the loss is the same with ours, and it does depend on the option."""
    wanted = runs("regular", **OPTIONS[name])
    assert_same_runs(runs("ours", "dapo", **OPTIONS[name]), wanted)
    if wanted.logs[0].keys() == default.logs[0].keys():
        assert not torch.allclose(wanted.column("policy/grad_norm"), default.column("policy/grad_norm"), 1e-4)


def test_a_loss_by_name(runs: Runs) -> None:
    """A call of `forward_backward` can name the loss and override options, as SkyRL's Tinker server does."""
    register_loss("named", "dapo")
    try:
        overrides = {"loss_fn_config": {"eps_clip_low": 0.002, "eps_clip_high": 0.003}}
        wanted, got = (runs("regular", call={"loss_fn": name, **overrides}) for name in ("regular", "named"))
        assert_same_runs(got, wanted)
        assert not torch.equal(wanted.column(CLIP_RATIO), runs("regular").column(CLIP_RATIO))
    finally:
        PolicyLossRegistry.unregister("named")


@pytest.fixture
def our_logps(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Replace the lines of SkyRL that docs/trainers.md names. Each call appends the dtype of its result."""
    pattern = r"`skyrl/(\S+/model_wrapper.py)`, line (\d+), .*?```python\n(.*?)\s+#"
    found = re.search(pattern, DOCS.read_text(), re.S)
    assert found is not None and str(model_wrapper.__file__).endswith(found[1])
    calls: list[torch.dtype] = []

    def called(logits: Tensor, ids: Tensor) -> Tensor:
        logps = selective_logps(logits, ids)
        calls.append(logps.dtype)
        return logps

    lines, first = inspect.getsourcelines(model_wrapper.HFModelWrapper.forward)
    at = int(found[2]) - first
    call = "".join(line.strip() for line in lines[at : at + 5]).replace(",)", ")").replace(",", ", ")
    assert call == "log_probs = logprobs_from_logits(logits_BSV, sequences_rolled, inplace_backward=True)"
    lines[at : at + 5] = [lines[at][:8] + found[3] + "\n"]
    names = {**vars(model_wrapper), "selective_logps": called}
    exec(textwrap.dedent("".join(lines)), names)
    monkeypatch.setattr(model_wrapper.HFModelWrapper, "forward", names["forward"])
    return calls


@pytest.mark.parametrize("name", ["KL, entropy", "no padding"])
def test_our_logps(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, our_logps: list[torch.dtype], name: str
) -> None:
    """With our log-probabilities too, the runs are those of SkyRL."""
    got = runs("ours", "dapo", **OPTIONS[name])
    assert set(our_logps) == {torch.float32}
    monkeypatch.undo()
    our_logps.clear()
    wanted = runs("regular", **OPTIONS[name])
    assert not our_logps
    assert_same_runs(got, wanted)


def test_bf16(runs: Runs, monkeypatch: pytest.MonkeyPatch, our_logps: list[torch.dtype]) -> None:
    """By default the model computes in bf16, and SkyRL's autocast covers the loss, whose inputs are fp32.

    A gradient that rounds to another bf16 number changes the runs, hence the tolerance.
    """
    autocast = torch.autocast

    def on_cpu(device_type: str, **options: Any) -> torch.autocast:
        return autocast("cpu", **options)

    monkeypatch.setattr(torch, "autocast", on_cpu)
    options = {"trainer.policy.fsdp_config.mixed_precision.param_dtype": "bf16"}
    wanted, got = runs("regular", **options), runs("ours", "dapo", **options)
    assert_same_runs(got, wanted, tolerance=0.03)
    assert set(our_logps) == {torch.float32}


def test_main_with_two_workers(runs: Runs, tmp_path: Path) -> None:
    """The main file of the docs trains two workers of Ray as SkyRL's own loss trains one here.

    The workers read the loss from SkyRL's registry. If one has fewer microbatches, it gets some without
    tokens. The class of a second loss is defined in the main file.
    """
    found = re.search(r"A main file, .*?```python\n(.*?)```", DOCS.read_text(), re.S)
    assert found is not None
    code = found[1].replace("\n\nif __name__", OTHER_LOSS + "\n\nif __name__")
    (tmp_path / "main_ours.py").write_text(code)
    metrics = tmp_path / "metrics.jsonl"
    options = {"trainer.max_tokens_per_microbatch": 20, "loss_reduction": "sequence_mean"}
    two = {"trainer.placement.policy_num_gpus_per_node": 2, "trainer.hf_save_interval": 100}
    (tmp_path / "two").mkdir()
    arguments = command_line(tmp_path / "two", "ours", **options, **two)
    paths = [ROOT, ROOT / "tests" / "trainers", ROOT / "tests" / "shared"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "RAY_TMPDIR": folder}
        command = [sys.executable, paths[1] / "skyrl_ray.py", metrics, "main_ours.py", *arguments]
        process = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
        )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    logs = [json.loads(line) for line in metrics.read_text().splitlines()]
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        next((tmp_path / "two" / "exports").glob("**/config.json")).parent, dtype=torch.float32
    )
    got = Run(logs, saved.state_dict())
    assert max(got.column("policy/num_padding_microbatches")) > 0
    wanted = runs("sapo", **options)
    means = [key for key in wanted.logs[0] if not key.endswith(("loss", "grad_norm", "policy_lr"))]
    assert_same_runs(got, wanted, skipped=means)


OTHER_LOSS = """

from grpo_kernels import LossSpec, PPOClip


class OtherLoss(PPOClip):
    pass


register_loss("other", LossSpec(OtherLoss()))
"""
