"""The targets for a GPU: what is asked for, what is predicted, and what a run has measured.

    python -m benchmarks.experiments.targets headline.csv experiments.csv

Without CSVs, the targets and predictions alone are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..speed.measure import Floors, measured_floors
from ..tables import record
from ..tables.markdown import markdown
from ..work.workload import Workload
from .costs import NOMINAL, Cost
from .headline import COSTS
from .plan import EXPERIMENTS

LOGITS = Workload("logits", "grpo_kl", 8192, 151936)
LINEAR = Workload("linear", "grpo", 8192, 151936, 4096)
IDLE = replace(LINEAR, inactive=0.5)


class Step(NamedTuple):
    """A provider, or a variant of an experiment, on a workload."""

    work: Workload
    provider: str

    def predicted_ms(self) -> float | None:
        """The prediction for an H200, or None if there is none."""
        variants = {variant.name: variant for e in EXPERIMENTS.values() for variant in e.variants}
        costs = {name: variant.cost for name, variant in variants.items()} | COSTS[self.work.form]
        return costs[self.provider](self.work).ms(self.work, NOMINAL) if self.provider in costs else None


class Target(NamedTuple):
    """`step` has to be at least `speed` times as fast as `than`, or as a count of bytes and FLOPs."""

    step: Step
    speed: float
    than: Step | Cost
    name: str


OURS = Step(LOGITS, "grpo_kernels")
HEAD = Step(LINEAR, "grpo_kernels")
TARGETS = (
    Target(OURS, 1 / 1.15, Cost(bytes=8, launches=0), "8 bytes per element"),
    Target(OURS, 1.3, Step(LOGITS, "liger"), "Liger"),
    Target(OURS, 1.9, Step(LOGITS, "trl"), "TRL"),
    Target(OURS, 2.0, Step(LOGITS, "torch.compile"), "compiled eager"),
    Target(HEAD, 1 / 1.12, Cost(products=6, launches=0), "6 T V H FLOPs"),
    Target(HEAD, 1.0, Step(LINEAR, "liger fused"), "Liger's fused head"),
    Target(HEAD, 1.4, Step(LINEAR, "trl"), "TRL's head"),
    Target(Step(IDLE, "ordered"), 1.7, Step(LINEAR, "ordered"), "all tokens have an advantage"),
    Target(Step(IDLE, "skip_inactive"), 1.7, Step(LINEAR, "ordered"), "all tokens have an advantage"),
)


Times = tuple[float | None, float | None]


def times(target: Target, ms: Callable[[Step], float | None], floors: Floors | None) -> Times:
    """The times of the target's step and of what it is compared with."""
    mine = ms(target.step)
    if isinstance(target.than, Step):
        return mine, ms(target.than)
    return mine, None if floors is None else target.than.ms(target.step.work, floors)


def predicted(target: Target) -> Times:
    return times(target, Step.predicted_ms, NOMINAL)


class Measured:
    """The medians of a run, in milliseconds, and its rates."""

    def __init__(self, rows: Sequence[record.Row]) -> None:
        rows = rows[::-1]  # of several rows for a step, and of several rates, the first counts
        self.floors = measured_floors(rows)
        self.ms = {
            record.pair(row)[1:]: row.y_value_50
            for row in rows
            if (row.status, row.metric_name, row.kernel_operation_mode) == ("ok", "speed", "full")
        }

    def of_step(self, step: Step) -> float | None:
        return self.ms.get(record.pair_of("", step.provider, step.work.config())[1:])

    def of_target(self, target: Target) -> Times:
        return times(target, self.of_step, self.floors)


def ratio(mine: float | None, other: float | None) -> float | None:
    return None if mine is None or other is None else other / mine


def verdict(target: Target, measured: Measured) -> str:
    mine, other = measured.of_target(target)
    found = ratio(mine, other)
    if found is None:
        return "not measured"
    short = 1 - found / target.speed
    what = f"**missed by {short:.0%}**" if short > 0 else "met"
    return f"{mine:.2f} ms, {other:.2f} ms: {found:.2f}, {what}"


def table(paths: Sequence[Path] = ()) -> str:
    """A line for each target, and with CSVs of a run what it has measured."""
    rows = [row for path in paths if path.exists() for row in record.read(path)]
    measured = Measured(rows)
    lines = []
    for target in TARGETS:
        expected = ratio(*predicted(target))
        told = (
            f"{target.step.work}: {target.step.provider}",
            target.name,
            f"{target.speed:.2f}",
            "" if expected is None else f"{expected:.2f}",
        )
        lines.append((*told, verdict(target, measured)) if paths else told)
    columns = ("ours", "against", "speed asked for", "predicted")
    return markdown((*columns, "measured") if paths else columns, lines, text_columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.targets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("csv", type=Path, nargs="*", help="of the headline shapes and of the experiments")
    print(table(parser.parse_args().csv))


if __name__ == "__main__":
    main()
