"""The benchmarks: providers agree, wrong providers are detected, and every result or failure has a row."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import report
from benchmarks.__main__ import arguments, main, output, shape
from benchmarks.speed import gate, measure, plans
from benchmarks.tables import record
from benchmarks.work.batch import Batch, make_batch
from benchmarks.work.providers import PROVIDERS, Provider, eager, eager_linear, ours
from benchmarks.work.workload import Workload

LOGITS = Workload("logits", "grpo_kl", 64, 333, dtype=torch.float32)
LINEAR = Workload("linear", "grpo_kl", 64, 333, 128, dtype=torch.float32)
WORKS = [
    replace(base, **change)
    for base in (LOGITS, LINEAR)
    for change in (
        {},
        {"loss": "grpo", "inactive": 0.5},
        {"loss": "grpo", "masked": 0.5},
        {"loss": "log_ratio"},
        {"given_ref": True},
        {"loss": "log_ratio", "given_ref": True, "masked": 0.5},
        {"dtype": torch.bfloat16},
    )
]
WORKS += [replace(LINEAR, loss="cross_entropy", masked=0.5), replace(LINEAR, frozen_head=True)]


def compiles(provider: Provider) -> bool:
    """torch.compile takes long, and computes the same as eager."""
    return provider.name.startswith("torch.compile")


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_all_providers_are_right(work: Workload, device: str) -> None:
    batch = make_batch(work, device)
    for provider in PROVIDERS[work.form].values():
        if not compiles(provider) and provider.reason_against(work, torch.device(device)) is None:
            verdict = gate.check(provider, batch)
            assert verdict.wrong is None, f"{provider.name}: {verdict.wrong}"
            assert work.dtype == torch.bfloat16 or verdict.error < 1e-4, provider.name


def broken(change: str, form: str) -> Provider:
    def loss(batch: Batch, *leaves: Tensor) -> Tensor:
        if change == "no KL":
            batch = batch._replace(work=replace(batch.work, loss="grpo"))
        if change == "one id":
            ids = batch.ids.clone()
            ids.view(-1)[batch.truth.dlogps.abs().argmax()] = 0
            batch = batch._replace(ids=ids)
        right = (eager if form == "logits" else eager_linear)(batch, *leaves)
        total = sum(x.sum() for x in leaves)
        wrong = {
            "loss only": right + 0.2,
            "gradient only": right + 0.01 * (total - total.detach()),
            "no gradient": right.detach() + 0 * total,
            "NaN": right * torch.nan,
            "twice": 2 * right,
        }
        return wrong.get(change, right)

    return Provider(change, loss)


CHANGES = ["no KL", "one id", "loss only", "gradient only", "no gradient", "NaN", "twice"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("work", [LOGITS, LINEAR, replace(LINEAR, dtype=torch.bfloat16)], ids=str)
def test_a_wrong_provider_is_caught(work: Workload, change: str) -> None:
    batch = make_batch(replace(work, T=1024 if change == "one id" else work.T))
    assert gate.check(broken("", work.form), batch).wrong is None
    assert gate.check(broken(change, work.form), batch).wrong is not None


def test_masked_positions_must_have_no_gradient() -> None:
    batch = make_batch(replace(LOGITS, masked=0.5))
    everywhere = Provider("", lambda batch, x: eager(batch, x) + 1e-2 * x[~batch.mask].norm())
    assert gate.check(everywhere, batch).wrong is not None


@pytest.mark.parametrize(
    ("change", "formula"),
    [
        ({}, "6E"),
        ({"loss": "grpo"}, "4E"),
        ({"masked": 0.5}, "4E"),
        ({"inactive": 0.5}, "6E"),
        ({"given_ref": True}, "4E"),
        ({"form": "linear", "H": 64, "given_ref": True}, "6TVH"),
        ({"form": "linear", "H": 64}, "8TVH"),
        ({"form": "linear", "H": 64, "loss": "grpo"}, "6TVH"),
        ({"form": "linear", "H": 64, "loss": "grpo", "inactive": 0.5}, "4TVH"),
        ({"form": "linear", "H": 64, "loss": "grpo", "masked": 0.5}, "3TVH"),
        ({"form": "linear", "H": 64, "loss": "grpo", "frozen_head": True}, "4TVH"),
    ],
)
def test_floors(change: dict[str, object], formula: str) -> None:
    work = replace(Workload("logits", "grpo_kl", 8192, 151936), **change)
    assert work.floor.formula == formula
    assert work.floor.amount == int(formula[0]) * 8192 * 151936 * (work.H or 1)


def test_the_batch_matches_the_workload() -> None:
    batch = make_batch(replace(LINEAR, T=256, masked=0.5, inactive=0.5))
    assert batch.mask.float().mean() == 0.5 and len(set(batch.mask.sum(-1).tolist())) == 8
    assert (batch.advantages == 0).float().mean() == 0.5
    clipped = batch.truth.dlogps[batch.mask & (batch.advantages != 0)[:, None]] == 0
    assert 0 <= clipped.float().mean() < 0.1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_plans_begin_with_every_form_and_repeat_nothing(device: str, quick: bool) -> None:
    works = plans.plan(["logits", "linear"], torch.device(device), quick=quick)
    assert {work.form for work in works[:2]} == {"logits", "linear"}
    assert len(set(works)) == len(works)
    assert {work.inactive for work in works} == {0.0, 0.5}
    assert {work.loss for work in works} >= {"grpo", "grpo_kl", "log_ratio"}
    assert {work.given_ref for work in works} == {False, True}


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *argv: str) -> list[record.Row]:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--output", str(output), *argv])
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})
    main()
    return list(record.read(output))


@pytest.mark.long
def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every provider has rows of times and memory, or a row with the reason if there are none."""

    def dies(batch: Batch, logits: Tensor) -> Tensor:
        raise RuntimeError("out of\nluck")

    extra = {
        "dies": Provider("dies", dies),
        "absent": Provider("absent", ours, "no-such"),
    }
    providers = {
        "grpo_kernels": PROVIDERS["logits"]["grpo_kernels"],
        **extra,
        "wrong": broken("twice", "logits"),
    }
    monkeypatch.setitem(PROVIDERS, "logits", {n: replace(p, name=n) for n, p in providers.items()})
    rows = run(monkeypatch, tmp_path / "a.csv", "--shape", "T=64,V=50", "--inactive", "0.5")
    assert [(r.kernel_provider, r.metric_unit) for r in rows if r.kernel_name == "floor"] == [
        ("copy", "GB/s"),
        ("matrix product", "TFLOP/s"),
    ]
    rows = rows[2:]
    ours_rows = [r for r in rows if r.kernel_provider == "grpo_kernels"]
    assert [r.kernel_operation_mode for r in ours_rows] == ["full", "forward", "backward", "full"]
    for r in ours_rows:
        assert r.status == "ok" and r.y_value_50 is not None and r.max_rel_err < 1e-4
        assert r.torch == torch.__version__ and record.config(r)["inactive"] == 0.5 and r.x_value == 64
    first = ours_rows[0]
    assert first.pct_of_floor > 0 and first.rate_unit == "GB/s" and ours_rows[3].metric_name == "memory"
    others = {r.kernel_provider: r for r in rows[4:]}
    assert len(rows) == 4 + len(others)
    assert others["dies"].status == "failed: RuntimeError: out of luck"
    assert others["absent"].status == "skipped: no-such is not installed"
    assert others["wrong"].status.startswith("wrong: loss errs") and others["wrong"].max_rel_err > 0.9
    assert all(r.y_value_50 is None and r.pct_of_floor is None for r in others.values())

    page = report.table(tmp_path / "a.csv")
    assert "| grpo, half without advantage, floor 8E | grpo_kernels | **" in page
    assert "* dies: failed: RuntimeError: out of luck\n* absent: skipped: no-such is not installed\n" in page


@pytest.mark.long
def test_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The figure shows every provider that was timed, with the values of the CSV."""
    plot = pytest.importorskip("benchmarks.plot", exc_type=ImportError)
    assert plot.COLOURS.keys() == {name for form in PROVIDERS.values() for name in form}
    providers = {name: PROVIDERS["logits"][name] for name in ("grpo_kernels", "eager")}
    monkeypatch.setitem(PROVIDERS, "logits", providers)
    run(
        monkeypatch,
        tmp_path / "b.csv",
        "--shape",
        "T=64,V=50",
        "--shape",
        "T=128,V=50",
        "--shape",
        "T=64,V=90",
    )
    rows = list(record.read(tmp_path / "b.csv"))
    chart = plot.figure(rows, "logits")
    lines, memory, floors = chart.axes
    assert "not drawn" not in chart.get_suptitle()
    assert [line.get_label() for line in lines.lines] == ["grpo_kernels", "eager", "floor"]
    assert [line.get_label() for line in memory.lines] == ["grpo_kernels", "eager"]
    timed = {(r.kernel_provider, r.x_value): r for r in rows if r.kernel_operation_mode == "full" and r.rate}
    for line in lines.lines[:2]:
        assert list(line.get_xdata()) == [64, 128]
        assert line.get_ydata()[1] == timed[line.get_label(), 128].y_value_50
    assert [text.get_text() for text in floors.get_xticklabels()] == ["V=50", "V=90"]
    assert len(floors.patches) == 4
    assert len(lines.collections) == 2 and not memory.collections  # the bands of the times
    assert plot.points(rows, "linear") == []


def test_the_limit_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path / "a.csv", "--quick", "--limit", "0", "--form", "linear")
    rows = [r for r in rows if r.kernel_name != "floor"]
    works = plans.plan(["linear"], torch.device("cpu"), quick=True)
    assert len(rows) == len(works) * len(PROVIDERS["linear"])
    assert {r.status for r in rows} == {"not run: the limit of 0 s was reached"}


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the loop of `do_bench` without a GPU, and records when it clears the cache.

    By the fake clock, a call takes 10 ms, so it is timed five times.
    """
    from triton import testing

    order: list[str] = []
    clock_ms = 0.0

    def passed(ms: float) -> float:
        nonlocal clock_ms
        clock_ms += ms
        return clock_ms

    def clear_cache(cache: object) -> None:
        order.append("cold")
        passed(9)

    class Event:
        def __init__(self, **how: object) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = passed(1)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    interface = SimpleNamespace(Event=Event, synchronize=lambda: None)
    driver = SimpleNamespace(
        get_device_interface=lambda: interface,
        get_empty_cache_for_benchmark=lambda: None,
        clear_cache=clear_cache,
    )
    monkeypatch.setattr(testing, "runtime", SimpleNamespace(driver=SimpleNamespace(active=driver)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: 1e-3 * passed(10)))
    monkeypatch.setattr(measure, "GPU_MS", 30)
    return order


def test_each_timed_call_is_prepared_and_has_a_cold_cache(fake_driver: list[str]) -> None:
    def call() -> None:
        fake_driver.append("call")

    timing = measure.on_gpu(call, lambda: fake_driver.append("prepare"))
    calls = [at for at, what in enumerate(fake_driver) if what == "call"]
    assert all("prepare" in fake_driver[max(0, at - 2) : at] for at in calls)
    assert all(set(fake_driver[at - 2 : at]) == {"prepare", "cold"} for at in calls[-5:])
    assert 1 <= timing.low <= timing.median <= timing.high


def test_a_long_preparation_takes_no_repetitions(fake_driver: list[str]) -> None:
    """`do_bench` counts it in its estimate: the forward before a backward."""
    from triton import testing

    def prepare() -> None:
        for _ in range(4):
            testing.runtime.driver.active.clear_cache(None)

    measure.on_gpu(lambda: fake_driver.append("call"), prepare)
    assert fake_driver.count("call") == 1 + 1 + 5 + 1 + 5  # to know the time, do_bench's first ones, warm-up


@pytest.mark.long
@pytest.mark.parametrize("work", [LOGITS, replace(LINEAR, loss="grpo", inactive=0.5)], ids=str)
def test_every_provider_can_be_timed_on_a_gpu(work: Workload, fake_driver: list[str]) -> None:
    """Repetition works: each backward has a new graph, and each step a new copy of overwritten inputs."""
    batch = make_batch(work)
    for provider in PROVIDERS[work.form].values():
        if not compiles(provider) and provider.reason_against(work, torch.device("cpu")) is None:
            subject = measure.Subject(provider, batch)
            found = measure.timings(subject, torch.device("cuda"))
            assert set(found) <= {"full", "forward", "backward"} and found["full"].median > 0


@pytest.mark.long
def test_the_gate_at_a_large_vocabulary() -> None:
    """The check works with tiny rows in the head's gradient and with coarsely rounded bf16 logits."""
    work = Workload("linear", "grpo_kl", 64, 151936, 64, inactive=0.5)
    batch = make_batch(work)
    for provider in (broken("", "linear"), PROVIDERS["linear"]["grpo_kernels"]):
        assert gate.check(provider, batch).wrong is None
    assert gate.check(broken("one id", "linear"), batch).wrong is not None


@pytest.mark.long
def test_a_failure_without_a_batch_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memory(*given: object) -> Batch:
        raise torch.OutOfMemoryError("there is none")

    monkeypatch.setattr("benchmarks.speed.run.make_batch", no_memory)
    rows = run(monkeypatch, tmp_path / "a.csv", "--shape", "T=64,V=50", "--provider", "eager")
    assert rows[-1].status == "failed: no batch: there is none"


@pytest.mark.long
def test_a_provider_that_hangs_is_reported(tmp_path: Path) -> None:
    """A hanging provider and all later ones have rows. The fake timer fires when the provider hangs.

    This needs another process, because the run ends it.
    """
    program = f"""
import sys, threading
from types import SimpleNamespace
sys.argv = ["benchmarks", "--device", "cpu", "--output", {str(tmp_path / "a.csv")!r},
            "--shape", "T=64,V=50"]
from benchmarks.__main__ import main
from benchmarks.speed import measure, run
from benchmarks.work.providers import PROVIDERS, Provider

hangs = threading.Event()

class Timer(threading.Thread):
    def __init__(self, seconds, call):
        assert seconds == run.PATIENCE["cpu"], seconds
        super().__init__(daemon=True)
        self.call = call

    def run(self):
        hangs.wait()
        self.call()

def hang(batch, logits):
    hangs.set()
    threading.Event().wait()

run.threading = SimpleNamespace(Timer=Timer)
measure.COPY_BYTES = {{"cpu": 2**16}}
PROVIDERS["logits"] = {{"hangs": Provider("hangs", hang), "eager": PROVIDERS["logits"]["eager"]}}
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=record.ROOT, timeout=1800, check=False)
    assert done.returncode == 1
    statuses = {r.kernel_provider: r.status for r in record.read(tmp_path / "a.csv")}
    assert statuses["hangs"] == "failed: it had not ended after 3600 s"
    assert statuses["eager"] == "not run: another provider hung"


def test_a_prediction_does_not_tell_pairs_apart() -> None:
    """It depends on the rates, which are rounded in a CSV."""
    pair = record.pair_of("a", "b", {"T": 8, "predicted_ms": 1.0})
    assert pair == record.pair_of("a", "b", {"T": 8, "predicted_ms": 2.0})
    assert pair != record.pair_of("a", "b", {"T": 9, "predicted_ms": 1.0})


def test_a_table_of_a_run_in_turns(tmp_path: Path) -> None:
    """The providers of a workload come together."""
    rows = record.Table(tmp_path / "a.csv")
    rows.add(record.row(torch.device("cpu"), kernel_name="floor", kernel_provider="copy", y_value_50=1.0))
    times = {
        "y_value_50": 2.0,
        "y_value_20": 1.0,
        "y_value_80": 3.0,
        "pct_of_floor": 50.0,
        "max_rel_err": 0.1,
    }
    for provider, V in (("a", 50), ("a", 60), ("b", 50), ("b", 60)):
        work = {"T": 64, "V": V, "H": 0, "loss": "grpo", "masked": 0, "inactive": 0, "frozen_head": False}
        names = {"kernel_name": "logits grpo", "kernel_provider": provider, "status": "ok", "x_value": 64}
        config = {"extra_benchmark_config_str": json.dumps(work), "kernel_operation_mode": "full"}
        for metric in ("speed", "memory"):
            rows.add(record.row(torch.device("cpu"), **names, **times, **config, metric_name=metric))
    lines = [line.strip("| ").split(" | ") for line in report.table(tmp_path / "a.csv").splitlines()]
    firsts = [line[0] for line in lines if line[-1] == "1e-01"]
    assert [first.startswith("grpo") for first in firsts] == [True, False, True, False]


@pytest.mark.parametrize("text", ["T=100,V=50", "T=64", "T=64,V=50,K=3", "T=0,V=50", "64x50"])
def test_invalid_shapes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected T=8192,V=151936"):
        shape(text)


def test_a_part_does_not_replace_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, name in (
        ([], "cpu.csv"),
        (["--quick"], "cpu-partial.csv"),
        (["--form", "linear"], "cpu-partial.csv"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *argv])
        assert output(arguments()).name == name
