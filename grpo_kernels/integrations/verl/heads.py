"""Bias, scale and softcap of a model's logits, which verl's fused forwards leave out.

verl's fused forwards pass on only the hidden states and the head's weight. This module reads the rest from
the model whose forward is running.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.models.transformers.monkey_patch import patch_forward_with_backends as verl_patch
from verl.utils.experimental import torch_functional

from ...log import warn_once
from ..logit_rule import LogitRule, is_linear, wrapped_layer
from .engine import find_engines

FIX = "Set actor_rollout_ref.model.use_fused_kernels=False."
# Logits that differ by less count as equal, because a model may round them to bf16 more than once.
TOLERANCE = 2**-6


class LogitHead(NamedTuple):
    """The arguments of `linear_logps` that describe a head, except for its weight.

    Attributes:
        bias: `[V]`; None without one.
        rule: what the model does with the output of its head.
    """

    bias: Tensor | None = None
    rule: LogitRule = LogitRule()

    @classmethod
    def of(cls, model: Any) -> LogitHead:
        """Return the head of a causal language model. Raise ValueError if it is more than a linear layer."""
        head = wrapped_layer(model.lm_head)
        if not is_linear(head):
            raise ValueError(
                f"the lm_head of {type(model).__name__} is of {type(head)}, whose forward is not that of a "
                f"linear layer (LoRA on the head, for example), and verl's fused forward passes on only its "
                f"weight. {FIX}"
            )
        return cls(getattr(model.lm_head, "bias", None), LogitRule.of(model.config))


# The model whose fused forward is running.
current_model: ContextVar[Any] = ContextVar("current_model", default=None)


def current_head() -> LogitHead:
    """Return the head of the model whose fused forward is running; outside of one, a head without bias."""
    model = current_model.get()
    return LogitHead() if model is None else LogitHead.of(model)


def patch_forward_with_backends(
    model: Any,
    use_fused_kernels: bool = False,
    fused_kernels_backend: str | None = None,
    **options: Any,
) -> None:
    """Call verl's function of this name, and let the fused forward set `current_model`.

    Raises:
        ValueError: the model's own forward computes other logits than its config describes, or the backend
            is "liger" and the logits are not `hidden @ weight.T`.
    """
    find_engines()  # an engine builds this model
    stock = getattr(type(model).forward, "stock", type(model).forward)
    if use_fused_kernels and fused_kernels_backend is not None:
        check_logits(model, stock, fused_kernels_backend)
    verl_patch(model, use_fused_kernels, fused_kernels_backend, **options)
    if use_fused_kernels and type(model).forward.__module__.startswith("verl."):
        type(model).forward = with_model(type(model).forward, stock)


def with_model(verl_forward: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a fused forward of verl, so that `current_model` is its model while it runs."""

    @functools.wraps(verl_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = current_model.set(self)
        try:
            return verl_forward(self, *args, **kwargs)
        finally:
            current_model.reset(token)

    forward.stock = stock  # type: ignore[attr-defined]  # verl patches the class again for its next model
    return forward


def check_logits(model: Any, stock: Callable[..., Any], backend: str) -> None:
    """Raise ValueError if verl's fused log-probabilities would not be those of the model's own logits."""
    name, rule = type(model).__name__, LogitRule.of(model.config)
    bias = getattr(getattr(model, "lm_head", None), "bias", None)
    liger = backend == "liger" and torch_functional._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is not None
    if liger and (rule != LogitRule() or bias is not None):
        raise ValueError(
            f"the backend 'liger' of verl's fused kernels takes hidden @ weight.T as the logits of {name}. "
            f"The model has {'no' if bias is None else 'a'} bias in its head and {rule} after it. Set "
            f"actor_rollout_ref.model.fused_kernel_options.impl_backend=torch or triton, which apply these."
        )
    if stock.__module__.startswith("verl."):
        return  # a vision-language model: verl takes its logits directly from the head
    try:
        z, logits = probe(model, stock)
    except Exception as error:
        # A forward from outside of transformers may need other inputs. The config is all that is known then.
        warn_once(
            f"could not check the logits of {name} ({type(error).__name__}: {error}). verl's fused kernels "
            f"compute lm_head(hidden) with {rule} after it, as the config describes"
        )
        return
    expected = rule(z)
    if logits.shape != z.shape or not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(
            f"verl's fused kernels would be wrong for {name}: its config describes {rule} after "
            f"lm_head(hidden), and its own forward does something else. {FIX}"
        )


@torch.no_grad()
def probe(model: Any, stock: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Return artificial outputs of a head, and the model's own logits for them; `[V]` fp32, on the CPU.

    The forward runs on a copy of the model. The backbone of this copy returns the artificial outputs, and its
    head passes them on. No weight is read, so weights may be on the meta device.
    """
    z = (torch.arange(model.lm_head.weight.shape[0], device="cpu") % 257 - 128).float()  # exact in bf16
    hidden = z.clone()[None, None]
    stubbed = copy.copy(model)
    stubbed._modules = {
        "model": Stub(model.model, lambda *args, **kwargs: BackboneOutput([hidden])),
        "lm_head": Stub(model.lm_head, lambda x: x),
    }
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    out = stock(stubbed, input_ids=ids, use_cache=False, return_dict=True)
    return z, out.logits[0, 0].float()


class Stub:
    """Has the attributes of a module, and calls another function in place of its forward."""

    def __init__(self, module: Any, function: Callable[..., Any]) -> None:
        self.module = module
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if isinstance(value, torch.nn.Module):
            raise AttributeError(f"the forward uses the module {name}")
        return value


class BackboneOutput(tuple[Tensor, ...]):
    """Holds hidden states as an output of transformers does. All other fields are None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None
