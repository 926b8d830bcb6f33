"""Rows of traffic.csv and operations.csv, and the Markdown tables made from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..tables import markdown, record
from .counts import KINDS, STEPS, Measurement, learning, volume

# In the linear form, "logits" are those of a chunk, of the policy or the reference.
TENSORS = {
    "logits": ("logits", "reference", "gradient", "per token"),
    "linear": ("logits", "gradient", "per token"),
}
Row = dict[str, str]  # of a CSV


def traffic_rows(one: Measurement) -> Iterator[Row]:
    work = one.batch.work
    floor = number(work.floor.amount / volume(work)) if work.form == "logits" else ""
    note = one.note
    if not note and not any(step.moved for step in one.steps.values()):
        note = "no Triton kernel, so its traffic is not counted"
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
        **{"form": work.form, "loss": one.loss, "masked": number(work.masked)},
        **{"inactive": number(work.inactive), "learning": number(learning(one.batch))},
        **{"provider": one.provider.name, "version": one.provider.version},
    }


def number(x: float) -> str:
    return f"{x:.6g}"


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
    return markdown.markdown(head, lines, text_columns=2) + "\n" + notes(rows)


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
    table = markdown.markdown(head, [*lines, ("floor", *(floors[work] for work in works))])
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
    return markdown.notes(reasons, dict.fromkeys(map(description, rows)))


def sources(rows: Sequence[Row]) -> str:
    peers = dict.fromkeys(f"{row['provider']} {row['version']}" for row in rows if row["version"])
    where = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, commit {rows[0]['commit']}"
    return f"{'; '.join([where, *peers])}.\n"
