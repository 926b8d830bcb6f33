"""Runs the examples in docstrings."""

from __future__ import annotations

import doctest
from typing import Any

import torch
from torch import distributed as dist


def examples(thing: Any) -> list[str]:
    """Return the statements of the examples in a docstring, without those of its methods."""
    return [example.source for example in doctest.DocTestParser().get_examples(thing.__doc__ or "")]


def run_examples(thing: Any, name: str, names: dict[str, Any] | None = None) -> None:
    """Run the examples in the docstring of `thing` and in those of its methods.

    Each docstring starts with `names` and nothing else: what an example needs, it has to import.

    Raises:
        AssertionError: there is no example, or one prints something else than the docstring says.
    """
    assert examples(thing), f"the docstring of {name} has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    try:
        with torch.random.fork_rng(devices=[]):
            for test in doctest.DocTestFinder().find(thing, name, module=False, globs=names or {}):
                runner.run(test, out=report.append)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert not runner.failures, "".join(report)
