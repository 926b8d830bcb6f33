"""What runs on the ranks: a registry of cases, and a `main` that runs all cases.

    cases = Cases()

    @cases.add(wrapper=["ddp", "fsdp2"], dtype=[torch.float32, torch.float64])
    def gradients(wrapper, dtype): ...      # "gradients[ddp-float32]", ...

    if __name__ == "__main__":
        cases.main()

Pytest imports such a script for the names of its cases. The import starts nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import few
from torch import distributed as dist

Function = Callable[..., None]

# Every case takes less, even on a busy machine. If a rank waits longer, another one has failed.
TIMEOUT = timedelta(minutes=10)
# Seconds that a rank whose case has failed waits for the others. They may hang in a collective of the case.
AFTER_FAILURE = 60


class Cases(dict[str, Callable[[], None]]):
    """Cases by name. Every rank runs them in the same order, with gloo as default process group."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # by function and case

    def add(self, **values: Iterable[Any]) -> Callable[[Function], Function]:
        """Register one case for each combination of the values of the keyword arguments."""

        def register(function: Function) -> Function:
            for chosen in itertools.product(*values.values()):
                label = "-".join(str(x).removeprefix("torch.") for x in chosen)
                arguments = dict(zip(values, chosen, strict=True))
                name = f"{function.__name__}[{label}]" if label else function.__name__
                assert name not in self, f"two cases are called {name}"
                self[name] = lambda arguments=arguments: function(**arguments)
                self.arguments[function.__name__][name] = arguments
            return function

        return register

    def pairwise(self) -> set[str]:
        """Return the names of the cases that `pytest --pairwise` runs."""
        return {[*cases][i] for cases in self.arguments.values() for i in few([*cases.values()])}

    def params(self) -> list[Any]:
        """Return the names of all cases for `parametrize`, with the mark `long` if --pairwise skips them."""
        chosen = self.pairwise()
        return [pytest.param(name, marks=[] if name in chosen else pytest.mark.long) for name in self]

    def main(self) -> None:
        """Run all cases, or with the argument `--pairwise` those of `pairwise`.

        After each case, write `{name: "ok" or a traceback}` to `<first argument>/<rank>.json`.
        """
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=TIMEOUT)
        rank = dist.get_rank()
        path = Path(sys.argv[1]) / f"{rank}.json"
        chosen = self.pairwise() if "--pairwise" in sys.argv else {*self}
        outcomes = {name: f"rank {rank} did not reach it" for name in self if name in chosen}
        try:
            for name in outcomes:
                outcomes[name] = f"rank {rank} hung or died in it"
                path.write_text(json.dumps(outcomes), encoding="utf-8")
                end = threading.Timer(AFTER_FAILURE, os._exit, (1,))  # the launcher then ends the other ranks
                end.daemon = True
                try:
                    self[name]()
                    outcomes[name] = "ok"
                except Exception:
                    outcomes[name] = f"rank {rank}:\n{traceback.format_exc()}"
                    path.write_text(json.dumps(outcomes), encoding="utf-8")
                    end.start()
                # If one rank fails early, the others wait for it in a collective of the case. Without this
                # barrier, the next case would use up that collective.
                dist.monitored_barrier(timeout=TIMEOUT)
                end.cancel()
        finally:
            path.write_text(json.dumps(outcomes), encoding="utf-8")
        dist.destroy_process_group()
