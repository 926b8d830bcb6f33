"""The table of targets: what was measured, what is missing, and that every target can be measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.experiments import targets
from benchmarks.experiments.costs import Cost
from benchmarks.experiments.plan import EXPERIMENTS
from benchmarks.experiments.targets import TARGETS, Step, Target
from benchmarks.speed.plans import headline
from benchmarks.tables import record
from benchmarks.work.providers import PROVIDERS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def rows(step: Step, ms: float, **values: object) -> record.Row:
    config = asdict(step.work) | {"dtype": str(step.work.dtype)[6:], "predicted_ms": 7.0}
    standard = {
        "kernel_operation_mode": "full",
        "metric_name": "speed",
        "status": "ok",
        "extra_benchmark_config_str": json.dumps(config),
        "x_value": step.work.T,
    }
    return record.row(CPU, kernel_provider=step.provider, y_value_50=ms, **(standard | values))


def rate(what: str, value: float) -> record.Row:
    return record.row(CPU, kernel_name="floor", kernel_provider=what, y_value_50=value, status="ok")


def write(path: Path, *found: record.Row) -> Path:
    record.Table(path, found)
    return path


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.step.provider}-{t.name}")
def test_every_target_is_in_the_plan(target: Target) -> None:
    """A step is one of the headline's pairs, or one of an experiment's, and is not refused."""
    pairs = {(work, name) for work in headline() for name in PROVIDERS[work.form]}
    pairs |= {(work, v.name) for e in EXPERIMENTS.values() for work in e.works for v in e.variants}
    steps = [target.step, *([target.than] if isinstance(target.than, Step) else [])]
    for step in steps:
        assert (step.work, step.provider) in pairs
        if step.provider in PROVIDERS[step.work.form]:
            assert PROVIDERS[step.work.form][step.provider].refuses(step.work, GPU) is None
    assert target.step.predicted_ms() is not None


def test_what_was_measured_is_compared(tmp_path: Path) -> None:
    logits = write(
        tmp_path / "headline.csv",
        rate("copy", 4000.0),
        rate("matrix product", 800.0),
        rows(targets.OURS, 0.9, kernel_operation_mode="forward"),
        rows(targets.OURS, 100.0, metric_name="memory"),
        rows(targets.OURS, 2.6),
        rows(Step(targets.LOGITS, "liger"), 2.6),
        rows(Step(targets.LOGITS, "trl"), 5.2),
        rows(Step(targets.LOGITS, "torch.compile"), 0.0, status="failed: it raised"),
    )
    idle = write(
        tmp_path / "experiments.csv",
        rate("copy", 1.0),  # the rates of the first file count
        rate("matrix product", 1.0),
        rows(Step(targets.LINEAR, "ordered"), 42.0),
        rows(Step(targets.IDLE, "ordered"), 28.0),
        rows(Step(targets.IDLE, "skip_inactive"), 21.0),
    )
    lines = targets.table([logits, idle, tmp_path / "missing.csv"]).splitlines()[2:]
    told = dict(zip((t.name + t.step.provider for t in TARGETS), lines, strict=True))
    # 8 * 8192 * 151936 bytes at 4 TB/s
    assert told["8 bytes per elementgrpo_kernels"].endswith("| 2.60 ms, 2.49 ms: 0.96, met |")
    assert told["Ligergrpo_kernels"].endswith("| 2.60 ms, 2.60 ms: 1.00, **missed by 23%** |")
    assert told["TRLgrpo_kernels"].endswith("| 2.60 ms, 5.20 ms: 2.00, met |")
    assert told["compiled eagergrpo_kernels"].endswith("| not measured |")
    assert told["6 T V H FLOPsgrpo_kernels"].endswith("| not measured |")
    assert told["all tokens have an advantageordered"].endswith("1.50, **missed by 12%** |")
    assert told["all tokens have an advantageskip_inactive"].endswith("2.00, met |")


def test_without_rates_no_floor_is_compared(tmp_path: Path) -> None:
    found = targets.table([write(tmp_path / "headline.csv", rows(targets.OURS, 2.6))]).splitlines()
    assert found[2].endswith("| not measured |")


def test_a_count_is_predicted_without_launches() -> None:
    target = Target(targets.OURS, 1.0, Cost(bytes=8, launches=0), "bytes")
    mine, floor = targets.predicted(target)
    assert mine is not None and floor is not None and mine > floor == pytest.approx(8192 * 151936 * 8 / 4.3e9)


def test_no_prediction_is_an_empty_cell() -> None:
    line = next(line for line in targets.table().splitlines() if "compiled eager" in line)
    assert line.endswith("| 2.00 |  |")
