"""Times the losses on a CPU in fp32, forward and backward. Each provider is first compared with fp64.

    make bench

From logits: 2048 tokens and 32,000 vocabulary entries. From hidden states: 4096 tokens, 512 dimensions and
32,000 vocabulary entries. A short batch has 1024 tokens and 14 vocabulary entries. The table at the end
compares each provider with compiled eager PyTorch in the same run. Memory is the largest growth of the
process during one step. `python -m benchmarks` measures more workloads, also forward and backward separately,
and writes a CSV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.speed import gate, measure
from benchmarks.speed.plans import on_cpu
from benchmarks.tables.markdown import markdown
from benchmarks.tables.record import device_name
from benchmarks.work.batch import Batch, make_batch
from benchmarks.work.providers import PROVIDERS, Provider, ours
from benchmarks.work.workload import LOSSES, Workload
from grpo_kernels.reference import reference_loss

ROUNDS = 7
SHORT_ROUNDS = 100  # a step takes about a millisecond
CPU = torch.device("cpu")


def eager_with_metrics(batch: Batch, logits: Tensor) -> Tensor:
    """The loss with all metrics, including exact KL and entropy, in eager PyTorch."""
    assert batch.ref_logits is not None
    return reference_loss(
        *(logits, batch.ids, batch.advantages),
        spec=LOSSES[batch.work.loss],
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logits=batch.ref_logits[:, :-1],
    ).loss


EXTRA = {
    "reference_loss": Provider("reference_loss", eager_with_metrics),
    "grpo_kernels + entropy": Provider("grpo_kernels + entropy", partial(ours, return_entropy=True)),
}

COMPILED = ("torch.compile", "torch.compile + exact KL")
EAGER = ("eager", "eager + exact KL")
OURS = ("grpo_kernels", "grpo_kernels inplace")
LOGITS, LINEAR, *_ = on_cpu()  # both with a reference
PLAIN_LOGITS, PLAIN_LINEAR = (replace(work, loss="grpo") for work in (LOGITS, LINEAR))
SHORT = replace(LOGITS, T=1024, V=14)
ROWS = [
    (work, name)
    for work, names in (
        (LOGITS, (*EAGER, *COMPILED, *OURS)),
        (replace(LOGITS, loss="grpo_kl"), (*EAGER, *COMPILED, *OURS)),
        (replace(LOGITS, given_ref=True), (EAGER[0], COMPILED[0], *OURS)),
        (PLAIN_LOGITS, (EAGER[0], COMPILED[0], "trl", *OURS)),
        (LINEAR, (*EAGER, *COMPILED, OURS[0])),
        (PLAIN_LINEAR, (EAGER[0], COMPILED[0], "trl", OURS[0])),
        (replace(PLAIN_LINEAR, inactive=0.5), (COMPILED[0], OURS[0], "grpo_kernels skip_inactive")),
        (SHORT, (*EAGER, *COMPILED, "reference_loss", OURS[0], "grpo_kernels + entropy")),
    )
    for name in names
]


class Result(NamedTuple):
    work: Workload
    name: str
    ms: float  # median
    mib: float


@pytest.fixture(scope="module")
def results() -> Iterator[list[Result]]:
    """Collects the results, and prints them side by side at the end."""
    found: list[Result] = []
    yield found
    print(f"\n\n{device_name(CPU)}, torch {torch.__version__}\n\n{side_by_side(found)}")


def side_by_side(results: list[Result]) -> str:
    """A table with the time relative to compiled eager, and the memory in MiB and in tensors of logits."""
    ms = {(result.work, result.name): result.ms for result in results}
    lines, before = [], None
    for work, name, median, mib in results:
        bases = (ms.get((work, base)) for base in COMPILED)
        lines.append((
            "" if work == before else str(work),
            name,
            f"{median:.4g}",
            *("" if base is None else f"{median / base:.2f}" for base in bases),
            f"{mib:.0f}",
            f"{mib * 2**20 / (work.T * work.V * work.dtype.itemsize):.2f}",
        ))  # fmt: skip
        before = work
    ratios = (f"time / {name}" for name in COMPILED)
    head = ("workload", "provider", "median ms", *ratios, "MiB", "tensors of logits")
    return markdown(head, lines, text_columns=2)


@lru_cache(maxsize=1)  # the rows of a workload follow each other
def batch_of(work: Workload) -> Batch:
    torch.compiler.reset()  # after several sizes, Dynamo would silently fall back to eager
    return make_batch(work)


@pytest.mark.parametrize(("work", "name"), ROWS, ids=str)
def test_step(benchmark, results: list[Result], work: Workload, name: str) -> None:
    provider = (PROVIDERS[work.form] | EXTRA)[name]
    reason = provider.reason_against(work, CPU)
    if reason is not None:
        pytest.skip(reason)
    batch = batch_of(work)
    verdict = gate.check(provider, batch)  # also compiles
    assert verdict.wrong is None, f"not timed: {verdict.wrong}"

    subject = measure.Subject(provider, batch)
    mib = measure.memory(subject, CPU)
    benchmark.extra_info |= {"memory_mib": round(mib), "max_rel_err": verdict.error}
    rounds = SHORT_ROUNDS if work == SHORT else ROUNDS
    benchmark.pedantic(subject.step, setup=subject.prepare, rounds=rounds, warmup_rounds=1)
    results.append(Result(work, name, 1e3 * benchmark.stats["median"], mib))
    print(f"\n{work}: {name}: median {results[-1].ms:.4g} ms, memory {mib:.0f} MiB")
