"""`make gpu`: parts run in order, within the limit, and go on at the next call where one stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.__main__ import arguments as of_benchmark
from benchmarks.__main__ import main as benchmark
from benchmarks.gpu import machine, session, steps
from benchmarks.gpu.__main__ import table
from benchmarks.gpu.session import Execution, Part, Setting, State, run
from benchmarks.speed import measure
from benchmarks.speed.run import CUT, PATIENCE, Run
from benchmarks.tables import record
from benchmarks.work.providers import PROVIDERS, Provider

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
    assert (first.status, first.note, first.seconds) == ("stopped", "its budget: the last line", 100)
    assert second.status == "ok"
    assert machine.run([part("a"), part("b")], tmp_path, 540) == []


def test_the_limit_stops_a_part_and_the_next_call_goes_on(tmp_path: Path) -> None:
    machine = Machine({"a": 80, "b": 80, "c": 5})
    parts = [part("a"), part("b"), part("c")]
    first, second = machine.run(parts, tmp_path, 120)
    assert (first.status, second.status, second.note, second.seconds) == (
        "ok",
        "stopped",
        "the limit: the last line",
        40,
    )
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


def test_a_run_that_a_pair_ended_goes_on_at_once(tmp_path: Path) -> None:
    """It goes on while its budget lasts, but not if it has come no further."""
    machine = Machine({"a": 30}, {"a": 1})
    statuses = iter([
        ("failed: it hung", "not run: another hung", "not run: another hung"),
        ("failed: it hung", "failed: it broke", "not run: another broke"),
        ("failed: it hung", "failed: it broke", "ok"),
    ])  # fmt: skip

    def writes(name: str) -> None:
        write_csv(tmp_path / "a.csv", *next(statuses))
        machine.codes["a"] = 0 if next(reversed(list(record.read(tmp_path / "a.csv")))).status == "ok" else 1

    machine.writes = writes
    parts = [part("a", csv="a.csv")]
    assert [r.status for r in machine.run(parts, tmp_path, 540)] == ["stopped", "stopped", "ok"]
    assert machine.calls == [("a", 100), ("a", 70), ("a", 40)]

    write_csv(tmp_path / "b.csv", "ok")
    machine.codes["b"], machine.takes["b"], machine.writes = -11, 30, lambda name: None
    (only,) = machine.run([part("b", csv="b.csv")], tmp_path, 540)
    assert only.status == "stopped" and only.note.endswith("(exit status -11): the last line")
    assert len(machine.run([part("b", csv="b.csv")], tmp_path, 540)) == 1  # a later call tries it again


def test_a_run_that_a_pair_ended_does_not_exceed_its_budget(tmp_path: Path) -> None:
    machine = Machine({"a": 45}, {"a": 1})
    counts = iter(range(1, 9))
    machine.writes = lambda name: write_csv(tmp_path / "a.csv", *next(counts) * ["not run: another hung"])
    assert len(machine.run([part("a", csv="a.csv")], tmp_path, 540)) == 2
    assert machine.calls == [("a", 100), ("a", 55)]  # the 10 s that are left are too few


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


def test_a_rehearsal_has_more_time(tmp_path: Path) -> None:
    machine = Machine({"a": 10})
    run([part("a")], Setting(tmp_path, dry=True), 1e6, execute=machine.execute, clock=machine.clock)
    assert machine.calls == [("a", 100 * session.DRY_BUDGETS)]


class TestExecution:
    """Of real processes."""

    def execute(self, program: str, seconds: float, log: Path) -> Execution:
        return session.execute([sys.executable, "-c", program], {}, seconds, log)

    def test_output_and_status(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        assert self.execute("print(1); print('two')", 600, log) == (0, "two")
        assert self.execute("raise SystemExit(3)", 600, log) == (3, "")
        assert "two" in log.read_text() and log.read_text().count("$ ") == 2  # it is added to

    def test_it_is_a_group_of_its_own(self, tmp_path: Path) -> None:
        """In the session of this process, with which it ends if that is killed."""
        program = "import os; print(os.getpgrp() == os.getpid(), os.getsid(0))"
        assert self.execute(program, 600, tmp_path / "log") == (0, f"True {os.getsid(0)}")

    def test_an_interrupt_stops_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the session."""
        waits, started = subprocess.Popen.wait, []

        def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            started.append(self)
            if len(started) == 1:
                raise KeyboardInterrupt
            return waits(self, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            self.execute("import time; time.sleep(600)", 600, tmp_path / "log")
        assert started[0].returncode is not None

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
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with_variable = replace(part("a"), variables={"A": "b"})
    real = session.environment(with_variable, Setting(Path()))
    assert "TRITON_INTERPRET" not in real and real["A"] == "b"
    assert real["PYTHONUNBUFFERED"] == "1"  # so that the output of a killed process is there
    assert session.environment(with_variable, Setting(Path(), dry=True))["TRITON_INTERPRET"] == "1"


def test_the_environment_keeps_carried_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", "more"]))
    path = session.environment(part("a"), Setting(Path()))["PYTHONPATH"]
    assert path.split(os.pathsep) == [str(record.ROOT), "site", "more"]
    monkeypatch.delenv("PYTHONPATH")
    assert session.environment(part("a"), Setting(Path()))["PYTHONPATH"] == str(record.ROOT)


def test_a_stopped_worker_leaves_time_for_the_summary() -> None:
    """pytest-xdist waits for a worker that hangs, and reports the failures after that."""
    manager = pytest.importorskip("xdist.workermanage").NodeManager
    assert session.STOP_SECONDS > manager.EXIT_TIMEOUT


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
        if named:
            assert command[command.index("--device") + 1] == ("cpu" if dry else "cuda")
        if each.csv:
            assert command[command.index("--output") + 1] == str(tmp_path / each.csv)
            # It starts, and ends its last pair, within the budget.
            assert float(command[command.index("--limit") + 1]) == each.budget - steps.END
            assert steps.END > steps.START
            assert PATIENCE["cuda"] < each.budget - steps.END  # what is left after a hang is used


@pytest.mark.parametrize("dry", [False, True])
def test_runs_take_their_arguments(tmp_path: Path, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks.experiments.__main__ import arguments as of_experiments
    from benchmarks.training_step.__main__ import arguments as of_training_step

    parsers = {
        "benchmarks": of_benchmark,
        "benchmarks.experiments": of_experiments,
        "benchmarks.training_step": of_training_step,
    }
    taken = {}
    for each in steps.parts():
        _, _, module, *argv = each.command(Setting(tmp_path, dry=dry, seconds=100))
        if module in parsers:
            monkeypatch.setattr(sys, "argv", [module, *argv])
            taken[each.name] = parsers[module]()
    assert all(args.tiny == dry for args in taken.values())
    headline, rest = taken["headline shapes"], taken["rest of the benchmark"]
    assert headline.headline and not rest.headline and rest.quick == dry
    assert headline.resume and rest.resume and taken["experiments"].resume and "training step" in taken


def test_the_checks_run_kernels_only(tmp_path: Path) -> None:
    checks, sanitized = steps.checks(Setting(tmp_path)), steps.sanitize(Setting(tmp_path))
    for command in (checks, sanitized):
        assert command[command.index("-k") + 1] == "not torch"
    files = {word.split("::")[0] for word in checks}
    assert {"tests/kernels/test_on_gpu.py", "tests/losses/test_parity.py"} <= files
    assert any(word.endswith("::TestCase12Large") for word in checks)
    assert "--pairwise" in checks and set(steps.NO_COMPILE) <= set(checks)


def test_the_memory_checker_fails_on_an_error(tmp_path: Path) -> None:
    """It watches one process, whose tensors are allocations of their own."""
    (checker,) = (each for each in steps.parts() if each.step == 5)
    command = checker.command(Setting(tmp_path))
    assert command[command.index("--error-exitcode") + 1] == "1" and "-n" not in command
    assert checker.variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize("dry", [False, True])
def test_a_rehearsal_only_collects_the_suite(tmp_path: Path, dry: bool) -> None:
    commands = [each.command(Setting(tmp_path, dry=dry)) for each in steps.parts() if each.step == 7]
    assert {"--collect-only" in command for command in commands} == {dry}
    assert ("151936" in steps.accuracy(Setting(tmp_path, dry=dry))) == (not dry)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=139 * 2**30, L2_cache_size=60 * 2**20
    )
    shapes = []

    def floors(device: torch.device, products: list[tuple[int, ...]], dtype: torch.dtype) -> measure.Floors:
        shapes.append((products, dtype))
        return measure.Floors(4.3e12, 790e12)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(measure, "floors", floors)
    found = machine.describe(torch.device("cuda"), tiny=False)
    assert found["device"] == "NVIDIA H200" and found["capability"] == "9.0"
    assert (found["multiprocessors"], found["memory_gib"], found["l2_mib"]) == (132, 139, 60)
    assert (found["copy_GB_per_s"], found["product_TFLOP_per_s"]) == (4300, 790)
    assert shapes == [([machine.PRODUCT], torch.bfloat16)] and machine.PRODUCT[2] == 151936
    assert "torch" in found and "triton" in found and "commit" in found
    json.dumps(found)


def test_a_file_that_cannot_be_imported_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    command = steps.pytest(str(tmp_path), jobs=False)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "1 passed, 1 error" in done.stdout


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


class TestEndedProcess:
    """A pair may crash its process, or hang until it is killed. An exception stands for that."""

    @pytest.fixture
    def call(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
        """Run two providers, of which the first may raise, and return their rows."""
        monkeypatch.setattr(measure, "floors", lambda *given: measure.Floors(1e10, 1e11))
        eager = PROVIDERS["logits"]["eager"]
        path = tmp_path / "a.csv"
        argv = ["--shape", "T=64,V=50", "--device", "cpu", "--output", str(path), "--resume"]
        monkeypatch.setattr(sys, "argv", ["benchmarks", *argv])

        def call(ends: type[BaseException] | None) -> list[tuple[str, str]]:
            def loss(*given: object) -> torch.Tensor:
                if ends is not None:
                    raise ends
                return eager.loss(*given)

            providers = {"first": Provider("first", loss), "second": replace(eager, name="second")}
            monkeypatch.setitem(PROVIDERS, "logits", providers)
            with pytest.raises(ends) if ends is not None else nullcontext():
                benchmark()
            rows = (row for row in record.read(path) if row.kernel_name != "floor")
            return list(dict.fromkeys((row.kernel_provider, row.status) for row in rows))

        return call

    def test_it_is_tried_once_more_after_the_others(self, call: Callable[..., list[tuple[str, str]]]) -> None:
        assert call(SystemExit) == [("first", CUT)]
        failed = [("second", "ok"), ("first", "failed: the process ended twice while it ran")]
        assert call(SystemExit) == failed
        assert call(None) == failed
        assert CUT.startswith("not run")  # so that the run counts as unfinished

    def test_it_keeps_its_place(
        self, call: Callable[..., list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if a call in between does not get so far."""
        call(SystemExit)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*sys.argv, "--limit", "0"])
            assert dict(call(None))["first"] == CUT
        assert [name for name, _ in call(None)] == ["second", "first"]

    def test_it_may_succeed(self, call: Callable[..., list[tuple[str, str]]]) -> None:
        call(SystemExit)
        assert call(None) == [("second", "ok"), ("first", "ok")]

    def test_an_interrupt_is_no_failure(self, call: Callable[..., list[tuple[str, str]]]) -> None:
        for _ in range(2):
            assert call(KeyboardInterrupt) == [("first", "not run: it was interrupted")]
        assert call(None) == [("first", "ok"), ("second", "ok")]

    def test_a_pair_that_has_ended_is_not_watched(
        self, call: Callable[..., list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A timer that is left would end the process in the middle of a later pair."""
        events = []

        class Timer:
            def __init__(self, seconds: float, call: Callable[[], None]) -> None:
                assert seconds == PATIENCE["cpu"]

            def start(self) -> None:
                events.append("start")

            def cancel(self) -> None:
                events.append("cancel")

        monkeypatch.setattr("benchmarks.speed.run.threading", SimpleNamespace(Timer=Timer))
        assert call(None) == [("first", "ok"), ("second", "ok")]
        assert events == ["start", "cancel"] * 2

    def test_a_broken_context_needs_another_process(
        self,
        call: Callable[..., list[tuple[str, str]]],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(Run, "clean", lambda self, provider: setattr(self, "broken", "it broke"))
        with pytest.raises(SystemExit, match="it broke"):
            call(None)
        last = list(record.read(tmp_path / "a.csv"))[-1]
        assert (last.kernel_provider, last.status) == ("second", "not run: it broke")


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
