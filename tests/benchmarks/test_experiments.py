"""The experiments of docs/dev/tuning.md: each variant computes the loss and matches its name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.costs import NOMINAL
from benchmarks.experiments.plan import EXPERIMENTS, by_gain
from benchmarks.experiments.tables import predictions, table
from benchmarks.experiments.variants import Variant
from benchmarks.machine_code.cases import mixed_products
from benchmarks.machine_code.no_gpu import TARGETS, launches_for
from benchmarks.machine_code.resources import resources
from benchmarks.speed import gate, measure
from benchmarks.tables import record
from benchmarks.work.batch import empty_batch, make_batch
from benchmarks.work.workload import Workload
from grpo_kernels import linear_losses, losses

PAIRS = [pair for experiment in EXPERIMENTS.values() for pair in experiment.pairs()]
INTERPRETED = "TRITON_INTERPRET" in os.environ


SMALL = list(
    {
        (variant.experiment, variant.name, work.tiny()): (work.tiny(), variant)
        for work, variant in PAIRS
        # test_split_rows.py tests the split kernel, which needs a process for each block.
        if not variant.name.startswith("row split") and not variant.profile
    }.values()
)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the losses choose the Triton backend."""
    for module in (losses, linear_losses):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")


@pytest.mark.usefixtures("needs_triton", "on_triton")
@pytest.mark.parametrize("work, variant", SMALL, ids=lambda x: getattr(x, "name", str(x)))
def test_a_variant_computes_the_loss(work: Workload, variant: Variant, device: str) -> None:
    if variant.refuses(work, torch.device(device)) is not None:
        pytest.skip(variant.refuses(work, torch.device(device)))
    batch = make_batch(work, device)
    with variant.changes():
        assert gate.check(variant, batch).wrong is None


@pytest.mark.long
def test_a_run_reports_the_predictions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})
    for name, experiment in EXPERIMENTS.items():
        works = tuple(dict.fromkeys(replace(work.tiny(), dtype=torch.float32) for work in experiment.works))
        monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, works=works))
    path = tmp_path / "cpu-experiments.csv"
    argv = ["experiments", "--device", "cpu", "--output", str(path), "--only", "3", "--only", "7"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    rows = [row for row in record.read(path) if row.kernel_name != "floor"]
    assert {row.kernel_name[:12] for row in rows} == {"experiment 3", "experiment 7"}
    assert all(record.config(row)["predicted_ms"] > 0 for row in rows)
    # Two workloads with three variants and one with two. One workload has no rows to skip.
    assert [row.status == "ok" for row in rows if row.kernel_operation_mode == "full"].count(False) == 1
    lines = table(path).splitlines()
    assert len(lines) == 2 + 6 + 2 and sum("every unmasked row has a gradient" in line for line in lines) == 1


def test_a_table_of_a_variant_that_is_not_checked(tmp_path: Path) -> None:
    """A variant without a stage has times but no error."""
    work = {"T": 8192, "V": 151936, "H": 0, "inactive": 0.0, "loss": "grpo", "predicted_ms": 2.0}
    rows = record.Table(tmp_path / "gpu-experiments.csv")
    names = {
        "kernel_name": "experiment 10",
        "kernel_provider": "without store",
        "status": "ok",
        "x_value": 8192,
    }
    values = {"y_value_50": 1.5, "y_value_20": 1.25, "y_value_80": 1.75, "pct_of_floor": 50.0}
    for metric in ("speed", "memory"):
        mode = {"metric_name": metric, "kernel_operation_mode": "full"}
        config = {"extra_benchmark_config_str": json.dumps(work)}
        rows.add(record.row(torch.device("cpu"), **names, **values, **mode, **config))
    line = table(tmp_path / "gpu-experiments.csv").splitlines()[2]
    assert line.split(" | ")[2:] == ["2.00", "**1.50** (1.25 to 1.75)", "50", "2", " |"]


def test_the_largest_predicted_gain_comes_first() -> None:
    gains = [EXPERIMENTS[name].gain(NOMINAL) for name in by_gain()]
    assert gains == sorted(gains, reverse=True) and sorted(by_gain()) == sorted(EXPERIMENTS)
    assert gains[0] > 0.2 and by_gain()[-1] == "10"  # it only profiles


def test_every_variant_has_a_prediction() -> None:
    told = [line.split(" | ") for line in predictions().splitlines()[2:]]
    assert all(float(ms.rstrip(" |")) > 0 for _, _, ms in told)
    names = [name for _, variants, _ in told for name in variants.split("; ")]
    assert names and sorted(names) == sorted(
        v.name for work, v in PAIRS if v.refuses(work, torch.device("cuda")) is None
    )


FROM_LOGITS = [(work, variant) for work, variant in PAIRS if work.form == "logits" and work.T == 8192]


@pytest.fixture
def no_launch_needs_memory() -> Iterator[None]:
    """Chooses matrix products as on a GPU, for tensors on the meta device."""
    with mixed_products:
        yield


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("work, variant", FROM_LOGITS, ids=lambda x: getattr(x, "name", str(x)))
@pytest.mark.usefixtures("on_triton", "no_launch_needs_memory")
def test_no_variant_spills(work: Workload, variant: Variant) -> None:
    """Variants do not spill on an H200, and a multiprocessor can hold the number of blocks in their name."""
    subject = measure.Subject(variant, empty_batch(work, "meta"))
    with launches_for(TARGETS["sm_90"]) as kernels, variant.changes():
        subject.prepare()
        subject.step()
    for kernel in dict.fromkeys(kernels):
        used = resources(kernel)
        assert used.spills <= 4, kernel.src.fn.__name__  # with 16 warps, four 32-bit words are spilled
        if "per multiprocessor" in variant.name and kernel.src.fn.__name__ == "fused_loss_kernel":
            wanted = int(variant.name.split()[0])
            assert used.threads * wanted == 1024 and used.registers * used.threads * wanted <= 65536
