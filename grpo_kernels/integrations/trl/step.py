"""One micro-batch of `FusedGRPOTrainer`: the calls of the model, and what they computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...policy_loss import policy_loss
from .forward_loss import ForwardLoss


class Step(ForwardLoss):
    """The loss of one micro-batch, and the outputs of the model for it.

    Attributes:
        model: the model that the trainer passed, which may be wrapped.
        with_gradients: whether gradients were enabled at the start.
        scored: how often the trainer requested log-probabilities.
        loss: 0-dim, as the wrapped model returned it.
        aux_loss: 0-dim loss of the routers; None without one.
        logps: `[B, T]`, a leaf from which TRL computes its loss.
        entropy: `[B, T]`, another leaf.
    """

    loss: Tensor
    aux_loss: Tensor | None
    logps: Tensor
    entropy: Tensor

    def start(self, model: Any) -> None:
        """Begin a micro-batch with `model`."""
        self.model = model
        self.with_gradients = torch.is_grad_enabled()
        self.scored = 0

    def concerns(self, model: Any) -> bool:
        """Return whether a call of `model` is part of the loss. A call of the reference is not."""
        return model is self.model and torch.is_grad_enabled() == self.with_gradients

    def call(self, *args: Any, **inputs: Any) -> Any:
        """Call the model. If it computes the loss, its outputs contain the leaves `logps` and `entropy`."""
        if not self.concerns(self.model):
            return self.model(*args, **inputs)
        before = self.computed
        outputs = self.model(*args, **inputs, fused_loss=self)
        if self.computed > before:
            self.loss = outputs.loss
            self.logps = outputs.log_probs = leaf(outputs.log_probs)
            self.entropy = outputs.entropy = leaf(outputs.entropy)
        return outputs

    @property
    def once(self) -> bool:
        """Whether exactly one call of the model computed the loss, and there was no other call."""
        return self.scored == self.calls == self.computed == 1

    def why_not(self) -> str | None:
        """Return what was wrong with the calls of the model, None if nothing. Syncs with the device."""
        if not self.calls:
            return "the model was not called with the loss"
        if max(self.scored, self.calls) > 1:
            return f"the model was called {max(self.scored, self.calls)} times for one loss"
        if not self.computed:
            return f"the model was called with {self.sequences} of {len(self.completion_ids)} sequences"
        if self.other_tokens:
            return "the model was called with other tokens than those of the batch"
        return None

    def loss_of_logps(self) -> Tensor:
        """Compute our loss as a differentiable function of `logps` and `entropy`."""
        options = {"backend": self.options.get("backend", "auto"), "entropy": self.entropy, **self.arguments}
        return policy_loss(self.logps, self.advantages, **options).loss

    def gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient of `loss` with respect to `logps` and `entropy`, `[2, B, T]`."""
        leaves = (self.logps, self.entropy)
        # A term that the user adds may share a part of the graph. Its backward must reach `refuse_gradient`.
        return torch.stack(
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        )


def leaf(x: Tensor) -> Tensor:
    """Return `x` without its graph. `torch.autograd.grad` works for it; a backward that reaches it raises."""
    x = x.detach().requires_grad_()
    x.register_post_accumulate_grad_hook(refuse_gradient)
    return x


def refuse_gradient(_: Tensor) -> None:
    """Raise RuntimeError, because this gradient would not reach a parameter: `leaf` cut its graph."""
    raise RuntimeError(
        "a term of the loss depends on the log-probabilities or entropies that FusedGRPOTrainer returned for "
        "its own loss. Its gradient does not reach the model. Compute the term from another call of "
        "_get_per_token_logps_and_entropies, outside of super()._compute_loss(), or use GRPOTrainer after "
        "fuse_trl_logps()"
    )


class CallWithLoss:
    """Stands in for the model in TRL's code. Calling it computes the loss."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.step.call(*args, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step.model, name)
