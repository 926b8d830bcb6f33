"""Measure time and peak memory of one loss, forward and backward, in a new process.

    python examples/loss_cost.py fused log_ratio 1024 32000

The process is new because memory that an earlier run left in the allocator would hide what this run needs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import LossSpec, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import peak_memory

MIB = 2**20
REPEATS = 5


def bare_loss(
    logits: Tensor, completion_ids: Tensor, advantages: Tensor, *, spec: LossSpec, ref_logits: Tensor
) -> tuple[Tensor]:
    """The least that eager PyTorch has to compute: two log_softmax, without exact KL or any other metric.

    On-policy every loss of the demo has this gradient, so `spec` is ignored.
    """

    def logps(x: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]

    with torch.no_grad():
        ref_logps = logps(ref_logits)
    return (-(advantages[:, None] * (logps(logits) - ref_logps)).mean(),)


KINDS: dict[str, tuple[Callable, dict]] = {
    "fused": (grpo_loss, {}),
    "fused, inplace=True": (grpo_loss, {"inplace": True}),
    "eager": (reference_loss, {}),
    "eager, no metrics": (bare_loss, {}),
}


class Cost(NamedTuple):
    latency_ms: float  # median
    peak_mib: float  # above the inputs; includes the gradient of the logits


def measure_cost(kind: str, loss: str, tokens: int, vocab: int) -> Cost:
    """Run `cost_of` in a new process."""
    command = [sys.executable, __file__, kind, loss, str(tokens), str(vocab)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Cost(**json.loads(output))


def cost_of(kind: str, loss: str, tokens: int, vocab: int) -> Cost:
    """Measure one on-policy sequence of fp32 logits. `kind` is a key of KINDS."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    source = torch.randn(1, tokens, vocab, device=device, requires_grad=True)
    ref_logits = torch.randn(1, tokens, vocab, device=device)
    completion_ids = torch.randint(vocab, (1, tokens), device=device)
    advantages = torch.ones(1, device=device)
    loss_fn, options = KINDS[kind]
    spec = LossSpec.preset(loss)

    def step(logits: Tensor) -> None:
        first = slice(logits.shape[1])
        ids, reference = completion_ids[:, first], ref_logits[:, first]
        value = loss_fn(logits, ids, advantages, spec=spec, ref_logits=reference, **options)[0]
        torch.autograd.grad(value, logits)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def new_logits(length: int = tokens) -> Tensor:
        """Logits that are not a leaf, as from a model, so that a loss may overwrite them."""
        return source[:, :length].clone()

    step(new_logits(1))  # compiles kernels, loads libraries
    first = new_logits()
    peak_bytes = peak_memory(lambda: step(first), device)
    latencies_ms = []
    for _ in range(REPEATS):
        logits = new_logits()
        start = time.perf_counter()
        step(logits)
        latencies_ms.append(1e3 * (time.perf_counter() - start))
    return Cost(statistics.median(latencies_ms), peak_bytes / MIB)


if __name__ == "__main__":
    kind, loss, tokens, vocab = sys.argv[1:]
    print(json.dumps(cost_of(kind, loss, int(tokens), int(vocab))._asdict()))
