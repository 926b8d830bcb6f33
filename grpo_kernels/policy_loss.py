"""The losses from log-probabilities, for trainers that compute these themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from .checks.choices import Backend, PresetName
from .checks.tensors import check_dtype, check_tensor, squeeze_hint
from .log import log_path
from .spec import LossSpec, resolve_spec
from .tokens.autograd import loss_of_statistics
from .tokens.batch import Batch
from .tokens.dispatch import has_token_kernels
from .tokens.inputs import check_reference, token_inputs
from .tokens.loss import BatchLoss
from .tokens.output import LossOutput, loss_output
from .tokens.statistics import RowStats
from .vocab.dispatch import choose_backend


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
    prompt_ids: Tensor | None = None,
    context_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Compute `grpo_loss` from log-probabilities, such as those of `selective_logps` and `linear_logps`.

    Use it to compute something between the log-probabilities and the loss, such as token weights that
    depend on the policy's entropies.

    Args:
        logps: `[B, T]` or `[N]`, nats, any floating dtype, differentiable. Not read at masked positions.
        advantages: as in `grpo_loss`, as are all options that are not described here.
        entropy: shaped as `logps`, nats, differentiable. The entropy bonus of `spec.entropy_coef` needs it.

    Returns:
        LossOutput as in `grpo_loss`. `logps` and `entropy` are those given, detached, and 0 at masked
        positions.

    Raises:
        ValueError, TypeError: as in `grpo_loss`. Also ValueError for an exact KL, which needs the
            vocabulary, and for an entropy bonus without `entropy`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import policy_loss
        >>> logps = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
        >>> old_logps = torch.tensor([[0.5, 0.5]]).log()
        >>> out = policy_loss(logps, torch.tensor([1.0]), spec="dapo", old_logps=old_logps)
        >>> round(out.loss.item(), 4)  # the ratios 1.4 and 0.6, of which dapo clips the first to 1.28
        -0.94
        >>> round(out.metrics["clip_fraction"].item(), 4)
        0.5
    """
    spec = resolve_spec(spec)
    check_tensor("logps", logps)
    check_dtype("logps", logps)
    if logps.dim() not in (1, 2):
        raise ValueError(f"logps must be [B, T] or packed [N], got shape {tuple(logps.shape)}")
    batch = Batch.of(
        logps.unsqueeze(-1), completion_mask, seq_lens, name="logps", context_group=context_group
    )
    check_reference(spec, None, ref_logps, None)
    if spec.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {spec.entropy_coef}, which needs entropy")
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
        prompt_ids=prompt_ids,
    )

    loss = BatchLoss(spec, inputs, batch.sequences)

    def per_token(name: str, x: Tensor) -> Tensor:
        """Check `x` and flatten it. Unlike `Batch.per_token`, it keeps the graph."""
        if tuple(check_tensor(name, x).shape) != batch.shape:
            raise ValueError(
                f"{name} must have shape {batch.shape}, as logps, got {tuple(x.shape)}"
                f"{squeeze_hint(x.shape, batch.shape)}"
            )
        batch.debug_numbers(**{name: x})
        return torch.where(batch.mask, x.reshape(-1).to(batch.dtype), 0.0)

    stats = RowStats(
        per_token("logps", logps), entropy=None if entropy is None else per_token("entropy", entropy)
    )
    chosen = choose_backend(backend, logps)
    one_kernel = has_token_kernels(spec, stats.logps, chosen)
    path = "one kernel over tokens" if one_kernel else "PyTorch operations over tokens"
    log_path("policy_loss", path, chosen, logps=logps.dtype)
    value, stats, derivatives = loss_of_statistics(stats, loss, chosen)
    return loss_output(value, batch, loss, stats, derivatives, chosen)
