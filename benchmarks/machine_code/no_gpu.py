"""Compiling the kernels for GPUs that are not here.

`launches_for(target)` stands a driver without a device before Triton, so that the package's own launchers run
up to the point where the machine code would start: what binds, specialises and compiles the arguments is the
very code that does it on a GPU. Tensors may live on the CPU, or on "meta", for which the package
otherwise launches nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from grpo_kernels import backend

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
MAX_THREADS = 1024  # of a block, on every one of them
_device_ids = itertools.count(1000)


class NoDevice:
    """What Triton asks of a driver during a launch, answered without a GPU.

    Each instance is a device of its own, so that Triton's caches per device start empty.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._device = next(_device_ids)
        # No limit but the number of threads is set here: the rest is read from the binary.
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30, "multiprocessor_count": 132},
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, MAX_THREADS),
        )
        self.launcher_cls = lambda src, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def no_device(target: GPUTarget) -> Iterator[None]:
    launches = mock.patch.object(backend, "has_data", lambda x: True)
    before = dict(vars(driver))  # asked for its active driver, it would look for a GPU
    driver.set_active(NoDevice(target))
    try:
        with launches:
            yield
    finally:
        vars(driver).update(before)


@contextlib.contextmanager
def launches_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Within: a Triton launch compiles for `target` and adds its CompiledKernel to the list; nothing runs."""
    kernels: list[Any] = []
    run = JITFunction.run

    def recording(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    JITFunction.run = recording
    try:
        with no_device(target):
            yield kernels
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def variants_for(target: GPUTarget) -> Iterator[dict[str, set[str]]]:
    """Within: a Triton launch neither compiles nor runs; kept are the keys by which it would find its binary.

    As many keys of a kernel as there are, so many times it would have been compiled.
    """
    variants: dict[str, set[str]] = defaultdict(set)
    do_compile = JITFunction._do_compile

    def recording(self: JITFunction, key: str, *args: Any) -> None:
        variants[self.__name__].add(key)  # nothing is compiled or cached, and the next launch asks again

    JITFunction._do_compile = recording
    try:
        with no_device(target):
            yield variants
    finally:
        JITFunction._do_compile = do_compile
