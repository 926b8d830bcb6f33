"""Kernels with a stage left out: they run, they are wrong, and their machine code lacks the stage."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.experiments.__main__ import on_kernels
from benchmarks.experiments.plan import EXPERIMENTS
from benchmarks.experiments.stages import FUSED_STAGES, LEFT_OUT, changed, without
from benchmarks.experiments.variants import Variant
from benchmarks.machine_code.no_gpu import TARGETS, launches_for
from benchmarks.machine_code.resources import resources
from benchmarks.speed import gate, measure
from benchmarks.work.batch import empty_batch, make_batch
from benchmarks.work.workload import Workload
from grpo_kernels.kernels import dlogits, fused, row_stats

INTERPRETED = "TRITON_INTERPRET" in os.environ
PROFILES = [variant for variant in EXPERIMENTS["10"].variants if variant.profile]
WORK = Workload("logits", "grpo", 32, 5000)  # whole blocks and a rest


def test_every_stage_has_a_variant() -> None:
    stages = {(kernel, stage) for kernel, found in LEFT_OUT.items() for stage in found}
    assert len(PROFILES) == len(stages) + len(FUSED_STAGES)
    names = {variant.name for variant in PROFILES}
    assert {"in place, without exponentials", "in place, without store", "dlogits without load"} <= names


@pytest.mark.parametrize("variant", PROFILES, ids=lambda x: x.name)
@pytest.mark.usefixtures("needs_triton")
def test_a_variant_runs_and_is_wrong(variant: Variant, device: str) -> None:
    batch = make_batch(WORK, device)
    with on_kernels():
        assert gate.check(variant, batch).wrong is None  # without its changes it is this package
        with variant.changes():
            assert gate.check(variant, batch).wrong is not None
        assert gate.check(variant, batch).wrong is None


def test_a_variant_leaves_the_package_alone() -> None:
    before = row_stats.row_stats, dlogits.dlogits, fused.fused_loss
    with without("exponentials", "row_stats", "dlogits", "fused"):
        inside = row_stats.row_stats, dlogits.dlogits, fused.fused_loss
        assert not set(inside) & set(before)
    assert (row_stats.row_stats, dlogits.dlogits, fused.fused_loss) == before


@pytest.mark.parametrize("stage", FUSED_STAGES)
def test_the_fused_kernel_calls_changed_functions(stage: str) -> None:
    module = changed("fused", (stage,))
    for other, name in (("row_stats", "reduce_row"), ("dlogits", "row_gradient")):
        assert getattr(module, name) is getattr(changed(other, (stage,)), name)
        assert getattr(module, name) is not getattr(fused, name)


def test_a_replacement_that_does_not_apply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEFT_OUT["dlogits"], "other", {"no such line": ""})
    with pytest.raises(ValueError, match=r"dlogits\.py has 0 times what 'other' replaces: 'no such line'"):
        changed("dlogits", ("other",))


def instructions(variant: Variant, loss: str) -> dict[str, Counter[str]]:
    """The opcodes of each kernel's PTX for sm_90."""
    work = replace(WORK, loss=loss, T=64, V=151936)
    subject = measure.Subject(variant, empty_batch(work, "meta"))
    with on_kernels(), launches_for(TARGETS["sm_90"]) as kernels, variant.changes():
        subject.prepare()
        subject.step()
    assert ("fused_loss_kernel" in {kernel.src.fn.__name__ for kernel in kernels}) == variant.overwrites
    found = {}
    for kernel in kernels:
        assert resources(kernel).spills == 0
        words = [line.split() for line in kernel.asm["ptx"].splitlines()]
        opcodes = (word[1] if word[0].startswith("@") else word[0] for word in words if word)
        found[kernel.src.fn.__name__] = Counter(opcode.split(".")[0] for opcode in opcodes)
    return found


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("loss", ["grpo", "grpo_kl"])
def test_the_machine_code_lacks_the_stage(loss: str) -> None:
    """Few exponentials and maxima are left, which are those of a row and not of its elements."""
    plain = {
        variant.overwrites: instructions(variant, loss)
        for variant in EXPERIMENTS["10"].variants
        if not variant.profile
    }
    kernels = {
        "row_stats": "row_stats_kernel",
        "dlogits": "dlogits_kernel",
        "in place,": "fused_loss_kernel",
    }
    opcodes = {"exponentials": "ex2", "maxima": "max", "load": "ld", "store": "st"}
    most = {"exponentials": 0.2, "maxima": 0.2, "load": 0.8}
    for variant in PROFILES:
        kernel, stage = variant.name.split(" without ")
        found, before = (
            of[kernels[kernel]] for of in (instructions(variant, loss), plain[variant.overwrites])
        )
        if stage == "store":
            # The stores are still there, each under a predicate that is never true.
            assert found["setp"] > before["setp"] + 8, variant.name
        else:
            assert found[opcodes[stage]] < before[opcodes[stage]] * most[stage], variant.name
        others = set(opcodes) - {stage, "maxima"}
        assert all(found[opcodes[x]] >= 0.5 * before[opcodes[x]] for x in others), variant.name


def test_the_device_does_not_matter_for_refusals() -> None:
    assert all(v.refuses(WORK, torch.device("cpu")) is None for v in PROFILES)
