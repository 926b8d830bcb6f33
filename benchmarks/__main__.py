"""Every provider on the same work: checked against fp64, then timed, one CSV row at a time.

python -m benchmarks                                         # all of it, on the GPU if there is one
python -m benchmarks --form linear --shape T=8192,V=151936,H=4096 --provider grpo_kernels --provider trl
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from . import gate, measure, record
from .plans import plan
from .providers import PROVIDERS, Provider
from .workload import LOSSES, Batch, Workload, make_batch

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
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def shape(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        wanted = "T=8192,V=151936 or, from hidden states, T=8192,V=151936,H=4096"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}") from error


def workloads(args: argparse.Namespace) -> list[Workload]:
    if not args.shape:
        return plan(args.form or list(PROVIDERS), args.device, quick=args.quick)
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    options = {"dtype": dtype, "masked": args.masked, "inactive": args.inactive}
    return [
        Workload("linear", args.loss, **sizes, frozen_head=args.frozen_head, **options)
        if "H" in sizes
        else Workload("logits", args.loss, **sizes, **options)
        for sizes in args.shape
    ]


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
        self.only: list[str] | None = args.provider
        self.works = workloads(args)
        self.limit = args.limit
        self.started = time.monotonic()
        self.broken: str | None = None  # why nothing more can run
        self.output = args.output or record.RESULTS / f"{record.short_name(self.device)}.csv"
        self.table = record.Table(self.output)
        products = {(min(work.T, 8192), work.H, work.V) for work in self.works if work.form == "linear"}
        shapes = sorted(products) or [(4096, 1024, 4096)]
        self.floors = measure.floors(self.device, shapes, self.works[0].dtype)

    def __call__(self) -> None:
        self.write_rate("copy", self.floors.bytes_per_s / 1e9, "GB/s")
        self.write_rate("matrix product", self.floors.flop_per_s / 1e12, "TFLOP/s")
        for work in self.works:
            print(f"\n{work}: floor {work.floor.formula}, {self.floors.ms(work.floor):.3g} ms", flush=True)
            batch = None
            for provider in PROVIDERS[work.form].values():
                if self.only is not None and provider.name not in self.only:
                    continue
                status = self.reason_against(provider, work)
                if status is None:
                    batch = batch or make_batch(work, self.device)
                    outcome = self.measure(provider, batch)
                else:
                    outcome = Outcome(status)
                self.write(work, provider, outcome)
        print(f"\n{self.output}")

    def reason_against(self, provider: Provider, work: Workload) -> str | None:
        if self.broken is not None:
            return f"not run: {self.broken}"
        if self.limit is not None and time.monotonic() - self.started > self.limit:
            return f"not run: the limit of {self.limit:g} s was reached"
        reason = provider.reason_against(work, self.device)
        return None if reason is None else f"skipped: {reason}"

    def measure(self, provider: Provider, batch: Batch) -> Outcome:
        if provider.name == "torch.compile":
            torch.compiler.reset()  # or after some sizes it falls back to eager without a word
        try:
            verdict = gate.check(provider, batch)
            if verdict.wrong is not None:
                outcome = Outcome(f"wrong: {verdict.wrong}", verdict.error)
            else:
                subject = measure.Subject(provider, batch)
                mib = measure.memory(subject, self.device)
                outcome = Outcome("ok", verdict.error, measure.timings(subject, self.device), mib)
        # Whatever a peer dies of belongs into the table, and the others go on.
        except Exception as error:
            outcome = Outcome(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.broken = f"{provider.name} has broken the GPU's context ({str(error).splitlines()[0]})"
        return outcome

    def write(self, work: Workload, provider: Provider, outcome: Outcome) -> None:
        """A row for each part of the step and one for its memory, or one that says why there are none."""
        floor_ms = self.floors.ms(work.floor)
        common = {
            "kernel_name": f"{work.form} {work.loss}",
            "kernel_provider": provider.name,
            "x_value": work.T,
            "extra_benchmark_config_str": json.dumps(asdict(work) | {"dtype": str(work.dtype)[6:]}),
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
