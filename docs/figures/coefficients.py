"""Draws coefficients.png: the derivative of some losses with respect to the log-probability.

Each curve is computed by the package's backward, so no formula is repeated here. A row of two logits in which
the taken token has a known probability p gives dL/dlogp from dL/dlogits, since dlogits_y = dL/dlogp (1 - p).
With the package and matplotlib installed:

    python docs/figures/coefficients.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from grpo_kernels import DRO, KL, ImportanceRatio, LogRatio, LossSpec, PPOClip, Reinforce, grpo_loss

BETA = 1.0
TAKEN_PROBABILITY = 0.1
LOG_RATIOS = torch.linspace(-2, 2, 1601, dtype=torch.float64)

# Okabe and Ito's palette: distinct under every common colour-vision deficiency.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)


def coefficients(spec: LossSpec, advantage: float = 0.0, on_policy: bool = False) -> Tensor:
    """dL/dlogp at every log-ratio of the grid, from one call: each is a sequence of one token."""
    logits = torch.tensor([TAKEN_PROBABILITY, 1 - TAKEN_PROBABILITY], dtype=torch.float64).log()
    logits = logits.expand(len(LOG_RATIOS), 1, 2).clone().requires_grad_()
    anchors = math.log(TAKEN_PROBABILITY) - LOG_RATIOS[:, None]
    completion_ids = torch.zeros(len(LOG_RATIOS), 1, dtype=torch.long)
    advantages = torch.full((len(LOG_RATIOS),), advantage, dtype=torch.float64)
    out = grpo_loss(
        logits,
        completion_ids,
        advantages,
        spec=spec,
        old_logps=None if on_policy else anchors,
        ref_logps=anchors,
    )
    out.loss.backward()
    return logits.grad[:, 0, 0] / (1 - TAKEN_PROBABILITY)


def token_sum(surrogate: Any = None, kl: KL | None = None) -> LossSpec:
    return LossSpec(surrogate, kl=kl, aggregation="token-sum")


def draw(axes: Axes, curve: Tensor, label: str, color: str, style: str = "-", width: float = 2.2) -> None:
    axes.plot(LOG_RATIOS, curve, style, color=color, linewidth=width, label=label, solid_joinstyle="round")


def draw_surrogates(axes: Axes, advantage: float) -> None:
    curves = [
        ("LogRatio", LogRatio(), BLACK, "-", 3.4),
        ("Reinforce", Reinforce(), ORANGE, "--", 1.8),
        ("ImportanceRatio", ImportanceRatio(), SKY, "-", 4.0),
        ("ImportanceRatio, max_ratio 2", ImportanceRatio(max_ratio=2.0), BLUE, "-.", 2.0),
        ("PPOClip 0.2, 0.28", PPOClip(0.2, 0.28), VERMILION, "-", 2.2),
        ("PPOClip, dual_clip 3", PPOClip(0.2, 0.28, dual_clip=3.0), VERMILION, ":", 2.2),
        ("DRO: squared log-ratio", DRO(BETA, anchor="ref"), GREEN, "-", 2.2),
    ]
    for label, surrogate, color, style, width in curves:
        draw(axes, coefficients(token_sum(surrogate), advantage), label, color, style, width)


def draw_kl(axes: Axes) -> None:
    draw(axes, coefficients(token_sum(kl=KL("k1", BETA))), "k1", BLACK)
    draw(axes, coefficients(token_sum(kl=KL("abs", BETA))), "abs", PURPLE, "--")
    draw(axes, coefficients(token_sum(kl=KL("k2", BETA))), "k2", GREEN, "-", 3.8)
    corrected = KL("k3", BETA, ratio_corrected=True)
    draw(
        axes, coefficients(token_sum(kl=corrected), on_policy=True), "k3, ratio_corrected", ORANGE, "--", 1.8
    )
    draw(axes, coefficients(token_sum(kl=KL("k3", BETA))), "k3", VERMILION)


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (positive, negative, penalty) = plt.subplots(1, 3, figsize=(11.5, 5.0))
    draw_surrogates(positive, advantage=1.0)
    draw_surrogates(negative, advantage=-1.0)
    draw_kl(penalty)
    positive.set(title="surrogates, $A = +1$", ylim=(-4.3, 2.3), ylabel=r"$\partial L\,/\,\partial \log\pi$")
    negative.set(title="surrogates, $A = -1$", ylim=(-2.3, 4.3))
    penalty.set(title="sampled KL kinds", ylim=(-3.3, 3.3))
    for axes in (positive, negative, penalty):
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#999999", linewidth=0.8, zorder=0)
        axes.set(xlim=(-2, 2), xlabel=r"log-ratio  $\log\pi - \log\pi_{\mathrm{anchor}}$")
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
    penalty.set_xlabel(r"log-ratio  $\log\pi - \log\pi_{\mathrm{ref}}$")
    handles, labels = positive.get_legend_handles_labels()
    style = {
        "frameon": False,
        "fontsize": 10.5,
        "columnspacing": 1.2,
        "handlelength": 2.4,
        "loc": "upper left",
    }
    figure.tight_layout(rect=(0, 0.15, 1, 1), w_pad=1.5)
    figure.legend(handles, labels, bbox_to_anchor=(0.05, 0.18), ncols=3, **style)
    figure.legend(*penalty.get_legend_handles_labels(), bbox_to_anchor=(0.72, 0.18), ncols=2, **style)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
