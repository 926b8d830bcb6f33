"""Checks every provider against fp64, then measures its time and memory, and writes a CSV.

python -m benchmarks                    # the whole plan, on the GPU if there is one
python -m benchmarks --form linear --shape T=8192,V=151936,H=4096 --provider grpo_kernels --provider trl
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from .speed import measure
from .speed.plans import headline, plan, turn
from .speed.run import Run
from .tables import record
from .work.providers import PROVIDERS, Provider
from .work.workload import LOSSES, SEQUENCES, Workload

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = sorted({name for form in PROVIDERS.values() for name in form})
    parser.add_argument("--form", action="append", choices=tuple(PROVIDERS), help="default: both, in turn")
    parser.add_argument("--provider", action="append", choices=names, help="can be repeated; default: all")
    parser.add_argument(
        "--shape",
        action="append",
        type=shape,
        metavar="T=8192,V=151936,H=4096",
        help="measure this shape instead of the plan; can be repeated",
    )
    parser.add_argument("--loss", choices=tuple(LOSSES), default="grpo", help="with --shape; default: grpo")
    parser.add_argument("--masked", type=float, default=0.0, help="with --shape: fraction of masked tokens")
    parser.add_argument(
        "--inactive", type=float, default=0.0, help="with --shape: fraction of sequences whose advantage is 0"
    )
    parser.add_argument("--frozen-head", action="store_true", help="with --shape: no gradient of the head")
    parser.add_argument(
        "--given-ref", action="store_true", help="with --shape: ref_logps are given instead of ref_logits"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="with --shape; default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--headline", action="store_true", help="the shapes that peers publish, best first")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in fp32: a rehearsal on a CPU")
    parser.add_argument("--resume", action="store_true", help="keep what the output has, measure the rest")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start no measurement after this time")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: benchmarks/results/<device>.csv, or <device>-partial.csv for a part of the plan",
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def shape(text: str) -> dict[str, int]:
    wanted = f"T=8192,V=151936 or, from hidden states, T=8192,V=151936,H=4096; T in {SEQUENCES}s"
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}") from error
    if not {"T", "V"} <= sizes.keys() <= {"T", "V", "H"} or sizes["T"] % SEQUENCES or min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
    return sizes


def workloads(args: argparse.Namespace) -> list[Workload]:
    forms = args.form or list(PROVIDERS)
    if args.headline:
        return [work for work in headline() if work.form in forms]
    if not args.shape:
        return plan(forms, args.device, quick=args.quick)
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    options = {name: getattr(args, name) for name in ("masked", "inactive", "given_ref")} | {"dtype": dtype}
    works = [
        Workload("linear", args.loss, **sizes, frozen_head=args.frozen_head, **options)
        if "H" in sizes
        else Workload("logits", args.loss, **sizes, **options)
        for sizes in args.shape
    ]
    return [work for work in works if work.form in forms]


def output(args: argparse.Namespace) -> Path:
    """The default path. A part of the plan goes to another file and keeps the published results."""
    part = args.form or args.provider or args.shape or args.quick or args.headline or args.tiny
    return record.RESULTS / f"{record.short_name(args.device)}{'-partial' if part else ''}.csv"


def pairs(args: argparse.Namespace) -> list[tuple[Workload, Provider]]:
    """What to measure, in order."""
    works = workloads(args)
    if args.tiny:
        works = list(dict.fromkeys(replace(work.tiny(), dtype=torch.float32) for work in works))
    found = [
        (work, provider)
        for work in works
        for provider in PROVIDERS[work.form].values()
        if args.provider is None or provider.name in args.provider
    ]
    if args.headline:
        found.sort(key=lambda pair: turn(pair[0], pair[1].name))  # stable: the workloads keep their order
    return found


def main() -> None:
    args = arguments()
    path = args.output or output(args)
    if args.tiny:
        measure.CPU_ROUNDS = 1
    Run(pairs(args), device=args.device, output=path, limit=args.limit, resume=args.resume)()


if __name__ == "__main__":
    main()
