"""Every provider on the same work: checked against fp64, then timed, one CSV row at a time.

python -m benchmarks                                         # all of it, on the GPU if there is one
python -m benchmarks --form linear --shape T=8192,V=151936,H=4096 --provider grpo_kernels --provider trl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from . import gate, measure, record
from .plans import plan
from .providers import PROVIDERS, Provider
from .workload import LOSSES, SEQUENCES, Batch, Workload, make_batch

GRACE = 40  # seconds after the limit
QUANTILES = ("y_value_50", "y_value_20", "y_value_80")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = sorted({name for form in PROVIDERS.values() for name in form})
    parser.add_argument("--form", action="append", choices=tuple(PROVIDERS), help="default: both, by turns")
    parser.add_argument("--provider", action="append", choices=names, help="may be given more than once")
    parser.add_argument(
        "--shape", action="append", type=shape, metavar="T=8192,V=151936,H=4096", help="instead of the plan"
    )
    parser.add_argument("--loss", choices=tuple(LOSSES), default="grpo", help="of --shape")
    parser.add_argument("--masked", type=float, default=0.0, help="of --shape: fraction of the tokens")
    parser.add_argument("--inactive", type=float, default=0.0, help="of --shape: fraction without advantage")
    parser.add_argument("--frozen-head", action="store_true", help="of --shape")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of --shape; default: bf16, on a CPU fp32")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start nothing new after this time")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/<device>.csv, of a part <device>-partial.csv"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def shape(text: str) -> dict[str, int]:
    wanted = f"T=8192,V=151936 or, from hidden states, T=8192,V=151936,H=4096; T in {SEQUENCES}s"
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}") from error
    if not {"T", "V"} <= sizes.keys() <= {"T", "V", "H"} or sizes["T"] % SEQUENCES or min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
    return sizes


def workloads(args: argparse.Namespace) -> list[Workload]:
    forms = args.form or list(PROVIDERS)
    if not args.shape:
        return plan(forms, args.device, quick=args.quick)
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    options = {"dtype": dtype, "masked": args.masked, "inactive": args.inactive}
    works = [
        Workload("linear", args.loss, **sizes, frozen_head=args.frozen_head, **options)
        if "H" in sizes
        else Workload("logits", args.loss, **sizes, **options)
        for sizes in args.shape
    ]
    return [work for work in works if work.form in forms]


def output(args: argparse.Namespace) -> Path:
    """The published results are those of everything; a part does not replace them."""
    part = args.form or args.provider or args.shape or args.quick
    return record.RESULTS / f"{record.short_name(args.device)}{'-partial' if part else ''}.csv"


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class Outcome(NamedTuple):
    """Of one provider on one workload."""

    status: str  # "ok", or what kept it from being timed
    error: float | None = None
    timings: Mapping[str, measure.Timing] = MappingProxyType({})
    memory_mib: float | None = None


class Run:
    """What is common to all rows of a CSV."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: torch.device = args.device
        self.todo = deque(self.plan(args))
        self.works = list(dict.fromkeys(work for work, _ in self.todo))
        self.limit = args.limit
        self.started = time.monotonic()
        self.broken: str | None = None  # why nothing more can run
        self.output = args.output or output(args)
        self.table = record.Table(self.output)
        products = {(min(work.T, 8192), work.H, work.V) for work in self.works if work.form == "linear"}
        shapes = sorted(products) or [(4096, 1024, 4096)]
        self.floors = measure.floors(self.device, shapes, self.works[0].dtype)

    def plan(self, args: argparse.Namespace) -> list[tuple[Workload, Provider]]:
        return [
            (work, provider)
            for work in workloads(args)
            for provider in PROVIDERS[work.form].values()
            if args.provider is None or provider.name in args.provider
        ]

    def describe(self, work: Workload, provider: Provider) -> tuple[str, dict[str, object]]:
        """The name of its rows, and what they were run with."""
        return f"{work.form} {work.loss}", asdict(work) | {"dtype": str(work.dtype)[6:]}

    def __call__(self) -> None:
        self.write_rate("copy", self.floors.bytes_per_s / 1e9, "GB/s")
        self.write_rate("matrix product", self.floors.flop_per_s / 1e12, "TFLOP/s")
        watchdog = threading.Timer((self.limit or threading.TIMEOUT_MAX - GRACE) + GRACE, self.give_up)
        watchdog.daemon = True
        watchdog.start()
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
                batch = batch or self.make_batch(work)
                outcome = self.attempt(provider, batch) if isinstance(batch, Batch) else batch
                self.clean(provider)
            self.write(work, provider, outcome)
            self.todo.popleft()
        watchdog.cancel()
        print(f"\n{self.output}")

    def give_up(self) -> None:
        """Something hangs, and would take the rest of the table with it."""
        (work, provider), *rest = self.todo
        self.write(work, provider, Outcome(f"failed: it had not ended {GRACE} s after the limit"))
        for work, provider in rest:
            self.write(work, provider, Outcome("not run: another provider hung"))
        os._exit(1)

    def make_batch(self, work: Workload) -> Batch | Outcome:
        torch.compiler.reset()  # or after some sizes compiled code falls back to eager without a word
        try:
            return make_batch(work, self.device)
        except RuntimeError as error:
            return Outcome(f"failed: no batch: {first_line(error)}")

    def reason_against(self, provider: Provider, work: Workload) -> str | None:
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
            subject = measure.Subject(provider, batch)
            mib = measure.memory(subject, self.device)
            return Outcome("ok", verdict.error, measure.timings(subject, self.device), mib)
        # Whatever a peer dies of belongs into the table, and the others go on.
        except Exception as error:
            return Outcome(f"failed: {type(error).__name__}: {first_line(error)}")

    def clean(self, provider: Provider) -> None:
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.broken = f"{provider.name} has broken the GPU's context ({first_line(error)})"

    def write(self, work: Workload, provider: Provider, outcome: Outcome) -> None:
        """A row for each part of the step and one for its memory, or one that says why there are none."""
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
            self.add(**common, kernel_operation_mode="full", metric_name="speed", metric_unit="ms")
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
            + f"{outcome.memory_mib:.0f} MiB, error {outcome.error:.1e}",
            flush=True,
        )

    def write_rate(self, what: str, rate: float, unit: str) -> None:
        values = {"metric_name": "rate", "metric_unit": unit, **dict.fromkeys(QUANTILES, rate)}
        self.add(**values, kernel_name="floor", kernel_provider=what, status="ok")
        print(f"floor: {what} {rate:.4g} {unit}")

    def add(self, **values: object) -> None:
        empty = {f.name: None if "None" in str(f.type) else "" for f in fields(record.Row)}
        here = {"gpu_name": record.device_name(self.device), "timestamp": record.timestamp()}
        axis = {"x_name": "T", "x_label": "tokens", "x_value": 0}
        self.table.add(record.Row(**(empty | axis | here | record.versions() | values)))


if __name__ == "__main__":
    Run(arguments())()
