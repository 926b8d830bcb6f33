"""The losses of trainers that the test environment lacks: the real code if it is installed, else a stand-in.

A trainer's package imports what a test does not need (deepspeed, vllm, Megatron). So only the module of the
loss is imported, without the `__init__` of the packages above it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

T = 7


class Trainer(NamedTuple):
    """The trainer's module with its loss, our adapter, and whether the first is a stand-in."""

    theirs: Any
    ours: Any
    stand_in: bool


@contextmanager
def trainer(
    module: str,
    adapter: str,
    stand_in: Mapping[str, Mapping[str, Any]],
    *,
    version: str,
    needs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Trainer]:
    """Import `module` of a trainer and our adapter, and forget both afterwards.

    Args:
        module: the full name of the trainer's module.
        adapter: the name of our module in `grpo_kernels.integrations`.
        stand_in: the contents of modules by name, if the trainer is not installed.
        version: what the package says of itself, as its `__init__` is not run.
        needs: contents of other modules that the real one imports, used if they are not installed.
    """
    top = module.split(".")[0]
    own = f"grpo_kernels.integrations.{adapter}"
    found = importlib.util.find_spec(top)
    tops = {top, *(name.split(".")[0] for name in needs or {})}
    tops -= {name for name in tops - {top} if importlib.util.find_spec(name) is not None}
    before = dict(sys.modules)
    try:
        if found is not None and found.submodule_search_locations is not None:
            for name in parents(module):
                package = ModuleType(name)
                package.__path__ = [
                    str(Path(x, *name.split(".")[1:])) for x in found.submodule_search_locations
                ]
                package.__version__ = version
                sys.modules[name] = package
            contents = {name: x for name, x in (needs or {}).items() if name.split(".")[0] in tops}
        else:
            contents = {name: {} for name in parents(module)} | dict(stand_in)
            contents[top] = {"__version__": version, **contents.get(top, {})}
        for name, attributes in contents.items():
            new = ModuleType(name)
            new.__path__ = []
            vars(new).update(attributes)
            sys.modules[name] = new
        for name in contents:
            above, _, last = name.rpartition(".")
            if above:
                setattr(sys.modules[above], last, sys.modules[name])
        yield Trainer(importlib.import_module(module), importlib.import_module(own), found is None)
    finally:
        for name in [name for name in sys.modules if name.startswith(own) or name.split(".")[0] in tops]:
            sys.modules.pop(name)
            if name in before:
                sys.modules[name] = before[name]


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


class Batch(NamedTuple):
    """Log-probabilities and constants of four completions, `[4, T]`, the last one without tokens.

    Padding is on the right, and one token in the middle is masked. Padded positions have numbers that would
    show in every sum.
    """

    logps: Tensor
    old: Tensor
    sampler: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor

    def leaf(self) -> Tensor:
        return self.logps.clone().requires_grad_()


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(4, T, generator=generator, dtype=dtype)

    old = -noise(1.0).abs() - 0.05
    mask = (torch.arange(T) < torch.tensor([T, 5, 2, 0])[:, None]).to(dtype)
    mask[0, 3] = 0
    advantages = noise(1.0)
    advantages[1, 2] = 0
    logps, sampler, ref = ((old + noise(scale)).clamp(max=-1e-3) for scale in (0.4, 0.2, 0.5))
    return Batch(logps, old, sampler, ref, advantages, mask)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, leaf)
    return found
