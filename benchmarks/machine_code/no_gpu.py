"""Compiles kernels for a GPU that the machine does not have.

`launches_for(target)` gives Triton a driver without a device. The package's launchers then run as on a GPU:
Triton binds and specializes the arguments and compiles the kernel, and only the launch itself does nothing.
Tensors may be on the CPU or on the meta device, for which the package otherwise launches nothing.
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

from grpo_kernels.checks import tensors

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
MAX_THREADS = 1024  # of a block, on each of the targets
_device_ids = itertools.count(1000)


class NoDevice:
    """A driver for Triton that needs no GPU.

    Each instance has its own device id, so Triton's caches, which are per device, start empty.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._device = next(_device_ids)
        # The only limit is the number of threads. `resources` reads the others from the binary.
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
def active(device: NoDevice) -> Iterator[None]:
    """Inside, `device` is Triton's driver."""
    before = dict(vars(driver))  # a copy, because reading the active driver would look for a GPU
    driver.set_active(device)
    try:
        yield
    finally:
        vars(driver).update(before)


@contextlib.contextmanager
def no_device(target: GPUTarget) -> Iterator[None]:
    """Inside, Triton and the package see a GPU of the kind `target`."""
    with active(NoDevice(target)), mock.patch.object(tensors, "has_data", lambda x: True):
        yield


@contextlib.contextmanager
def launches_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, a Triton launch compiles for `target` and appends the CompiledKernel to the list."""
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
    """Inside, a Triton launch neither compiles nor runs. It adds its cache key to the set of its kernel.

    The number of a kernel's keys is the number of times that it would be compiled.
    """
    variants: dict[str, set[str]] = defaultdict(set)
    do_compile = JITFunction._do_compile

    def recording(self: JITFunction, key: str, *args: Any) -> None:
        variants[self.__name__].add(key)  # nothing is cached, so the next launch comes here too

    JITFunction._do_compile = recording
    try:
        with no_device(target):
            yield variants
    finally:
        JITFunction._do_compile = do_compile
