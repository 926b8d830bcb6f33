"""Predicts the time of a variant from the bytes, FLOPs and launches that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..speed.measure import Floors
from ..work.workload import Workload

# Rates assumed for an H200. A run measures its own.
NOMINAL = Floors(4.3e12, 790e12)
MULTIPROCESSORS, L2_BYTES = 132, 60e6
L2_SHARE = 0.75  # of the cache for rows that will be read again; a guess
LAUNCH_MS = 2e-3


class Cost(NamedTuple):
    """Bytes, FLOPs and launches of a variant, relative to the sizes of its workload."""

    bytes: float = 0.0  # per element of T V
    products: float = 0.0  # FLOPs per T V H
    head_bytes: float = 0.0  # per element of the head's weight, V H
    launches: int = 29

    def ms(self, work: Workload, floors: Floors) -> float:
        """The predicted time in milliseconds, if nothing overlaps."""
        elements = work.T * work.V
        moved = self.bytes * elements + self.head_bytes * work.V * work.H
        seconds = moved / floors.bytes_per_s + self.products * elements * work.H / floors.flop_per_s
        return 1e3 * seconds + LAUNCH_MS * self.launches


def linear(
    *, products: float | None = None, chunk: int = 8192, logits: int = 4, one_pass: bool = True
) -> Callable[[Workload], Cost]:
    """The cost of the linear form with `logits` bytes per logit.

    Logits of all rows are read once. For rows with a gradient, they are read again and the gradient is
    written. The weight's gradient is written in bf16 by a single chunk in one pass. Else it is summed in fp32
    over chunks, and rounded at the end.
    """

    def cost(work: Workload) -> Cost:
        read = (1 - work.masked) * (1 + work.reference)
        needed = 2 * read + 4 * work.learning if products is None else products
        chunks = math.ceil(work.T * work.learning / chunk)
        head_bytes = 2 if one_pass and chunks == 1 else 8 * (chunks - 1) + 4 + 6
        return Cost(logits * (read + work.learning) + 2 * work.learning, needed, head_bytes, launches=60)

    return cost


def where_they_stand(work: Workload) -> Cost:
    """The cost without reordering: products for all rows, and zeros written for rows without a gradient."""
    cost = linear(products=6)(work)
    return cost._replace(bytes=cost.bytes + 2 * (1 - work.learning))


def logits(bytes_per_element: float, launches: int = 29) -> Callable[[Workload], Cost]:
    """The cost of the logits form, in bytes per element."""
    return lambda work: Cost(bytes_per_element, launches=launches)


def two_kernels(work: Workload) -> Cost:
    """The cost of two launches: reading policy and reference, then the policy, and writing the gradient."""
    return Cost(work.dtype.itemsize * (3 + work.reference))


def without_bytes(saved: float) -> Callable[[Workload], Cost]:
    """The cost of two launches without a stage that moves `saved` bytes per element."""
    return lambda work: Cost(two_kernels(work).bytes - saved)


def read_twice(resident: int) -> Callable[[Workload], Cost]:
    """The cost of one kernel that reads rows twice, with `resident` blocks per multiprocessor.

    The second read is free if the rows of all resident blocks fit into the L2 cache.
    """

    def cost(work: Workload) -> Cost:
        at_work = MULTIPROCESSORS * resident * work.V * work.dtype.itemsize
        return Cost(6 if at_work < L2_SHARE * L2_BYTES else 8)

    return cost
