"""Every provider on the same work: checked against fp64, then timed, one CSV row at a time.

python -m benchmarks                                         # all of it, on the GPU if there is one
python -m benchmarks --form linear --shape T=8192,V=151936,H=4096 --provider grpo_kernels --provider trl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .speed.plans import plan
from .speed.run import Run
from .tables import record
from .work.providers import PROVIDERS, Provider
from .work.workload import LOSSES, SEQUENCES, Workload

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = sorted({name for form in PROVIDERS.values() for name in form})
    parser.add_argument("--form", action="append", choices=tuple(PROVIDERS), help="default: both, by turns")
    parser.add_argument("--provider", action="append", choices=names, help="may be given more than once")
    parser.add_argument(
        "--shape", action="append", type=shape, metavar="T=8192,V=151936,H=4096", help="instead of the plan"
    )
    parser.add_argument("--loss", choices=tuple(LOSSES), default="grpo", help="of --shape")
    parser.add_argument("--masked", type=float, default=0.0, help="of --shape: fraction of the tokens")
    parser.add_argument("--inactive", type=float, default=0.0, help="of --shape: fraction without advantage")
    parser.add_argument("--frozen-head", action="store_true", help="of --shape")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of --shape; default: bf16, on a CPU fp32")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start nothing new after this time")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/<device>.csv, of a part <device>-partial.csv"
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
    if not args.shape:
        return plan(forms, args.device, quick=args.quick)
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    options = {"dtype": dtype, "masked": args.masked, "inactive": args.inactive}
    works = [
        Workload("linear", args.loss, **sizes, frozen_head=args.frozen_head, **options)
        if "H" in sizes
        else Workload("logits", args.loss, **sizes, **options)
        for sizes in args.shape
    ]
    return [work for work in works if work.form in forms]


def output(args: argparse.Namespace) -> Path:
    """The published results are those of everything; a part does not replace them."""
    part = args.form or args.provider or args.shape or args.quick
    return record.RESULTS / f"{record.short_name(args.device)}{'-partial' if part else ''}.csv"


def pairs(args: argparse.Namespace) -> list[tuple[Workload, Provider]]:
    return [
        (work, provider)
        for work in workloads(args)
        for provider in PROVIDERS[work.form].values()
        if args.provider is None or provider.name in args.provider
    ]


def main() -> None:
    args = arguments()
    Run(pairs(args), device=args.device, output=args.output or output(args), limit=args.limit)()


if __name__ == "__main__":
    main()
