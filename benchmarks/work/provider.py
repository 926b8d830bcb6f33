"""What a provider of the loss is, and the table of all providers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, masked_mean, token_losses
from .workload import Workload

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """A loss function, `loss(batch, logits)` or `loss(batch, hidden, weight)`, and what it needs."""

    name: str
    loss: Loss
    package: str | None = None  # must be installed
    also: tuple[str, ...] = ()  # more packages that a GPU needs
    entropies: bool = False  # computes entropies if the workload asks for them
    refuses: Callable[[Workload, torch.device], str | None] = lambda work, device: None
    padded: bool = False  # takes the logits of all L + 1 positions
    overwrites: bool = False  # writes the gradient over the logits

    def reason_against(self, work: Workload, device: torch.device) -> str | None:
        """Why this provider cannot do this workload on this device, or None."""
        if self.package is not None and installed_version(self.package) is None:
            return f"{self.package} is not installed"
        if work.entropy and not self.entropies:
            return "computes no entropy"
        reason = self.refuses(work, device)
        missing = (name for name in self.also if installed_version(name) is None)
        if reason is None and device.type == "cuda" and (name := next(missing, None)) is not None:
            return f"{name} is not installed"
        return reason

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
