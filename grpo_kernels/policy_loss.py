"""The losses of log-probabilities: for trainers that have computed these themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import LossOutput, check_reference, loss_output, resolve_spec, token_inputs
from .autograd import loss_of_statistics
from .backend import choose_backend, has_token_kernels, log_path
from .batch import Batch, Vocabulary, check_dtype, check_tensor, squeeze_hint
from .names import Backend, PresetName
from .objective import RowStats
from .spec import LossSpec


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    *,
    spec: LossSpec | PresetName = LossSpec(),
    completion_mask: Tensor | None = None,
    seq_lens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """`grpo_loss` of the taken tokens' log-probabilities, as `selective_logps` and `linear_logps` give them.

    Use it when something has to be computed between the log-probabilities and the loss, such as token weights
    that depend on the policy's entropies.

    Args:
        logps: `[B, T]` or `[N]`, nats, any floating dtype; differentiable. What it holds at a masked position
            never matters.
        entropy: as `logps`; differentiable: that of the bonus, where `spec.entropy_coef` is set.
        advantages, and all other options: as in `grpo_loss`.

    Returns:
        LossOutput as `grpo_loss`; `logps` and `entropy` are those given, detached, 0 where masked.

    Raises:
        ValueError, TypeError: as `grpo_loss`; for an exact KL, which runs over the vocabulary; for an entropy
            bonus without `entropy`.
    """
    spec = resolve_spec(spec)
    check_tensor("logps", logps)
    check_dtype("logps", logps)
    if logps.dim() not in (1, 2):
        raise ValueError(f"logps must be [B, T] or packed [N], got shape {tuple(logps.shape)}")
    batch = Batch.of(logps.unsqueeze(-1), None, completion_mask, seq_lens, Vocabulary(1, 0, 1), name="logps")
    check_reference(spec, None, ref_logps, None)
    if spec.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {spec.entropy_coef}: it needs entropy")
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
    )

    def live(name: str, x: Tensor) -> Tensor:
        if tuple(check_tensor(name, x).shape) != batch.shape:
            raise ValueError(
                f"{name} must have shape {batch.shape}, as logps, got {tuple(x.shape)}"
                f"{squeeze_hint(x.shape, batch.shape)}"
            )
        batch.look_at(**{name: x})
        return torch.where(batch.mask, x.reshape(-1).to(batch.dtype), 0.0)

    stats = RowStats(live("logps", logps), entropy=None if entropy is None else live("entropy", entropy))
    chosen = choose_backend(backend, logps)
    one_kernel = has_token_kernels(spec, stats.logps, chosen)
    path = "one kernel over tokens" if one_kernel else "PyTorch operations over tokens"
    log_path("policy_loss", path, chosen, logps=logps.dtype)
    loss, stats, derivatives = loss_of_statistics(stats, spec, inputs, batch.layout, chosen)
    return loss_output(spec, batch, loss, stats, inputs, derivatives, chosen)
