"""Copies of a trainer's model compute with their own parameters, and train them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import (
    TRAINER_MARKS,
    Folders,
    T,
    assert_same_gradients,
    batch,
    lora,
    loss_and_gradients,
    new_trainer,
)

pytest.importorskip("trl", minversion="1.16")

import transformers

from grpo_kernels.integrations.trl import FusedGRPOTrainer

pytestmark = TRAINER_MARKS


def sequences(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def shifted(model: Any, amount: float = 0.05) -> None:
    """Change every parameter, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += amount * torch.randn(p.shape, generator=generator)


def scores(trainer: Any, model: Any) -> Tensor:
    """Return the log-probabilities that the trainer computes with `model`."""
    ids = sequences(batch())
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model, *ids.values(), T)[0]


def deep_copy(model: Any) -> Any:
    return copy.deepcopy(model)


def averaged(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(model).module


def copy_of_a_copy(model: Any) -> Any:
    return copy.deepcopy(copy.deepcopy(model))


COPIES = {"deepcopy": deep_copy, "AveragedModel": averaged, "copy of a copy": copy_of_a_copy}


def trained_by(kind: str, path: str, tmp_path: Path) -> Any:
    """Make a trainer whose model has been wrapped or prepared in one of several ways."""
    if kind == "PEFT":
        from peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(path), lora())
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        trainer = new_trainer(
            functools.partial(FusedGRPOTrainer, processing_class=tokenizer), model, tmp_path
        )
        shifted(trainer.model)  # LoRA's B is zero at the start
        return trainer
    trainer = new_trainer(FusedGRPOTrainer, path, tmp_path, cast_lm_head_to_fp32=kind == "fp32 head")
    if kind == "second trainer":
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        again = functools.partial(FusedGRPOTrainer, processing_class=tokenizer)
        return new_trainer(again, trainer.model, tmp_path)
    return trainer


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["plain", "PEFT", "fp32 head", "second trainer"])
def test_copy_has_its_own_forward(how: str, kind: str, folders: Folders, tmp_path: Path) -> None:
    """After the original has changed, logits, log-probabilities and loss of the copy are as before."""
    trainer = trained_by(kind, folders("bias"), tmp_path)
    model, ids = trainer.model, sequences(batch())
    with torch.no_grad():
        logits = model(**ids).logits
        logps = scores(trainer, model)
        loss = trainer._compute_loss(model, batch())
    twin = COPIES[how](model)
    shifted(model)
    with torch.no_grad():
        assert torch.equal(twin(**ids).logits, logits)
        assert torch.equal(scores(trainer, twin), logps)
        assert torch.equal(trainer._compute_loss(twin, batch()), loss)
        # The original has changed.
        assert (model(**ids).logits - logits).abs().max() > 1e-2
        assert (scores(trainer, model) - logps).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["plain", "PEFT", "second trainer"])
def test_copy_trains_itself(kind: str, folders: Folders, tmp_path: Path) -> None:
    """A copy's loss has gradients of the copy's parameters, and none of the original's."""
    trainer = trained_by(kind, folders("llama"), tmp_path)
    _, wanted = loss_and_gradients(trainer, batch())
    trainer.model.zero_grad()
    twin = copy.deepcopy(trainer.model)
    trainer._compute_loss(twin, batch()).backward()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert_same_gradients({n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, wanted)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])
    loss = twin(**sequences(batch()), labels=sequences(batch())["input_ids"]).loss
    loss.backward()
    assert all(p.grad is None for p in trainer.model.parameters())


def test_copy_in_mixed_precision(folders: Folders, tmp_path: Path) -> None:
    """accelerate wraps the forward that it finds, and binds the wrapper to the model."""
    trainer = trained_by("plain", folders("llama"), tmp_path)
    from accelerate.utils import convert_outputs_to_fp32

    model = trainer.model
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    model.forward = type(model.forward)(convert_outputs_to_fp32(autocast(model.forward.__func__)), model)
    twin, logps = copy.deepcopy(model), scores(trainer, model)
    shifted(model)
    assert torch.equal(scores(trainer, twin), logps)


def test_copy_under_hooks_of_accelerate(folders: Folders, tmp_path: Path) -> None:
    """`device_map` replaces the forward of the model before TRL does."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    trainer = new_trainer(functools.partial(FusedGRPOTrainer, processing_class=tokenizer), model, tmp_path)
    twin, ids = copy.deepcopy(trainer.model), sequences(batch())
    with torch.no_grad():
        logits = trainer.model(**ids).logits
        shifted(trainer.model)
        assert torch.equal(twin(**ids).logits, logits)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_model(how: str, folders: Folders, tmp_path: Path) -> None:
    """A pickled model loads with its parameters and the forward of its class, and a new trainer takes it."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    ids = sequences(batch())
    with torch.no_grad():
        logits, logps = trainer.model(**ids).logits, scores(trainer, trainer.model)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(trainer.model))
    else:
        torch.save(trainer.model, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    shifted(trainer.model)
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("llama"))
    new = new_trainer(functools.partial(FusedGRPOTrainer, processing_class=tokenizer), loaded, tmp_path)
    assert torch.equal(scores(new, loaded), logps)
    _, grads = loss_and_gradients(new, batch())
    assert max(float(g.abs().max()) for g in grads.values()) > 0
    assert all(p.grad is None for p in trainer.model.parameters())
