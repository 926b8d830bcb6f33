"""The experiments of docs/tuning.md: variants of this package side by side, each beside what was predicted.

    python -m benchmarks.experiments                    # on a GPU; --only 4 --only 6: some of them
    python -m benchmarks.experiments --predict          # the predictions alone, as a table, without a GPU

A variant is checked against fp64 like every provider before it is timed. Predictions count bytes over the
copy rate, operations over the rate of a matrix product, and 2 us for each launch around the passes over the
vocabulary, all in sequence.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels import backend, linear_losses, selective_logps

from . import record
from .__main__ import Outcome, Run
from .measure import Floors
from .providers import (
    Provider,
    ours,
    ours_in_bf16,
    ours_inplace,
    ours_linear,
    ours_skipping,
    refused_without_idle_rows,
)
from .report import markdown
from .split_rows import VARIANTS as SPLIT
from .split_rows import in_place_of_fused
from .workload import Batch, Workload

# Of an H200, until a run has measured its own.
NOMINAL = Floors(4.3e12, 790e12)
MULTIPROCESSORS, L2_BYTES = 132, 60e6
L2_SHARE = 0.75  # a guess: what streams through the cache beside the rows takes the rest
LAUNCH_MS = 2e-3


class Cost(NamedTuple):
    """What a variant has to do, in the units of its workload."""

    bytes: float = 0.0  # per element of T V
    products: float = 0.0  # operations per T V H
    head_bytes: float = 0.0  # per element of the head's weight, V H
    launches: int = 29

    def ms(self, work: Workload, floors: Floors) -> float:
        elements = work.T * work.V
        moved = self.bytes * elements + self.head_bytes * work.V * work.H
        seconds = moved / floors.bytes_per_s + self.products * elements * work.H / floors.flop_per_s
        return 1e3 * seconds + LAUNCH_MS * self.launches


@dataclass(frozen=True)
class Variant(Provider):
    experiment: str = ""
    cost: Callable[[Workload], Cost] = lambda work: Cost()
    changes: Callable[[], AbstractContextManager[object]] = nullcontext  # from the first call to the last


@dataclass(frozen=True)
class Experiment:
    name: str
    works: tuple[Workload, ...]
    variants: tuple[Variant, ...]

    def pairs(self) -> Iterator[tuple[Workload, Variant]]:
        for work in self.works:
            for variant in self.variants:
                yield work, replace(variant, experiment=self.name)


# How variants differ.


@contextmanager
def blocks(block: int, num_warps: int, *kernels: str, keep: bool = False) -> Iterator[None]:
    """`block` columns of a row at a time, by `num_warps`; `keep`: the L2 cache is asked to keep the row."""
    from grpo_kernels.kernels import dlogits, fused, launch, row_stats

    def chosen(*args: Any, **options: Any) -> launch.Blocking:
        shape = launch.blocking(*args, **options, num_warps=num_warps)
        return shape._replace(BLOCK=block, TAIL=min(block, 8 * shape.THREADS))

    modules = {"row_stats": row_stats, "dlogits": dlogits, "fused": fused}
    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.object(modules[kernel], "blocking", chosen))
        stack.enter_context(mock.patch.object(fused, "KEEP", keep))
        yield


def two_passes() -> AbstractContextManager[object]:
    return mock.patch.object(linear_losses, "fusible", lambda spec, dtype: False)


def tokens_in_torch() -> AbstractContextManager[object]:
    return mock.patch.object(backend, "has_token_kernels", lambda spec, logps, backend: False)


def reference_by_itself(batch: Batch, logits: Tensor) -> Tensor:
    assert batch.ref_logits is not None
    ref_logps = selective_logps(batch.ref_logits[:, :-1], batch.ids, mask=batch.mask)
    return ours(batch._replace(ref_logits=None), logits, ref_logps=ref_logps)


def in_chunks(tokens: int) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    return lambda batch, hidden, weight: ours_linear(batch, hidden, weight, chunk_tokens=tokens)


def uncompacted(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return ours_linear(batch, hidden, weight, compact=False)


# What they cost.


def linear(
    *, products: float | None = None, chunk: int = 8192, logits: int = 4
) -> Callable[[Workload], Cost]:
    """Logits of `logits` bytes are read twice and their gradient written, the last two for rows that learn;
    the weight's gradient is summed in fp32, chunk by chunk, and rounded at the end.
    """

    def cost(work: Workload) -> Cost:
        read = (1 - work.masked) * (1 + work.reference)
        needed = 2 * read + 4 * work.learning if products is None else products
        sums = 8 * (math.ceil(work.T * work.learning / chunk) - 1) + 4
        return Cost(logits * (read + work.learning) + 2 * work.learning, needed, sums + 6, launches=60)

    return cost


def where_they_stand(work: Workload) -> Cost:
    """All products; and zeros are written for rows without a gradient."""
    cost = linear(products=6)(work)
    return cost._replace(bytes=cost.bytes + 2 * (1 - work.learning))


def logits(bytes_per_element: float, launches: int = 29) -> Callable[[Workload], Cost]:
    return lambda work: Cost(bytes_per_element, launches=launches)


def read_twice(resident: int) -> Callable[[Workload], Cost]:
    """Rows of so many blocks per multiprocessor: the second read is free if all of them fit the L2 cache."""

    def cost(work: Workload) -> Cost:
        at_work = MULTIPROCESSORS * resident * work.V * work.dtype.itemsize
        return Cost(6 if at_work < L2_SHARE * L2_BYTES else 8)

    return cost


LINEAR = Workload("linear", "grpo", 8192, 151936, 4096)
LOGITS = Workload("logits", "grpo_kl", 8192, 151936)
VOCABULARIES = tuple(replace(LOGITS, V=V) for V in (151936, 128256, 32000))
CHUNKS = (1024, 2048, 4096, 8192, 16384)
# A thread loads 8 columns of bf16 at a time; 128 of each row spill.
BLOCKS = tuple((b, w) for b in (1024, 2048, 4096, 8192) for w in (2, 4, 8) if 8 <= b // (32 * w) < 128)


EXPERIMENTS = {
    "1": Experiment(
        "1: 6TVH against 8TVH",
        (LINEAR, replace(LINEAR, loss="grpo_kl")),
        (
            Variant("gradient in the forward", ours_linear, cost=linear()),
            Variant(
                "logits anew in the backward",
                ours_linear,
                cost=lambda work: linear(products=8 + 2 * work.reference)(work),
                changes=two_passes,
            ),
        ),
    ),
    "2": Experiment(
        "2: tokens of a chunk",
        (replace(LINEAR, T=16384),),
        tuple(Variant(f"{n}", in_chunks(n), cost=linear(chunk=n)) for n in CHUNKS),
    ),
    "3": Experiment(
        "3: half the rows without advantage",
        (LINEAR, replace(LINEAR, inactive=0.5)),
        (
            Variant("ordered", ours_linear, cost=linear()),
            Variant(
                "skip_inactive",
                ours_skipping,
                refuses=refused_without_idle_rows,
                cost=lambda work: linear()(replace(work, masked=1 - work.learning, inactive=0.0)),
            ),
            Variant("where they stand", uncompacted, cost=where_they_stand),
        ),
    ),
    "4": Experiment(
        "4: one pass",
        VOCABULARIES,
        (
            Variant("two kernels", ours, cost=logits(8)),
            Variant("in place", ours_inplace, overwrites=True, cost=logits(8)),
            *(
                Variant(
                    f"{32 // warps} per multiprocessor{', kept in L2' if keep else ''}",
                    ours_inplace,
                    overwrites=True,
                    cost=read_twice(32 // warps),
                    changes=partial(blocks, 512 * warps, warps, "fused", keep=keep),
                )
                for warps in (32, 16, 8)
                for keep in (False, True)
            ),
            *(
                Variant(
                    f"row {name}",
                    ours_inplace,
                    overwrites=True,
                    cost=logits(6),
                    changes=partial(in_place_of_fused, **how),
                )
                for name, how in SPLIT.items()
            ),
        ),
    ),
    "6": Experiment(
        "6: block and warps",
        VOCABULARIES,
        tuple(
            Variant(
                f"{block} by {warps} warps",
                ours,
                cost=logits(8),
                changes=partial(blocks, block, warps, "row_stats", "dlogits"),
            )
            for block, warps in BLOCKS
        ),
    ),
    "7": Experiment(
        "7: policy and reference in one launch",
        tuple(replace(LOGITS, T=T) for T in (512, 4096, 16384, 32768)),
        (
            Variant("one", ours, cost=logits(8)),
            Variant("two", reference_by_itself, cost=logits(8, launches=45)),
        ),
    ),
    "8": Experiment(
        "8: logits of a chunk",
        (LINEAR,),
        (
            Variant("fp32", ours_linear, cost=linear()),
            Variant("bf16", ours_in_bf16, cost=linear(logits=2)),
        ),
    ),
    "9": Experiment(
        "9: loss and metrics in one launch each",
        (LOGITS, replace(LOGITS, T=2048, V=32000)),
        (
            Variant("in Triton", ours, cost=logits(8)),
            Variant("in PyTorch", ours, cost=logits(8, launches=119), changes=tokens_in_torch),
        ),
    ),
}


class Experiments(Run):
    def plan(self, args: argparse.Namespace) -> list[tuple[Workload, Provider]]:
        return [pair for name in args.only or EXPERIMENTS for pair in EXPERIMENTS[name].pairs()]

    def describe(self, work: Workload, provider: Provider) -> tuple[str, dict[str, object]]:
        assert isinstance(provider, Variant)
        _, config = super().describe(work, provider)
        return f"experiment {provider.experiment}", config | {
            "predicted_ms": round(provider.cost(work).ms(work, self.floors), 3)
        }

    def attempt(self, provider: Provider, batch: Batch) -> Outcome:
        assert isinstance(provider, Variant)
        with provider.changes():
            return super().attempt(provider, batch)


def predictions() -> str:
    """A table, at the rates that `NOMINAL` assumes; what is expected to be equal, in one line."""
    lines, before = [], ""
    for experiment in EXPERIMENTS.values():
        for work in experiment.works:
            equal: dict[str, list[str]] = {}
            for variant in experiment.variants:
                if variant.refuses(work, torch.device("cuda")) is None:
                    ms = f"{variant.cost(work).ms(work, NOMINAL):.2f}"
                    equal.setdefault(ms, []).append(variant.name)
            for ms, names in equal.items():
                head = f"{experiment.name}; {work}"
                lines.append(("" if head == before else head, "; ".join(names), ms))
                before = head
    return markdown(("experiment", "variants", "predicted, ms"), lines, text_columns=2)


def table(path: Path) -> str:
    """Prediction and outcome, from the CSV alone."""
    steps: dict[tuple[str, str], dict[str, record.Row]] = {}
    for row in record.read(path):
        if row.kernel_name.startswith("experiment"):
            work = record.config(row)
            sizes = " ".join(f"{name}={work[name]}" for name in ("T", "V", "H", "inactive") if work[name])
            part = "memory" if row.metric_name == "memory" else row.kernel_operation_mode
            head = f"{row.kernel_name.removeprefix('experiment ')}; {work['loss']} {sizes}"
            steps.setdefault((head, row.kernel_provider), {})[part] = row
    lines, before = [], ""
    for (head, variant), part in steps.items():
        full = part["full"]
        predicted = f"{record.config(full)['predicted_ms']:.2f}"
        if full.status == "ok":
            found = (
                f"**{full.y_value_50:.2f}** ({full.y_value_20:.2f} to {full.y_value_80:.2f})",
                f"{full.pct_of_floor:.0f}",
                f"{part['memory'].y_value_50:.0f}",
                f"{full.max_rel_err:.0e}",
            )
        else:
            found = (full.status, "", "", "")
        lines.append(("" if head == before else head, variant, predicted, *found))
        before = head
    columns = (
        "experiment",
        "variant",
        "predicted, ms",
        "measured (20 to 80 %)",
        "% of floor",
        "MiB",
        "error",
    )
    return markdown(columns, lines, text_columns=2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(EXPERIMENTS), help="may be given more than once"
    )
    parser.add_argument("--predict", action="store_true", help="print the predictions and run nothing")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start nothing new after this time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-experiments.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output = args.output or record.RESULTS / f"{record.short_name(args.device)}-experiments.csv"
    return args


def main() -> None:
    args = arguments()
    if args.predict:
        print(predictions())
    else:
        Experiments(args)()


if __name__ == "__main__":
    main()
