"""Runs the experiments of docs/dev/tuning.md: compares variants, and predictions with results.

    python -m benchmarks.experiments                    # on a GPU; --only 4 --only 6 selects two experiments
    python -m benchmarks.experiments --predict          # prints a table of the predictions; needs no GPU

Like every provider, a variant is compared with fp64 before it is timed. A prediction is the sum of bytes
divided by the copy rate, FLOPs divided by the rate of a matrix product, and 2 us for each launch other than
the passes over the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..tables import record
from .plan import EXPERIMENTS
from .run import Experiments
from .tables import predictions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(EXPERIMENTS), help="can be repeated; default: all"
    )
    parser.add_argument("--predict", action="store_true", help="print the predictions and run nothing")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start no measurement after this time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-experiments.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output = args.output or record.RESULTS / f"{record.short_name(args.device)}-experiments.csv"
    return args


def main() -> None:
    args = arguments()
    if args.predict:
        print(predictions())
    else:
        pairs = [pair for name in args.only or EXPERIMENTS for pair in EXPERIMENTS[name].pairs()]
        Experiments(pairs, device=args.device, output=args.output, limit=args.limit)()


if __name__ == "__main__":
    main()
