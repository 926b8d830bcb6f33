"""Variants of this package: what an experiment consists of, and how variants differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import Tensor

from grpo_kernels import backend, linear_losses, selective_logps

from ..work.batch import Batch
from ..work.providers import Provider, ours, ours_linear
from ..work.workload import Workload
from .costs import Cost


@dataclass(frozen=True)
class Variant(Provider):
    experiment: str = ""
    cost: Callable[[Workload], Cost] = lambda work: Cost()
    changes: Callable[[], AbstractContextManager[object]] = nullcontext  # from the first call to the last


@dataclass(frozen=True)
class Experiment:
    name: str
    works: tuple[Workload, ...]
    variants: tuple[Variant, ...]

    def pairs(self) -> Iterator[tuple[Workload, Variant]]:
        for work in self.works:
            for variant in self.variants:
                yield work, replace(variant, experiment=self.name)


@contextmanager
def blocks(block: int, num_warps: int, *kernels: str, keep: bool = False) -> Iterator[None]:
    """`block` columns of a row at a time, by `num_warps`; `keep`: the L2 cache is asked to keep the row."""
    from grpo_kernels.kernels import dlogits, fused, launch, row_stats

    def chosen(*args: Any, **options: Any) -> launch.Blocking:
        shape = launch.blocking(*args, **options, num_warps=num_warps)
        return shape._replace(BLOCK=block, TAIL=min(block, 8 * shape.THREADS))

    modules = {"row_stats": row_stats, "dlogits": dlogits, "fused": fused}
    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.object(modules[kernel], "blocking", chosen))
        stack.enter_context(mock.patch.object(fused, "KEEP", keep))
        yield


def two_passes() -> AbstractContextManager[object]:
    return mock.patch.object(linear_losses, "fusible", lambda spec, dtype: False)


def tokens_in_torch() -> AbstractContextManager[object]:
    return mock.patch.object(backend, "has_token_kernels", lambda spec, logps, backend: False)


def reference_by_itself(batch: Batch, logits: Tensor) -> Tensor:
    assert batch.ref_logits is not None
    ref_logps = selective_logps(batch.ref_logits[:, :-1], batch.ids, mask=batch.mask)
    return ours(batch._replace(ref_logits=None), logits, ref_logps=ref_logps)


def in_chunks(tokens: int) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    return lambda batch, hidden, weight: ours_linear(batch, hidden, weight, chunk_tokens=tokens)


def uncompacted(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return ours_linear(batch, hidden, weight, compact=False)
