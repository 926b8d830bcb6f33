"""The providers of the loss from hidden states. `providers.py` explains what a provider is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels import linear_grpo_loss, linear_logps

from .batch import Batch
from .from_logits import LossAndKL, eager_logps, loss_and_kl, provider_with_kl
from .provider import Loss, loss_of, needs_gpu, provider
from .workload import BETA, CLIP, LOSSES, Workload


def ours_linear(batch: Batch, hidden: Tensor, weight: Tensor, **how: Any) -> Tensor:
    return linear_grpo_loss(
        *(hidden, weight, batch.ids, batch.advantages),
        spec=LOSSES[batch.work.loss],
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_hidden=batch.ref_hidden,
        ref_lm_head_weight=batch.ref_weight,
        ref_logps=batch.ref_logps,
        **{"return_entropy": batch.work.entropy, **how},
    ).loss


provider("grpo_kernels", "linear", entropies=True)(ours_linear)


def refused_without_idle_rows(work: Workload, device: torch.device) -> str | None:
    return None if work.learning < 1 - work.masked else "every unmasked row has a gradient"


@provider("grpo_kernels skip_inactive", "linear", entropies=True, refuses=refused_without_idle_rows)
def ours_skipping(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """Omits the log-probabilities of rows without a gradient, so it does less than the others."""
    return ours_linear(batch, hidden, weight, skip_inactive=True)


def refused_but_in_bf16(work: Workload, device: torch.device) -> str | None:
    return None if work.dtype == torch.bfloat16 else "logits have the dtype of the hidden states"


@provider("grpo_kernels bf16 logits", "linear", entropies=True, refuses=refused_but_in_bf16)
def ours_in_bf16(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return ours_linear(batch, hidden, weight, logits_dtype=torch.bfloat16)


def from_logps(logps_of: Callable[..., Tensor], *, entropies: bool = False) -> Loss:
    """Decorates `logps_of(hidden, weight, ids, mask)`: makes it a loss function.

    With `entropies`, `logps_of` also takes `entropy`, whether it should compute entropies.
    """

    def loss(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        ref_logps = batch.ref_logps
        if batch.ref_hidden is not None:
            with torch.no_grad():
                ref_logps = logps_of(batch.ref_hidden, batch.ref_weight, batch.ids, batch.mask)
        how = {"entropy": batch.work.entropy} if entropies else {}
        return loss_of(batch, logps_of(hidden, weight, batch.ids, batch.mask, **how), ref_logps)

    return loss


with_entropies = partial(from_logps, entropies=True)


@provider("grpo_kernels linear_logps", "linear", entropies=True)
@with_entropies
def ours_logps(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor, *, entropy: bool = False) -> Tensor:
    found = linear_logps(hidden, weight, ids, mask=mask, return_entropy=entropy)
    return found[0] if isinstance(found, tuple) else found


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


@provider("trl", "linear", package="trl", entropies=True)
@from_logps
def trl_linear(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """TRL's chunked head. Like TRL, this omits masked rows if the Triton kernels run."""
    from trl.kernels import chunked_logprob

    rows = mask if chunked_logprob._use_triton(hidden.device) else torch.ones_like(mask)
    logps, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
        *(hidden[rows], weight, None, ids[rows], 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    )
    return logps.new_zeros(mask.shape).masked_scatter(rows, logps)


@provider("verl", "linear", package="verl", entropies=True, refuses=needs_gpu)
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


# The library of CuTe's compiler is a wheel of its own, by the version of CUDA.
CUTE_COMPILER = f"nvidia-cutlass-dsl-libs-cu{(torch.version.cuda or '13').split('.')[0]}"


def refused_by_fused_liger(work: Workload, device: torch.device) -> str | None:
    return "on a CPU it is a loop over 512 rows in eager PyTorch" if device.type != "cuda" else None


@provider(
    "liger fused",
    "linear",
    package="liger-kernel",
    also=("nvidia-cutlass-dsl", CUTE_COMPILER, "apache-tvm-ffi"),
    entropies=True,
    refuses=refused_by_fused_liger,
)
@with_entropies
def liger_fused(
    hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor, *, entropy: bool = False
) -> Tensor:
    """Log-probabilities and entropies of Liger's fused scaled cross entropy, in CuTe on a Hopper GPU."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden[mask], weight, ids[mask], return_entropy=entropy
    )
    nll = found[0] if isinstance(found, tuple) else found
    return nll.new_zeros(mask.shape).masked_scatter(mask, -nll)


QUACK_CHUNK = 4096  # rows: the default of QuACK 0.6.5


@provider(
    "quack", "linear", package="quack-kernels", also=("nvidia-cutlass-dsl", CUTE_COMPILER), refuses=needs_gpu
)
def quack(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """QuACK's linear cross entropy: in chunks if the loss is their mean, else per token, from all logits.

    Without autotuning, which takes minutes.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    if batch.work.loss == "cross_entropy":
        ids = batch.ids.masked_fill(~batch.mask, -100).flatten()
        rows = hidden.flatten(0, 1)
        return chunked_linear_cross_entropy(rows, weight, ids, chunk_size=QUACK_CHUNK, tuned=False)

    @from_logps
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        rows, ids = hidden.flatten(0, 1), ids.masked_fill(~mask, -100)
        nll = linear_cross_entropy_func(rows, weight, None, ids.flatten(), reduction="none")
        return -nll.view_as(ids)

    return loss(batch, hidden, weight)


UNSLOTH_CHUNKS = 4  # the default of its log-probabilities


@provider("unsloth", "linear", package="unsloth_zoo", also=("unsloth",), refuses=needs_gpu)
@from_logps
def unsloth(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The log-probabilities of its GRPO, in chunks under `torch.compile`. Its import needs a GPU."""
    import unsloth  # noqa: F401  (unsloth_zoo refuses to be imported first)
    from unsloth_zoo.rl_replacements import RL_REPLACEMENTS

    return RL_REPLACEMENTS["grpo_selective_log_softmax"](hidden, weight, ids, UNSLOTH_CHUNKS)


@provider("cut-cross-entropy", "linear", package="cut-cross-entropy", refuses=needs_gpu)
@from_logps
def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Its per-token form. By default, cut-cross-entropy drops gradients that it considers negligible."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids.masked_fill(~mask, -100), reduction="none")


def refused_by_torch(work: Workload, device: torch.device) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


@provider("torch linear_cross_entropy", "linear", refuses=refused_by_torch)
def torch_linear(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """In chunks. The mean has its gradient in the forward, the per-token form computes logits again."""
    options = torch.nn.LinearCrossEntropyOptions()

    def nll(hidden: Tensor, weight: Tensor, ids: Tensor, reduction: str) -> Tensor:
        rows, ids = hidden.flatten(0, 1), ids.flatten()
        return F.linear_cross_entropy(rows, weight, ids, reduction=reduction, options=options)

    if batch.work.loss == "cross_entropy":
        return nll(hidden, weight, batch.ids.masked_fill(~batch.mask, -100), "mean")

    @from_logps
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return -nll(hidden, weight, ids.masked_fill(~mask, -100), "none").view_as(ids)

    return loss(batch, hidden, weight)
