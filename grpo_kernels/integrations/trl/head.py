"""Replaces the function that TRL's fused head calls with `linear_logps` or with a whole loss.

`trl.trainer.utils.add_fused_lm_head` gives a model a forward that runs the backbone, finds the head and calls
`_ChunkedLogProbFunction.apply`. The replacements have the same signature. TRL's forward still reads scales
and softcaps from the model's config, casts heads to fp32, computes router losses and gathers shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...log import logger, warn_once
from ...logps import linear_token_stats
from ..versions import require

TESTED = "1.16"
installed = require("trl", "TRL", tested=TESTED)

# The other modules import these from here, after the version was checked.
from trl import GRPOTrainer  # noqa: E402, F401
from trl.trainer import utils  # noqa: E402

try:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import FusedCausalLMOutput, _ChunkedLogProbFunction  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"TRL {installed} has another fused head than TRL {TESTED}, and needs a newer grpo_kernels: {error}"
    ) from error


class PerToken(NamedTuple):
    """The results of TRL's function in its order: `[N]` each, or None if not requested."""

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass(frozen=True)
class FusedLogProbs:
    """`linear_logps` with the arguments and results of TRL's `_ChunkedLogProbFunction`.

    Attributes:
        options: further options of `linear_logps`.
        name: the name of this function in the log.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "linear_logps"

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
        weight, bias = cast_head(hidden, weight, bias)
        # The entropy is computed even if `outputs` does not name it, as for a reference. Policy and reference
        # then run the same code and round alike, and their KL is exactly 0 at the start.
        found = linear_token_stats(
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
            warn_once(f"TRL's own function computes {' and '.join(others)} of each token, in another pass")
            head = (hidden, weight, bias, targets, temperature, chunk_size, logit_softcap, logit_scale)
            with torch.no_grad():
                rest = PerToken(*ChunkedLogProbFunction.apply(*head, others))
        else:
            rest = PerToken(found.logps)
        entropy = found.entropy if "entropy" in outputs else None
        return rest._replace(logps=found.logps, entropy=entropy, is_top1=found.top1)


class FusedUnlessSharded:
    """Calls `FusedLogProbs`, or TRL's own function under DeepSpeed ZeRO-3.

    The backward of `FusedLogProbs` reads the head, which ZeRO-3 has sharded again by then.
    """

    @staticmethod
    def apply(*args: Any) -> PerToken | tuple[Tensor | None, ...]:
        if zero3_enabled():
            warn_once("Under DeepSpeed ZeRO-3 the log-probabilities remain TRL's own")
            return ChunkedLogProbFunction.apply(*args)
        return FusedLogProbs(name="fuse_trl_logps").apply(*args)


def zero3_enabled() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast the head to the dtype of the hidden states, as TRL does without autocast."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def mean_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean logit, `[N]` fp32, as the product with the mean row of the weight."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return mean if bias is None else mean + bias.mean(dtype=torch.float32)


@contextmanager
def head_function(function: Any) -> Iterator[None]:
    """Let TRL's fused heads call `function.apply` inside of this context."""
    before = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = function
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = before


def stock_head() -> AbstractContextManager[None]:
    """Let TRL's fused heads call TRL's own function, even after `fuse_trl_logps`."""
    return head_function(ChunkedLogProbFunction)


def fuse_trl_logps() -> None:
    """Compute the log-probabilities of TRL's fused heads with `linear_logps` from now on.

    This changes all trainers to which TRL gives such a head: GRPO, RLOO, SFT, DPO and KTO. Their losses stay
    TRL's. Call it before or after a trainer is created; a second call changes nothing. Logits and accumulated
    gradients are fp32. Tokens without an upstream gradient cost nothing in the backward.

    In these cases TRL's own function still runs, and one warning says so:

    * It computes what DPO's `use_weighting` needs, in an additional pass.
    * It computes the mean logits (DPO, KTO) of models with `final_logit_softcapping`, in an additional pass.
    * It computes everything under DeepSpeed ZeRO-3.

    Examples:
        >>> from trl import GRPOTrainer
        >>> from grpo_kernels.integrations.trl import fuse_trl_logps
        >>> fuse_trl_logps()  # once per process
        >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts)
    """
    utils._ChunkedLogProbFunction = FusedUnlessSharded
    logger.info("fuse_trl_logps: the fused heads of TRL compute log-probabilities with linear_logps")
