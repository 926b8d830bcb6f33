"""Bytes that kernels move and operations of matrix products: counted, for which no GPU is needed.

    python -m benchmarks.traffic

runs the providers on the same small batches, their kernels in Triton's interpreter, writes
benchmarks/results/traffic.csv and operations.csv and prints tables of them. Bytes are per element of the
logits, `E = T * V`: bf16 logits read once are 2. Every load and store of a kernel counts, whatever a cache
would serve; loads of what the same launch has read before are also shown by themselves. What PyTorch moves
around the kernels is not seen: the matrix products of the linear form, TRL's loss of `[B, L]`, the zeros of
the position that Liger adds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # heeded when Triton is imported

import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import heads

from . import record, report
from .addresses import Traffic, quick_interpreter, recording
from .providers import PROVIDERS, Provider
from .workload import Batch, Workload, make_batch

# Rows so long that what is per token counts for little, and end within a block of every kernel. None of them
# is clipped: those without a gradient are masked or have no advantage.
BASES = {
    "logits": Workload("logits", "grpo", 16, 5000),
    "linear": Workload("linear", "grpo", 16, 5000, 64),
}
LOSSES = {"logits": ("grpo", "grpo_kl", "log_ratio"), "linear": ("grpo", "grpo_kl")}
FRACTIONS = tuple(itertools.product((0.0, 0.5), repeat=2))  # masked, without advantage

FROM_LOGITS, FROM_HIDDEN = PROVIDERS["logits"], PROVIDERS["linear"]
COMPARED = {
    "logits": [FROM_LOGITS[name] for name in ("grpo_kernels", "grpo_kernels inplace", "liger", "trl")],
    "linear": [
        FROM_HIDDEN["grpo_kernels"],
        FROM_HIDDEN["grpo_kernels bf16 logits"],
        FROM_HIDDEN["grpo_kernels skip_inactive"],
        FROM_HIDDEN["grpo_kernels linear_logps"],
        *(FROM_HIDDEN[name] for name in ("trl", "liger", "eager")),
    ],
}
# In the linear form a chunk of "logits" is the policy's or the reference's.
TENSORS = {
    "logits": ("logits", "reference", "gradient", "per token"),
    "linear": ("logits", "gradient", "per token"),
}
# Which the counter of operations leaves out.
IN_PLACE = {torch.ops.aten.addmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * b[1]}
STEPS = ("forward", "backward")
KINDS = ("reads", "rereads", "writes")

Moved = dict[tuple[str, str], float]  # bytes per element of T * V, by tensor and kind; empty without kernels
Row = dict[str, str]  # of a CSV


class Step(NamedTuple):
    moved: Moved
    products: float  # operations per T * V * H


class Measurement(NamedTuple):
    batch: Batch
    provider: Provider
    steps: dict[str, Step]  # forward and backward
    note: str = ""  # why there are none


def main() -> None:
    started = time.monotonic()
    # The interpreter runs on NumPy, which warns of infinities.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    with quick_interpreter():
        found = [one for form in BASES for one in measurements(form)]
    # What logits are held in changes no product.
    of_products = (one for one in found if one.batch.work.form == "linear")
    products = [one for one in of_products if one.provider.name != "grpo_kernels bf16 logits"]
    for name, rows, table in (
        ("traffic.csv", [row for one in found for row in traffic_rows(one)], traffic_tables),
        ("operations.csv", [row for one in products for row in operations_rows(one)], operations_table),
    ):
        path = record.RESULTS / name
        record.write_table(path, rows)
        print(f"{path}\n\n{table(path)}")
    print(f"{len(found)} measurements in {time.monotonic() - started:.0f} s")


def measurements(form: str) -> Iterator[Measurement]:
    for loss, (masked, inactive) in itertools.product(LOSSES[form], FRACTIONS):
        batch = make_batch(replace(BASES[form], loss=loss, masked=masked, inactive=inactive))
        for provider in COMPARED[form]:
            yield measure(provider, batch)


def measure(provider: Provider, batch: Batch) -> Measurement:
    reason = provider.reason_against(batch.work, batch.ids.device)
    if reason is not None:
        return Measurement(batch, provider, {}, reason)
    inputs = provider.inputs(batch)
    steps, before = {}, 0
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with recording() as seen, counter, as_on_a_gpu():
        for step in STEPS:
            if step == "forward":
                loss = provider.loss(batch, *inputs)
            else:
                loss.backward()
            operations = counter.get_total_flops()
            steps[step] = Step(moved(seen, batch), (operations - before) / volume(batch.work))
            before = operations
            seen.reset()
    return Measurement(batch, provider, steps)


def volume(work: Workload) -> int:
    return work.T * work.V * max(1, work.H)


def moved(seen: Traffic, batch: Batch) -> Moved:
    """What the kernels move, by tensor and kind."""
    found: Counter[tuple[str, str]] = Counter()
    for (address, storage), kind in itertools.product(seen.storages.items(), KINDS):
        tensor = "logits"
        if storage.numel() < batch.work.V:
            tensor = "per token"
        elif kind == "writes":
            tensor = "gradient"  # of the logits, and maybe in their place
        elif batch.ref_logits is not None and address == batch.ref_logits.untyped_storage().data_ptr():
            tensor = "reference"
        accesses = int(seen.of(kind, storage).sum())
        found[tensor, kind] += accesses * storage.element_size()
    return {key: amount / (batch.work.T * batch.work.V) for key, amount in found.items()}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within: what asks for a tensor's device, to choose how to compute, takes it for a GPU."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        patches.enter_context(mock.patch.object(heads, "multiplies_mixed", lambda device: True))
        if importlib.util.find_spec("trl") is not None:
            patches.enter_context(mock.patch("trl.kernels.chunked_logprob._use_triton", lambda device: True))
        # Liger compiles its loss of `[B, L]`, in which there is no kernel and no product.
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def traffic_rows(one: Measurement) -> Iterator[Row]:
    work = one.batch.work
    floor = number(work.floor.amount / volume(work)) if work.form == "logits" else ""
    note = one.note
    if not note and not any(step.moved for step in one.steps.values()):
        note = "no kernel of Triton's: its traffic is not seen"
    places = [("", "")] if note else itertools.product(STEPS, TENSORS[work.form])
    for step, tensor in places:
        counts = {f"{k}_E": "" if note else number(one.steps[step].moved.get((tensor, k), 0)) for k in KINDS}
        known = {"step": step, "tensor": tensor, **counts, "floor_E": floor}
        yield {**case(one), **known, "note": note, **record.versions()}


def operations_rows(one: Measurement) -> Iterator[Row]:
    floor = number(one.batch.work.floor.amount / volume(one.batch.work))
    for step in one.steps or [""]:
        products = number(one.steps[step].products) if step else ""
        known = {"step": step, "products_TVH": products, "floor_TVH": floor}
        yield {**case(one), **known, "note": one.note, **record.versions()}


def case(one: Measurement) -> Row:
    work = one.batch.work
    return {
        **{"form": work.form, "loss": work.loss, "masked": number(work.masked)},
        **{"inactive": number(work.inactive), "learning": number(learning(one.batch))},
        **{"provider": one.provider.name, "version": one.provider.version},
    }


def learning(batch: Batch) -> float:
    """The fraction of the tokens with a gradient."""
    return float((batch.truth.dlogps != 0).float().mean())


def number(x: float) -> str:
    return f"{x:.6g}"


# Tables for docs/benchmarks.md, each of its CSV.


def traffic_tables(path: Path) -> str:
    rows = record.read_table(path)
    parts = [traffic_table(form, [row for row in rows if row["form"] == form]) for form in TENSORS]
    return "\n".join([sources(rows), *parts])


def traffic_table(form: str, rows: Sequence[Row]) -> str:
    lines, before = [], ""
    counted = [row for row in rows if not row["note"]]
    for (work, provider), of in grouped(counted).items():
        by = {(row["step"], row["tensor"]): row for row in of}
        cells = []
        for tensor in TENSORS[form]:
            steps = (sum(float(by[step, tensor][f"{k}_E"]) for k in ("reads", "writes")) for step in STEPS)
            cells.append(" + ".join(f"{round(x, 2):g}" for x in steps))
        total = sum(float(row[f"{k}_E"]) for row in of for k in ("reads", "writes"))
        again = sum(float(row["rereads_E"]) for row in of)
        floor = f", floor {of[0]['floor_E']}" if of[0]["floor_E"] else ""
        name = "" if work == before else work + floor
        lines.append((name, provider, *cells, f"**{round(total, 2):g}**", f"{round(again, 2):g}"))
        before = work
    head = (f"{form}: forward + backward", "provider", *TENSORS[form], "all", "of it read again")
    return report.markdown(head, lines, text_columns=2) + "\n" + notes(rows)


def operations_table(path: Path) -> str:
    rows = record.read_table(path)
    works = dict.fromkeys(map(description, rows))
    totals = {
        key: sum(float(row["products_TVH"]) for row in of)
        for key, of in grouped([row for row in rows if not row["note"]]).items()
    }
    floors = {description(row): row["floor_TVH"] for row in rows}
    lines = [
        (provider, *(f"{totals[w, provider]:.4g}" if (w, provider) in totals else "" for w in works))
        for provider in dict.fromkeys(row["provider"] for row in rows)
    ]
    head = ("operations of products, TVH", *works)
    table = report.markdown(head, [*lines, ("floor", *(floors[work] for work in works))])
    return f"{sources(rows)}\n{table}\n{notes(rows)}"


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((description(row), row["provider"]), []).append(row)
    return groups


def description(row: Row) -> str:
    halves = {"masked": "half masked", "inactive": "half without advantage"}
    return ", ".join([row["loss"], *(said for name, said in halves.items() if row[name] == "0.5")])


def notes(rows: Sequence[Row]) -> str:
    reasons = ((f"{row['provider']}: {row['note']}", description(row)) for row in rows if row["note"])
    return report.notes(reasons, dict.fromkeys(map(description, rows)))


def sources(rows: Sequence[Row]) -> str:
    peers = dict.fromkeys(f"{row['provider']} {row['version']}" for row in rows if row["version"])
    where = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, commit {rows[0]['commit']}"
    return f"{'; '.join([where, *peers])}.\n"


if __name__ == "__main__":
    main()
