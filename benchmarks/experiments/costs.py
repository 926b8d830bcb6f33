"""The predicted time of a variant, from what it has to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..speed.measure import Floors
from ..work.workload import Workload

# Of an H200, until a run has measured its own.
NOMINAL = Floors(4.3e12, 790e12)
MULTIPROCESSORS, L2_BYTES = 132, 60e6
L2_SHARE = 0.75  # a guess: what streams through the cache beside the rows takes the rest
LAUNCH_MS = 2e-3


class Cost(NamedTuple):
    """What a variant has to do, in the units of its workload."""

    bytes: float = 0.0  # per element of T V
    products: float = 0.0  # operations per T V H
    head_bytes: float = 0.0  # per element of the head's weight, V H
    launches: int = 29

    def ms(self, work: Workload, floors: Floors) -> float:
        elements = work.T * work.V
        moved = self.bytes * elements + self.head_bytes * work.V * work.H
        seconds = moved / floors.bytes_per_s + self.products * elements * work.H / floors.flop_per_s
        return 1e3 * seconds + LAUNCH_MS * self.launches


def linear(
    *, products: float | None = None, chunk: int = 8192, logits: int = 4
) -> Callable[[Workload], Cost]:
    """Logits of `logits` bytes are read twice and their gradient written, the last two for rows that learn;
    the weight's gradient is summed in fp32, chunk by chunk, and rounded at the end.
    """

    def cost(work: Workload) -> Cost:
        read = (1 - work.masked) * (1 + work.reference)
        needed = 2 * read + 4 * work.learning if products is None else products
        sums = 8 * (math.ceil(work.T * work.learning / chunk) - 1) + 4
        return Cost(logits * (read + work.learning) + 2 * work.learning, needed, sums + 6, launches=60)

    return cost


def where_they_stand(work: Workload) -> Cost:
    """All products; and zeros are written for rows without a gradient."""
    cost = linear(products=6)(work)
    return cost._replace(bytes=cost.bytes + 2 * (1 - work.learning))


def logits(bytes_per_element: float, launches: int = 29) -> Callable[[Workload], Cost]:
    return lambda work: Cost(bytes_per_element, launches=launches)


def read_twice(resident: int) -> Callable[[Workload], Cost]:
    """Rows of so many blocks per multiprocessor: the second read is free if all of them fit the L2 cache."""

    def cost(work: Workload) -> Cost:
        at_work = MULTIPROCESSORS * resident * work.V * work.dtype.itemsize
        return Cost(6 if at_work < L2_SHARE * L2_BYTES else 8)

    return cost
