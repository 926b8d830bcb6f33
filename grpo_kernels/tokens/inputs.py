"""The constants of a loss: advantages, weights and log-probabilities, checked and laid out as `[N]`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import debug
from ..checks.choices import Aggregation
from ..checks.scalars import check_number
from ..checks.tensors import check_device, check_integers, check_tensor, scalar_on
from ..spec import LossSpec
from ..spec.surrogates import Surrogate
from .aggregation import aggregation_weights, safe_divide
from .batch import Batch


class TokenInputs(NamedTuple):
    """The constants of a loss, `[N]` each, fp32 (fp64 for fp64 logits), zero at masked positions."""

    mask: Tensor  # bool
    advantages: Tensor
    row_weights: Tensor  # loss = sum(row_weights * token losses)
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None  # if they were given; else the statistics have them
    token_weights: Tensor | None = None
    entropy_weights: Tensor | None = None  # of the entropy in the loss, with sign and coefficient

    def rows(self, index: Tensor | slice) -> TokenInputs:
        return TokenInputs(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def check_reference(spec: LossSpec, whole: Tensor | None, ref_logps: Tensor | None, name: str | None) -> None:
    """Raise ValueError unless the reference that the loss needs is given exactly once.

    `whole` is the argument `name`, from which the reference's whole distribution can be computed. `name` is
    None if the function has no such argument.
    """
    if whole is not None and ref_logps is not None:
        raise ValueError(f"{name} and ref_logps are both given: give one")
    if spec.exact_kl is not None and whole is None:
        needed = "logits or hidden states" if name is None else name
        raise ValueError(f"KL({spec.exact_kl.kind!r}) runs over the vocabulary: it needs {needed}")
    give = "ref_logps" if name is None else f"{name} or ref_logps"
    if whole is None and ref_logps is None:
        if spec.anchored_to_reference:
            raise ValueError(f"{spec.surrogate} needs a reference: give {give}")
        if spec.sampled_kl is not None:
            raise ValueError(f"{spec.sampled_kl} needs a reference: give {give}")


def token_inputs(
    spec: LossSpec,
    batch: Batch,
    *,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    prompt_ids: Tensor | None,
) -> TokenInputs:
    """Check the constants of a loss and lay them out as `[N]`. Arguments as in `grpo_loss`."""
    if spec.uses_callable and batch.sequences.group is not None:
        raise ValueError(
            "context_group: a callable surrogate would see only this rank's tokens of a sequence. Use a "
            "surrogate of the package"
        )
    normalizer = check_normalizer(batch, normalizer)
    row_weights = check_row_weights(spec.aggregation, spec.max_tokens, batch, normalizer, prompt_ids)
    if spec.couples_tokens and not spec.uses_callable:
        name = "a KL" if spec.surrogate is None else type(spec.surrogate).__name__
        batch.require_sequences(f"{name} at level {spec.level!r}")
    weights = batch.optional("token_weights", token_weights, per_sequence=True)
    one_per_sequence = token_weights is not None and tuple(token_weights.shape) != batch.shape
    if weights is not None and one_per_sequence and isinstance(spec.surrogate, Surrogate):
        weights = spec.surrogate.spread_sequence_weights(weights, batch.sequences)
    return TokenInputs(
        mask=batch.mask,
        advantages=batch.per_token("advantages", advantages, per_sequence=True),
        row_weights=row_weights,
        old_logps=batch.optional("old_logps", old_logps),
        ref_logps=batch.optional("ref_logps", ref_logps),
        token_weights=weights,
        entropy_weights=entropy_weights(spec, batch, row_weights, normalizer),
    )


def check_normalizer(batch: Batch, normalizer: float | Tensor | None) -> float | Tensor | None:
    """Return the normalizer as a 0-dim tensor on the batch's device, a Python number or None."""
    if not isinstance(normalizer, Tensor):
        return check_number("normalizer", normalizer, optional=True)
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a float or a 0-dim tensor, got shape {tuple(normalizer.shape)}")
    if debug.enabled():
        debug.check_scalar("normalizer", normalizer)
    return scalar_on(batch.device, normalizer).to(batch.device)


def check_row_weights(
    aggregation: Aggregation,
    max_tokens: int | None,
    batch: Batch,
    normalizer: float | Tensor | None,
    prompt_ids: Tensor | None,
) -> Tensor:
    """Return the aggregation as a weight per token. Raise ValueError if it lacks an argument.

    Only "prompt-mean" reads `prompt_ids`. Others ignore them, so that a trainer may always pass them.
    """
    if aggregation in ("seq-mean-token-mean", "prompt-mean") or (
        aggregation.startswith("seq-") and normalizer is None
    ):
        batch.require_sequences(f"aggregation {aggregation!r}")
    if aggregation == "prompt-mean":
        if prompt_ids is None:
            raise ValueError(f"aggregation {aggregation!r} needs prompt_ids, one integer per sequence")
        check_tensor("prompt_ids", prompt_ids)
        check_device("prompt_ids", prompt_ids, batch.device, batch.source)
        check_integers("prompt_ids", prompt_ids, batch.num_sequences)
    sequences, count = batch.sequences, batch.num_sequences
    return aggregation_weights(aggregation, max_tokens, sequences, count, normalizer, prompt_ids)


def entropy_weights(
    spec: LossSpec, batch: Batch, row_weights: Tensor, normalizer: float | Tensor | None
) -> Tensor | None:
    """The weight of each token's entropy in the loss.

    The bonus is a mean over the unmasked tokens. With a normalizer it is aggregated as the loss is.
    """
    if not spec.entropy_coef:
        return None
    if normalizer is None:
        weights = batch.mask.to(batch.dtype)
        row_weights = safe_divide(weights, batch.sequences.over_ranks(weights.sum()))
    return -spec.entropy_coef * row_weights
