"""The running call of verl's engine. verl's fused forwards are not told what the engine needs from them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from verl.utils import tensordict_utils


class EngineCall(NamedTuple):
    """One batch of a verl engine."""

    entropy: bool  # whether the engine reads the entropies that its model returns
    config: Any  # the model's config in transformers; None if the engine has none


current_call: ContextVar[EngineCall | None] = ContextVar("current_call", default=None)


def find_engines() -> None:
    """Record the calls of verl's engines in `current_call`, if verl has imported its engines.

    This function does not import them, because that imports Megatron, also in processes without an engine.
    """
    base = sys.modules.get("verl.workers.engine.base")
    if base is not None:
        record_calls(base.BaseEngine)


@functools.cache  # once per class
def record_calls(engine: Any) -> None:
    for name in ("train_batch", "infer_batch"):  # every engine inherits both
        setattr(engine, name, with_call(getattr(engine, name)))


def with_call(method: Callable[..., Any]) -> Callable[..., Any]:
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
