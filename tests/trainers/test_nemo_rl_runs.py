"""Whole runs of NeMo-RL's GRPO on the CPU: as it is, and with the lines of docs/trainers.md.

The seeds are the same, so both runs sample the same completions. Errors are relative to the largest value
of a run. Both sides are fp32: 1e-6 per step.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from nemo_rl_stand_ins import RemoteWorker  # makes nemo_rl importable

pytest.importorskip("nemo_rl")

import ray
from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn, prepare_packed_loss_input
from nemo_rl.algorithms.loss.wrapper import SequencePackingFusionLossWrapper
from nemo_rl_runs import ROOT, SYMBOLS, Run, documented_lines, patched, train
from same_runs import TOLERANCE, assert_close, assert_same_parameters

from grpo_kernels.integrations.nemo_rl import PolicyLossFn

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = documented_lines().replace(', spec="sapo"', "")
METRICS = (
    "reward",
    "probs_ratio",
    "probs_ratio_max",
    "kl_penalty",
    "sampling_importance_ratio",
    "approx_entropy",
)
PADDED = "policy.sequence_packing.enabled=false"
SAMPLER = "loss_fn.use_importance_sampling_correction=true"
REINFORCE = "loss_fn.disable_ppo_ratio=true"


def assert_same_runs(got: Run, wanted: Run, metrics: tuple[str, ...] = ("loss", *METRICS)) -> None:
    """Assert that gradient norms, some metrics and the final parameters agree."""
    assert type(wanted.loss_fn).__module__ != type(got.loss_fn).__module__
    assert len(wanted.logs) == 3
    for key in ("grad_norm", *metrics):
        assert_close(key, got.column(key), wanted.column(key))
    assert_same_parameters(got.after, wanted.after)


def truncated(kind: str) -> str:
    """Return the options of an importance sampling correction with bounds."""
    name = "loss_fn.truncated_importance_sampling"
    return f"{SAMPLER} {name}_type={kind} {name}_ratio_min=0.9 {name}_ratio=1.1"


OPTIONS = {
    "default, packed": "",
    "padded": f"{PADDED} loss_fn.reference_policy_kl_penalty=0"
    " policy.dtensor_cfg.activation_checkpointing=true",
    "dynamic batches": f"{PADDED} policy.dynamic_batching.enabled=true {truncated('tis')}",
    "gspo": f"loss_fn.sequence_level_importance_ratios=true loss_fn.token_level_loss=false {SAMPLER}"
    " loss_fn.ratio_clip_min=0.05 loss_fn.ratio_clip_max=0.05",
    "cispo": f"loss_fn.use_cispo=true {truncated('icepop')} grpo.overlong_filtering=true",
    "reinforce++": f"{REINFORCE} grpo.adv_estimator.name=reinforce_plus_plus loss_fn.use_kl_in_reward=true"
    f" {truncated('seq-mask-tis')}",
    "on-policy": f"{REINFORCE} loss_fn.force_on_policy_ratio=true policy.train_global_batch_size=16"
    " loss_fn.use_on_policy_kl_approximation=true",
    "dual clip, top-k": "loss_fn.ratio_clip_c=1.5 policy.generation.top_k=6",
    "older worker": f"{PADDED} {SAMPLER} policy.dtensor_cfg._v2=false",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_its_own_losses(tmp_path: Path, name: str) -> None:
    """Losses, metrics and final parameters are those of NeMo-RL's own run."""
    wanted = train(tmp_path / "theirs", OPTIONS[name])
    assert float(wanted.column("loss").abs().max()) > 1e-4
    assert_same_runs(train(tmp_path / "ours", OPTIONS[name], lines=OURS), wanted)


# SAPO has the gradient of REINFORCE whose advantages are multiplied by the derivative of its gate.
SAPO = """
import torch
from nemo_rl.algorithms.loss import ClippedPGLossFn

class Sapo(ClippedPGLossFn):
    def __call__(self, next_token_logprobs, data, **counts):
        advantages = data["advantages"].clone()
        ratio = (next_token_logprobs.detach() - data["prev_logprobs"][:, 1:]).exp()
        gate = torch.sigmoid(torch.where(advantages[:, 1:] > 0, 1.0, 1.05) * (ratio - 1))
        advantages[:, 1:] *= 4 * gate * (1 - gate) * ratio
        return super().__call__(next_token_logprobs, {**data, "advantages": advantages}, **counts)

loss_fn = Sapo(master_config.loss_fn)
"""
CISPO = "from grpo_kernels import CISPO, LossSpec\n" + OURS.replace(
    "linear_logprobs)", "linear_logprobs, spec=LossSpec(CISPO(ratio_min=0.8, ratio_max=1.2)))"
)
LOG_RATIO = documented_lines().replace("sapo", "log_ratio")
# Our lines; NeMo-RL's lines and options for the same gradient; options of both; further metrics that agree.
SURROGATES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "sapo": (documented_lines(), SAPO, REINFORCE, truncated("tis"), ()),
    "cispo": (CISPO, "", "loss_fn.use_cispo=true", "", ("loss", *METRICS)),
    "log_ratio": (LOG_RATIO, "", REINFORCE, "", ()),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_another_surrogate(tmp_path: Path, name: str) -> None:
    """With `spec`, the gradients are those of another loss."""
    lines, same, options, common, metrics = SURROGATES[name]
    wanted = train(tmp_path / "theirs", f"{options} {common}", lines=same)
    got = train(tmp_path / "ours", common, lines=lines)
    assert_same_runs(got, wanted, ("reward", "kl_penalty", *metrics))
    stock = train(tmp_path / "stock", common)
    assert float((got.column("grad_norm") - stock.column("grad_norm")).abs().max()) > 1e-3


def test_a_reference_that_is_not_computed(tmp_path: Path) -> None:
    """Without a penalty NeMo-RL passes zeros for the reference's log-probabilities, which no loss may use."""
    with pytest.raises(ValueError, match="does not pass the reference's log-probabilities"):
        train(tmp_path / "ours", "loss_fn.reference_policy_kl_penalty=0", lines=LOG_RATIO)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A step of NeMo-RL's own run."""
    return train(tmp_path_factory.mktemp("one_step") / "theirs", "grpo.max_num_steps=1")


def test_a_worker_of_ray(one_step: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray pickles our loss for a worker in another process, whose loss and gradient norm are as NeMo-RL's."""
    given, wanted = one_step.trained[0]
    here = Path(__file__)
    folders = os.pathsep.join(str(folder) for folder in (here.parent, here.parents[2], ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(
        "local",  # never a cluster that already runs
        num_cpus=1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": folders}},
    )
    try:
        worker = ray.remote(RemoteWorker).remote()
        given = {**given, "loss_fn": PolicyLossFn(ClippedPGLossConfig())}
        got = ray.get(worker.train.remote(one_step.builder, given))
    finally:
        ray.shutdown()
    for key in ("global_loss", "grad_norm"):
        assert_close(key, got[key], wanted[key])


def test_packed_rows_at_once(one_step: Run) -> None:
    """The wrapper of the Megatron worker calls the loss once for all sequences of a packed row."""
    data = one_step.trained[0][0]["data"]
    ends = torch.nn.functional.pad(data["input_lengths"].cumsum(0), (1, 0))
    logits = torch.randn(1, int(ends[-1]), len(SYMBOLS), generator=torch.Generator().manual_seed(0))
    counts = (torch.tensor(7.0), torch.tensor(30.0))
    found = []
    with patched():
        options = {"vocab_parallel_rank": 0, "vocab_parallel_group": torch.distributed.group.WORLD}
        for kind in (ClippedPGLossFn, PolicyLossFn):
            leaf, loss_fn = logits.clone().requires_grad_(), kind(ClippedPGLossConfig())
            wrapper = SequencePackingFusionLossWrapper(loss_fn, prepare_packed_loss_input, ends, **options)
            loss, metrics = wrapper(leaf, data, *counts)
            loss.backward()
            found.append((loss.detach(), leaf.grad, metrics))
    (loss, gradient, metrics), wanted = found[1], found[0]
    assert float(wanted[1].abs().max()) > 1e-3
    assert_close("loss", loss, wanted[0])
    assert_close("gradient", gradient, wanted[1])
    assert metrics == pytest.approx(wanted[2], rel=TOLERANCE)
