"""prime-rl 0.8: `prime_rl_loss`, for the `import_path` of its custom loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checks.choices import PresetName
from ..spec import KL, LossSpec
from ..tokens.output import LossOutput
from .shared import surrogate_spec, weighted_loss


def prime_rl_loss(
    inputs: Any,
    *,
    preset: PresetName = "dppo_tv",
    kl: Mapping[str, Any] | None = None,
    kl_tau: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute the loss of one sequence, with the signature of a custom loss of prime-rl.

    prime-rl divides the sum over sequences by the number of tokens of the step, so the aggregation is
    "token-mean". The old policy is the sampler's (`inference_logprobs`).

    Args:
        inputs: prime-rl's `LossInputs`, tensors `[N]`.
        preset, options: as of `LossSpec.preset`.
        kl: the options of `KL`, a penalty to the reference (`ref_logprobs`).
        kl_tau: weight of the squared log-ratio to the sampler, as in prime-rl's default loss.

    Returns:
        LossOutput. prime-rl reads its `loss` and `metrics`.

    Raises:
        ValueError: a bad option; both `kl` and `kl_tau`; a KL with a weight per token, which would not
            multiply it; a reference is needed, and the algorithm has none.
    """
    if kl and kl_tau:
        raise ValueError(f"give kl or kl_tau, got kl={dict(kl)} and kl_tau={kl_tau}")
    if (kl or kl_tau) and inputs.loss_weights is not None:
        raise ValueError("kl and kl_tau do not apply to a step with rl weights per token: both must be unset")
    spec = LossSpec.preset(preset, **{"max_tokens": 1, **options})
    spec = surrogate_spec("prime-rl", spec, "token-mean", reference=not kl_tau)
    # The squared log-ratio is twice the estimator k2 of a KL to the sampler.
    penalty = KL("k2", beta=2 * kl_tau) if kl_tau else KL(**kl) if kl else None
    ref_logps = inputs.inference_logprobs if kl_tau else inputs.ref_logprobs
    return weighted_loss(
        replace(spec, kl=penalty),
        inputs.trainer_logprobs[None],  # one sequence, [1, N]
        inputs.advantages[None],
        None if inputs.loss_weights is None else inputs.loss_weights[None],
        completion_mask=inputs.loss_mask[None],
        old_logps=inputs.inference_logprobs[None],
        ref_logps=None if ref_logps is None else ref_logps[None],
    )
