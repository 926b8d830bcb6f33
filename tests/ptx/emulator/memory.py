"""Global and shared memory. Every access is checked and recorded.

An address space is an array of bytes. `locate` turns the addresses of the program into offsets there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .errors import Fault

ALIGNMENT = 16  # of the widest access, in bytes

UNWRITTEN = {2: 0x7FDB, 4: 0x7FDBDBDB, 8: 0x7FFBDBDBDBDBDBDB}
"""Bits that mark a floating-point element as unwritten, by element size: a NaN that no operation returns."""


class Access(NamedTuple):
    """What one instruction loaded or stored: an element of each array per thread."""

    offsets: np.ndarray
    nbytes: int
    threads: np.ndarray  # number of the thread in the launch
    epochs: np.ndarray  # number of barriers that the thread has passed
    store: bool
    where: str

    @property
    def touched(self) -> np.ndarray:
        """Offsets of all bytes, `[threads, nbytes]`."""
        return self.offsets[:, None] + np.arange(self.nbytes)


class Space:
    """Bytes, which of them have been written, and a record of all accesses."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.data = np.zeros(-(-size // ALIGNMENT) * ALIGNMENT, np.uint8)
        self.known = np.zeros(self.data.size, bool)  # has a value: may be read
        self.stored = np.zeros(self.data.size, bool)  # by this launch
        self.accesses: list[Access] = []

    def load(self, access: Access, dtype: np.dtype) -> np.ndarray:
        """Return `[threads, elements]`. Raise Fault if a byte has never been written."""
        self.accesses.append(access)
        unknown = ~self.known[access.touched].all(1)
        if unknown.any():
            thread, place = access.threads[unknown][0], self.describe(int(access.offsets[unknown][0]))
            raise Fault(
                f"{access.where}: thread {thread} of the launch reads {self.name} memory that was never "
                f"written, {place}"
            )
        return self.data.view(dtype)[self.elements(access, dtype)]

    def store(self, access: Access, values: np.ndarray) -> None:
        """Write `[threads, elements]`."""
        self.accesses.append(access)
        self.known[access.touched] = self.stored[access.touched] = True
        self.data.view(values.dtype)[self.elements(access, values.dtype)] = values

    @staticmethod
    def elements(access: Access, dtype: np.dtype) -> np.ndarray:
        """Return the indices of the elements, `[threads, elements]`."""
        return access.offsets[:, None] // dtype.itemsize + np.arange(access.nbytes // dtype.itemsize)

    def describe(self, offset: int) -> str:
        """Say what is at an offset."""
        return f"byte {offset}"


def check_alignment(addresses: np.ndarray, nbytes: int, where: str) -> None:
    """Raise Fault unless the addresses are multiples of `nbytes`. PTX ISA, "Memory Consistency Model"."""
    if (addresses % nbytes).any():
        raise Fault(f"{where}: an address is not a multiple of {nbytes} bytes")


class SharedMemory(Space):
    """The shared memory of several blocks, one after the other. Nothing is written at first."""

    def forget(self) -> None:
        """Start with new blocks: nothing is written, and no access is recorded."""
        self.known[:] = False
        self.stored[:] = False
        self.accesses.clear()

    BASE = 1024  # address of the first byte: an address of 0 is out of bounds

    def __init__(self, size: int, blocks: int) -> None:
        self.size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self.limit = size
        super().__init__("shared", self.size * blocks)

    def locate(self, addresses: np.ndarray, nbytes: int, where: str, blocks: np.ndarray) -> np.ndarray:
        """Return the offsets of addresses in the memory of the given blocks.

        Raise Fault if an access is misaligned or out of bounds.
        """
        offsets = addresses.astype(np.int64) - self.BASE
        if ((offsets < 0) | (offsets + nbytes > self.limit)).any():
            raise Fault(f"{where}: an access beyond the {self.limit} bytes of shared memory")
        check_alignment(offsets, nbytes, where)
        return offsets + blocks * self.size


class Parameters:
    """The arguments of a kernel, read only, one after the other at addresses of their own."""

    def __init__(self, arguments: Mapping[str, bytes]) -> None:
        self.addresses: dict[str, int] = {}
        self.sizes: dict[int, int] = {}  # by address
        data = b""
        for name, raw in arguments.items():
            data += bytes(-len(data) % len(raw))
            self.addresses[name] = len(data)
            self.sizes[len(data)] = len(raw)
            data += raw
        self.data = np.frombuffer(data + bytes(-len(data) % ALIGNMENT), np.uint8)

    def load(self, addresses: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
        """Return whole arguments. Raise Fault if there is none of that size at an address."""
        for address in np.unique(addresses):
            if self.sizes.get(int(address)) != dtype.itemsize:
                raise Fault(f"{where}: no argument of {dtype.itemsize} bytes at {address}")
        return self.data.view(dtype)[addresses // dtype.itemsize]


class Run(NamedTuple):
    """Adjacent elements of one tensor, or of several with the same memory."""

    start: int  # address
    stop: int
    name: str


class GlobalMemory(Space):
    """The elements of tensors, and nothing between or around them.

    Args:
        tensors: CPU tensors by the names of the kernel's parameters. They may have any strides and may share
            memory. Their memory is copied, and `write_back` returns what was stored.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.runs = merged(sorted(run for name, tensor in tensors for run in runs(name, tensor)))
        self.starts = np.array([run.start for run in self.runs], np.int64)
        self.stops = np.array([run.stop for run in self.runs], np.int64)
        # Each run keeps its address modulo ALIGNMENT.
        places, end = [], 0
        for run in self.runs:
            places.append(-(-end // ALIGNMENT) * ALIGNMENT + run.start % ALIGNMENT)
            end = places[-1] + run.stop - run.start
        self.places = np.array(places, np.int64)
        super().__init__("global", end)
        for run, place in zip(self.runs, places, strict=True):
            span = slice(place, place + run.stop - run.start)
            self.data[span] = memory_of(run)
            self.known[span] = True
        for _, tensor in tensors:
            self.forget_unwritten(tensor)

    def forget_unwritten(self, tensor: torch.Tensor) -> None:
        """Mark the elements that hold UNWRITTEN as not known."""
        size = tensor.element_size()
        if not tensor.is_floating_point():
            return
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        found = (tensor.detach().view(integer) == UNWRITTEN[size]).nonzero()
        if len(found):
            strides = torch.tensor(tensor.stride(), dtype=torch.int64)  # empty, if there is one element
            addresses = tensor.data_ptr() + size * (found * strides).sum(1).numpy()
            offsets = self.locate(addresses, size, "")
            self.known[offsets[:, None] + np.arange(size)] = False

    def locate(self, addresses: np.ndarray, nbytes: int, where: str) -> np.ndarray:
        """Return the offsets of addresses. Raise Fault if an access is misaligned or out of bounds."""
        if not self.runs:
            raise Fault(f"{where}: an access to global memory, and no tensor has elements")
        addresses = addresses.astype(np.int64)
        index = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (index < 0) | (addresses + nbytes > self.stops[index])
        if outside.any():
            near = self.runs[max(int(index[outside][0]), 0)]
            first = int(addresses[outside][0]) - near.start
            raise Fault(
                f"{where}: an access to bytes {first} to {first + nbytes - 1} of a contiguous part of "
                f"{near.name}, which has {near.stop - near.start} bytes"
            )
        check_alignment(addresses, nbytes, where)
        return addresses - self.starts[index] + self.places[index]

    def write_back(self) -> None:
        """Copy what was stored to the tensors."""
        for run, span in self.spans():
            if self.stored[span].any():
                memory_of(run)[:] = self.data[span]

    def unwritten(self) -> str | None:
        """Describe the elements that have no value in a part of a tensor, if there is one."""
        for run, span in self.spans():
            missing = np.flatnonzero(~self.known[span])
            if len(missing):
                count = f"{len(missing)} of {run.stop - run.start} bytes of a contiguous part"
                return f"elements of {run.name} were never written: {count}, the first at {missing[0]}"
        return None

    def spans(self) -> Iterator[tuple[Run, slice]]:
        """Yield each run and its place in `data`."""
        for run, place in zip(self.runs, self.places, strict=True):
            yield run, slice(int(place), int(place) + run.stop - run.start)

    def describe(self, offset: int) -> str:
        index = int(np.searchsorted(self.places, offset, "right")) - 1
        return f"byte {offset - int(self.places[index])} of a contiguous part of {self.runs[index].name}"


def runs(name: str, tensor: torch.Tensor) -> Iterator[Run]:
    """Yield the runs of adjacent elements of a tensor."""
    if tensor.numel() == 0:
        return
    sizes = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and stride]
    sizes.sort(key=lambda size: size[1])
    length = 1
    while sizes and sizes[0][1] == length:
        length *= sizes.pop(0)[0]
    offsets = np.zeros(1, np.int64)
    for n, stride in sizes:
        offsets = (offsets[:, None] + np.arange(n) * stride).ravel()
    item = tensor.element_size()
    for offset in offsets:
        start = tensor.data_ptr() + int(offset) * item
        yield Run(start, start + length * item, name)


def merged(found: Sequence[Run]) -> list[Run]:
    """Join runs that overlap. The runs are in the order of addresses."""
    result: list[Run] = []
    for run in found:
        last = result[-1] if result else None
        if last and run.start < last.stop:
            name = last.name if run.name in last.name.split(" and ") else f"{last.name} and {run.name}"
            result[-1] = Run(last.start, max(last.stop, run.stop), name)
        else:
            result.append(run)
    return result


def memory_of(run: Run) -> np.ndarray:
    """Return the bytes of a run, without a copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * (run.stop - run.start)).from_address(run.start))
