"""Counts the bytes that a provider's kernels move and the FLOPs of its matrix products."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import distillation_loss
from grpo_kernels.linear import config

from ..work.batch import Batch, make_batch
from ..work.providers import PROVIDERS, Provider
from ..work.workload import Workload
from .addresses import Traffic, recording

# Rows are so long that bytes per token hardly count, and they end inside a block of every kernel. No token is
# clipped: those without a gradient are masked or have no advantage.
BASES = {
    "logits": Workload("logits", "grpo", 16, 5000),
    "linear": Workload("linear", "grpo", 16, 5000, 64),
}
LOSSES = {"logits": ("grpo", "grpo_kl", "log_ratio"), "linear": ("grpo", "grpo_kl")}
FRACTIONS = tuple(itertools.product((0.0, 0.5), repeat=2))  # masked, without advantage
FROM_LOGITS, FROM_HIDDEN = PROVIDERS["logits"], PROVIDERS["linear"]
COMPARED = {
    "logits": [FROM_LOGITS[name] for name in ("grpo_kernels", "grpo_kernels inplace", "liger", "trl")],
    "linear": [
        FROM_HIDDEN["grpo_kernels"],
        FROM_HIDDEN["grpo_kernels bf16 logits"],
        FROM_HIDDEN["grpo_kernels skip_inactive"],
        FROM_HIDDEN["grpo_kernels linear_logps"],
        *(FROM_HIDDEN[name] for name in ("trl", "liger", "eager")),
    ],
}
# FlopCounterMode does not count this operator.
IN_PLACE = {torch.ops.aten.addmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * b[1]}
STEPS = ("forward", "backward")
KINDS = ("reads", "rereads", "writes")
Moved = dict[tuple[str, str], float]  # bytes per element of T * V, by tensor and kind; empty without kernels


class Step(NamedTuple):
    moved: Moved
    products: float  # FLOPs per T * V * H


class Measurement(NamedTuple):
    batch: Batch
    provider: Provider
    steps: dict[str, Step]  # forward and backward
    note: str = ""  # why there are no steps
    divergence: str = ""  # of a distillation, which has no loss of the workload

    @property
    def loss(self) -> str:
        return self.divergence or self.batch.work.loss


def measurements(form: str) -> Iterator[Measurement]:
    for loss, (masked, inactive) in itertools.product(LOSSES[form], FRACTIONS):
        batch = make_batch(replace(BASES[form], loss=loss, masked=masked, inactive=inactive))
        for provider in COMPARED[form]:
            yield measure(provider, batch)


def distillations() -> Iterator[Measurement]:
    """Measure each divergence for two models whose rows differ, and for two whose rows are equal."""
    for masked in (0.0, 0.5):
        batch = make_batch(replace(BASES["logits"], loss="log_ratio", masked=masked))
        for kind in ("reverse_kl", "forward_kl", "jsd"):
            yield distillation(kind, batch, equal=False)
            yield distillation(kind, batch, equal=True)


def distillation(kind: str, batch: Batch, *, equal: bool) -> Measurement:
    """Measure a divergence from a teacher whose rows are the student's, or the student's turned around.

    The temperature is so high that the student is sure of no token.
    """
    assert batch.logits is not None
    batch = batch._replace(ref_logits=batch.logits.clone() if equal else batch.logits.flip(-1))

    def loss(batch: Batch, logits: Tensor) -> Tensor:
        assert batch.ref_logits is not None
        teacher = batch.ref_logits[:, :-1]
        return distillation_loss(
            logits,
            teacher_logits=teacher,
            divergence=kind,  # type: ignore[arg-type]
            completion_mask=batch.mask,
            temperature=4.0,
        ).loss

    what = f"{kind}, equal rows" if equal else kind
    return measure(Provider("grpo_kernels", loss), batch)._replace(divergence=what)


def measure(provider: Provider, batch: Batch) -> Measurement:
    reason = provider.reason_against(batch.work, batch.ids.device)
    if reason is not None:
        return Measurement(batch, provider, {}, reason)
    inputs = provider.inputs(batch)
    steps, before = {}, 0
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with recording() as seen, counter, as_on_a_gpu():
        for step in STEPS:
            if step == "forward":
                loss = provider.loss(batch, *inputs)
            else:
                loss.backward()
            operations = counter.get_total_flops()
            steps[step] = Step(moved(seen, batch), (operations - before) / volume(batch.work))
            before = operations
            seen.reset()
    return Measurement(batch, provider, steps)


def volume(work: Workload) -> int:
    return work.T * work.V * max(1, work.H)


def moved(seen: Traffic, batch: Batch) -> Moved:
    """Bytes that the kernels have moved, by tensor and kind."""
    found: Counter[tuple[str, str]] = Counter()
    for (address, storage), kind in itertools.product(seen.storages.items(), KINDS):
        tensor = "logits"
        if storage.numel() < batch.work.V:
            tensor = "per token"
        elif kind == "writes":
            tensor = "gradient"  # of the logits; possibly in place
        elif batch.ref_logits is not None and address == batch.ref_logits.untyped_storage().data_ptr():
            tensor = "reference"
        accesses = int(seen.of(kind, storage).sum())
        found[tensor, kind] += accesses * storage.element_size()
    return {key: amount / (batch.work.T * batch.work.V) for key, amount in found.items()}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, code that chooses its path by the device of a tensor sees a GPU."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        patches.enter_context(mock.patch.object(config, "multiplies_mixed", lambda device: True))
        if importlib.util.find_spec("trl") is not None:
            patches.enter_context(mock.patch("trl.kernels.chunked_logprob._use_triton", lambda device: True))
        # Liger compiles its loss on `[B, L]`, which contains no kernel and no matrix product.
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def learning(batch: Batch) -> float:
    """The fraction of the tokens that have a gradient."""
    return float((batch.truth.dlogps != 0).float().mean())
