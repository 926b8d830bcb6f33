"""Messages of the logger "grpo_kernels": the path of each call, and warnings. Each is logged once."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("grpo_kernels")


class OnceLogger:
    """Logs each message once. A message counts as logged only if a handler output it.

    So a message from before logging was configured is logged again. A repeated message costs one set lookup.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self.seen: set[tuple[object, ...]] = set()

    def __call__(self, message: str, *args: object) -> None:
        """Log `message % args`; the arguments must be hashable."""
        key = (message, *args)
        if key not in self.seen and would_output(logger, self.level):
            self.seen.add(key)
            logger.log(self.level, message, *args)

    def cache_clear(self) -> None:
        """Forget which messages were logged."""
        self.seen.clear()


def would_output(logger: logging.Logger, level: int) -> bool:
    """Return whether a record of this level would reach a handler that outputs it."""
    if not logger.isEnabledFor(level):
        return False
    if not logger.hasHandlers():  # then Python prints warnings to stderr, and drops what is below
        return logging.lastResort is not None and level >= logging.lastResort.level
    at: logging.Logger | None = logger
    while at is not None:
        if any(level >= x.level and not isinstance(x, logging.NullHandler) for x in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


log_once = OnceLogger(logging.INFO)
warn_once = OnceLogger(logging.WARNING)


def log_path(function: str, path: str, backend: str, **dtypes: torch.dtype | None) -> None:
    """Log how a call is computed, once per function, path, backend and dtypes.

    The dtype of an absent tensor is None.
    """
    if torch.compiler.is_compiling():
        return
    given = [x for pair in dtypes.items() if pair[1] is not None for x in pair]
    log_once("%s: %s, %s backend" + ", %s %s" * (len(given) // 2), function, path, backend, *given)


def kernel_path(learns: bool) -> str:
    """Return the argument `path` of `log_path` for a call on logits that is not fused."""
    if not learns:
        return "one kernel (statistics, no gradient)"
    return "two kernels (statistics, then the gradient in the backward)"


def pass_path(learns: bool) -> str:
    """Return the argument `path` of `log_path` for a call on hidden states without a fused gradient."""
    if not learns:
        return "one pass (statistics, no gradient)"
    return "two passes (statistics, then logits and gradient in the backward)"
