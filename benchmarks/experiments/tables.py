"""Markdown tables of predictions and results."""

from __future__ import annotations

from pathlib import Path

import torch

from ..tables import record
from ..tables.markdown import markdown
from .costs import NOMINAL
from .plan import EXPERIMENTS


def predictions() -> str:
    """The predictions for the rates in `NOMINAL`. Variants with equal predictions share a line."""
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
    """Predictions and results of a run, from its CSV."""
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
            # A variant without a stage is not checked.
            error = "" if full.max_rel_err is None else f"{full.max_rel_err:.0e}"
            found = (
                f"**{full.y_value_50:.2f}** ({full.y_value_20:.2f} to {full.y_value_80:.2f})",
                f"{full.pct_of_floor:.0f}",
                f"{part['memory'].y_value_50:.0f}",
                error,
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
