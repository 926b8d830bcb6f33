"""prime-rl 0.8: `prime_rl_loss`, for the `import_path` of its custom loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checks.choices import PresetName
from ..checks.scalars import check_number
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
        ValueError: a bad option; both `kl` and `kl_tau`; a KL with rl weights other than 0 and 1, which would
            not multiply it; a reference is needed, and prime-rl has none for this sequence.
        TypeError: an option that is not a number, such as a string from the command line.
    """
    kl_tau = check_number("kl_tau", kl_tau)
    if kl is not None and kl_tau:
        raise ValueError(f"give kl or kl_tau, got kl={dict(kl)} and kl_tau={kl_tau}")
    spec = LossSpec.preset(preset, **{"max_tokens": 1, **options})
    spec = surrogate_spec("prime-rl", spec, "token-mean", reference=not kl_tau)
    weights, ref_logps = inputs.loss_weights, None
    penalty = None if kl is None else KL(**kl)
    if kl_tau:
        # The squared log-ratio is twice the estimator k2 of a KL to the sampler.
        penalty, ref_logps = KL("k2", beta=2 * kl_tau), inputs.inference_logprobs
    elif penalty is not None or spec.anchored_to_reference:
        ref_logps = reference(inputs)
    if penalty is not None and weights is not None:
        # prime-rl masks the tokens of weight 0, and has just synced to find out whether one is left.
        if bool(((weights != 1) & inputs.loss_mask).any()):
            raise ValueError("kl and kl_tau need rl weights of 0 and 1, because others do not multiply them")
        weights = None
    return weighted_loss(
        replace(spec, kl=penalty),
        inputs.trainer_logprobs[None],  # one sequence, [1, N]
        inputs.advantages[None],
        None if weights is None else weights[None],
        completion_mask=inputs.loss_mask[None],
        old_logps=inputs.inference_logprobs[None],
        ref_logps=None if ref_logps is None else ref_logps[None],
    )


def reference(inputs: Any) -> Tensor | None:
    """Return the reference's log-probabilities, or None if prime-rl has none for the tokens of this sequence.

    If one sequence of a packed micro-batch has a reference, prime-rl gives zeros to those that have none.
    Without tokens, as in the micro-batches that pad a rank, the zeros are returned.
    """
    mask, given = inputs.loss_mask, inputs.ref_logprobs
    if given is None:
        given = inputs.inference_logprobs.new_zeros(mask.shape)
    # Syncs: nothing but the numbers tells whether there is a reference.
    missing = mask.any() & ~(mask & (given != 0)).any()
    return None if bool(missing) else given
