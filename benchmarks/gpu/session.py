"""Runs parts in their order, within a limit of time, and goes on at the next call where this one stopped.

A part is a command in a process of its own, so that a crash, a hang or a broken GPU context does not stop
the others. What became of it is one line of `gpu.jsonl`, written when it ends. Its output goes to `gpu.log`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..tables import record

STATE, LOG = "gpu.jsonl", "gpu.log"
STOP_SECONDS = 15  # for a part to end after an interrupt; pytest-xdist waits 10 for its workers
LEAST_SECONDS = 15  # nothing useful starts and ends in less
BUDGET = "its budget"  # why a part was stopped
DRY_BUDGETS = 30  # times a budget is what a part may take in a rehearsal, on a slow machine


class Setting(NamedTuple):
    """How the commands of a call are made."""

    out: Path
    dry: bool = False  # tiny sizes, on a CPU, in Triton's interpreter
    seconds: float = 0.0  # how long this command may take


@dataclass(frozen=True)
class Part:
    """A command, how long it takes on a GPU, and after how many seconds it is stopped."""

    step: int
    name: str
    seconds: float  # estimated
    budget: float
    command: Callable[[Setting], list[str]]
    csv: str = ""  # of a run that can go on where it was stopped
    variables: Mapping[str, str] | None = None  # of the environment


@dataclass(frozen=True)
class Result:
    """A line of the state."""

    part: str
    status: str  # ok, failed, or stopped
    seconds: float
    code: int | None = None
    note: str = ""  # the last line of output, after why the part was stopped


class State:
    """The results so far, of this call and earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.results = [Result(**json.loads(line)) for line in lines]

    def add(self, result: Result) -> None:
        self.results.append(result)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def finished(self, part: Part) -> bool:
        """Whether a part needs no other call: it ended, or its budget stopped it and it cannot go on."""
        mine = [result for result in self.results if result.part == part.name]
        if not mine:
            return False
        last = mine[-1]
        return last.status != "stopped" or (not part.csv and last.note.startswith(BUDGET))


def unfinished(csv: Path) -> bool:
    """Whether a run's CSV is missing, or says that a pair was not run."""
    return not csv.exists() or any(row.status.startswith("not run") for row in record.read(csv))


class Execution(NamedTuple):
    code: int | None  # None: it was stopped
    last_line: str


def execute(command: Sequence[str], variables: Mapping[str, str], seconds: float, log: Path) -> Execution:
    """Run a command, with its output in `log`, and interrupt it after `seconds`."""
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=record.ROOT,
                env=dict(variables),
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # so that its own processes are stopped with it, and not this one
            )
        except OSError as error:
            return Execution(127, str(error))
        code: int | None = None
        try:
            code = process.wait(seconds)
        except BaseException as error:
            stop(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in text.splitlines()[2:] if line.strip()]
    return Execution(code, lines[-1][:300] if lines else "")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and all of its group, and kill what is left after `STOP_SECONDS`."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def environment(part: Part, setting: Setting) -> dict[str, str]:
    """The environment of a part: kernels are compiled, but in a rehearsal interpreted.

    PYTHONPATH keeps its folders. Packages that were carried to the machine are there.
    """
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(record.ROOT), found.get("PYTHONPATH"))))
    found |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(part.variables or {})}
    return found | {"TRITON_INTERPRET": "1"} if setting.dry else found


def run(
    parts: Sequence[Part],
    setting: Setting,
    limit: float,
    *,
    execute: Callable[..., Execution] = execute,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> list[Result]:
    """Run the parts that are left, in order, and return the results of this call.

    A run that a pair has ended, by a crash or a hang, goes on with the other pairs while its budget lasts.
    `started` is the time by `clock` from which the limit counts.
    """
    started = clock() if started is None else started
    setting.out.mkdir(parents=True, exist_ok=True)
    state, found = State(setting.out / STATE), []
    for part in parts:
        if state.finished(part):
            say(part, "done in an earlier call")
            continue
        budget = part.budget * (DRY_BUDGETS if setting.dry else 1)
        first, again = clock(), True
        while again:
            begun = clock()
            mine, left = budget - (begun - first), limit - (begun - started)
            allowed = min(mine, left)
            if allowed < min(LEAST_SECONDS, budget):
                say(part, f"not started: {max(0, allowed):.0f} s are left")
                break
            say(part, f"about {part.seconds:.0f} s, at most {allowed:.0f} s")
            how, csv = setting._replace(seconds=allowed), setting.out / part.csv
            before = contents(csv)
            code, note = execute(part.command(how), environment(part, how), allowed, setting.out / LOG)
            status = "stopped" if code is None else "ok" if code == 0 else "failed"
            if code is None:
                note = f"{BUDGET if mine <= left else 'the limit'}: {note}"
            elif part.csv and (code or unfinished(csv)):
                status, note = "stopped", f"some pairs were not run (exit status {code}): {note}"
            again = bool(part.csv and code) and contents(csv) != before
            result = Result(part.name, status, round(clock() - begun, 1), code, note)
            state.add(result)
            found.append(result)
            print(f"   {result.status} after {result.seconds:.0f} s: {result.note}", flush=True)
    return found


def contents(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def say(part: Part, what: str) -> None:
    print(f"{part.step} {part.name}: {what}", flush=True)
