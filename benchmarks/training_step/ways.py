"""The ways to take a training step: TRL's trainer or a plain loop, each with several losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..work import providers
from ..work.batch import Batch
from ..work.workload import BETA, SEQUENCES
from . import trainers
from .case import LEARNING_RATE, POLICY, WARM_UP, Case, hidden_of, make_model, make_models
from .samples import Samples

FLOOR = "no loss"


class Subject(NamedTuple):
    """A model that is ready to train."""

    model: Any
    train: Callable[[trainers.Watch], None]  # WARM_UP + case.steps steps


def plain_loop(
    case: Case, samples: Samples, folder: Path, micro_batch: int, *, loss: providers.Loss
) -> Subject:
    """A loop in PyTorch. `loss` is that of a provider from hidden states."""
    model, reference = make_models(case)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def loss_of(part: Samples) -> Tensor:
        hidden, ref_hidden, ref_weight = hidden_of(model, part.ids, case.completion), None, None
        if reference is not None:
            ref_hidden = hidden_of(reference, part.ids, case.completion)
            ref_weight = reference.lm_head.weight
        targets = part.ids[:, case.prompt :]
        mask = torch.ones_like(targets, dtype=torch.bool)
        tokens = targets, mask, part.advantages, part.old_logps
        heads = hidden, model.lm_head.weight, ref_hidden, ref_weight
        batch = Batch(case.work, *tokens, None, None, *heads, truth=None)
        return loss(batch, hidden, model.lm_head.weight) * micro_batch / SEQUENCES

    def train(watch: trainers.Watch) -> None:
        for _ in range(WARM_UP + case.steps):
            watch.begin()
            for part in samples.micro_batches(micro_batch):
                value = loss_of(part)
                value.backward()
                watch.after_backward(value.detach())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.end()

    return Subject(model, train)


def trl_trainer(
    case: Case,
    samples: Samples,
    folder: Path,
    micro_batch: int,
    *,
    fused_loss: bool = False,
    fused_logps: bool = False,
    without_loss: bool = False,
) -> Subject:
    from trl import GRPOTrainer

    from grpo_kernels.integrations.trl import FusedGRPOTrainer

    model = make_model(case, POLICY)
    model.config._name_or_path = str(folder)  # TRL loads the reference from this path
    mixin = trainers.WithoutLoss if without_loss else trainers.OnSamples
    bases = mixin, FusedGRPOTrainer if fused_loss else GRPOTrainer
    trainer = trainers.grpo_trainer(
        type("Trainer", bases, {}),
        model,
        folder,
        SEQUENCES,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=SEQUENCES // micro_batch,
        max_completion_length=case.completion,
        max_steps=WARM_UP + case.steps,
        beta=BETA if case.work.reference else 0.0,
        use_bias_correction_kl=False,
        learning_rate=LEARNING_RATE,
        bf16=case.work.dtype == torch.bfloat16,
        use_cpu=case.device.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )

    def train(watch: trainers.Watch) -> None:
        with trainers.fused_logps() if fused_logps else nullcontext():
            trainer.train_on(trainers.grpo_inputs(*samples), watch)
        if fused_loss and trainer._handed_over:
            raise RuntimeError("FusedGRPOTrainer has left the loss to TRL")

    return Subject(model, train)


def mean_of_hidden(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float().mean()


@dataclass(frozen=True)
class Way:
    """A trainer or loop, with one loss."""

    host: str  # "TRL" or "PyTorch"
    what: str
    make: Callable[..., Subject]
    package: str | None = None

    @property
    def name(self) -> str:
        return f"{self.host}: {self.what}"

    @property
    def version(self) -> str:
        return (self.package and providers.installed_version(self.package)) or ""


def in_plain_loop(name: str) -> Way:
    provider = providers.PROVIDERS["linear"][name]
    return Way("PyTorch", name, functools.partial(plain_loop, loss=provider.loss), provider.package)


def in_trl(what: str, **how: bool) -> Way:
    return Way("TRL", what, functools.partial(trl_trainer, **how), "trl")


# The most informative come first, because a run can end at its limit. A floor comes before those that are
# compared with it.
WAYS = {
    way.name: way
    for way in (
        in_trl(FLOOR, without_loss=True),
        in_trl("stock"),
        in_trl("FusedGRPOTrainer", fused_loss=True),
        in_trl("fuse_trl_logps", fused_logps=True),
        Way("PyTorch", FLOOR, functools.partial(plain_loop, loss=mean_of_hidden)),
        in_plain_loop("eager"),
        in_plain_loop("grpo_kernels"),
        in_plain_loop("liger"),
        in_plain_loop("torch.compile"),
    )
}
