"""Memory that holds NaN until it is written.

A module of its own, because Dynamo looks up the module of a traced function by name, and there are several
modules named conftest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import trace_rules

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
]


def let_dynamo_find_allocators() -> None:
    """Let Dynamo look up the functions that it may trace, before the allocators are replaced.

    It does so once, by name. `init_process_group` lets it do so again, and that may be in a test.
    """
    if torch.empty not in trace_rules.get_torch_obj_rule_map():
        trace_rules.clear_lru_cache()
        assert torch.empty in trace_rules.get_torch_obj_rule_map()


def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an allocator whose floating-point tensors hold NaN."""

    def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        new = allocate(*args, **kwargs)
        if new.is_floating_point() and not new.is_meta:  # "meta" tensors have no memory
            new.detach().fill_(torch.nan)
        return new

    return allocate_nan
