"""Replaces the function that TRL's fused head calls, by `linear_logps` or by a whole loss.

`trl.trainer.utils.add_fused_lm_head` gives a model a forward that runs the backbone, looks the head up, and
calls `_ChunkedLogProbFunction.apply`. What stands here has that signature; all else is left to TRL's forward:
scales and softcaps of the model's config, heads in fp32, router losses, gathered shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear_losses import linear_grpo_loss
from ..log import logger, warn_once
from ..logps import linear_token_statistics
from ..tokens.differentiation import outside_graphs
from ..tokens.output import LossOutput
from .versions import require

TESTED = "1.16"
installed = require("trl", "TRL", tested=TESTED)

from trl import GRPOTrainer  # noqa: E402, F401 - for the trainer, which is to import it after the check
from trl.trainer import utils  # noqa: E402

try:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import FusedCausalLMOutput, _ChunkedLogProbFunction  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"TRL {installed} has another fused head than TRL {TESTED}, and needs a newer grpo_kernels: {error}"
    ) from error


class PerToken(NamedTuple):
    """`[N]` each, None where not asked for: the results of TRL's function, in its order."""

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass(frozen=True)
class FusedLogProbs:
    """`linear_logps` with the arguments and results of TRL's `_ChunkedLogProbFunction`."""

    options: Mapping[str, Any] = field(default_factory=dict)  # of `linear_logps`, besides
    name: str = "linear_logps"  # in the log

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = PerToken._fields[1:],
    ) -> PerToken:
        weight, bias = as_multiplied(hidden, weight, bias)
        # With the entropy even where nobody asks for it, as of a reference: the same code then rounds policy
        # and reference alike, and their KL is exactly 0 at the start.
        found = linear_token_statistics(
            hidden,
            weight,
            targets,
            lm_head_bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            entropy=True,
            top1="is_top1" in outputs,
            function=self.name,
            **self.options,
        )
        others = tuple(x for x in ("log_sum_sq_probs", "mean_logits") if x in outputs)
        if others == ("mean_logits",) and logit_softcap is None:
            scale = logit_scale / temperature
            rest = PerToken(found.logps, mean_logits=mean_of_logits(hidden, weight, bias) * scale)
        elif others:
            warn_once(f"{' and '.join(others)} of each token: by TRL's own function, in another pass")
            head = (hidden, weight, bias, targets, temperature, chunk_size, logit_softcap, logit_scale)
            with torch.no_grad():
                rest = PerToken(*ChunkedLogProbFunction.apply(*head, others))
        else:
            rest = PerToken(found.logps)
        entropy = found.entropy if "entropy" in outputs else None
        return rest._replace(logps=found.logps, entropy=entropy, is_top1=found.top1)


class FusedUnlessSharded:
    """`FusedLogProbs`, whose backward needs the head: by then DeepSpeed ZeRO-3 has taken it apart again."""

    @staticmethod
    def apply(*args: Any) -> PerToken | tuple[Tensor | None, ...]:
        if zero3_enabled():
            warn_once("Under DeepSpeed ZeRO-3 the log-probabilities remain TRL's own")
            return ChunkedLogProbFunction.apply(*args)
        return FusedLogProbs(name="fuse_trl_logps").apply(*args)


def zero3_enabled() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def as_multiplied(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of the hidden states, in which TRL multiplies where autocast sets none."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def mean_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over the vocabulary, `[N]` fp32: the mean of the products is the product with the mean row."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return mean if bias is None else mean + bias.mean(dtype=torch.float32)


class ForwardLoss:
    """A loss in the place of the log-probabilities, for one call of a model with `add_fused_loss`.

    It counts the calls, because a loss of the whole batch is right only if exactly one call computed it.

    It is not a dataclass, because FSDP casts the tensors in a dataclass among a model's arguments.
    """

    output: LossOutput
    other_tokens: Tensor  # bool, on the device: the call that computed the loss had other labels

    def __init__(
        self,
        completion_ids: Tensor,  # [B, T]
        labelled: Tensor,  # [B, T]: the tokens that TRL gives labels
        advantages: Tensor,
        arguments: dict[str, Any],  # of `linear_grpo_loss` and `policy_loss`
        options: Mapping[str, Any],  # of `linear_grpo_loss`
    ) -> None:
        self.completion_ids = completion_ids
        self.labelled = labelled.bool()
        self.advantages = advantages
        self.arguments = arguments
        self.options = options
        self.calls = 0  # of the model with this loss
        self.computed = 0  # calls that computed it
        self.sequences = 0  # of the last call

    def takes(self, labels: Tensor | None) -> bool:  # [B, L]
        """Count a call of the model, and return whether it has as many sequences as the loss."""
        B, T = self.completion_ids.shape
        self.calls += 1
        self.sequences = 0 if labels is None else len(labels)
        if labels is None or len(labels) != B or labels.shape[1] <= T:
            return False
        expected = self.completion_ids.masked_fill(~self.labelled, -100)
        self.other_tokens = (labels[:, -T:] != expected).any()
        self.computed += 1
        return True

    @outside_graphs  # inside of them it would take two passes
    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> PerToken:
        """Fills `output`; returns zeros, which `add_fused_loss` replaces."""
        weight, bias = as_multiplied(hidden, weight, bias)
        self.output = linear_grpo_loss(
            self.of_completions(hidden),
            weight,
            self.completion_ids,
            self.advantages,
            lm_head_bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=True,
            **self.arguments,
            **self.options,
        )
        return PerToken(self.output.logps.new_zeros(len(hidden)))

    def of_completions(self, hidden: Tensor) -> Tensor:
        """`[B, T, H]` of TRL's rows: all positions of all sequences, or, where it has Triton, those with
        labels."""
        rows = self.completion_ids.numel()
        if len(hidden) >= rows:
            B, T = self.completion_ids.shape
            return hidden.view(B, -1, hidden.shape[-1])[:, -T:]
        # The host waits for their number, as it has in TRL, which picked them in the same way.
        padded = hidden.new_zeros(rows, hidden.shape[-1]).index_put((self.labelled.flatten(),), hidden)
        return padded.view(*self.completion_ids.shape, -1)


@contextmanager
def head_function(function: Any) -> Iterator[None]:
    """What TRL's fused heads call while this lasts."""
    before = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = function
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = before


def stock_head() -> AbstractContextManager[None]:
    """TRL's own function, whatever `fuse_trl_logps` has done."""
    return head_function(ChunkedLogProbFunction)


def fuse_trl_logps() -> None:
    """Every fused head of TRL computes its log-probabilities with `linear_logps` from now on.

    That is in all trainers that TRL gives such a head, the losses staying theirs: GRPO, RLOO, SFT, DPO, KTO.
    Before or after a trainer is made; calling it again changes nothing. Gradients are summed in fp32 and
    logits held in it; tokens without an upstream gradient cost nothing in the backward.

    With one warning, TRL's own function adds in a pass of its own what DPO's `use_weighting` needs, and the
    mean logits (DPO, KTO) of models with `final_logit_softcapping`; under DeepSpeed ZeRO-3 all is left to it.
    """
    utils._ChunkedLogProbFunction = FusedUnlessSharded
    logger.info("fuse_trl_logps: the fused heads of TRL compute log-probabilities with linear_logps")
