"""What the adapters share: the trainer keeps its KL, entropy bonus and aggregation, the surrogate is ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks.choices import PRESET_NAMES, Aggregation, PresetName
from ..checks.scalars import check_choice
from ..log import warn_once
from ..policy_loss import policy_loss
from ..spec import LossSpec, resolve_spec
from ..spec.surrogates import Surrogate
from ..tokens.output import LossOutput


def surrogate_spec(
    trainer: str,
    spec: LossSpec | PresetName,
    aggregation: Aggregation | Literal["any"] | None,
    *,
    reference: bool = False,
    scaled_advantages: bool = False,
) -> LossSpec:
    """Return `spec` with "token-sum" for its aggregation, which the trainer replaces by weights per token.

    Args:
        trainer: its name in messages.
        spec: a LossSpec, or the name of a preset.
        aggregation: the one that the trainer uses; None: one with another formula; "any": not yet known. One
            warning says if the spec has another one.
        reference: whether the trainer passes the reference's log-probabilities to its loss.
        scaled_advantages: whether the trainer has multiplied the advantages by the weights of its
            aggregation. Then only a loss that is linear in the advantages is what the spec says.

    Raises:
        ValueError: the spec has a KL or an entropy bonus, which the trainer adds itself; or it needs a
            reference that the trainer does not pass; or the advantages are scaled and the loss is not linear
            in them.
    """
    if isinstance(spec, str):
        check_choice("spec", spec, PRESET_NAMES)
        # The trainer's own constant replaces `max_tokens`.
        spec = LossSpec.preset(spec, max_tokens=1)
    spec = resolve_spec(spec)
    if spec.surrogate is None or spec.kl is not None or spec.entropy_coef:
        raise ValueError(
            f"a LossSpec for {trainer} must have a surrogate, no KL and no entropy bonus: these are options "
            f"of {trainer}, got {spec}"
        )
    surrogate = spec.surrogate if isinstance(spec.surrogate, Surrogate) else None
    if spec.anchored_to_reference and not reference:
        raise ValueError(
            f"{trainer} does not pass the reference's log-probabilities to its loss, which {spec.surrogate} "
            "needs (LogRatio: the preset 'reinforce' has the same gradient)"
        )
    if scaled_advantages and (surrogate is None or not surrogate.zero_without_advantage):
        raise ValueError(
            f"{trainer} divides the advantages by its counts of tokens, so the loss must be linear in the "
            f"advantages, which {spec.surrogate} is not, or need not be"
        )
    # "token-mean" is the default of LossSpec, so the user need not have chosen it.
    if aggregation != "any" and spec.aggregation not in ("token-mean", aggregation):
        warn_once(f"{trainer}'s own aggregation decides, not the {spec.aggregation!r} of the spec")
    return replace(spec, aggregation="token-sum", max_tokens=None)


def with_bounds(spec: LossSpec, *clamps: float, **bounds: Any) -> LossSpec:
    """Return `spec` with the bounds of a trainer's configuration.

    Args:
        clamps: none, or two: bounds on the absolute log-ratio of a token and on the mean of a sequence. They
            apply to surrogates with one of these ratios.
        bounds: values for those fields of the surrogate that have these names.
    """
    surrogate: Any = spec.surrogate
    names = {field.name for field in fields(surrogate)}
    if clamps and surrogate.uses_ratio and not surrogate.couples_tokens:
        spec = replace(spec, log_ratio_clamp=clamps[spec.level != "token"])
    return replace(spec, surrogate=replace(surrogate, **{x: bounds[x] for x in bounds if x in names}))


def token_weights_of(total: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the weight of each token in a sum that the trainer computes, without a gradient.

    Args:
        total: from a value per token, shaped as `like`, to a 0-dim tensor; linear near 1.
        like: a floating tensor, for shape, dtype and device.
    """
    ones = torch.ones_like(like, requires_grad=True)
    # Only the innermost hooks apply. These keep checkpointing and offloading out of this small graph.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        (weights,) = torch.autograd.grad(total(ones), ones)
    return weights


def weighted_loss(
    spec: LossSpec, logps: Tensor, advantages: Tensor, weights: Tensor | None, **options: Any
) -> LossOutput:
    """Compute `policy_loss` with the token losses multiplied by `weights`, shaped as `logps`, or None.

    GMPO and VESPO read token weights as part of a sequence's ratio. They are linear in the advantages, which
    are multiplied instead.
    """
    in_the_ratio = isinstance(spec.surrogate, Surrogate) and not spec.surrogate.zero_without_weight
    if in_the_ratio and weights is not None:
        return policy_loss(logps, advantages * weights, spec=spec, **options)
    return policy_loss(logps, advantages, spec=spec, token_weights=weights, **options)
