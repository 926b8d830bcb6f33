"""Writes the tables of docs/benchmarks.md and docs/tuning.md from the CSVs in benchmarks/results/.

    python -m benchmarks.report

The text between `<!-- cpu.csv -->` and `<!-- end -->` is replaced by the table of benchmarks/results/cpu.csv,
and the same for any other CSV. `<!-- predictions -->` begins the table of what the experiments should show.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .experiments import tables as experiments
from .machine_code import comparison
from .tables import record
from .tables.run_table import run_table
from .traffic import tables as traffic

PAGES = tuple(record.ROOT / "docs" / name for name in ("benchmarks.md", "tuning.md"))
SECTION = re.compile(r"(<!-- (\w[\w.-]*\.csv|predictions) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path) -> str:
    if path.name == "predictions":
        return experiments.predictions()
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
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(
            SECTION.sub(lambda m: f"{m[1]}\n{table(record.RESULTS / m[2])}\n{m[3]}", text), encoding="utf-8"
        )
        print(page)


if __name__ == "__main__":
    main()
