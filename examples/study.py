"""What keeps a policy near its reference? Train the demo's task with five losses and three seeds each.

    make study

Writes docs/study.png (reward, entropy and exact KL to the reference over training) and docs/study.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model is tiny: run single-threaded processes in parallel
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib
import torch
import transformers
from addition import positive, silence_libraries
from addition_task import accuracy, build_model, build_tokenizer, split_sums, warm_up
from addition_trainer import reinforce
from tqdm import tqdm

from grpo_kernels import DRO, KL, ImportanceRatio, LogRatio, LossSpec, PPOClip, grpo_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRPO = "seq-mean-token-mean"
LOSSES: dict[str, LossSpec] = {
    "log_ratio": LossSpec(LogRatio(), aggregation=GRPO),
    "importance_ratio, to the reference": LossSpec(ImportanceRatio(anchor="ref"), aggregation=GRPO),
    "grpo": LossSpec(PPOClip(), aggregation=GRPO),
    "grpo + KL('exact', 0.1)": LossSpec(PPOClip(), KL("exact", beta=0.1), aggregation=GRPO),
    "dro, to the reference (0.5)": LossSpec(DRO(beta=0.5, anchor="ref"), aggregation=GRPO),
}
SEEDS = (0, 1, 2)
CURVES = {
    "reward": "Reward",
    "entropy": "Entropy, nats per token",
    "kl_exact": "Exact KL to the reference, nats per token",
}
COLOURS = ("#D55E00", "#CC79A7", "#000000", "#56B4E9", "#009E73")
NEIGHBOURS = 4
LAST = 20  # the table has means over this many steps


class Result(NamedTuple):
    loss: str
    seed: int
    before: float  # held-out accuracy, greedy
    after: float
    history: list[dict[str, float]]

    def final(self, key: str) -> float:
        return mean(logs[key] for logs in self.history[-LAST:] if key in logs)


def run(job: tuple[str, int, int]) -> Result:
    """Run one training in this process."""
    loss, seed, steps = job
    torch.set_num_threads(1)
    silence_libraries()
    transformers.set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    held_out, labelled, unlabelled = split_sums(seed)
    warm_up(model, tokenizer, labelled, probe=unlabelled[:256])
    before = accuracy(model, tokenizer, held_out)
    history = reinforce(
        model,
        tokenizer,
        unlabelled,
        loss_fn=functools.partial(grpo_loss, return_entropy=True),
        spec=LOSSES[loss],
        steps=steps,
        seed=seed,
        on_step=lambda logs: None,
    )
    return Result(loss, seed, before, accuracy(model, tokenizer, held_out), history)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours, up to `NEIGHBOURS` on either side."""
    return [mean(values[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1]) for i in range(len(values))]


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw one panel per curve, with the mean over the seeds and a band over their range."""
    figure, panels = plt.subplots(1, len(CURVES), figsize=(14, 4.4), layout="constrained")
    for axes, (key, title) in zip(panels, CURVES.items(), strict=True):
        for colour, loss in zip(COLOURS, LOSSES, strict=True):
            runs = [[logs.get(key) for logs in r.history] for r in results if r.loss == loss]
            columns = enumerate(zip(*runs, strict=True), start=1)
            steps, values = zip(*((step, y) for step, y in columns if None not in y), strict=True)
            lowest, highest = (smooth([f(y) for y in values]) for f in (min, max))
            axes.fill_between(steps, lowest, highest, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, smooth([mean(y) for y in values]), color=colour, lw=1.8, label=loss)
        axes.set(title=title, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(results: Sequence[Result], steps: int) -> str:
    lines = [
        "# Five losses on the demo's task",
        "",
        f"`make study` trains the demo (examples/addition.py) for {steps} optimizer steps, "
        f"with {len(SEEDS)} seeds.",
        "Each cell is the mean over the seeds, with their range. Accuracy: greedy decoding of held-out sums.",
        f"Reward, entropy and exact KL: sampled, means of the last {LAST} steps.",
        f"torch {torch.__version__.split('+')[0]}, on a CPU.",
        f"The figure: mean over the seeds as a line, their range as a band, over {2 * NEIGHBOURS + 1} steps.",
        "",
        "![Reward, entropy and exact KL to the reference over training](study.png)",
        "",
        "| loss | accuracy before | after | reward | entropy | exact KL to the reference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for loss in LOSSES:
        runs = [r for r in results if r.loss == loss]
        columns = [
            [r.before for r in runs],
            [r.after for r in runs],
            *([r.final(key) for r in runs] for key in CURVES),
        ]
        cells = [f"{mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in columns]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps per run")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of figure and table")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="parallel runs")
    arguments = parser.parse_args()
    jobs = [(loss, seed, arguments.steps) for seed in SEEDS for loss in LOSSES]
    # A process forked after PyTorch has started its threads may hang.
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        results = list(tqdm(pool.imap(run, jobs), total=len(jobs), unit="run"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(arguments.output / "study.png", results)
    text = table(results, arguments.steps)
    (arguments.output / "study.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
