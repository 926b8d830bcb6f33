"""Compares the first step with the exact one, and times the steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .samples import Truth

# Bounds by bytes of the dtype. The error of the loss is relative to a token's mean magnitude, and that of
# gradients to their norm. Eager gradients of a small model in bf16 had an error of 6e-3.
TOLERANCE = {2: {"loss": 1e-3, "gradient": 5e-2}, 4: {"loss": 1e-5, "gradient": 1e-3}}


class Meter:
    """Times every step, and compares the first one with `truth` if that is given."""

    def __init__(self, case: Case, model: Any, micro_batches: int, truth: Truth | None) -> None:
        self.case, self.model, self.truth = case, model, truth
        self.remaining = micro_batches  # left in the first step
        self.loss = 0.0
        self.errors: dict[str, float] = {}
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.start = self.now()

    def after_backward(self, loss: Tensor) -> None:
        if self.truth is None or not self.remaining:
            return
        self.loss += loss.item()
        self.remaining -= 1
        if not self.remaining:
            self.errors = self.compare(self.truth)

    def end(self) -> None:
        self.seconds.append(self.now() - self.start)

    def now(self) -> float:
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compare(self, truth: Truth) -> dict[str, float]:
        """Errors of the loss, of the head's gradient and of the other gradients."""
        head = self.model.get_output_embeddings().weight
        squares = {"head": [0.0, 0.0], "backbone": [0.0, 0.0]}
        for parameter, gradient in zip(self.model.parameters(), truth.gradients, strict=True):
            want = gradient.to(self.case.device, torch.float32)
            of = squares["head" if parameter is head else "backbone"]
            of[0] += (parameter.grad.float() - want).square().sum().item()
            of[1] += want.square().sum().item()
        errors = {f"gradient of the {name}": (e / n) ** 0.5 for name, (e, n) in squares.items()}
        return {"loss": abs(self.loss - truth.loss) / truth.token_loss} | errors


def verdict(case: Case, errors: Mapping[str, float]) -> str:
    """The status of the step: "ok", or each error above its bound."""
    tolerance = TOLERANCE[case.work.dtype.itemsize]
    wrong = (
        f"{what} differs by {x:.1e}" for what, x in errors.items() if not x <= tolerance[what.split()[0]]
    )
    return ", ".join(wrong) or "ok"
