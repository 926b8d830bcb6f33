"""Times the losses on a CPU in fp32, forward and backward. Each provider is first compared with fp64.

    make bench

From logits: 2048 tokens and 32,000 vocabulary entries. From hidden states: 4096 tokens, 512 dimensions and
32,000 vocabulary entries. Memory is the largest growth of the process during one step. `python -m benchmarks`
measures more workloads, also forward and backward separately, and writes a CSV.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.speed import gate, measure
from benchmarks.speed.plans import on_cpu
from benchmarks.work.batch import Batch, make_batch
from benchmarks.work.providers import PROVIDERS
from benchmarks.work.workload import Workload

ROUNDS = 5
CPU = torch.device("cpu")
LOGITS, LINEAR, *_ = on_cpu()
HALF_IDLE = replace(LINEAR, inactive=0.5)
ROWS = [
    *((LOGITS, name) for name in ("eager", "trl", "grpo_kernels", "grpo_kernels inplace")),
    *((LINEAR, name) for name in ("eager", "trl", "grpo_kernels")),
    *((HALF_IDLE, name) for name in ("grpo_kernels", "grpo_kernels skip_inactive")),
]

batch_of = cache(make_batch)


@pytest.mark.parametrize(("work", "name"), ROWS, ids=str)
def test_step(benchmark, work: Workload, name: str) -> None:
    provider = PROVIDERS[work.form][name]
    reason = provider.reason_against(work, CPU)
    if reason is not None:
        pytest.skip(reason)
    batch: Batch = batch_of(work)
    verdict = gate.check(provider, batch)
    assert verdict.wrong is None, f"not timed: {verdict.wrong}"

    subject = measure.Subject(provider, batch)
    mib = measure.memory(subject, CPU)
    benchmark.extra_info |= {"memory_mib": round(mib), "max_rel_err": verdict.error}
    benchmark.pedantic(subject.step, setup=subject.prepare, rounds=ROUNDS, warmup_rounds=1)
    print(f"\n{work}: {name}: median {1e3 * benchmark.stats['median']:.0f} ms, memory {mib:.0f} MiB")
