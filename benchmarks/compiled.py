"""The table of machine code: every kernel variant of this package and, where installed, the peers' kernels.

    python -m benchmarks.compiled            # --quick: only what the comparison with the peers needs

compiles for GPUs that are not here, writes benchmarks/results/compiled.csv and prints tables of it. What is
counted is said at `machine_code.Pass`; kernels around matrix products have no passes over a row. Peers run as
called by their providers, at V = 151936 and temperature 1, both of which are constants in the peers' kernels.
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled")
    parser.add_argument("--quick", action="store_true", help="only what the comparison with the peers needs")
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=COMPARED)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/compiled.csv; --quick: none")
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
