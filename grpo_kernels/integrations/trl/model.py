"""Changes the forward and the head of a model for `FusedGRPOTrainer`, and checks what the head computes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .forward_loss import ForwardLoss
from .head import FusedCausalLMOutput, head_function

# Attributes under which wrappers of FSDP1, activation checkpointing and torch.compile hold a module.
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def base_model(model: Any) -> Any:
    """Return the model that has TRL's fused head: the one inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unbound(forward: Any, model: Any) -> Callable[..., Any]:
    """Return the bound method `forward` of `model` as a function that takes the model first."""
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        return forward.__func__
    if isinstance(forward, functools.partial) and forward.args == (model,) and not forward.keywords:
        return forward.func  # accelerate binds the hooks of `device_map` in this way
    return lambda self, *args, **kwargs: forward(*args, **kwargs)


def add_fused_loss(model: Any) -> None:
    """Let the forward of a model with TRL's fused head accept `fused_loss=`, a `ForwardLoss`.

    The forward computes the loss and returns it, so that the hooks of DDP, FSDP and DeepSpeed see it as they
    see TRL's log-probabilities. The output also holds the log-probabilities, `[B, T]`, without a gradient.

    The new forward is a method and holds no model, so a deep copy computes with its own parameters. A pickled
    model loads with the forward of its class, as it does with TRL's forward.
    """
    model = base_model(model)
    fused = unbound(model.forward, model)
    # TRL's forward calls the earlier forward, which is bound to this model even in a copy of the model.
    original = inspect.getclosurevars(fused).nonlocals.get("original_forward")
    plain = fused if original is None else unbound(original, model)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        fused_loss: ForwardLoss | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return plain(self, *args, **kwargs)
        if fused_loss is None or not fused_loss.takes(kwargs.get("labels")):
            return fused(self, *args, fused_lm_head=True, **kwargs)
        with head_function(fused_loss):
            outputs = fused(self, *args, fused_lm_head=True, **kwargs)
        found = fused_loss.output
        return FusedCausalLMOutput(
            loss=found.loss, log_probs=found.logps, entropy=found.entropy, aux_loss=outputs.aux_loss
        )

    model.forward = types.MethodType(forward, model)


def linear_in_fp32(self: Any, hidden: Tensor) -> Tensor:
    """The forward that TRL gives a head under `cast_lm_head_to_fp32`, as a method of the head."""
    bias = None if self.bias is None else self.bias.float()
    return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def cast_own_head(model: Any) -> None:
    """Replace TRL's fp32 forward of the head by a method.

    TRL's forward is a closure over one head, so a copy of the model would use the head of the original.
    """
    head = base_model(model).get_output_embeddings()
    head.forward = types.MethodType(linear_in_fp32, head)


def ignored_forward(model: Any) -> str | None:
    """Name what the head of `model` computes in addition to its linear layer; None if nothing.

    TRL's fused head reads the weight and the bias and does not call the head, so this is not run.
    """
    head = base_model(model).get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)  # PEFT's wrapper calls one of these copies
    for module in [head] if saved is None else saved.values():
        found = extra_computation(module)
        if found is not None:
            return found
    return None


def extra_computation(head: Any) -> str | None:
    """Name what the module `head` computes in addition to its linear layer; None if nothing."""
    for name in WRAPPED:
        head = getattr(head, name, head)
    forward = vars(head).get("forward")
    if hasattr(head, "_hf_hook"):  # accelerate's, which only moves tensors
        forward = vars(head).get("_old_forward")
    function = getattr(forward, "__func__", forward) or type(head).forward
    if function not in (nn.Linear.forward, linear_in_fp32):
        return f"{type(head).__name__}.forward"
    # The hooks of FSDP2 and tensor parallelism gather shards, as TRL does.
    if (head._forward_hooks or head._forward_pre_hooks) and not isinstance(head.weight, DTensor):
        return f"the forward hooks of {type(head).__name__}"
    return None
