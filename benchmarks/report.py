"""Writes the tables of docs/benchmarks.md and of the pages in docs/dev/ from the CSVs in benchmarks/results/.

    python -m benchmarks.report

The text between `<!-- cpu.csv -->` and `<!-- end -->` is replaced by the tables of that CSV in
benchmarks/results/, and the same for any other CSV. `<!-- cpu.csv summary -->` begins a short table of one
loss, `<!-- predictions -->` the table of what the experiments should show, `<!-- headline -->` that of the
headline shapes, `<!-- targets -->` that of the targets, and `<!-- memory -->` the peaks of a step from hidden
states, by formula.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import memory
from .experiments import headline, targets
from .experiments import tables as experiments
from .machine_code import comparison
from .tables import record
from .tables.run_table import run_table, summary
from .traffic import tables as traffic

DOCS = record.ROOT / "docs"
NAMES = r"\w[\w.-]*\.csv|predictions|headline|memory|targets"
SECTION = re.compile(rf"(<!-- ({NAMES})( summary)? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path, *, short: bool = False) -> str:
    if short:
        return summary(path)
    if path.name == "predictions":
        return experiments.predictions()
    if path.name == "headline":
        return headline.table()
    if path.name == "targets":
        return targets.table()
    if path.name == "memory":
        return memory.predicted()
    if path.stem.endswith("-experiments"):
        return experiments.table(path)
    if record.is_run(path):
        return run_table(path)
    tables = {
        "compiled.csv": comparison.tables,
        "traffic.csv": traffic.traffic_tables,
        "operations.csv": traffic.operations_table,
    }
    return tables[path.name](path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.parse_args()
    for page in (DOCS / "benchmarks.md", *sorted((DOCS / "dev").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        page.write_text(SECTION.sub(with_table, text), encoding="utf-8")
        print(page)


def with_table(section: re.Match[str]) -> str:
    return f"{section[1]}\n{table(record.RESULTS / section[2], short=section[3] is not None)}\n{section[4]}"


if __name__ == "__main__":
    main()
