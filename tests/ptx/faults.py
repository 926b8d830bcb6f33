"""Puts faults into the package's kernels: in the PTX, or in the Python of a Triton function."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from emulator import Fault, Launch, emulated
from triton.runtime.jit import JITFunction

import grpo_kernels.kernels

Check = Callable[[], object]
"""Runs kernels, and raises AssertionError if what they compute is wrong."""

# Every n-th place is changed, to save minutes. n by kernel; it is 1 for the others.
STEP = {"row_stats_kernel": 5, "dlogits_kernel": 3, "fused_loss_kernel": 4, "token_metrics_kernel": 7}


def message(check: Check, edit: Callable[[str], str] = lambda ptx: ptx) -> str:
    """Return how a check fails, or an empty text."""
    try:
        with emulated(edit=edit):
            check()
    except (Fault, AssertionError) as error:
        return str(error)
    return ""


@functools.cache
def launches_of(check: Check) -> list[Launch]:
    with emulated() as launches:
        check()
    return launches


def unnoticed(
    kernel: str, check: Check, pattern: str, new: str, match: str, *, skip: int = 0, step: int = 0
) -> list[str]:
    """Change each place in the PTX of a kernel that matches a pattern, one at a time, and run the check.

    Return the places at which the check does not fail, or not with a message that matches `match`. The first
    `skip` places are not changed, and of the others one of `step`, by default of STEP.
    """
    launches = launches_of(check)
    ptx = next(launch.ptx for launch in launches if launch.kernel == kernel)
    places = list(re.finditer(pattern, ptx))[skip :: step or STEP.get(kernel, 1)]
    assert places, f"no {pattern} in {kernel}"
    missed = []
    for place in places:
        broken = ptx[: place.start()] + place.expand(new) + ptx[place.end() :]
        found = message(check, {ptx: broken, **{x.ptx: x.ptx for x in launches if x.ptx != ptx}}.__getitem__)
        if not re.search(match, found):
            missed.append(f"{place[0].strip()}: {found}")
    return missed


class Change:
    """Replaces text in the source of a Triton function."""

    def __init__(self, function: JITFunction, old: str, new: str) -> None:
        self.function, self.old, self.new = function, old, new

    def source(self) -> str:
        assert self.function.src.count(self.old) == 1, self.old
        return str(self.function.src.replace(self.old, self.new))


def triton_functions() -> list[JITFunction]:
    """Return all Triton functions of the package."""
    package = grpo_kernels.kernels
    modules = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    found = [x for name in modules for x in vars(importlib.import_module(name)).values()]
    return list({id(x): x for x in found if isinstance(x, JITFunction)}.values())


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Change a function. Inside, every kernel is compiled anew, because it may call the function.

    Triton finds compiled kernels in memory by their arguments and in files by `hash`, which depends on the
    source of all functions that are called. `used_global_vals` comes with the hash.
    """
    functions = triton_functions()
    before = [(f, f.src, f.hash, f.used_global_vals, f.device_caches) for f in functions]
    source = change.source()
    for f in functions:
        f.hash, f.used_global_vals, f.device_caches = None, {}, defaultdict(f.create_binder)
    change.function._unsafe_update_src(source)
    try:
        yield
    finally:
        for f, source, hashed, values, caches in before:
            f._unsafe_update_src(source)
            f.hash, f.used_global_vals, f.device_caches = hashed, values, caches
