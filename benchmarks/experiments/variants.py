"""The types of experiment and variant, and the changes to this package that make a variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels import linear_losses, selective_logps
from grpo_kernels.tokens import dispatch

from ..speed.measure import Floors
from ..work.batch import Batch
from ..work.providers import Provider, ours, ours_linear
from ..work.workload import Workload
from .costs import Cost

GPU = torch.device("cuda")


@dataclass(frozen=True)
class Variant(Provider):
    """A provider that is this package with some change, and its predicted cost."""

    experiment: str = ""
    cost: Callable[[Workload], Cost] = lambda work: Cost()
    changes: Callable[[], AbstractContextManager[object]] = nullcontext  # active while the variant runs
    profile: bool = False  # leaves a stage out, so its result is wrong and not compared with fp64


@dataclass(frozen=True)
class Experiment:
    """Variants that are compared on the same workloads."""

    name: str
    works: tuple[Workload, ...]
    variants: tuple[Variant, ...]

    def gain(self, floors: Floors) -> float:
        """The largest predicted gain of a variant over another, as a fraction of the slower one's time.

        0 if the variants only profile, because then none of them can become a default.
        """
        gains = [0.0]
        for work in self.works:
            able = [v for v in self.variants if not v.profile and v.refuses(work, GPU) is None]
            times = [variant.cost(work).ms(work, floors) for variant in able]
            if len(times) > 1 and not any(variant.profile for variant in self.variants):
                gains.append(1 - min(times) / max(times))
        return max(gains)

    def pairs(self) -> Iterator[tuple[Workload, Variant]]:
        for work in self.works:
            for variant in self.variants:
                yield work, replace(variant, experiment=self.name)


@contextmanager
def blocks(block: int, num_warps: int, *kernels: str, keep: bool = False) -> Iterator[None]:
    """Inside, `kernels` process `block` columns at a time with `num_warps` warps.

    With `keep`, the fused kernel asks the L2 cache to keep the row.
    """
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
    """Inside, the linear form computes logits again in the backward."""
    return mock.patch.object(linear_losses, "fusible", lambda spec, dtype: False)


def tokens_in_torch() -> AbstractContextManager[object]:
    """Inside, the loss of each token is computed in PyTorch, not in a Triton kernel."""
    return mock.patch.object(dispatch, "has_token_kernels", lambda spec, logps, backend: False)


def reference_by_itself(batch: Batch, logits: Tensor) -> Tensor:
    """The loss with the reference's log-probabilities from a separate launch."""
    assert batch.ref_logits is not None
    ref_logps = selective_logps(batch.ref_logits[:, :-1], batch.ids, mask=batch.mask)
    return ours(batch._replace(ref_logits=None), logits, ref_logps=ref_logps)


def in_chunks(tokens: int) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    """The linear form with chunks of `tokens` tokens."""
    return lambda batch, hidden, weight: ours_linear(batch, hidden, weight, chunk_tokens=tokens)


def uncompacted(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """The linear form without reordering rows by whether they have a gradient."""
    return ours_linear(batch, hidden, weight, compact=False)
