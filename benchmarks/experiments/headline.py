"""Predicts the headline shapes for this package and for each peer, before the first run on a GPU.

A prediction is a sum of bytes, FLOPs and launches, as for the experiments. A peer's products may run below
the rate of a plain product; the share is what was published. Nothing is predicted for providers that filter
gradients or that are compiled, because no count of their work tells the time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..speed.measure import Floors
from ..speed.plans import headline
from ..tables.markdown import markdown
from ..work.providers import PROVIDERS
from ..work.workload import Workload
from .costs import NOMINAL, Cost, linear

# Assumed for an H100: its data sheet's bandwidth less the share that an H200 loses in a copy, and the rate at
# which Liger's fused head was published to run.
GPUS = {"H100": Floors(3.0e12, 700e12), "H200": NOMINAL}
GPU_DEVICE = torch.device("cuda")


def passes(forward: float, backward: float, reference: float) -> Callable[[Workload], Cost]:
    """The cost of the logits form in bytes per element of each part."""
    return lambda work: Cost(forward + backward + reference * work.reference)


def products(policy: float = 8, *, logits: float = 0, share: float = 1.0) -> Callable[[Workload], Cost]:
    """The cost of the linear form: FLOPs per T V H at a `share` of the rate, and bytes per logit.

    A reference adds the FLOPs of its logits, and reads and writes them once.
    """

    def cost(work: Workload) -> Cost:
        flops = policy + 2 * work.reference
        return Cost(logits + 8 * work.reference * (logits > 0), flops / share, head_bytes=4, launches=100)

    return cost


def of_torch(work: Workload) -> Cost:
    """The mean takes one pass, the per-token form computes the logits again."""
    return products(6 if work.loss == "cross_entropy" else 8, logits=30)(work)


COSTS: dict[str, dict[str, Callable[[Workload], Cost]]] = {
    # One launch reads the logits, another reads them and writes the gradient.
    "logits": {
        **dict.fromkeys(("grpo_kernels", "grpo_kernels inplace", "trl", "liger"), passes(2, 4, 2)),
        "grpo_kernels selective_logps": passes(2, 4, 2),
        # A copy in fp32, log_softmax, the gradient of gather, that of log_softmax, and a copy in bf16.
        "eager": passes(14, 22, 14),
    },
    "linear": {
        "grpo_kernels": linear(),
        "grpo_kernels bf16 logits": linear(logits=2),
        "grpo_kernels linear_logps": lambda work: linear(products=8 + 2 * work.reference, one_pass=False)(
            work
        ),
        "liger fused": products(),
        "trl": products(logits=36),
        "verl": products(share=212 / 700),
        "quack": lambda work: products(6, logits=10 if work.loss == "cross_entropy" else 14)(work),
        "torch linear_cross_entropy": of_torch,
        "eager": products(6, logits=42),
    },
}
# Milliseconds that others have published for a loss without a reference, by form, T and V: Liger's README and
# its #1369 for the fused head and verl, TRL's #7244 for an earlier head of TRL, and for eager cross entropy.
PUBLISHED = {
    ("linear", 8192, 131072): {"liger fused": "H100: 50.2", "verl": "H100: 165.6"},
    ("linear", 4096, 128256): {"liger fused": "H200: 18.3"},
    ("linear", 8192, 151936): {"trl": "H100: 167", "eager": "H100: 59"},
    ("logits", 8192, 151936): {"trl": "H100: 0.89 forward"},
}
TARGETS = {
    ("linear", 8192, 131072): "H100: under 45",
    ("linear", 4096, 128256): "H200: under 18",
    ("logits", 8192, 151936): "H100: statistics under 0.85",
}


def statistics_ms(work: Workload, floors: Floors) -> float:
    """The predicted time of statistics with entropies: one pass over the logits."""
    return Cost(work.dtype.itemsize, launches=10).ms(work, floors)


def table() -> str:
    """A line for each headline shape and provider that has a prediction, with times on each GPU."""
    lines = []
    for work in headline():
        shape = work.form, work.T, work.V
        heads = [str(work)]
        for name, cost in COSTS[work.form].items():
            reason = PROVIDERS[work.form][name].refuses(work, GPU_DEVICE)
            if reason is not None or (work.entropy and not PROVIDERS[work.form][name].entropies):
                continue
            told = []
            for floors in GPUS.values():
                ms = f"{cost(work).ms(work, floors):.{1 if work.form == 'linear' else 2}f}"
                if name == "grpo_kernels selective_logps":
                    ms += f", statistics {statistics_ms(work, floors):.2f}"
                told.append(ms)
            alike = not work.reference and (work.form == "linear" or work.entropy)
            published = PUBLISHED.get(shape, {}).get(name, "") if alike else ""
            target = TARGETS.get(shape, "") if work.entropy and heads else ""
            lines.append((heads.pop() if heads else "", name, *told, published, target))
    columns = ("shape", "provider", *(f"{gpu}, ms" for gpu in GPUS), "published, ms", "our target, ms")
    return markdown(columns, lines, text_columns=2)
