"""Uses of a trainer: custom losses and heads, several GPUs in one process, logging."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl_runs import (
    KL,
    TRAINER_MARKS,
    Folders,
    batch,
    lora,
    messages,
    new_trainer,
)

pytest.importorskip("trl", minversion="1.16")

import transformers
import trl

from grpo_kernels import KL as KLTerm
from grpo_kernels import LossSpec
from grpo_kernels.integrations.trl import FusedGRPOTrainer, fuse_trl_logps
from grpo_kernels.integrations.trl import head as trl_head
from grpo_kernels.spec.surrogates import DRO

pytestmark = TRAINER_MARKS


def test_data_parallel(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel is refused with a message that names `accelerate launch`."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    names = r"nn\.DataParallel.*accelerate launch"
    with pytest.raises(ValueError, match=names):
        trainer._compute_loss(nn.DataParallel(trainer.model), batch())
    with pytest.raises(ValueError, match=names):
        new_trainer(FusedGRPOTrainer, nn.DataParallel(trainer.model), tmp_path)
    monkeypatch.setattr(trl.GRPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch"):
        new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)


# --- Checks in the constructor ------------------------------------------------------------------------------


def own(spec: Any) -> type[FusedGRPOTrainer]:
    """Return a trainer class with a custom spec."""
    return type("Own", (FusedGRPOTrainer,), {"loss_spec": lambda self: spec})


@pytest.mark.parametrize(
    "spec, config, why",
    [
        (LossSpec.preset("log_ratio"), {}, "needs a reference"),
        (LossSpec.preset("opmd"), {}, "needs a reference"),
        (LossSpec(DRO(beta=0.1, anchor="ref")), {}, "needs a reference"),
        (LossSpec.preset("grpo", kl=KLTerm("k3", beta=0.1)), {}, "needs a reference"),
        (LossSpec.preset("grpo", kl=KLTerm("exact", beta=0.1)), KL, "runs over the vocabulary"),
        (LossSpec(aggregation="prompt-mean"), {}, "'prompt-mean' needs the prompt of each completion"),
        (LossSpec.preset("grpo"), {"top_entropy_quantile": 0.2}, r"top_entropy_quantile=0\.2 weighs tokens"),
        (LossSpec.preset("grpo"), {"off_policy_mask_threshold": 0.2}, "off_policy_mask_threshold"),
    ],
)
def test_own_spec_is_checked_in_the_constructor(
    spec: LossSpec,
    config: dict[str, Any],
    why: str,
    folders: Folders,
    tmp_path: Path,
) -> None:
    """The constructor refuses a spec that the trainer's options cannot serve."""
    with pytest.raises(ValueError, match=why):
        new_trainer(own(spec), folders("llama"), tmp_path, **config)


def test_own_spec_of_another_type(folders: Folders, tmp_path: Path) -> None:
    """`loss_spec()` must return a LossSpec."""
    with pytest.raises(TypeError, match=r"loss_spec\(\) must return a LossSpec, got 'log_ratio'"):
        new_trainer(own("log_ratio"), folders("llama"), tmp_path, **KL)


def test_own_spec_that_reads_a_later_attribute(folders: Folders, tmp_path: Path) -> None:
    """The attribute is set after `super().__init__()`, so the error comes before generation."""

    class Later(FusedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.spec_name = "log_ratio"

        def loss_spec(self) -> LossSpec:
            return LossSpec.preset(self.spec_name)

        def _generate(self, prompts: Any) -> Any:
            raise AssertionError("generated")

    trainer = new_trainer(Later, folders("llama"), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="needs a reference"):
        trainer.train()
    trainer = new_trainer(Later, folders("llama"), tmp_path, max_steps=1, **KL)
    assert trainer._compute_loss(trainer.model, batch()).isfinite()
    with pytest.raises(AssertionError, match="generated"):
        trainer.train()


# --- Heads --------------------------------------------------------------------------------------------------


class ScaledHead(nn.Linear):
    """A head that is more than linear."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def with_head(change: Callable[[Any], None], path: str, tmp_path: Path, **config: Any) -> Any:
    """Make a trainer of a model that `change` has changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    change(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return new_trainer(
        functools.partial(FusedGRPOTrainer, processing_class=tokenizer), model, tmp_path, **config
    )


def scaled_class(model: Any) -> None:
    model.lm_head.__class__ = ScaledHead


def scaled_instance(model: Any) -> None:
    model.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(model.lm_head, hidden)


def scaled_by_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


IGNORED = {
    "class": (scaled_class, "ScaledHead.forward is not run"),
    "instance": (scaled_instance, "Linear.forward is not run"),
    "hook": (scaled_by_hook, "the forward hooks of Linear"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_head_with_its_own_forward(
    name: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning says that the fused loss does not run the head's own forward or hooks."""
    change, text = IGNORED[name]
    trainer = with_head(change, folders("llama"), tmp_path)
    trainer._compute_loss(trainer.model, batch())
    (warning,) = messages(caplog, logging.WARNING)
    assert text in warning


@pytest.mark.parametrize("model", ["llama", "tied", "bias"])
@pytest.mark.parametrize("head", ["plain", "fp32", "saved", "fp32 saved", "hooked", "checkpointed"])
def test_head_that_only_multiplies(
    model: str,
    head: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PEFT's copy, TRL's cast and accelerate's hooks compute the same, so there is no warning."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def change(model: Any) -> None:
        if head == "hooked":
            add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
        if head == "checkpointed":
            model.lm_head = checkpoint_wrapper(model.lm_head)

    if (model, head) == ("tied", "fp32 saved"):
        pytest.skip("TRL 1.16 looks for the embedding of a PEFT model in the wrong place")
    if "saved" in head:
        path = folders(model)
        trainer = new_trainer(
            functools.partial(FusedGRPOTrainer, peft_config=lora(modules_to_save=["lm_head"])),
            path,
            tmp_path,
            cast_lm_head_to_fp32="fp32" in head,
        )
    else:
        trainer = with_head(change, folders(model), tmp_path, cast_lm_head_to_fp32=head == "fp32")
    trainer._compute_loss(trainer.model, batch())
    assert messages(caplog, logging.WARNING) == []


# --- Logging ------------------------------------------------------------------------------------------------


def test_every_trainer_logs_its_path(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each trainer logs once how it computes the loss."""
    for config, text in (({}, "in the model's forward"), ({"top_entropy_quantile": 0.5}, "linear_logps")):
        for _ in range(2):
            caplog.clear()
            trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path, **config)
            for _ in range(2):
                trainer._compute_loss(trainer.model, batch())
            (path,) = (x for x in messages(caplog, logging.INFO) if x.startswith("FusedGRPOTrainer"))
            assert text in path


def test_path_is_logged_once_logging_is_on(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The path is logged at the first step at which INFO is enabled.

    Logging may be configured after the first steps.
    """
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    caplog.set_level(logging.WARNING, logger="grpo_kernels")
    trainer._compute_loss(trainer.model, batch())
    caplog.set_level(logging.INFO, logger="grpo_kernels")
    trainer._compute_loss(trainer.model, batch())
    assert any("in the model's forward" in text for text in messages(caplog, logging.INFO))


def test_fuse_trl_logps_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """`fuse_trl_logps` logs each call, and again when a head runs."""
    for calls in (1, 2):
        fuse_trl_logps()
        found = [text for text in messages(caplog, logging.INFO) if text.startswith("fuse_trl_logps")]
        assert len(found) == calls and "linear_logps" in found[0]
    assert trl_head.utils._ChunkedLogProbFunction is trl_head.FusedUnlessSharded
    # It logs again when a head runs, because logging may be configured only then.
    trl_head.FusedUnlessSharded.apply(torch.randn(3, 4), torch.randn(5, 4), None, torch.arange(3), 1.0, 2)
    assert messages(caplog, logging.INFO)[-1].startswith("fuse_trl_logps: one pass")
