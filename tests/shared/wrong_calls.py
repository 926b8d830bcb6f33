"""Correct calls, which a test changes in one argument, and a check of the error that follows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import LossSpec, grpo_loss, selective_logps

B, T, V = 2, 3, 7  # a padded batch
N, S = 5, 2  # a packed one


def zeros(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(shape, **how)


def ids(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(shape, **{"dtype": torch.int64, **how})


def lengths(*values: float) -> Tensor:
    return torch.tensor(values)


def padded(**changes: Any) -> Any:
    given = {
        "logits": zeros(B, T, V),
        "completion_ids": ids(B, T),
        "advantages": zeros(B),
        "spec": LossSpec(),
    }
    return grpo_loss(**{**given, **changes})


def packed(**changes: Any) -> Any:
    given = {"logits": zeros(N, V), "completion_ids": ids(N), "advantages": zeros(N), "spec": LossSpec()}
    return grpo_loss(**{**given, **changes})


def logps(**changes: Any) -> Any:
    return selective_logps(**{"logits": zeros(B, T, V), "ids": ids(B, T), **changes})


def spec(**fields: Any) -> dict[str, LossSpec]:
    return {"spec": LossSpec(**fields)}


def check(call: Callable[..., Any], changes: dict[str, Any], error: type[Exception], *parts: str) -> None:
    """The message starts with the first of `parts` and holds the others in their order."""
    with pytest.raises(error, match="^" + ".*".join(map(re.escape, parts))):
        call(**changes)


def case(call: Callable[..., Any], changes: dict[str, Any], *parts: str) -> Any:
    named = "-".join(
        f"{name}={value}" for name, value in changes.items() if not isinstance(value, Tensor | LossSpec)
    )
    return pytest.param(call, changes, parts, id=f"{call.__name__}-{named or '-'.join(changes)}")


PER_TOKEN = {
    "completion_ids": "(2, 3), as logits (2, 3, 7)",
    "completion_mask": "(2, 3)",
    "ref_logps": "(2, 3)",
    "old_logps": "(2, 3)",
    "token_weights": "(2, 3) or (2, 1) or (2,)",
    "advantages": "(2, 3) or (2, 1) or (2,)",
    "temperature": "(2, 3) or (2, 1) or (2,)",
}
