"""Times training steps of a model in TRL's GRPOTrainer and in a plain loop, with several losses.

    python -m benchmarks.training_step           # the shape of Qwen2.5-0.5B, 8 sequences of 512 + 3584 tokens
    python -m benchmarks.training_step --tiny    # a small model, to see that everything runs; needs no GPU

Weights and tokens are random. The model runs in bf16 (fp32 on a CPU) with SDPA, gradient checkpointing and
AdamW. A step consists of forward, backward, gradient clipping and optimizer, for grpo_kl also the forward of
the reference. Nothing is generated. Loss and gradients of the first step are compared with those of a head in
fp32. The floor is the step whose loss is a mean of hidden states, in the same trainer or loop. The time above
the floor is that of the loss, including a trainer's metrics.

Memory is the peak that PyTorch allocated, including model and optimizer. On a CPU it is the growth of the
process. If 8 sequences in a micro-batch run out of memory, half as many are tried.

TRL 1.16 has no eager loss: its own loss ("stock") is a chunked head, which uses Triton on a GPU. Its option
`use_liger_kernel` replaces layers, not the loss, and would affect all later models of the process. Liger's
loss is measured in the plain loop.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

from ..tables import record
from .case import WARM_UP, Case
from .run import Run
from .ways import FLOOR, WAYS, Way


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=("0.5B", "1.5B"), default="0.5B", help="default: 0.5B")
    parser.add_argument("--loss", action="append", choices=("grpo", "grpo_kl"), help="default: both")
    parser.add_argument("--way", action="append", choices=tuple(WAYS), help="can be repeated; default: all")
    parser.add_argument("--inactive", type=float, default=0.0, help="fraction of sequences without advantage")
    parser.add_argument(
        "--steps", type=int, default=5, help=f"timed steps, after {WARM_UP} warm-up steps; default: 5"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything runs")
    parser.add_argument(
        "--limit",
        type=float,
        default=270,
        metavar="SECONDS",
        help="start nothing after this time; default: 270",
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/training-step-<device>.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output = args.output or record.RESULTS / f"training-step-{record.short_name(args.device)}.csv"
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    model, prompt, completion = ("tiny", 8, 24) if args.tiny else (args.model, 512, 3584)
    return [
        Case(model, loss, args.device, prompt, completion, args.inactive, args.steps)
        for loss in args.loss or ("grpo", "grpo_kl")
    ]


def ways(args: argparse.Namespace) -> list[Way]:
    """The chosen ways, and the floors to compare them with."""
    wanted = [WAYS[name] for name in args.way or WAYS]
    hosts = {way.host for way in wanted}
    return [way for way in WAYS.values() if way in wanted or (way.what == FLOOR and way.host in hosts)]


def make_run(args: argparse.Namespace, folder: Path) -> Run:
    how = {"device": args.device, "output": args.output, "limit": args.limit, "folder": folder}
    return Run(cases(args), ways(args), **how)


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make_run(args, Path(folder))()
    print(args.output)


if __name__ == "__main__":
    main()
