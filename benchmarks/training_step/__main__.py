"""Training steps of a real model, in TRL's GRPOTrainer and in a plain loop, by stock losses and by ours.

    python -m benchmarks.training_step           # the shape of Qwen2.5-0.5B, 8 sequences of 512 + 3584 tokens
    python -m benchmarks.training_step --tiny    # does everything run? needs no GPU

Weights and tokens are random; bf16 (on a CPU fp32), SDPA, gradient checkpointing, AdamW. A step is forward,
backward, clipping of the gradients and optimizer, on samples at hand; of grpo_kl also the reference's
forward. The first step's loss and gradients are compared with those under a head that is multiplied out in
fp32. The floor is the step whose loss is a mean of hidden states, in the same trainer or loop: what a step
takes beyond it is the loss's, a trainer's metrics included.

Memory is the most that PyTorch had allocated, model and optimizer included (on a CPU: by how much the process
grew). Who runs out of it with 8 sequences in a micro-batch is tried again with half as many.

TRL 1.16 has no eager loss left: its stock is a chunked head, in Triton on a GPU. Its `use_liger_kernel` swaps
layers and not the loss, and would do so for all that run after it; Liger's loss is here in the plain loop.
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
    parser.add_argument(
        "--loss", action="append", choices=("grpo", "grpo_kl"), help="default: both, by turns"
    )
    parser.add_argument("--way", action="append", choices=tuple(WAYS), help="may be given more than once")
    parser.add_argument("--inactive", type=float, default=0.0, help="fraction of sequences without advantage")
    parser.add_argument(
        "--steps", type=int, default=5, help=f"timed, after {WARM_UP} that are not; default: 5"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model: does everything run?")
    parser.add_argument(
        "--limit", type=float, default=270, metavar="SECONDS", help="start nothing new after; default: 270"
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
    """Those wanted, and the floors that they are compared with."""
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
