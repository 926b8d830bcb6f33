"""Finds races: accesses whose order the program does not determine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .memory import Access, Space


class Touches(NamedTuple):
    """Accesses, split into units of memory. Each array has one element per thread and unit.

    A unit is as wide as the narrowest access. Accesses are aligned, so none touches half of a unit.
    """

    place: np.ndarray  # offset of the unit
    thread: np.ndarray
    block: np.ndarray
    epoch: np.ndarray
    store: np.ndarray
    access: np.ndarray  # index of the access


def race(space: Space, threads_per_block: int) -> str | None:
    """Describe a race between the recorded accesses, if there is one.

    Two accesses of a byte race if different threads make them, one is a store, and no barrier separates them.
    A barrier (`bar.sync`) orders the threads of one block only. PTX ISA, "Memory Consistency Model".
    """
    accesses = [access for access in space.accesses if space.stored[access.touched].any()]
    if not accesses:
        return None
    found = touches(space, accesses, threads_per_block)
    within = conflict(found, (found.place, found.block, found.epoch), found.thread)
    pair = within or conflict(found, (found.place,), found.block)
    if pair is None:
        return None
    who = [f"program {found.block[i]}, thread {found.thread[i] % threads_per_block}" for i in pair]
    lines = [f"{name}, {accesses[found.access[i]].where}" for name, i in zip(who, pair, strict=True)]
    return f"race in {space.name} memory, {space.describe(int(found.place[pair[0]]))}: {lines[0]}; {lines[1]}"


def touches(space: Space, accesses: Sequence[Access], threads_per_block: int) -> Touches:
    """Return the touches of units that were stored to."""
    unit = min(access.nbytes for access in accesses)
    parts = []
    for index, access in enumerate(accesses):
        steps = np.arange(0, access.nbytes, unit)
        place = (access.offsets[:, None] + steps).ravel()
        thread, epoch = (np.repeat(x, len(steps)) for x in (access.threads, access.epochs))
        same = (np.full(len(place), value) for value in (access.store, index))
        part = Touches(place, thread, thread // threads_per_block, epoch, *same)
        kept = space.stored[place]
        parts.append([x[kept] for x in part])
    return Touches(*map(np.concatenate, zip(*parts, strict=True)))


def conflict(found: Touches, keys: Sequence[np.ndarray], who: np.ndarray) -> tuple[int, int] | None:
    """Return the indices of a store and of another touch with equal keys and a different `who`, or None."""
    order = np.lexsort(keys)
    changes = np.any([key[order][1:] != key[order][:-1] for key in keys], 0)
    starts = np.flatnonzero(np.r_[True, changes])  # of groups with equal keys
    different = np.minimum.reduceat(who[order], starts) != np.maximum.reduceat(who[order], starts)
    conflicts = different & np.logical_or.reduceat(found.store[order], starts)
    if not conflicts.any():
        return None
    group = np.split(order, starts[1:])[int(np.argmax(conflicts))]
    store = group[found.store[group]][0]
    return store, group[who[group] != who[store]][0]
