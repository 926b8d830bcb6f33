"""Kernels of this package with one stage left out. Their times say which stage limits a kernel.

Hardware counters are not always readable. The difference between the time of a kernel and that of the same
kernel without a stage is what the stage costs beyond what it overlaps with. The results are wrong on purpose.

A variant is the source of a kernel's module with a few replacements, each of which must apply exactly once.
So a change of a kernel that no longer matches is an error, and a variant cannot fall behind the kernel.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from unittest import mock

# Replacements in the source of a module in grpo_kernels/kernels/, by module and stage. `grad > 3e38` is never
# true, but the compiler does not know it, so what the store depends on is still computed.
LEFT_OUT: dict[str, dict[str, dict[str, str]]] = {
    "row_stats": {
        "exponentials": {
            "    e = tl.exp2(d)\n": "    e = d\n",
            "ref_e = tl.exp2(ref_d)\n        ref_alpha": "ref_e = ref_d\n        ref_alpha",
        },
        "maxima": {
            "new_shift = tl.maximum(shift, tl.max(tl.max(y, 2), 0))": "new_shift = shift",
        },
    },
    "dlogits": {
        "exponentials": {"    e = tl.exp2(d)\n": "    e = d\n"},
        "store": {
            "grad.to(out_ptr.dtype.element_ty), eviction_policy=EVICTION)":
            "grad.to(out_ptr.dtype.element_ty), mask=grad > 3e38)",
        },
        "load": {
            "load_block(logits_ptr + start, columns, V, scale, softcap, CAPPED, PARTIAL, DTYPE, EVICTION)":
            "shift - 1e-3 * columns.to(DTYPE)",
        },
    },
}  # fmt: skip
# The fused kernel has the stages of both modules, whose functions it calls.
CALLED_BY_FUSED = {"row_stats": ("reduce_row",), "dlogits": ("row_gradient",)}
FUSED_STAGES = ("exponentials", "store")


@cache
def changed(name: str, stages: tuple[str, ...]) -> ModuleType:
    """Return a copy of the module `name` of grpo_kernels.kernels without some stages.

    Raises:
        ValueError: a replacement does not apply exactly once.
    """
    import grpo_kernels.kernels

    __import__(f"{grpo_kernels.kernels.__name__}.{name}")
    original = sys.modules[f"{grpo_kernels.kernels.__name__}.{name}"]
    source = inspect.getsource(original)
    for stage in stages:
        for old, new in LEFT_OUT.get(name, {}).get(stage, {}).items():
            if source.count(old) != 1:
                raise ValueError(f"{name}.py has {source.count(old)} times what {stage!r} replaces: {old!r}")
            source = source.replace(old, new)
    module = ModuleType(f"{original.__name__}_without_{'_'.join(stages)}")
    module.__package__ = original.__package__  # for its relative imports
    path = f"<{module.__name__}>"
    # Triton reads the source of a kernel again, which it finds here.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    if name == "fused":
        for other, functions in CALLED_BY_FUSED.items():
            for function in functions:
                setattr(module, function, getattr(changed(other, stages), function))
    return module


@contextmanager
def without(stage: str, *kernels: str) -> Iterator[None]:
    """Inside, `kernels` ("row_stats", "dlogits" or "fused") run without `stage`."""
    from grpo_kernels.kernels import dlogits, fused, row_stats

    launchers = {"row_stats": (row_stats, "row_stats"), "dlogits": (dlogits, "dlogits")}
    launchers["fused"] = (fused, "fused_loss")
    with ExitStack() as stack:
        for kernel in kernels:
            module, launcher = launchers[kernel]
            variant = getattr(changed(kernel, (stage,)), launcher)
            stack.enter_context(mock.patch.object(module, launcher, variant))
        yield
