"""The tables of docs/benchmarks.md, from the CSVs and from nothing else.

    python -m benchmarks.report

replaces what stands between `<!-- cpu.csv -->` and `<!-- end -->` by the table of benchmarks/results/cpu.csv,
and so for every other CSV that is named in this way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import record
from .record import Row

PAGE = record.ROOT / "docs" / "benchmarks.md"
SECTION = re.compile(r"(<!-- (\w[\w.-]*\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    rules = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rules, *lines))


def run_table(path: Path) -> str:
    """A line for each provider and workload; those of which there is nothing to time are summed up below."""
    rows = list(record.read(path))
    first, lines = rows[0], []
    rates = [
        f"{r.kernel_provider} {r.y_value_50:.4g} {r.metric_unit}" for r in rows if r.kernel_name == "floor"
    ]
    parts: dict[tuple[str, str], dict[str, Row]] = {}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.kernel_name == "floor":
            continue
        work = description(row)
        if row.status == "ok":
            part = "memory" if row.metric_name == "memory" else row.kernel_operation_mode
            parts.setdefault((work, row.kernel_provider), {})[part] = row
        else:
            reasons.setdefault(f"{row.kernel_provider}, {row.status}", []).append(work)
    before = ""
    for (work, provider), part in parts.items():
        full = part["full"]
        cells = (f"{part[name].y_value_50:.4g}" for name in ("forward", "backward"))
        lines.append((
            "" if work == before else f"{work}, floor {full.floor}",
            " ".join(filter(None, (provider, full.provider_version))),
            f"**{full.y_value_50:.4g}** ({full.y_value_20:.4g} to {full.y_value_80:.4g})",
            *cells,
            f"{full.pct_of_floor:.0f}",
            f"{part['memory'].y_value_50:.0f}",
            f"{full.max_rel_err:.0e}",
        ))  # fmt: skip
        before = work
    head = ("work", "provider", "ms (20 to 80 %)", "forward", "backward", "% of floor", "MiB", "error")
    where = f"{first.gpu_name}; torch {first.torch}, Triton {first.triton}, commit {first.commit}"
    said = "".join(f"* {why}: {', '.join(dict.fromkeys(works))}\n" for why, works in reasons.items())
    return f"{where}, {first.timestamp[:10]}. Floors: {', '.join(rates)}.\n\n" + "\n".join(
        filter(None, (markdown(head, lines, text_columns=2), said))
    )


def description(row: Row) -> str:
    work = record.config(row)
    sizes = ", ".join(f"{name}={work[name]}" for name in ("T", "V", "H") if work[name])
    idle = [
        *(["half masked"] if work["masked"] == 0.5 else []),
        *(["half without advantage"] if work["inactive"] == 0.5 else []),
        *(["frozen head"] if work["frozen_head"] else []),
    ]
    return ", ".join([row.kernel_name, sizes, *idle])


def table(path: Path) -> str:
    from . import compiled, traffic  # which make their tables with `markdown`

    tables = {
        "compiled.csv": compiled.tables,
        "traffic.csv": traffic.traffic_tables,
        "operations.csv": traffic.operations_table,
    }
    return tables.get(path.name, run_table)(path)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        SECTION.sub(lambda m: f"{m[1]}\n{table(record.RESULTS / m[2])}\n{m[3]}", text), encoding="utf-8"
    )
    print(PAGE)


if __name__ == "__main__":
    main()
