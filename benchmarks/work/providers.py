"""The providers of the loss: this package, eager PyTorch and other packages ("peers").

Each is called as its users call it. A provider takes a batch and the tensors that need a gradient, and
returns the loss. If a peer computes only log-probabilities, `token_losses` follows in eager PyTorch. If a
provider cannot do a workload, it gives a reason, which the results show.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels import grpo_loss, linear_grpo_loss, linear_logps

from .batch import Batch, masked_mean, token_losses
from .workload import BETA, CLIP, LOSSES, Workload

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """A loss function, `loss(batch, logits)` or `loss(batch, hidden, weight)`, and what it needs."""

    name: str
    loss: Loss
    package: str | None = None  # must be installed
    refuses: Callable[[Workload, torch.device], str | None] = lambda work, device: None
    padded: bool = False  # takes the logits of all L + 1 positions
    overwrites: bool = False  # writes the gradient over the logits

    def reason_against(self, work: Workload, device: torch.device) -> str | None:
        """Why this provider cannot do this workload on this device, or None."""
        if self.package is not None and installed_version(self.package) is None:
            return f"{self.package} is not installed"
        return self.refuses(work, device)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tensors that need a gradient. Logits that will be overwritten are copied."""
        if batch.logits is not None:
            logits = (batch.logits if self.padded else batch.logits[:, :-1]).detach().requires_grad_()
            return (logits.clone() if self.overwrites else logits,)
        assert batch.hidden is not None and batch.weight is not None
        hidden, weight = batch.hidden.detach(), batch.weight.detach()
        return hidden.requires_grad_(), weight.requires_grad_(not batch.work.frozen_head)

    @property
    def version(self) -> str:
        return (self.package and installed_version(self.package)) or ""


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


PROVIDERS: dict[str, dict[str, Provider]] = {"logits": {}, "linear": {}}


def provider(name: str, form: str, **how: Any) -> Callable[[Loss], Loss]:
    """Decorates a loss function: adds it to PROVIDERS."""

    def add(loss: Loss) -> Loss:
        PROVIDERS[form][name] = Provider(name, loss, **how)
        return loss

    return add


def loss_of(batch: Batch, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """The loss in eager PyTorch, for providers that compute only log-probabilities."""
    losses = token_losses(batch.work, logps, batch.old_logps, ref_logps, batch.advantages)
    return masked_mean(losses, batch.mask)


def needs_gpu(work: Workload, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "its kernels need a GPU"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU, as for counting bytes."""
    import triton

    return bool(triton.knobs.runtime.interpret)


# From logits.


def ours(batch: Batch, logits: Tensor, **how: Any) -> Tensor:
    """If the reference's logits are given, this also computes their exact KL, for the metrics."""
    ref_logits = None if batch.ref_logits is None else batch.ref_logits[:, :-1]
    return grpo_loss(
        *(logits, batch.ids, batch.advantages),
        spec=LOSSES[batch.work.loss],
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logits=ref_logits,
        **{"ref_logps": batch.ref_logps, **how},
    ).loss


provider("grpo_kernels", "logits")(ours)


@provider("grpo_kernels inplace", "logits", overwrites=True)
def ours_inplace(batch: Batch, logits: Tensor, **how: Any) -> Tensor:
    return ours(batch, logits, inplace=True, **how)


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
@provider("trl", "logits", package="trl")
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


# From hidden states.


def ours_linear(batch: Batch, hidden: Tensor, weight: Tensor, **how: Any) -> Tensor:
    return linear_grpo_loss(
        *(hidden, weight, batch.ids, batch.advantages),
        spec=LOSSES[batch.work.loss],
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_hidden=batch.ref_hidden,
        ref_lm_head_weight=batch.ref_weight,
        ref_logps=batch.ref_logps,
        **how,
    ).loss


provider("grpo_kernels", "linear")(ours_linear)


def refused_without_idle_rows(work: Workload, device: torch.device) -> str | None:
    return None if work.learning < 1 - work.masked else "every unmasked row has a gradient"


@provider("grpo_kernels skip_inactive", "linear", refuses=refused_without_idle_rows)
def ours_skipping(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """Omits the log-probabilities of rows without a gradient, so it does less than the others."""
    return ours_linear(batch, hidden, weight, skip_inactive=True)


def refused_but_in_bf16(work: Workload, device: torch.device) -> str | None:
    return None if work.dtype == torch.bfloat16 else "logits have the dtype of the hidden states"


@provider("grpo_kernels bf16 logits", "linear", refuses=refused_but_in_bf16)
def ours_in_bf16(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return ours_linear(batch, hidden, weight, logits_dtype=torch.bfloat16)


def from_logps(logps_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Decorates `logps_of(hidden, weight, ids, mask)`: makes it a loss function."""

    def loss(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        ref_logps = batch.ref_logps
        if batch.ref_hidden is not None:
            with torch.no_grad():
                ref_logps = logps_of(batch.ref_hidden, batch.ref_weight, batch.ids, batch.mask)
        return loss_of(batch, logps_of(hidden, weight, batch.ids, batch.mask), ref_logps)

    return loss


@provider("grpo_kernels linear_logps", "linear")
@from_logps
def ours_logps(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return linear_logps(hidden, weight, ids, mask=mask)


@from_logps
def eager_linear(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return eager_logps(hidden @ weight.t(), ids)


provider("eager", "linear")(eager_linear)


def eager_linear_with_kl(batch: Batch, hidden: Tensor, weight: Tensor) -> LossAndKL:
    assert batch.ref_hidden is not None and batch.ref_weight is not None
    return loss_and_kl(batch, hidden @ weight.t(), batch.ref_hidden @ batch.ref_weight.t())


compiled_linear_with_kl = torch.compile(eager_linear_with_kl)

provider_with_kl("eager + exact KL", "linear", eager_linear_with_kl)
provider("torch.compile", "linear")(torch.compile(eager_linear))
provider_with_kl("torch.compile + exact KL", "linear", compiled_linear_with_kl)


TRL_CHUNK = 32768  # vocabulary entries: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE of TRL 1.16


@provider("trl", "linear", package="trl")
@from_logps
def trl_linear(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """TRL's chunked head. Like TRL, this omits masked rows if the Triton kernels run."""
    from trl.kernels import chunked_logprob

    rows = mask if chunked_logprob._use_triton(hidden.device) else torch.ones_like(mask)
    logps, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
        *(hidden[rows], weight, None, ids[rows], 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    )
    return logps.new_zeros(mask.shape).masked_scatter(rows, logps)


@provider("verl", "linear", package="verl", refuses=needs_gpu)
@from_logps
def verl(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, _ = linear_cross_entropy(hidden, weight, ids, 1.0, "none")
    return logps.view_as(ids)


def refused_by_chunked_liger(work: Workload, device: torch.device) -> str | None:
    return None if work.loss in ("grpo", "grpo_kl") else f"has no {work.loss} loss"


@provider("liger", "linear", package="liger-kernel", refuses=refused_by_chunked_liger)
def liger_linear(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=BETA if batch.work.loss == "grpo_kl" else 0.0,
        use_ref_model=batch.work.loss == "grpo_kl",
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
    )
    loss, _ = module(
        *(hidden, weight, batch.ids, batch.mask.int(), batch.advantages),
        old_per_token_logps=batch.old_logps,
        ref_per_token_logps=batch.ref_logps,
        ref_input=batch.ref_hidden,
        ref_weight=batch.ref_weight,
    )
    return loss


@provider("cut-cross-entropy", "linear", package="cut-cross-entropy", refuses=needs_gpu)
@from_logps
def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """By default, cut-cross-entropy drops gradients that it considers negligible."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids.masked_fill(~mask, -100), reduction="none")


def refused_by_torch(work: Workload, device: torch.device) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None if work.loss == "cross_entropy" else "computes only the mean cross entropy"


@provider("torch linear_cross_entropy", "linear", refuses=refused_by_torch)
def torch_linear(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    ids = batch.ids.masked_fill(~batch.mask, -100)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, ids.flatten(), options=options)
