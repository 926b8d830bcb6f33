"""Makes the most of a GPU that is there for some minutes: `make gpu LIMIT=540 OUT=folder`.

In this order, each with a budget, and each result written at once: (1) the machine and its rates, (2) tests
that only a compiled kernel can fail, (3) the headline shapes for this package and every peer, (4) the
experiments, by predicted gain, (5) compute-sanitizer on a sample, (6) the rest of the benchmark, (7) the
whole suite. A second call with the same folder goes on where the first one stopped. A failure is recorded and
does not stop the others. At the end, the results are compared with the targets.

    python -m benchmarks.gpu --out folder --limit 540
    python -m benchmarks.gpu --out folder --dry        # every step on a CPU, in tiny sizes, interpreted
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before torch is imported, which counts too

import argparse  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from ..experiments import targets  # noqa: E402
from ..tables.markdown import markdown  # noqa: E402
from .session import STATE, Part, Result, Setting, State, run  # noqa: E402
from .steps import parts  # noqa: E402

DRY_LIMIT = 4 * 3600.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of the state")
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS", help="default: 540")
    parser.add_argument("--step", type=int, action="append", choices=range(1, 8), help="can be repeated")
    parser.add_argument("--dry", action="store_true", help="a rehearsal on a CPU, without the limit")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    return parser.parse_args()


def table(chosen: Sequence[Part], results: Sequence[Result] = ()) -> str:
    """The parts with their estimates and budgets, and what became of them."""
    last = {result.part: result for result in results}
    lines = []
    for part in chosen:
        found = last.get(part.name)
        told = ("", "") if found is None else (f"{found.seconds:.0f}", f"{found.status}: {found.note}")
        lines.append((f"{part.step} {part.name}", f"{part.seconds:.0f}", f"{part.budget:.0f}", *told))
    return markdown(("step", "estimate on a GPU, s", "budget, s", "took, s", "result"), lines)


def main() -> None:
    args = arguments()
    chosen = [part for part in parts() if args.step is None or part.step in args.step]
    print(table(chosen))
    if args.list:
        return
    out = args.out.resolve()
    setting = Setting(out / "dry" if args.dry else out, dry=args.dry)  # a rehearsal leaves results alone
    run(chosen, setting, DRY_LIMIT if args.dry else args.limit, started=STARTED)
    print(f"\n{table(chosen, State(setting.out / STATE).results)}")
    print(targets.table([setting.out / "headline.csv", setting.out / "experiments.csv"]))


if __name__ == "__main__":
    main()
