"""Replaces the loss of TRL's DistillationTrainer with `linear_distillation_loss`.

TRL's trainer passes the hidden states and heads of student and teacher to `_chunked_divergence_loss`. The
replacement has the same signature and results. TRL still generates, runs both models, reads scales and
softcaps from their configs, and counts the tokens of all ranks and micro-batches.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...checks.choices import DivergenceKind
from ...linear_distillation import linear_distillation_loss
from ...log import logger, warn_once
from .head import TESTED, cast_head, installed, zero3_enabled

MODULE, NAME = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"

# `ref_logit_softcap=None` would give the teacher the student's softcap. This one changes no fp32 logit.
NO_SOFTCAP = 2.0**64

Losses = tuple[Tensor, Tensor, Tensor]  # the loss, the sum of the student's entropies, the number of tokens


def divergence_loss(
    student_hidden_states: Tensor,  # [B, T, H]
    teacher_hidden_states: Tensor,  # [B, T, H']
    student_lm_head_weight: Tensor,  # [V, H]
    teacher_lm_head_weight: Tensor,  # [V, H']
    completion_mask: Tensor,  # [B, T]
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # [V]
    teacher_lm_head_bias: Tensor | None = None,  # [V]
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> Losses:
    """Compute the loss of TRL's trainer with the arguments and results of its own function."""
    teacher_softcap = teacher_final_logit_softcapping
    if teacher_softcap is None and student_final_logit_softcapping is not None:
        teacher_softcap = NO_SOFTCAP
    weight, bias = cast_head(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    teacher = cast_head(teacher_hidden_states, teacher_lm_head_weight.detach(), teacher_lm_head_bias)
    mask = completion_mask != 0
    kind, jsd_weight = divergence_of(beta)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(mask.device)
    out = linear_distillation_loss(
        student_hidden_states,
        weight,
        lm_head_bias=bias,
        teacher_hidden=teacher_hidden_states,
        teacher_lm_head_weight=teacher[0],
        teacher_lm_head_bias=teacher[1],
        divergence=kind,
        jsd_weight=jsd_weight,
        completion_mask=mask,
        normalizer=num_items_in_batch,
        temperature=temperature,
        logit_scale=student_logit_scale,
        logit_softcap=student_final_logit_softcapping,
        ref_logit_scale=teacher_logit_scale,
        ref_logit_softcap=teacher_softcap,
        return_entropy=True,
    )
    assert out.entropy is not None
    return out.loss, out.entropy.sum(), mask.sum()


def divergence_of(beta: float) -> tuple[DivergenceKind, float]:
    """Return `divergence` and `jsd_weight` for TRL's `beta`."""
    if beta == 0.0:
        return "forward_kl", 0.5
    if beta == 1.0:
        return "reverse_kl", 0.5
    return "jsd", beta


@dataclass(frozen=True)
class FusedUnlessSharded:
    """Calls `divergence_loss`, or under DeepSpeed ZeRO-3 the function `stock` that it replaces.

    Under ZeRO-3 both heads are whole only inside of TRL's own function, which gathers them.
    """

    stock: Callable[..., Losses]

    def __call__(self, *args: Any, **kwargs: Any) -> Losses:
        if zero3_enabled():
            warn_once("Under DeepSpeed ZeRO-3 the distillation loss remains TRL's own")
            return self.stock(*args, **kwargs)
        return divergence_loss(*args, **kwargs)


def fuse_trl_distillation() -> None:
    """Compute the loss of TRL's DistillationTrainer with `linear_distillation_loss` from now on.

    Its `beta` is `jsd_weight`, and its 0 and 1 are "forward_kl" and "reverse_kl" (GKD, arXiv:2306.13649).
    Call it before or after a trainer is created; a second call changes nothing. The gradient is computed in
    the forward: 6 N V H FLOPs for N unmasked tokens, and 2 N V H' for the teacher. Until the backward, it
    takes the memory of the student's hidden states and head in fp32.

    Under DeepSpeed ZeRO-3 the loss remains TRL's own, and one warning says so.

    Raises:
        ImportError: this version of TRL has another distillation loss.

    Examples:
        >>> from trl import DistillationTrainer
        >>> from grpo_kernels.integrations.trl import fuse_trl_distillation
        >>> fuse_trl_distillation()  # once per process
        >>> trainer = DistillationTrainer(model, teacher_model=teacher, args=args, train_dataset=prompts)
    """
    try:
        module: Any = importlib.import_module(MODULE)
        stock = getattr(module, NAME)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{another_loss()}: {error}") from error
    if isinstance(stock, FusedUnlessSharded):
        return
    wanted, found = (list(inspect.signature(f).parameters) for f in (divergence_loss, stock))
    if found != wanted:
        raise ImportError(f"{another_loss()}: its arguments are {', '.join(found)}")
    setattr(module, NAME, FusedUnlessSharded(stock))
    logger.info(
        "fuse_trl_distillation: TRL's DistillationTrainer computes its loss with linear_distillation_loss"
    )


def another_loss() -> str:
    return f"TRL {installed} has another distillation loss than TRL {TESTED}, and needs a newer grpo_kernels"
