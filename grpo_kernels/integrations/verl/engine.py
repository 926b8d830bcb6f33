"""Records the running call of verl's engine, because verl does not tell its fused forwards what it needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from verl.utils import tensordict_utils


class EngineCall(NamedTuple):
    """One batch of a verl engine.

    Attributes:
        entropy: whether the engine reads the entropies that its model returns.
        config: the model's config in transformers; None if the engine has none.
    """

    entropy: bool
    config: Any


current_call: ContextVar[EngineCall | None] = ContextVar("current_call", default=None)


def find_engines() -> None:
    """Record the calls of verl's engines in `current_call`, if verl has imported its engines.

    This function does not import them, because that also imports Megatron, even in processes without an
    engine.
    """
    base = sys.modules.get("verl.workers.engine.base")
    if base is not None:
        record_calls(base.BaseEngine)


@functools.cache  # once per class
def record_calls(engine: Any) -> None:
    """Wrap the methods of verl's base engine that process a batch."""
    for name in ("train_batch", "infer_batch"):  # every engine inherits both
        setattr(engine, name, with_call(getattr(engine, name)))


def with_call(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of an engine, so that `current_call` describes its batch while it runs."""

    @functools.wraps(method)
    def run(self: Any, data: Any, *args: Any, **options: Any) -> Any:
        entropy = tensordict_utils.get_non_tensor_data(data=data, key="calculate_entropy", default=False)
        config = getattr(getattr(self, "model_config", None), "hf_config", None)
        token = current_call.set(EngineCall(bool(entropy), config))
        try:
            return method(self, data, *args, **options)
        finally:
            current_call.reset(token)

    return run
