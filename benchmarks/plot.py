"""Draws the figures of a run from its CSV.

python -m benchmarks.plot                        # every run in benchmarks/results/
python -m benchmarks.plot some/where/mine.csv    # docs/benchmarks_mine_logits.png and ..._linear.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from .tables import record
from .tables.record import Row
from .work.workload import WITH_REFERENCE

DOCS = record.ROOT / "docs"
COLOURS = {
    "grpo_kernels": "#0b5cad",
    "grpo_kernels inplace": "#4d9fe0",
    "grpo_kernels skip_inactive": "#4d9fe0",
    "grpo_kernels bf16 logits": "#7fd1c7",
    "grpo_kernels linear_logps": "#a9cdec",
    "eager": "#444444",
    "eager + exact KL": "#a32020",
    "torch.compile": "#8a8a8a",
    "torch.compile + exact KL": "#e08a80",
    "trl": "#d9820f",
    "liger": "#b3346c",
    "verl": "#3a8f5c",
    "cut-cross-entropy": "#7d5ba6",
    "liger fused": "#e06aa0",
    "quack": "#5fa8a8",
    "unsloth": "#9a6b3f",
    "grpo_kernels selective_logps": "#a9cdec",
    "torch linear_cross_entropy": "#a08a3c",
}


class Point(NamedTuple):
    """Results of one provider on one workload."""

    provider: str
    work: Mapping[str, Any]
    ms: float
    low: float  # 20th percentile of the time
    high: float  # 80th percentile
    mib: float
    pct_of_floor: float


def points(rows: list[Row], form: str) -> list[Point]:
    """The timed steps of a form, in the order of the CSV."""
    steps: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        timed = row.kernel_operation_mode == "full" and row.status == "ok"
        if timed and row.kernel_name.startswith(f"{form} "):
            key = row.kernel_provider, row.extra_benchmark_config_str
            steps.setdefault(key, {})[row.metric_name] = row
    return [
        Point(
            name,
            record.config(x["speed"]),
            x["speed"].y_value_50,
            x["speed"].y_value_20,
            x["speed"].y_value_80,
            x["memory"].y_value_50,
            x["speed"].pct_of_floor,
        )
        for (name, _), x in steps.items()
    ]


def select(found: list[Point], base: Mapping[str, Any], **wanted: Any) -> list[Point]:
    """The points whose workload equals `base`, changed by `wanted`; `...` accepts any value."""
    wanted = {**base, **wanted}  # older CSVs have no `given_ref`
    return [p for p in found if all(x is ... or p.work.get(name, False) == x for name, x in wanted.items())]


def figure(rows: list[Row], form: str) -> plt.Figure:
    """Three charts: time and memory of the first workload against T, and the time of every loss."""
    found = points(rows, form)
    base = found[0].work
    chart, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    over_T = select(found, base, T=...)
    against_T(axes[0], over_T, "ms, forward and backward", lambda p: p.ms, timed=True)
    against_T(axes[1], over_T, "MiB at the peak, beyond the inputs", lambda p: p.mib)
    plain = {**base, "loss": "grpo"}
    losses = {
        **with_reference(found, base),
        "grpo": select(found, plain),
        "grpo, half\nwithout advantage": select(found, plain, inactive=0.5),
    }
    by_V = {f"V={V}": select(found, base, V=V) for V in sorted({p.work["V"] for p in found})}
    if len(by_V) > 1:
        grouped(axes[2], by_V, "% of the floor's speed", lambda p: p.pct_of_floor)
    else:
        grouped(axes[2], losses, "ms, forward and backward", lambda p: p.ms)
    sizes = " ".join(f"{name}={base[name]}" for name in ("T", "V", "H") if base[name])
    chart.suptitle(
        f"{form}, {base['loss']}, {base['dtype']}, {sizes} unless said otherwise\n"
        f"{rows[0].gpu_name}, torch {rows[0].torch}, Triton {rows[0].triton}, commit {rows[0].commit}"
        + without_figures(rows, form)
    )
    drawn = {label: x for ax in axes.flat for x, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    chart.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=6, frameon=False)
    return chart


def with_reference(found: list[Point], base: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The points of each loss with a reference, given by its logits (or hidden states) or by `ref_logps`."""
    return {
        loss + (",\ngiven ref_logps" if given_ref else ""): select(
            found, base, loss=loss, given_ref=given_ref
        )
        for loss in WITH_REFERENCE
        for given_ref in (False, True)
    }


def without_figures(rows: list[Row], form: str) -> str:
    """The providers that have no timing, each with the first word of its status."""
    drawn = {p.provider for p in points(rows, form)}
    of = (row for row in rows if row.kernel_name.startswith(f"{form} ") and row.kernel_provider not in drawn)
    missing = {row.kernel_provider: row.status.split(":")[0] for row in of}
    said = ", ".join(f"{name} ({why})" for name, why in missing.items())
    return f"\nnot drawn: {said}" if said else ""


def providers(found: list[Point]) -> list[str]:
    return [name for name in COLOURS if any(p.provider == name for p in found)]


def against_T(
    axes: Axes, found: list[Point], label: str, value: Callable[[Point], float], *, timed: bool = False
) -> None:
    """A line over T for each provider; bars if there is only one T. Times have a band and a floor."""
    lengths = sorted({p.work["T"] for p in found})
    if len(lengths) == 1:
        grouped(axes, {f"T={lengths[0]}": found}, label, value)
    for name in providers(found) if len(lengths) > 1 else ():
        line = sorted((p for p in found if p.provider == name), key=lambda p: p.work["T"])
        at = [p.work["T"] for p in line]
        axes.plot(at, [value(p) for p in line], marker="o", label=name, color=COLOURS[name])
        if timed:
            spread = [p.low for p in line], [p.high for p in line]
            axes.fill_between(at, *spread, color=COLOURS[name], alpha=0.25, linewidth=0)
    if timed:
        best = sorted({p.work["T"]: p.ms * p.pct_of_floor / 100 for p in found}.items())
        if len(best) > 1:
            axes.plot(*zip(*best, strict=True), "k--", label="floor")
        else:
            axes.axhline(best[0][1], color="k", linestyle="--", label="floor")
    if len(lengths) > 1:
        axes.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel=label)
        axes.set_xticks(lengths, [str(T) for T in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def grouped(
    axes: Axes, groups: Mapping[str, list[Point]], label: str, value: Callable[[Point], float]
) -> None:
    """Groups of bars, with one bar for each provider."""
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        axes.set_axis_off()
        return
    names = providers([p for group in groups.values() for p in group])
    width = 0.85 / len(names)
    for number, name in enumerate(names):
        bars = [
            (at + (number - (len(names) - 1) / 2) * width, value(p))
            for at, group in enumerate(groups.values())
            for p in group
            if p.provider == name
        ]
        drawn = axes.bar(*zip(*bars, strict=True), width, label=name, color=COLOURS[name])
        axes.bar_label(drawn, fmt=lambda x: f"{x:.0f}" if x >= 100 else f"{x:.3g}", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(label)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "csv",
        nargs="*",
        type=Path,
        default=sorted(record.RESULTS.glob("*.csv")),
        help="default: every run in benchmarks/results/",
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="folder; default: docs")
    args = parser.parse_args()
    for path in args.csv:
        if not record.is_run(path):
            continue
        rows = list(record.read(path))
        for form in ("logits", "linear"):
            if points(rows, form):
                to = args.output / f"benchmarks_{path.stem}_{form}.png"
                figure(rows, form).savefig(to, dpi=110)
                print(to)


if __name__ == "__main__":
    main()
