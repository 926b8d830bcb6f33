"""Runs providers on workloads and writes each result to the CSV at once."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..tables import record
from ..work.batch import Batch, make_batch
from ..work.providers import Provider
from ..work.workload import Workload
from . import gate, measure

PATIENCE = {"cuda": 75, "cpu": 3600}  # seconds until a pair counts as hung
CUT = "not run: the process ended while it ran"  # a pair with this row is tried once more, after all others
QUANTILES = ("y_value_50", "y_value_20", "y_value_80")


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class Outcome(NamedTuple):
    """The result of one provider on one workload."""

    status: str  # "ok", or why there is no timing
    error: float | None = None
    timings: Mapping[str, measure.Timing] = MappingProxyType({})
    memory_mib: float | None = None


class Run:
    """Checks, times and records each pair of workload and provider."""

    def __init__(
        self,
        todo: Iterable[tuple[Workload, Provider]],
        *,
        device: torch.device,
        output: Path,
        limit: float | None,  # seconds
        resume: bool = False,
    ) -> None:
        """With `resume`, pairs that `output` has already are not measured again, and its rates are used.

        A pair that ended the process is tried once more, after the others.
        """
        self.device = device
        self.todo = deque(todo)
        self.works = list(dict.fromkeys(work for work, _ in self.todo))
        self.limit = limit
        self.started = time.monotonic()
        self.broken: str | None = None  # why nothing can run any more
        self.output = output
        earlier = list(record.read(output)) if resume and output.exists() else []
        known = record.finished(earlier)
        self.cut = {record.pair(row) for row in earlier if row.status == CUT}
        self.table = record.Table(output, known)
        measured = measure.measured_floors(known)
        self.rates_known = measured is not None
        if measured is not None:
            self.floors = measured
        else:
            products = {(min(work.T, 8192), work.H, work.V) for work in self.works if work.form == "linear"}
            shapes = sorted(products) or [(4096, 1024, 4096)]
            self.floors = measure.floors(self.device, shapes, self.works[0].dtype)
        done = {record.pair(row) for row in known}
        left = [pair for pair in self.todo if self.pair(*pair) not in done]
        self.todo = deque(sorted(left, key=lambda pair: self.pair(*pair) in self.cut))

    def describe(self, work: Workload, provider: Provider) -> tuple[str, dict[str, object]]:
        """The name of a pair's rows, and its configuration."""
        return f"{work.form} {work.loss}", work.config()

    def pair(self, work: Workload, provider: Provider) -> tuple[str, ...]:
        name, config = self.describe(work, provider)
        return record.pair_of(name, provider.name, config)

    def __call__(self) -> None:
        """Measures the machine's rates, then every pair.

        Ends the process with an error if another one has to measure the rest.
        """
        if not self.rates_known:
            self.write_rate("copy", self.floors.bytes_per_s / 1e9, "GB/s")
            self.write_rate("matrix product", self.floors.flop_per_s / 1e12, "TFLOP/s")
        batch: Batch | Outcome | None = None
        last: Workload | None = None
        while self.todo:
            work, provider = self.todo[0]
            if work != last:
                print(
                    f"\n{work}: floor {work.floor.formula}, {self.floors.ms(work.floor):.3g} ms", flush=True
                )
                batch, last = None, work
            status = self.reason_against(provider, work)
            if status is not None:
                outcome = Outcome(status)
            else:
                watchdog = threading.Timer(PATIENCE[self.device.type], self.give_up)
                watchdog.daemon = True
                watchdog.start()
                try:
                    self.begin(work, provider)
                    batch = batch or self.make_batch(work)
                    outcome = self.attempt(provider, batch) if isinstance(batch, Batch) else batch
                    self.clean(provider)
                except KeyboardInterrupt:
                    self.write(work, provider, Outcome("not run: it was interrupted"))
                    raise
                watchdog.cancel()
            self.write(work, provider, outcome)
            self.todo.popleft()
        print(f"\n{self.output}")
        if self.broken is not None:
            raise SystemExit(self.broken)

    def begin(self, work: Workload, provider: Provider) -> None:
        """Writes the row that stays if the pair ends the process."""
        twice = self.pair(work, provider) in self.cut
        status = "failed: the process ended twice while it ran" if twice else CUT
        self.write(work, provider, Outcome(status), draft=True)

    def give_up(self) -> None:
        """Ends a run that hangs, after a row for each pair that is left."""
        (work, provider), *rest = self.todo
        self.write(work, provider, Outcome(f"failed: it had not ended after {PATIENCE[self.device.type]} s"))
        for work, provider in rest:
            self.write(work, provider, Outcome("not run: another provider hung"))
        os._exit(1)

    def make_batch(self, work: Workload) -> Batch | Outcome:
        torch.compiler.reset()  # after several sizes, Dynamo would silently fall back to eager
        try:
            return make_batch(work, self.device)
        except RuntimeError as error:
            return Outcome(f"failed: no batch: {first_line(error)}")

    def reason_against(self, provider: Provider, work: Workload) -> str | None:
        """The status of a pair that cannot run, or None."""
        if self.broken is not None:
            return f"not run: {self.broken}"
        if self.limit is not None and time.monotonic() - self.started > self.limit:
            return f"not run: the limit of {self.limit:g} s was reached"
        reason = provider.reason_against(work, self.device)
        return None if reason is None else f"skipped: {reason}"

    def attempt(self, provider: Provider, batch: Batch) -> Outcome:
        try:
            verdict = gate.check(provider, batch)
            if verdict.wrong is not None:
                return Outcome(f"wrong: {verdict.wrong}", verdict.error)
            return self.timed(provider, batch, verdict.error)
        # Any error of a provider is a result; the others continue.
        except Exception as error:
            return Outcome(f"failed: {type(error).__name__}: {first_line(error)}")

    def timed(self, provider: Provider, batch: Batch, error: float | None) -> Outcome:
        """The outcome of a provider whose result has this error."""
        subject = measure.Subject(provider, batch)
        mib = measure.memory(subject, self.device)
        return Outcome("ok", error, measure.timings(subject, self.device), mib)

    def clean(self, provider: Provider) -> None:
        """Frees memory, and detects whether the provider broke the GPU's context."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.broken = f"{provider.name} has broken the GPU's context ({first_line(error)})"

    def write(self, work: Workload, provider: Provider, outcome: Outcome, *, draft: bool = False) -> None:
        """Writes a row for each timed part and one for memory, or one row with the status.

        A draft is one row that the next one replaces.
        """
        if outcome.status.startswith("not run") and self.pair(work, provider) in self.cut:
            outcome = Outcome(CUT)  # it still has one try
        floor_ms = self.floors.ms(work.floor)
        name, config = self.describe(work, provider)
        common = {
            "kernel_name": name,
            "kernel_provider": provider.name,
            "x_value": work.T,
            "extra_benchmark_config_str": json.dumps(config),
            "floor": work.floor.formula,
            "max_rel_err": outcome.error,
            "status": outcome.status,
            "provider_version": provider.version,
        }
        if outcome.status != "ok":
            empty = {"kernel_operation_mode": "full", "metric_name": "speed", "metric_unit": "ms"}
            self.table.add(record.row(self.device, **common, **empty), draft=draft)
            if not draft:
                print(f"  {provider.name}: {outcome.status}", flush=True)
            return
        for mode, timing in outcome.timings.items():
            values = dict(zip(QUANTILES, timing, strict=True))
            if mode == "full":
                unit, scale = ("GB/s", 1e-6) if work.floor.unit == "B" else ("TFLOP/s", 1e-9)
                values |= {"pct_of_floor": 100 * floor_ms / timing.median, "rate_unit": unit}
                values["rate"] = scale * work.floor.amount / timing.median
            self.add(**common, **values, kernel_operation_mode=mode, metric_name="speed", metric_unit="ms")
        peak = dict.fromkeys(QUANTILES, outcome.memory_mib)
        self.add(**common, **peak, kernel_operation_mode="full", metric_name="memory", metric_unit="MiB")
        print(
            f"  {provider.name}: "
            + ", ".join(f"{mode} {timing.median:.4g}" for mode, timing in outcome.timings.items())
            + f" ms, {100 * floor_ms / outcome.timings['full'].median:.0f} % of the floor, "
            + f"{outcome.memory_mib:.0f} MiB"
            + (f", error {outcome.error:.1e}" if outcome.error is not None else ""),
            flush=True,
        )

    def write_rate(self, what: str, rate: float, unit: str) -> None:
        values = {"metric_name": "rate", "metric_unit": unit, **dict.fromkeys(QUANTILES, rate)}
        self.add(**values, kernel_name="floor", kernel_provider=what, status="ok")
        print(f"floor: {what} {rate:.4g} {unit}")

    def add(self, **values: object) -> None:
        self.table.add(record.row(self.device, **values))
