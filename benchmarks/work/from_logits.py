"""The providers of the loss from logits. `providers.py` explains what a provider is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import grpo_loss, selective_logps

from .batch import Batch, masked_mean
from .provider import interpreting, loss_of, needs_gpu, provider
from .workload import BETA, CLIP, LOSSES, Workload


def ours(batch: Batch, logits: Tensor, **how: Any) -> Tensor:
    """If the reference's logits are given, this also computes their exact KL, for the metrics."""
    ref_logits = None if batch.ref_logits is None else batch.ref_logits[:, :-1]
    return grpo_loss(
        *(logits, batch.ids, batch.advantages),
        spec=LOSSES[batch.work.loss],
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logits=ref_logits,
        **{"ref_logps": batch.ref_logps, "return_entropy": batch.work.entropy, **how},
    ).loss


provider("grpo_kernels", "logits", entropies=True)(ours)


@provider("grpo_kernels inplace", "logits", overwrites=True, entropies=True)
def ours_inplace(batch: Batch, logits: Tensor, **how: Any) -> Tensor:
    return ours(batch, logits, inplace=True, **how)


def refused_without_entropy(work: Workload, device: torch.device) -> str | None:
    return None if work.entropy else "measured with entropies only"


@provider("grpo_kernels selective_logps", "logits", entropies=True, refuses=refused_without_entropy)
def ours_selective(batch: Batch, logits: Tensor) -> Tensor:
    """Its forward computes statistics in one launch, and nothing else of the logits' size."""
    ref_logps = batch.ref_logps
    if batch.ref_logits is not None:
        ref_logps = selective_logps(batch.ref_logits[:, :-1], batch.ids, mask=batch.mask)
    logps, _ = selective_logps(logits, batch.ids, mask=batch.mask, return_entropy=True)
    return loss_of(batch, logps, ref_logps)


def taken(log_p: Tensor, ids: Tensor) -> Tensor:
    return log_p.gather(-1, ids[..., None])[..., 0]


def eager_logps(logits: Tensor, ids: Tensor) -> Tensor:
    return taken(torch.log_softmax(logits.float(), -1), ids)


@provider("eager", "logits")
def eager(batch: Batch, logits: Tensor) -> Tensor:
    ref_logps = batch.ref_logps
    if batch.ref_logits is not None:
        with torch.no_grad():
            ref_logps = eager_logps(batch.ref_logits[:, :-1], batch.ids)
    return loss_of(batch, eager_logps(logits, batch.ids), ref_logps)


class LossAndKL(NamedTuple):
    loss: Tensor
    kl: Tensor  # exact KL(policy || reference), detached, mean over the unmasked tokens, nats


def loss_and_kl(batch: Batch, logits: Tensor, ref_logits: Tensor) -> LossAndKL:
    """The loss in eager PyTorch with the exact KL as a metric, as a trainer would log it."""
    log_p = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        log_q = torch.log_softmax(ref_logits.float(), -1)
        kl = masked_mean((log_p.exp() * (log_p - log_q)).sum(-1), batch.mask)
    return LossAndKL(loss_of(batch, taken(log_p, batch.ids), taken(log_q, batch.ids)), kl)


def refused_without_reference(work: Workload, device: torch.device) -> str | None:
    return None if work.reference else "needs a reference's logits"


def provider_with_kl(name: str, form: str, both: Callable[..., LossAndKL]) -> None:
    """Adds the loss of `both` to PROVIDERS.

    `both` returns the KL as well, because the compiler removes what is not returned.
    """

    @provider(name, form, refuses=refused_without_reference)
    def loss(batch: Batch, *inputs: Tensor) -> Tensor:
        return both(batch, *inputs).loss


def eager_with_kl(batch: Batch, logits: Tensor) -> LossAndKL:
    assert batch.ref_logits is not None
    return loss_and_kl(batch, logits, batch.ref_logits[:, :-1])


compiled_with_kl = torch.compile(eager_with_kl)

provider_with_kl("eager + exact KL", "logits", eager_with_kl)
provider("torch.compile", "logits")(torch.compile(eager))
provider_with_kl("torch.compile + exact KL", "logits", compiled_with_kl)


def refused_by_liger(work: Workload, device: torch.device) -> str | None:
    if work.loss not in ("grpo", "grpo_kl"):
        return f"has no {work.loss} loss"
    return None if interpreting() else needs_gpu(work, device)


# Liger works in place by default.
@provider("liger", "logits", package="liger-kernel", refuses=refused_by_liger, padded=True, overwrites=True)
def liger(batch: Batch, logits: Tensor) -> Tensor:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    mask = batch.mask.int()
    ref_logps = batch.ref_logps
    if batch.ref_logits is not None:
        ref_logps = fused_selective_log_softmax(batch.ref_logits, batch.ids, temperature=1.0, mask=mask)
    loss, _ = triton_grpo_loss(
        *(logits, batch.old_logps, ref_logps, batch.ids, batch.advantages, mask),
        temperature=1.0,
        beta=0.0 if ref_logps is None else BETA,
        eps_low=CLIP,
        eps_high=CLIP,
        loss_type="bnpo",
        reduce=True,
    )
    return loss


# With the entropy, which TRL's GRPO trainer always computes.
@provider("trl", "logits", package="trl", entropies=True)
def trl(batch: Batch, logits: Tensor) -> Tensor:
    if logits.is_cuda or interpreting():  # TRL's utilities call the kernels in this case
        from trl.kernels import selective_log_softmax_and_entropy as both

        logps_of: Callable[..., Tensor] = lambda *args, **how: both(*args, **how)[0]  # noqa: E731
    else:
        from trl.trainer.utils import selective_log_softmax as logps_of
        from trl.trainer.utils import selective_log_softmax_and_entropy as both

    ref_logps = batch.ref_logps
    if batch.ref_logits is not None:
        with torch.no_grad():
            ref_logps = logps_of(batch.ref_logits[:, :-1], batch.ids, row_mask=batch.mask)
    logps, _ = both(logits, batch.ids, row_mask=batch.mask)
    return loss_of(batch, logps, ref_logps)
