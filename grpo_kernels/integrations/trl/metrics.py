"""The state that TRL's `_compute_loss` changes: the trainer's metrics and its entropy controller."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .step import Step

# Attributes of a trainer that TRL's `_compute_loss` changes, apart from its metrics.
CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")


def current_metrics(trainer: Any) -> dict[str, list[float]]:
    """Return the metrics that the trainer is collecting, for training or for evaluation."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


class LoggedState(NamedTuple):
    """The state of a trainer before a call of TRL's `_compute_loss`.

    Attributes:
        lengths: the number of values of each metric.
        controller: the attributes of the entropy controller.
    """

    lengths: dict[str, int]
    controller: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> LoggedState:
        controller = {name: vars(trainer)[name] for name in CONTROLLER if name in vars(trainer)}
        return cls({name: len(values) for name, values in current_metrics(trainer).items()}, controller)

    def restore(self, trainer: Any) -> None:
        """Undo what was logged since, and the steps of the entropy controller."""
        metrics = current_metrics(trainer)
        for name in [*metrics]:
            metrics[name] = metrics[name][: self.lengths.get(name, 0)]
            if not metrics[name]:
                del metrics[name]
        vars(trainer).update(self.controller)


def log_own_metrics(trainer: Any, step: Step) -> bool:
    """Log the metrics of our loss, averaged over ranks, under `grpo_kernels/`.

    Returns:
        Whether the model was called with other tokens than those of the batch on any rank.
    """
    found = step.output.metrics
    rows = torch.stack([*found.values(), step.other_tokens.float()])[None]
    # One sync for all metrics. TRL syncs for each of its own.
    *values, others = trainer.accelerator.gather(rows).nanmean(0).tolist()
    metrics = current_metrics(trainer)
    for name, value in zip(found, values, strict=True):
        metrics[f"grpo_kernels/{name}"].append(value)
    return others > 0
