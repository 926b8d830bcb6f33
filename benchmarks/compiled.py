"""Compiles every kernel of this package, and those of installed peers, and counts their instructions.

    python -m benchmarks.compiled            # --quick: only kernels that the peers also have

No GPU is needed. The results go to benchmarks/results/compiled.csv and are printed as tables. The docstring
of `machine_code.figures.Pass` explains the counts. Kernels that contain matrix products have no pass over a
row. The peers' kernels are called as in work/providers.py, with V = 151936 and temperature 1: both are
constants in their machine code.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from .machine_code.cases import CASES
from .machine_code.comparison import (
    CASES_OF_JOBS,
    COMPARED,
    PEERS_OF_JOBS,
    comparison,
    every_variant,
    rows_of,
)
from .machine_code.figures import compile_all
from .machine_code.no_gpu import TARGETS
from .machine_code.peers import PEERS, call_peer, installed
from .tables import record


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="only the kernels that the peers also have")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=tuple(TARGETS),
        default=COMPARED,
        help=f"default: {' '.join(COMPARED)}",
    )
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/compiled.csv, or no file with --quick"
    )
    args = parser.parse_args()
    started = time.monotonic()
    peers = [name for name in (PEERS_OF_JOBS if args.quick else PEERS) if installed(name)]
    cases = CASES_OF_JOBS if args.quick else CASES
    calls = [*(partial(call_peer, name) for name in peers), *(CASES[name] for name in cases)]
    found = compile_all(calls, args.targets)
    rows = [row for one in found for row in rows_of(one)]
    print(f"{comparison(rows)}\n{every_variant(rows)}")
    output = args.output or (None if args.quick else record.RESULTS / "compiled.csv")
    if output is not None:
        record.write_table(output, rows)
        print(output)
    print(f"{len(found)} kernels in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
