"""Records every address that a kernel reads or writes in Triton's interpreter.

Compiled kernels execute the same loads and stores. TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Traffic:
    """Counts reads and writes of each element of every storage that a kernel gets.

    "Rereads" are the reads of an element after the first one of the same launch. A cache may serve them.
    """

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}  # by address; kept alive, so no address is reused
        self.current: set[int] = set()  # addresses of the storages that the running kernel got
        self.elements: dict[int, Tensor] = {}  # by address: whether each element is in a tensor that it got
        self.counts: dict[str, dict[int, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        self.counts = {"reads": {}, "writes": {}, "rereads": {}}

    @contextlib.contextmanager
    def launch(self, arguments: Any) -> Iterator[None]:
        """Is active while the kernel runs with these arguments."""
        self.current.clear()
        self.elements.clear()
        self.given(arguments)
        before = {start: counts.clone() for start, counts in self.counts["reads"].items()}
        yield
        for start in self.current & self.counts["reads"].keys():
            reads = self.counts["reads"][start] - before.get(start, 0)
            earlier = self.counts["rereads"].get(start, 0)
            self.counts["rereads"][start] = earlier + (reads - 1).clamp(min=0)

    def given(self, arguments: Any) -> None:
        """Notes the storages and elements of a kernel's tensor arguments."""
        for x in arguments:
            if isinstance(x, tuple):
                self.given(x)
            elif isinstance(x, Tensor):
                flat = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                self.storages.setdefault(flat.data_ptr(), flat)
                self.current.add(flat.data_ptr())
                given = self.elements.setdefault(flat.data_ptr(), torch.zeros(flat.numel(), dtype=torch.bool))
                sizes = [n if stride else min(1, n) for n, stride in zip(x.shape, x.stride(), strict=True)]
                given.as_strided(sizes, x.stride(), x.storage_offset()).fill_(True)

    def record(self, kind: str, pointers: Any, mask: Any) -> None:
        """Counts an access. Fails if it is outside of the tensors that the kernel got."""
        # In NumPy, because PyTorch's overhead per call is larger than the work for one block.
        addresses = pointers.data[mask.data].astype("int64").ravel()
        for start in self.current:
            storage = self.storages[start]
            offsets = addresses - start
            here = (offsets >= 0) & (offsets < storage.numel() * storage.element_size())
            if here.any():
                elements, between = np.divmod(offsets[here], storage.element_size())
                assert not between.any(), "an address between two elements"
                outside = elements[~self.elements[start].numpy()[elements]]
                assert not len(outside), f"{len(outside)} {kind} outside the elements of a tensor"
                if start not in self.counts[kind]:
                    self.counts[kind][start] = torch.zeros(storage.numel(), dtype=torch.long)
                np.add.at(self.counts[kind][start].numpy(), elements, 1)
                addresses = addresses[~here]
        assert not len(addresses), (
            f"{len(addresses)} {kind} outside of every tensor that the kernel was given"
        )

    def of(self, kind: str, x: Tensor) -> Tensor:
        """How often each element of `x` was read or written."""
        counts = self.counts[kind].get(x.untyped_storage().data_ptr())
        return (
            torch.zeros(x.shape, dtype=torch.long)
            if counts is None
            else counts.as_strided(x.shape, x.stride(), x.storage_offset())
        )

    def reads(self, x: Tensor) -> Tensor:
        return self.of("reads", x)

    def writes(self, x: Tensor) -> Tensor:
        return self.of("writes", x)

    def stays_within(self, x: Tensor) -> bool:
        """Whether every access to the storage of `x`, which is a view, was to an element of `x`."""
        totals = {kind: counts.get(x.untyped_storage().data_ptr()) for kind, counts in self.counts.items()}
        return all(total is None or total.sum() == self.of(kind, x).sum() for kind, total in totals.items())


@contextlib.contextmanager
def recording() -> Iterator[Traffic]:
    """Inside, the reads and writes of every launched kernel are counted."""
    seen = Traffic()
    launch = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def launch_seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with seen.launch((*args, *kwargs.values())):
            return launch(self, *args, **kwargs)

    def load_seen(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.record("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def store_seen(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.record("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", launch_seen),
        mock.patch.object(InterpreterBuilder, "create_masked_load", load_seen),
        mock.patch.object(InterpreterBuilder, "create_masked_store", store_seen),
    ):
        yield seen


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Makes Triton's interpreter faster: it patches `triton.language` once per launch and module.

    Otherwise it does so at every call of a device function, which takes longer than the kernel's arithmetic.
    """
    patch, launch = interpreter._patch_lang, GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)

    def launch_afresh(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(*args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(GridExecutor, "__call__", launch_afresh),
    ):
        yield
