"""The Markdown tables of a run, made from its CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import record
from .markdown import markdown, notes
from .record import Row

IDLE = {"masked": "masked", "inactive": "without advantage"}


def run_table(path: Path) -> str:
    """One table for each form."""
    rows = list(record.read(path))
    forms = dict.fromkeys(row.kernel_name.split()[0] for row in rows if row.kernel_name != "floor")
    tables = (form_table(form, [r for r in rows if r.kernel_name.startswith(f"{form} ")]) for form in forms)
    return "\n".join([f"{source(rows)}\n", *tables])


def source(rows: Sequence[Row]) -> str:
    """Where and with what the run was made."""
    first = rows[0]
    where = f"{first.gpu_name}; torch {first.torch}, Triton {first.triton}, commit {first.commit}"
    floors = (
        f"{r.kernel_provider} {r.y_value_50:.4g} {r.metric_unit}" for r in rows if r.kernel_name == "floor"
    )
    return f"{where}, {first.timestamp[:10]}. Floors: {', '.join(floors)}."


def summary(path: Path) -> str:
    """One line for each provider, with time, memory and error of the workload each form began with."""
    rows = list(record.read(path))
    columns: dict[str, dict[str, tuple[str, str, str]]] = {}
    names: dict[str, None] = {}
    for form in ("logits", "linear"):
        of = [row for row in rows if row.kernel_name.startswith(f"{form} ")]
        of = [row for row in of if row.extra_benchmark_config_str == of[0].extra_benchmark_config_str]
        ok = [row for row in of if row.status == "ok" and row.kernel_operation_mode == "full"]
        memory = {row.kernel_provider: row for row in ok if row.metric_name == "memory"}
        for row in ok:
            if row.metric_name == "speed":
                name = " ".join(filter(None, (row.kernel_provider, row.provider_version)))
                mib = memory[row.kernel_provider].y_value_50
                names[name] = None
                columns.setdefault(form, {})[name] = (
                    f"**{row.y_value_50:.4g}**", f"{mib:.0f}", f"{row.max_rel_err:.0e}"
                )  # fmt: skip
    empty = ("", "", "")
    lines = [[name, *(x for of in columns.values() for x in of.get(name, empty))] for name in names]
    titles = {"logits": "from logits", "linear": "from hidden states"}
    head = [x for form in columns for x in (f"{titles[form]}: ms", "MiB", "error")]
    return f"{markdown(['provider', *head], lines)}\n{source(rows)}\n"


def form_table(form: str, rows: Sequence[Row]) -> str:
    """One line for each workload and provider. The notes below say why others have no timing."""
    sizes = dict.fromkeys(map(sizes_of, rows))
    steps: dict[tuple[str, str], dict[str, Row]] = {}
    reasons, works = [], {}
    for row in rows:
        work = description(row, with_sizes=len(sizes) > 1)
        works[work] = None
        if row.status == "ok":
            part = "memory" if row.metric_name == "memory" else row.kernel_operation_mode
            steps.setdefault((work, row.kernel_provider), {})[part] = row
        else:
            reasons.append((f"{row.kernel_provider}: {row.status}", work))
    lines, before = [], ""
    order = list(works)
    # Stable. A run that is made in turns comes back to a workload.
    for (work, provider), part in sorted(steps.items(), key=lambda step: order.index(step[0][0])):
        full = part["full"]
        lines.append((
            "" if work == before else f"{work}, floor {full.floor}",
            " ".join(filter(None, (provider, full.provider_version))),
            f"**{full.y_value_50:.4g}** ({full.y_value_20:.4g} to {full.y_value_80:.4g})",
            *(f"{part[name].y_value_50:.4g}" if name in part else "" for name in ("forward", "backward")),
            f"{full.pct_of_floor:.0f}",
            f"{part['memory'].y_value_50:.0f}",
            f"{full.max_rel_err:.0e}",
        ))  # fmt: skip
        before = work
    title = form if len(sizes) > 1 else f"{form}, {next(iter(sizes))}"
    head = (title, "provider", "ms (20 to 80 %)", "forward", "backward", "% of floor", "MiB", "error")
    return "\n".join(filter(None, (markdown(head, lines, text_columns=2), notes(reasons, works))))


def description(row: Row, *, with_sizes: bool) -> str:
    work = record.config(row)
    idle = [
        *(f"{share(work[name])} {what}" for name, what in IDLE.items() if work[name]),
        *(["frozen head"] if work["frozen_head"] else []),
        # Older CSVs do not have these.
        *(["given ref_logps"] if work.get("given_ref") else []),
        *(["entropy"] if work.get("entropy") else []),
    ]
    return ", ".join([work["loss"], *([sizes_of(row)] if with_sizes else []), *idle])


def share(fraction: float) -> str:
    return "half" if fraction == 0.5 else f"{fraction:.0%}"


def sizes_of(row: Row) -> str:
    work = record.config(row)
    return ", ".join(f"{name}={work[name]}" for name in ("T", "V", "H") if work[name])
