"""Runs the experiments of docs/dev/tuning.md: compares variants, and predictions with results.

    python -m benchmarks.experiments                    # on a GPU; --only 4 --only 6 selects two experiments
    python -m benchmarks.experiments --predict          # prints a table of the predictions; needs no GPU
    TRITON_INTERPRET=1 python -m benchmarks.experiments --tiny    # a rehearsal on a CPU

Like every provider, a variant is compared with fp64 before it is timed. A prediction is the sum of bytes
divided by the copy rate, FLOPs divided by the rate of a matrix product, and 2 us for each launch other than
the passes over the vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from grpo_kernels import linear_losses, losses

from ..speed import measure
from ..tables import record
from .plan import EXPERIMENTS, by_gain
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
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in fp32, on the kernels: a rehearsal")
    parser.add_argument("--resume", action="store_true", help="keep what the output has, measure the rest")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-experiments.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output = args.output or record.RESULTS / f"{record.short_name(args.device)}-experiments.csv"
    return args


def main() -> None:
    args = arguments()
    if args.predict:
        print(predictions())
        return
    pairs = [pair for name in args.only or by_gain() for pair in EXPERIMENTS[name].pairs()]
    how = {"device": args.device, "output": args.output, "limit": args.limit, "resume": args.resume}
    if not args.tiny:
        Experiments(pairs, **how)()
        return
    small = ((replace(work.tiny(), dtype=torch.float32), variant) for work, variant in pairs)
    once = {(work, variant.experiment, variant.name): (work, variant) for work, variant in small}
    measure.CPU_ROUNDS = 1
    with on_kernels():
        Experiments(once.values(), **how)()


@contextmanager
def on_kernels() -> Iterator[None]:
    """Inside, the losses use the Triton kernels on every device, as on a GPU."""
    with (
        mock.patch.object(losses, "choose_backend", lambda *_: "triton"),
        mock.patch.object(linear_losses, "choose_backend", lambda *_: "triton"),
    ):
        yield


if __name__ == "__main__":
    main()
