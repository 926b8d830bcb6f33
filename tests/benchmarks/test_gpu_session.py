"""`make gpu`: parts run in order, within the limit, and go on at the next call where one stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.__main__ import main as benchmark
from benchmarks.gpu import session, steps
from benchmarks.gpu.__main__ import table
from benchmarks.gpu.session import Execution, Part, Setting, State, run
from benchmarks.speed import measure
from benchmarks.tables import record

TESTS = Path(__file__).parents[1]


class Machine:
    """A fake clock and a fake execution of commands, which take the seconds that their names say."""

    def __init__(self, takes: dict[str, float], codes: dict[str, int] | None = None) -> None:
        self.takes, self.codes = takes, codes or {}
        self.now = 100.0
        self.calls: list[tuple[str, float]] = []
        self.writes: Callable[[str], None] = lambda name: None

    def clock(self) -> float:
        return self.now

    def execute(self, command: Sequence[str], variables: object, seconds: float, log: Path) -> Execution:
        name = command[0]
        self.calls.append((name, seconds))
        self.writes(name)
        self.now += min(seconds, self.takes[name])
        stopped = self.takes[name] > seconds
        return Execution(None if stopped else self.codes.get(name, 0), "the last line")

    def run(self, parts: Sequence[Part], out: Path, limit: float) -> list[session.Result]:
        self.calls.clear()
        return run(parts, Setting(out), limit, execute=self.execute, clock=self.clock)


def part(name: str, budget: float = 100, csv: str = "") -> Part:
    return Part(1, name, budget / 2, budget, lambda setting: [name, str(setting.seconds)], csv=csv)


def test_parts_run_in_order_and_once(tmp_path: Path) -> None:
    machine = Machine({"a": 10, "b": 20})
    found = machine.run([part("a"), part("b")], tmp_path, 540)
    assert [(r.part, r.status, r.seconds, r.note) for r in found] == [
        ("a", "ok", 10, "the last line"),
        ("b", "ok", 20, "the last line"),
    ]
    assert machine.calls == [("a", 100), ("b", 100)]
    assert machine.run([part("a"), part("b")], tmp_path, 540) == [] and not machine.calls
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 2


def test_a_failure_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    machine = Machine({"a": 10, "b": 20}, {"a": 3})
    first, second = machine.run([part("a"), part("b")], tmp_path, 540)
    assert (first.status, first.code, second.status) == ("failed", 3, "ok")
    assert machine.run([part("a"), part("b")], tmp_path, 540) == []  # a failure is a result


def test_a_part_over_its_budget_is_stopped_for_good(tmp_path: Path) -> None:
    machine = Machine({"a": 1000, "b": 20})
    first, second = machine.run([part("a"), part("b")], tmp_path, 540)
    assert (first.status, first.note, first.seconds) == ("stopped", "its budget", 100)
    assert second.status == "ok"
    assert machine.run([part("a"), part("b")], tmp_path, 540) == []


def test_the_limit_stops_a_part_and_the_next_call_goes_on(tmp_path: Path) -> None:
    machine = Machine({"a": 80, "b": 80, "c": 5})
    parts = [part("a"), part("b"), part("c")]
    first, second = machine.run(parts, tmp_path, 120)
    assert (first.status, second.status, second.note, second.seconds) == ("ok", "stopped", "the limit", 40)
    assert machine.calls == [("a", 100), ("b", 40)]  # c is not started without time for it
    assert [(r.part, r.status) for r in machine.run(parts, tmp_path, 540)] == [("b", "ok"), ("c", "ok")]


def test_a_short_part_still_fits(tmp_path: Path) -> None:
    machine = Machine({"a": 95, "b": 80, "c": 4})
    found = machine.run([part("a"), part("b"), part("c", budget=5)], tmp_path, 100)
    assert [(r.part, r.status) for r in found] == [("a", "ok"), ("c", "ok")]


def write_csv(path: Path, *statuses: str) -> None:
    """A run's CSV with one pair for each status."""
    rows = record.Table(path)
    for place, status in enumerate(statuses):
        work = json.dumps({"T": 8, "V": place})
        names = {"kernel_name": "logits grpo", "kernel_provider": "eager", "metric_name": "memory"}
        rows.add(
            record.row(
                torch.device("cpu"), **names, x_value=8, extra_benchmark_config_str=work, status=status
            )
        )


def test_a_run_that_left_pairs_out_goes_on(tmp_path: Path) -> None:
    """A run ends by itself before its budget, with rows that say what was not run."""
    machine = Machine({"a": 50})
    statuses = iter([("ok", "not run: the limit"), ("ok", "failed: it broke")])
    machine.writes = lambda name: write_csv(tmp_path / "a.csv", *next(statuses))
    (first,) = machine.run([part("a", csv="a.csv")], tmp_path, 540)
    assert (first.status, first.code) == ("stopped", 0) and first.note.startswith("some pairs were not run")
    (second,) = machine.run([part("a", csv="a.csv")], tmp_path, 540)
    assert second.status == "ok"
    assert machine.run([part("a", csv="a.csv")], tmp_path, 540) == []


def test_a_run_over_its_budget_goes_on(tmp_path: Path) -> None:
    machine = Machine({"a": 1000})
    (first,) = machine.run([part("a", csv="a.csv")], tmp_path, 540)
    assert first.status == "stopped" and session.unfinished(tmp_path / "a.csv")
    machine.takes["a"] = 10
    machine.writes = lambda name: write_csv(tmp_path / "a.csv", "ok")
    assert [r.status for r in machine.run([part("a", csv="a.csv")], tmp_path, 540)] == ["ok"]


def test_the_time_before_the_first_part_counts(tmp_path: Path) -> None:
    machine = Machine({"a": 10})
    how = {"execute": machine.execute, "clock": machine.clock, "started": machine.now - 500}
    assert run([part("a")], Setting(tmp_path), 540, **how)[0].status == "ok"
    assert machine.calls == [("a", 40)]


class TestExecution:
    """Of real processes."""

    def execute(self, program: str, seconds: float, log: Path) -> Execution:
        return session.execute([sys.executable, "-c", program], {}, seconds, log)

    def test_output_and_status(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        assert self.execute("print(1); print('two')", 600, log) == (0, "two")
        assert self.execute("raise SystemExit(3)", 600, log)[0] == 3
        assert "two" in log.read_text() and log.read_text().count("$ ") == 2  # it is added to

    def test_a_missing_command(self, tmp_path: Path) -> None:
        code, note = session.execute(["/no/such/command"], {}, 600, tmp_path / "log")
        assert code == 127 and "/no/such/command" in note

    def test_a_hanging_command_is_stopped_with_its_children(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also one that ignores the interrupt."""
        monkeypatch.setattr(session, "STOP_SECONDS", 1)
        ready = tmp_path / "ready"
        child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        child += f"import os; open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        # The child has to be there before the parent is stopped, however slow the machine is.
        waits = subprocess.Popen.wait

        def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            for _ in range(6000):
                if ready.exists() and ready.read_text():
                    break
                time.sleep(0.1)
            return waits(self, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        assert self.execute(program, 1, tmp_path / "log").code is None
        pid = int(ready.read_text())
        for _ in range(600):  # a killed process may take a moment to disappear
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
            time.sleep(0.1)
        raise AssertionError("the child is still there")


def test_the_environment_decides_whether_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with_variable = replace(part("a"), variables={"A": "b"})
    real = session.environment(with_variable, Setting(Path()))
    assert "TRITON_INTERPRET" not in real and real["A"] == "b"
    assert session.environment(with_variable, Setting(Path(), dry=True))["TRITON_INTERPRET"] == "1"


def test_the_steps() -> None:
    parts = steps.parts()
    assert [p.step for p in parts] == sorted(p.step for p in parts) and {p.step for p in parts} == set(
        range(1, 8)
    )
    assert len({p.name for p in parts}) == len(parts)
    assert all(p.seconds > 0 and p.budget > 0 for p in parts)
    budgets = {step: sum(p.budget for p in parts if p.step == step) for step in range(1, 8)}
    assert budgets[2] <= 90 and sum(budgets[step] for step in range(1, 6)) <= 480
    lines = table(parts, [session.Result("machine", "ok", 7, 0, "done")]).splitlines()
    assert len(lines) == 2 + len(parts) and lines[2].endswith("| 7 | ok: done |")


def test_every_folder_of_tests_has_a_part() -> None:
    """verl's tests need an environment of their own, and those of PTX run the emulator."""
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert folders - {"verl", "ptx"} == steps.SUITE.keys()


@pytest.mark.parametrize("dry", [False, True])
def test_commands_name_files_that_exist(tmp_path: Path, dry: bool) -> None:
    for each in steps.parts():
        command = each.command(Setting(tmp_path, dry=dry, seconds=each.budget))
        paths = [word.split("::")[0] for word in command if word.startswith(("tests/", "docs/"))]
        assert all((record.ROOT / path).exists() for path in paths), command
        modules = [command[place + 1] for place, word in enumerate(command) if word == "-m"]
        named = [name.replace(".", "/") for name in modules if name.startswith("benchmarks")]
        assert all(
            (record.ROOT / f"{name}.py").exists() or (record.ROOT / name / "__main__.py").exists()
            for name in named
        ), command
        assert ("cuda" not in command) if dry else ("--tiny" not in command)
        if each.csv:
            assert command[command.index("--output") + 1] == str(tmp_path / each.csv)
            assert float(command[command.index("--limit") + 1]) < each.budget


def test_a_benchmark_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second call keeps what was measured, with its rates, and measures the rest."""
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})
    path = tmp_path / "a.csv"
    shapes = ["--shape", "T=64,V=50", "--shape", "T=64,V=60", "--provider", "eager", "--device", "cpu"]

    def call(*argv: str) -> list[record.Row]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *shapes, "--output", str(path), *argv])
        benchmark()
        return list(record.read(path))

    none = call("--limit", "0")
    assert [r.status.split(":")[0] for r in none] == ["ok", "ok", "not run", "not run"]
    done = call("--resume")
    assert done[:2] == none[:2]  # the rates, which are not measured again
    ok = [r for r in done[2:] if r.metric_name == "memory"]
    assert len(ok) == 2 and {r.status for r in done} == {"ok"}
    assert call("--resume") == done
    # A pair that was cut off, so that its last row is missing, is measured again.
    record.Table(path, [row for row in done if row is not done[-1]])
    again = call("--resume")
    assert again[: len(done) - 4] == done[: len(done) - 4] and len(again) == len(done)


@pytest.mark.long
def test_a_rehearsal(tmp_path: Path) -> None:
    """Two steps of `make gpu ARGS=--dry`, in processes of their own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--out",
        str(tmp_path),
        "--dry",
        "--step",
        "1",
        "--step",
        "3",
    ]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    state = State(tmp_path / "dry" / "gpu.jsonl")
    assert [(r.part, r.status) for r in state.results] == [("machine", "ok"), ("headline shapes", "ok")], (
        done.stdout
    )
    rows = list(record.read(tmp_path / "dry" / "headline.csv"))
    assert {row.status.split(":")[0] for row in rows} <= {"ok", "skipped"}
    assert json.loads((tmp_path / "dry" / "machine.json").read_text())["copy_GB_per_s"] > 0
