"""Chooses between the Triton kernels and PyTorch, and gives both one face.

If a call is `traced`, the two primitives are opaque operators. Otherwise they are called directly.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import torch_backend
from .checks import check_choice, has_data, values
from .names import BACKENDS, Backend
from .objective import Coefficients, RowStats, TokenInputs, unbounded
from .row_loss import coefficients, reference_logps
from .row_loss import row_loss as in_torch
from .sequences import Layout
from .spec import LogitTransform, LossSpec
from .surrogates import Surrogate

logger = logging.getLogger("grpo_kernels")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(backend: Backend, logits: Tensor) -> str:
    """ "triton" or "torch". Raises ValueError where the one asked for cannot run."""
    check_choice("backend", backend, BACKENDS)
    on_gpu = logits.is_cuda  # ROCm's devices are "cuda" too
    if backend == "auto":
        return "triton" if on_gpu and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend='triton', but the triton package is not installed")
        from .kernels.launch import INTERPRETED

        # Tensors on "meta" stand for a GPU's where kernels are compiled for one that is not there.
        if not (on_gpu or logits.is_meta or INTERPRETED):
            raise ValueError(
                f"backend='triton' needs GPU tensors, got logits on {logits.device}; with "
                "TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter"
            )
    return backend


class OnceLogger:
    """Logs each message once. Only records that a handler has output count.

    A message that came before logging was configured is therefore logged again. After a message was output,
    its calls cost a set lookup.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self.seen: set[tuple[object, ...]] = set()

    def __call__(self, message: str, *args: object) -> None:
        """Log `message % args`; the arguments must be hashable."""
        key = (message, *args)
        if key not in self.seen and takes_records(logger, self.level):
            self.seen.add(key)
            logger.log(self.level, message, *args)

    def cache_clear(self) -> None:
        """Forget what was logged, as in a new process."""
        self.seen.clear()


def takes_records(logger: logging.Logger, level: int) -> bool:
    """Whether a record of this level would reach a handler that outputs it."""
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


def two_kernels(learns: bool) -> str:
    """The `path` of a loss from logits for `log_path`, if it is not fused."""
    if not learns:
        return "one kernel (statistics, no gradient)"
    return "two kernels (statistics, then the gradient in the backward)"


def two_passes(learns: bool) -> str:
    """The `path` of a loss from hidden states for `log_path`, if its forward computes no gradient."""
    if not learns:
        return "one pass (statistics, no gradient)"
    return "two passes (statistics, then logits and gradient in the backward)"


def traced(x: Tensor) -> bool:
    """Whether a call on `x` uses opaque operators only, as under `torch.compile` and if `x` has no data.

    Without data the operators do nothing, and the results have shapes only. A tracer that uses fake tensors
    records the operators.
    """
    return torch.compiler.is_compiling() or not has_data(x)


def row_stats(
    logits: Tensor,
    targets: Tensor,
    out: RowStats,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    transform: LogitTransform,
    backend: str,
) -> None:
    """Fills `out` with the statistics of every row; masked rows are not read and get zeros."""
    call: Callable[..., None] = torch.ops.grpo_kernels.row_stats if traced(logits) else _row_stats
    call(logits, targets, *out, ref_logits, temperatures, *values(transform), backend)


def nats_per_shift(
    transform: LogitTransform, temperatures: Tensor | None
) -> tuple[Tensor | float, Tensor | float]:
    """What 1 is worth in the units of `RowStats.shift` and `ref_shift`."""
    scale = 1.0 if transform.softcap is not None else transform.scale
    ref_scale = 1.0 if transform.ref_softcap is not None else transform.ref_scale
    temperature = transform.temperature if temperatures is None else temperatures
    return scale / temperature, ref_scale / temperature


def dlogits(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    transform: LogitTransform,
    backend: str,
) -> None:
    """Fills `out` (which may be `logits`) with the gradient; rows without one are not read and get zeros."""
    call: Callable[..., None] = torch.ops.grpo_kernels.dlogits if traced(logits) else _dlogits
    call(out, logits, targets, *stats, *coefficients, ref_logits, temperatures, *values(transform), backend)


def fused_loss(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor,
    out: RowStats,
    value: Tensor,
    dlogp: Tensor,
    inputs: TokenInputs,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    transform: LogitTransform,
    spec: LossSpec,
    backend: str,
) -> None:
    """Statistics, token-local loss and gradient: fills `dlogits` (which may be `logits`) and the rest."""
    if targets.numel() == 0:
        return
    if backend == "torch":
        torch_backend.fused_loss(
            dlogits, logits, targets, out, value, dlogp, inputs, ref_logits, temperatures, transform, spec
        )
        return
    from .kernels import fused

    fused.fused_loss(
        dlogits,
        logits,
        targets,
        value,
        dlogp,
        out.logps,
        out.entropy,
        out.ref_logps,
        out.kl,
        out.kl_forward,
        inputs.advantages,
        inputs.row_weights,
        inputs.old_logps,
        inputs.ref_logps,
        inputs.token_weights,
        inputs.entropy_weights,
        **_loss_arguments(spec),
        ref_logits=ref_logits,
        temperatures=temperatures,
        **asdict(transform),
    )


def has_token_kernels(spec: LossSpec, logps: Tensor, backend: str) -> bool:
    """Whether what a loss makes of its statistics takes one launch, and not one for each operation."""
    return (
        backend == "triton"
        and not spec.couples_tokens
        and logps.dtype == torch.float32
        and logps.numel() > 0
        and not traced(logps)
    )


def row_loss(
    spec: LossSpec, stats: RowStats, inputs: TokenInputs, layout: Layout | None, backend: str
) -> tuple[Tensor, Coefficients]:
    """As `row_loss.row_loss`."""
    if not has_token_kernels(spec, stats.logps, backend):
        return in_torch(spec, stats, inputs, layout)
    from .kernels import token_loss

    value, dlogp = torch.empty_like(stats.logps), torch.empty_like(stats.logps)
    token_loss.token_losses(
        value,
        dlogp,
        inputs.mask,
        *_of_tokens(stats, inputs),
        inputs.row_weights,
        inputs.token_weights,
        inputs.entropy_weights,
        **_loss_arguments(spec),
    )
    return value, coefficients(spec, inputs, dlogp)


def token_metrics(
    spec: LossSpec,
    stats: RowStats,
    inputs: TokenInputs,
    derivatives: Coefficients,
    ran: Tensor,
    *,
    ratio: bool,
    clip: tuple[str | None, float, float],
) -> dict[str, Tensor]:
    """Every metric of `metrics.metrics`, where `has_token_kernels`; of those that do not apply, anything."""
    from .kernels import token_loss

    kind, low, high = clip
    assert derivatives.dlogp is not None
    dkl = derivatives.dkl if derivatives.dkl_forward is None else derivatives.dkl_forward
    return token_loss.token_metrics(
        inputs.mask,
        ran,
        *_of_tokens(stats, inputs),
        derivatives.dlogp,
        derivatives.dentropy,
        dkl,
        ratio=ratio,
        clip=kind,
        low=low,
        high=high,
        **_loss_arguments(spec),
    )


def _of_tokens(
    stats: RowStats, inputs: TokenInputs
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """What loss and metrics are made of, in the order of the kernels over tokens."""
    kls = stats.kl, stats.kl_forward
    return (
        stats.logps,
        inputs.old_logps,
        reference_logps(stats, inputs),
        stats.entropy,
        *kls,
        inputs.advantages,
    )


def _loss_arguments(spec: LossSpec) -> dict[str, Any]:
    """Of a token-local loss, for the kernels."""
    surrogate, kl = spec.surrogate, spec.sampled_kl or spec.exact_kl
    assert surrogate is None or isinstance(surrogate, Surrogate)
    return {
        "surrogate": None if surrogate is None else surrogate.statement,
        "rests_at_zero": surrogate is None or surrogate.rests_at_zero,
        "anchor": None if surrogate is None else surrogate.anchor,
        "params": () if surrogate is None else surrogate.params,
        "log_ratio_clamp": unbounded(spec.log_ratio_clamp),
        "kl_kind": None if kl is None else kl.kind,
        "kl_beta": 0.0 if kl is None else float(kl.beta),
        "kl_clamp": unbounded(None if kl is None else kl.clamp),
        "kl_output_clamp": unbounded(None if kl is None else kl.output_clamp),
        "straight_through": kl is not None and kl.straight_through,
        "ratio_corrected": kl is not None and kl.ratio_corrected,
    }


def scale_rows(x: Tensor, factor: Tensor, backend: str) -> None:
    """`x *= factor`; free where the factor is 1, which on a GPU the kernel and not the host finds out."""
    if x.numel() == 0:
        return
    if backend == "torch":
        if x.device.type != "cpu" or factor != 1:
            x.mul_(factor)
        return
    from .kernels import fused

    fused.scale_rows(x, factor)


def _row_stats(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    shift: Tensor | None,
    sum_exp: Tensor | None,
    entropy: Tensor | None,
    ref_logps: Tensor | None,
    ref_shift: Tensor | None,
    ref_sum_exp: Tensor | None,
    kl: Tensor | None,
    kl_forward: Tensor | None,
    top1: Tensor | None,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    vocab_size: int,
    scale: float,
    softcap: float | None,
    ref_scale: float,
    ref_softcap: float | None,
    temperature: float,
    backend: str,
) -> None:
    out = RowStats(logps, shift, sum_exp, entropy, ref_logps, ref_shift, ref_sum_exp, kl, kl_forward, top1)
    if targets.numel() == 0:
        return
    if vocab_size == 0:  # an empty part of a vocabulary that is split over ranks
        for name, x in zip(out._fields, out, strict=True):
            if x is not None:
                x.fill_(torch.finfo(x.dtype).min if name.endswith("shift") else 0.0)
        return
    transform = LogitTransform(vocab_size, scale, softcap, ref_scale, ref_softcap, temperature)
    if backend == "torch":
        torch_backend.row_stats(logits, targets, out, ref_logits, temperatures, transform)
        return
    from .kernels import row_stats

    row_stats.row_stats(
        logits, targets, *out, ref_logits=ref_logits, temperatures=temperatures, **asdict(transform)
    )


def _dlogits(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    shift: Tensor | None,
    sum_exp: Tensor | None,
    entropy: Tensor | None,
    ref_logps: Tensor | None,
    ref_shift: Tensor | None,
    ref_sum_exp: Tensor | None,
    kl: Tensor | None,
    kl_forward: Tensor | None,
    top1: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    dkl: Tensor | None,
    dkl_forward: Tensor | None,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    vocab_size: int,
    scale: float,
    softcap: float | None,
    ref_scale: float,
    ref_softcap: float | None,
    temperature: float,
    backend: str,
) -> None:
    if targets.numel() == 0:
        return
    if vocab_size == 0:
        out.zero_()
        return
    transform = LogitTransform(vocab_size, scale, softcap, ref_scale, ref_softcap, temperature)
    stats = RowStats(logps, shift, sum_exp, entropy, ref_logps, ref_shift, ref_sum_exp, kl, kl_forward, top1)
    coefficients = Coefficients(dlogp, dentropy, dkl, dkl_forward)
    if backend == "torch":
        torch_backend.dlogits(out, logits, targets, stats, coefficients, ref_logits, temperatures, transform)
        return
    from .kernels import dlogits

    dlogits.dlogits(
        out,
        logits,
        targets,
        *(logps, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl),
        *coefficients,
        ref_logits=ref_logits,
        temperatures=temperatures,
        **asdict(transform),
    )


torch.library.custom_op("grpo_kernels::row_stats", _row_stats, mutates_args=RowStats._fields)
torch.library.custom_op("grpo_kernels::dlogits", _dlogits, mutates_args=("out",))
