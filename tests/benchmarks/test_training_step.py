"""The benchmark of training steps with a tiny model: every way has rows, and a wrong loss is detected."""

from __future__ import annotations

import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")

from benchmarks import report
from benchmarks.tables import record
from benchmarks.training_step import __main__ as command
from benchmarks.training_step.ways import WAYS, Subject, Way, plain_loop
from benchmarks.work.providers import PROVIDERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

FLOORS = ["TRL: no loss", "PyTorch: no loss"]
# Without torch.compile, which takes long.
TIMED = [
    "TRL: stock",
    "TRL: FusedGRPOTrainer",
    "TRL: fuse_trl_logps",
    "PyTorch: eager",
    "PyTorch: grpo_kernels",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[record.Row]]:
    def rows_of(ways: list[Way], *argv: str) -> list[record.Row]:
        monkeypatch.setattr(command, "WAYS", {way.name: way for way in ways})
        to = tmp_path / "step.csv"
        options = ["--tiny", "--steps", "2", "--device", "cpu", "--output", str(to)]
        monkeypatch.setattr(sys, "argv", ["training_step", *options, *argv])
        command.make_run(command.arguments(), tmp_path)()
        return list(record.read(to))

    return rows_of


def like_eager(batch: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    return PROVIDERS["linear"]["eager"].loss(batch, hidden, weight)


def altered(name: str, change: Callable[[Tensor], Tensor]) -> Way:
    """A way with the eager loss, changed by `change`."""
    loss = lambda *given: change(like_eager(*given))  # noqa: E731
    return Way("PyTorch", name, functools.partial(plain_loop, loss=loss))


def short_of_memory(way: Way, enough_for: int) -> Way:
    def make(case: Any, samples: Any, folder: Path, micro_batch: int) -> Subject:
        if micro_batch > enough_for:
            raise torch.OutOfMemoryError("there is none")
        return way.make(case, samples, folder, micro_batch)

    return replace(way, what=f"small {way.what}", make=make)


@pytest.mark.long
def test_every_way(run: Callable[..., list[record.Row]], tmp_path: Path) -> None:
    rows = run([WAYS[name] for name in FLOORS + TIMED])
    for loss in ("grpo", "grpo_kl"):
        floor = {r.kernel_provider: r for r in rows if r.kernel_name == "floor" and r.metric_name == "speed"}
        for name in TIMED:
            found = {
                (r.kernel_operation_mode, r.metric_name): r
                for r in rows
                if r.kernel_name == f"training_step {loss}" and r.kernel_provider == name
            }
            full, first = found["full", "speed"], found["first step", "loss"]
            assert {r.status for r in found.values()} == {"ok"}
            # Both are fp32, so only rounding differs. CSVs have five digits.
            assert first.max_rel_err < 1e-6 and full.max_rel_err < 1e-5
            floor_ms = floor[f"{name.split(':')[0]}: no loss, {loss}"].y_value_50
            assert full.pct_of_floor == pytest.approx(100 * floor_ms / full.y_value_50, rel=1e-3)
            assert found["loss", "speed"].y_value_50 == pytest.approx(full.y_value_50 - floor_ms, abs=1e-2)
            assert found["full", "memory"].metric_unit == "MiB"
            assert record.config(full)["prompt"] == 8 and record.config(full)["T"] == full.x_value == 8 * 24
    losses = {r.y_value_50 for r in rows if r.metric_name == "loss"}
    assert len(losses) == 2, "one with a KL term and one without"
    page = report.table(tmp_path / "step.csv")
    assert (
        "| grpo, floor the step without a loss | TRL: stock 1.16" in page and "| PyTorch: eager | **" in page
    )


@pytest.mark.long
def test_who_runs_out_of_memory_is_tried_with_less(run: Callable[..., list[record.Row]]) -> None:
    small = [short_of_memory(WAYS[name], 2) for name in ("TRL: FusedGRPOTrainer", "PyTorch: grpo_kernels")]
    rows = run([*(WAYS[name] for name in FLOORS), *small], "--loss", "grpo_kl")
    for way in small:
        found = {r.kernel_provider: r for r in rows if r.kernel_provider.startswith(way.name)}
        names = [way.name, f"{way.name}, micro-batch 4", f"{way.name}, micro-batch 2"]
        assert list(found) == names
        dead = "failed: OutOfMemoryError: there is none"
        assert [found[name].status for name in names] == [dead, dead, "ok"]
        assert [record.config(found[name])["micro_batch"] for name in names] == [8, 4, 2]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda loss: 1.01 * loss, "loss differs by"),
        (lambda loss: loss + 0.01 * (loss - loss.detach()), "gradient of the head differs by 1.0e-02"),
        pytest.param(lambda loss: loss * torch.nan, "loss differs by nan", marks=pytest.mark.long),
    ],
    ids=["loss", "gradient", "NaN"],
)
def test_a_wrong_way_is_reported(
    run: Callable[..., list[record.Row]], change: Callable[[Tensor], Tensor], status: str
) -> None:
    rows = run([WAYS["PyTorch: no loss"], altered("wrong", change)], "--loss", "grpo")
    assert all(r.status.startswith(status) for r in rows if r.kernel_provider == "PyTorch: wrong")


@pytest.mark.long
def test_a_way_without_timing_is_reported(run: Callable[..., list[record.Row]]) -> None:
    floor = WAYS["PyTorch: no loss"]
    absent = replace(floor, what="absent", package="no-such")
    rows = run([floor, absent], "--loss", "grpo")
    assert rows[-1].status == "skipped: no-such is not installed" and rows[-1].y_value_50 is None
    rows = run([floor, absent], "--limit", "0")
    assert rows[0].status == "not run: the limit of 0 s was reached"


@pytest.mark.long
def test_a_way_frees_its_model(run: Callable[..., list[record.Row]]) -> None:
    """Otherwise, the next way would have less memory."""
    models: list[weakref.ref[Any]] = []

    def watched(way: Way) -> Way:
        def make(*given: Any) -> Subject:
            assert not any(model() for model in models)
            subject = way.make(*given)
            models.append(weakref.ref(subject.model))
            return subject

        return replace(way, make=make)

    names = ["TRL: no loss", "TRL: FusedGRPOTrainer", "PyTorch: no loss", "PyTorch: grpo_kernels"]
    gc.disable()  # so that no collection happens by chance between two ways
    try:
        rows = run([watched(WAYS[name]) for name in names], "--loss", "grpo_kl")
    finally:
        gc.enable()
    assert len(models) == 4 and {r.status for r in rows} == {"ok"}
