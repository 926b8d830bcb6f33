"""The reference's log-probabilities for our losses.

verl's registry does not pass them to a loss. If verl computes them, they are in the batch that its `ppo_loss`
takes. `hand_batch_to_losses` makes this batch available to our losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...log import warn_once
from ...spec import LossSpec
from ...spec.surrogates import LogRatio, Reinforce

# The batch of the call of verl's `ppo_loss` that is running.
current_batch: ContextVar[Any] = ContextVar("current_batch", default=None)


def with_reference(name: str, spec: LossSpec) -> tuple[LossSpec, Tensor | None]:
    """Return the spec and the reference's log-probabilities `[B, T]` of the current batch, if it needs them.

    Without them, the log-ratio loss is replaced by one with the same gradient and no reference.

    Raises:
        ValueError: the loss needs a reference, and the batch has none.
    """
    if not (spec.anchored_to_reference or spec.sampled_kl is not None or spec.uses_callable):
        return spec, None
    batch = current_batch.get()
    if batch is not None and "ref_log_prob" in batch:
        return spec, batch.select("ref_log_prob").to_padded_tensor()["ref_log_prob"]
    advice = (
        "actor_rollout_ref.actor.use_kl_loss=True makes verl compute ref_log_prob (kl_loss_coef=0 adds no "
        "penalty)"
    )
    if isinstance(spec.surrogate, LogRatio) and spec.sampled_kl is None:
        warn_once(
            f"loss {name!r}: the batch has no ref_log_prob. The gradient is the same without it, but the "
            f"reported loss is -A * logp, not -A * (logp - ref_logp). {advice}"
        )
        return replace(spec, surrogate=Reinforce()), None
    if spec.anchored_to_reference or spec.sampled_kl is not None:
        raise ValueError(f"loss {name!r} needs a reference, and the batch has no ref_log_prob: {advice}")
    return spec, None


def hand_batch_to_losses(verl_ppo_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap verl's `ppo_loss`, so that `current_batch` is its batch while it runs."""

    @functools.wraps(verl_ppo_loss)
    def ppo_loss(config: Any, model_output: Any, data: Any, *rest: Any, **options: Any) -> Any:
        token = current_batch.set(data)
        try:
            return verl_ppo_loss(config, model_output, data, *rest, **options)
        finally:
            current_batch.reset(token)

    return ppo_loss
