"""Measures every case in every way, and writes the CSV."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from grpo_kernels.testing import peak_memory

from ..speed import measure
from ..speed.run import QUANTILES, first_line
from ..tables import record
from ..work.providers import installed_version
from ..work.workload import SEQUENCES
from .case import REFERENCE, WARM_UP, Case, make_model
from .meter import Meter, verdict
from .samples import Samples, Truth, make_samples
from .ways import FLOOR, Way


class Outcome(NamedTuple):
    status: str  # "ok", the errors of the first step, or why there is no timing
    timing: measure.Timing | None = None
    peak_mib: float | None = None
    loss: float | None = None  # of the first step
    errors: Mapping[str, float] = MappingProxyType({})


class Run:
    def __init__(
        self,
        cases: Sequence[Case],
        ways: Sequence[Way],
        *,
        device: torch.device,
        output: Path,
        limit: float,  # seconds
        folder: Path,  # for the reference's weights and the trainers' files
    ) -> None:
        self.cases = cases
        self.ways = ways
        self.device = device
        self.limit = limit
        self.folder = folder
        self.started = time.monotonic()
        self.floors: dict[tuple[str, str], float] = {}  # ms, by host and loss
        self.table = record.Table(output)

    def __call__(self) -> None:
        for case in self.cases:
            samples, truth = make_samples(case)
            if case.work.reference:
                make_model(case, REFERENCE).save_pretrained(self.folder)
            self.clean()
            print(f"{case.model}, {case.work}: loss {truth.loss:.6g}", flush=True)
            for way in self.ways:
                self.take(case, way, samples, truth)

    def take(self, case: Case, way: Way, samples: Samples, truth: Truth) -> None:
        """Measures with as many sequences in a micro-batch as fit into memory."""
        micro_batch = SEQUENCES
        while micro_batch:
            outcome = self.attempt(case, way, samples, truth, micro_batch)
            self.clean()
            self.write(case, way, micro_batch, outcome)
            micro_batch = micro_batch // 2 if "OutOfMemoryError" in outcome.status else 0

    def attempt(self, case: Case, way: Way, samples: Samples, truth: Truth, micro_batch: int) -> Outcome:
        if way.package is not None and installed_version(way.package) is None:
            return Outcome(f"skipped: {way.package} is not installed")
        if time.monotonic() - self.started > self.limit:
            return Outcome(f"not run: the limit of {self.limit:g} s was reached")
        try:
            subject = way.make(case, samples, self.folder, micro_batch)
            compared = None if way.what == FLOOR else truth
            meter = Meter(case, subject.model, SEQUENCES // micro_batch, compared)
            model = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
            peak = model + peak_memory(lambda: subject.train(meter), self.device)
        # Any error is a result; the other ways continue.
        except Exception as error:
            traceback.print_exc(limit=-3)
            return Outcome(f"failed: {type(error).__name__}: {first_line(error)}")
        timing = measure.quantiles(torch.tensor(meter.seconds[WARM_UP:], dtype=torch.float64))
        loss = meter.loss if meter.errors else None
        return Outcome(verdict(case, meter.errors), timing, peak / 2**20, loss, meter.errors)

    def clean(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, case: Case, way: Way, micro_batch: int, outcome: Outcome) -> None:
        """Writes rows of speed, memory and loss, or one row with the status."""
        work = case.work.config()
        sizes = {
            "model": case.model,
            "prompt": case.prompt,
            "sequences": SEQUENCES,
            "micro_batch": micro_batch,
        }
        name = way.name if micro_batch == SEQUENCES else f"{way.name}, micro-batch {micro_batch}"
        common = {
            "kernel_name": f"training_step {case.loss}",
            "kernel_provider": name,
            "kernel_operation_mode": "full",
            "x_value": case.work.T,
            "extra_benchmark_config_str": json.dumps(work | sizes),
            "status": outcome.status,
            "provider_version": way.version,
        }
        ms = outcome.timing
        if ms is None:
            self.add(common, metric_name="speed", metric_unit="ms")
            print(f"  {name}: {outcome.status}", flush=True)
            return
        speed = dict(zip(QUANTILES, ms, strict=True))
        if way.what == FLOOR:
            self.floors[way.host, case.loss] = ms.median
            common |= {"kernel_name": "floor", "kernel_provider": f"{name}, {case.loss}"}
        else:
            floor_ms = self.floors.get((way.host, case.loss))
            common |= {"floor": "the step without a loss"}
            errors = [error for what, error in outcome.errors.items() if what != "loss"]
            speed["max_rel_err"] = max(errors)
            if floor_ms is not None:
                speed["pct_of_floor"] = 100 * floor_ms / ms.median
                rest = {"kernel_operation_mode": "loss", "y_value_50": ms.median - floor_ms}
                self.add(common | rest, metric_name="speed", metric_unit="ms")
            first = {"kernel_operation_mode": "first step", "y_value_50": outcome.loss}
            self.add(common | first, metric_name="loss", max_rel_err=outcome.errors["loss"])
        peak = dict.fromkeys(QUANTILES, outcome.peak_mib)
        self.add(common | speed, metric_name="speed", metric_unit="ms")
        self.add(common | peak, metric_name="memory", metric_unit="MiB")
        print(
            f"  {name}: {ms.median:.4g} ms ({ms.low:.4g} to {ms.high:.4g}), {outcome.peak_mib:.0f} MiB",
            *(f"{what} differs by {error:.1e}" for what, error in outcome.errors.items()),
            sep=", ",
            flush=True,
        )

    def add(self, common: dict[str, object], **values: object) -> None:
        self.table.add(record.row(self.device, **(common | values)))
