"""The three tables and the figure that the demo shows at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib
import torch
from loss_cost import KINDS, measure_cost
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Logs = dict[str, float]


class Run(NamedTuple):
    history: list[Logs]  # what TRL logged, one entry per step
    accuracy: float
    seconds: float


def show(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = ""
) -> None:
    """Print a plain table with the first column left-aligned, the others right-aligned, and `note` below."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    console.print(table)
    if note:
        console.print(note, soft_wrap=True)


def show_accuracy(console: Console, before: float, runs: dict[str, Run], *, n_sums: int) -> None:
    rows = []
    for name, run in runs.items():
        gain = f"{run.accuracy - before:+.3f}"
        rows.append([name, f"{before:.3f}", f"{run.accuracy:.3f}", gain, f"{run.seconds:.0f} s"])
    columns = ("loss", "after warm-up", "at the end", "gain", "training")
    show(console, f"Exact match on {n_sums:,} held-out sums, greedy decoding", columns, rows)


def show_steps(console: Console, ours: list[Logs], name: str, theirs: list[Logs]) -> None:
    """Compare loss and gradient norm of two runs with the same seed, step by step."""
    keys = ("loss", "grad_norm")
    # A loss is a mean of terms of either sign. If they cancel, only their rounding errors would be compared.
    # Differences are therefore relative to at least the mean size of the loss (absolute if all are zero).
    usual = {key: mean(abs(logs[key]) for logs in theirs) or 1.0 for key in keys}
    rows, largest = [], dict.fromkeys(keys, 0.0)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        row = [str(step)]
        for key in keys:
            difference = abs(a[key] - b[key]) / max(abs(b[key]), usual[key])
            largest[key] = max(largest[key], difference)
            row += [f"{a[key]:.6f}", f"{b[key]:.6f}", f"{difference:.1e}"]
        rows.append(row)
    rows.append(["largest", "", "", f"{largest['loss']:.1e}", "", "", f"{largest['grad_norm']:.1e}"])
    show(
        console,
        f"The first {len(ours)} steps from the same seed: fused loss against {name}",
        ("step", "loss\nfused", f"\n{name}", "\ndiff.", "grad norm\nfused", f"\n{name}", "\ndiff."),
        rows,
        f"diff. = |fused - {name}| / max(|{name}|, mean of |{name}| over these steps)",
    )


def show_cost(console: Console, loss: str, device_name: str) -> None:
    """Measure each loss at the vocabulary of a real model. With the demo's 14 tokens every loss is cheap."""
    tokens, vocab = (1024, 128_256) if torch.cuda.is_available() else (1024, 32_000)
    rows = []
    for kind in tqdm(KINDS, desc="time and memory", unit="loss"):
        cost = measure_cost(kind, loss, tokens, vocab)
        rows.append([kind, f"{cost.latency_ms:.1f} ms", f"{cost.peak_mib:,.0f} MiB"])
    show(
        console,
        f"Loss forward and backward on {device_name}: {tokens:,} tokens, vocabulary {vocab:,}, fp32",
        ("loss", "time", "peak memory"),
        rows,
        "Memory beyond the two logits tensors. All but the last also compute the exact KL to the reference.",
    )


def draw(path: Path, title: str, before: float, runs: dict[str, Run]) -> None:
    """Draw reward and exact KL over the steps, one line per run."""
    # A broad pale line under a thin dark one: both are visible even if they agree.
    styles = ({"color": "#56B4E9", "lw": 4.5, "alpha": 0.7}, {"color": "#D55E00", "lw": 1.2})
    figure, (rewards, kls) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for (name, run), style in zip(runs.items(), styles, strict=True):
        for axes, key in ((rewards, "reward"), (kls, "kl_exact")):
            points = [(step, logs[key]) for step, logs in enumerate(run.history, start=1) if key in logs]
            axes.plot(*zip(*points, strict=True), label=f"{name} loss", **style)
    ours = next(iter(runs.values()))
    for accuracy, label, offset in ((before, "after warm-up", -12), (ours.accuracy, "at the end", 9)):
        rewards.axhline(accuracy, color="0.5", lw=1, ls=":")
        rewards.annotate(
            f"held-out accuracy {label}: {accuracy:.2f}",
            (0.99, accuracy),
            xycoords=("axes fraction", "data"),
            xytext=(0, offset),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color="0.35",
        )
    rewards.set(title="Reward", ylabel="share of sampled answers that are right", ylim=(0, 1.1))
    kls.set(title="Exact KL to the reference", ylabel="nats per token")
    kls.set_ylim(bottom=0)
    for axes in (rewards, kls):
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, len(ours.history))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    kls.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
