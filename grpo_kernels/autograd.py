"""The autograd functions: statistics of the logits, a loss of known derivatives, and both fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend
from .distributed import VocabShard, merge
from .objective import Coefficients, RowStats, TokenInputs, arithmetic_dtype
from .sequences import Layout
from .spec import LogitTransform, LossSpec

T = TypeVar("T")


def once_differentiable(x: Tensor, *sources: Tensor | None) -> Tensor:
    """Return `x` as a function of `sources` whose derivative raises an error."""
    error = torch._C._functions.DelayedError(
        "the losses of grpo_kernels are differentiable once", 1 + len(sources)
    )
    return error(x, *sources)[0]


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make every derivative of the gradient that `backward` returns raise an error.

    `torch.autograd.function.once_differentiable` does so only if the incoming gradient requires grad. The
    gradient of a loss does not, so a penalty on the gradient would silently drop out. The engine also skips
    nodes that lead to none of the inputs it was asked for. So the gradient depends on the origin of the
    forward's inputs (see `apply`) and on the incoming gradients.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return tuple(None if x is None else once_differentiable(x, *ctx.origin, *grads) for x in found)

    return wrapper


def refuse_transforms(*inputs: Tensor | None) -> None:
    """Raise an error under the transforms of `torch.func`, and for dual numbers."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the losses of grpo_kernels are differentiable once, and only by torch.autograd. They do not "
            "support the transforms of torch.func"
        )
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "the losses of grpo_kernels are differentiable once, and in reverse mode only"
        )


def apply(function: type[torch.autograd.Function], inputs: tuple[Tensor | None, ...], *rest: Any) -> Any:
    """Return `function.apply(*inputs, *rest, origin)`, differentiable once with respect to `inputs`.

    `first_order` reads `origin`, an empty tensor that depends on `inputs` and keeps none of their memory. It
    is in a tuple, which hides it from autograd, so that a first backward does not visit it. The tuple is
    empty if there is no graph, and under `torch.compile`, whose graphs have no second derivative.
    """
    if torch.compiler.is_compiling():
        return function.apply(*inputs, *rest, ())
    refuse_transforms(*inputs)
    origin = (once_differentiable(torch.empty(0), *inputs),) if torch.is_grad_enabled() else ()
    return function.apply(*inputs, *rest, origin)


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compile` breaks its graph at this function, as it has to where ranks speak to each other.

    `torch.compiler.disable` would import the compiler, and Triton with it, beside this package.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> T:
        call = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return call(*args)

    return wrapper


def fusible(spec: LossSpec, dtype: torch.dtype) -> bool:
    """Whether a loss and its gradient may be made in one step, in the forward.

    Not in fp16, whose gradients underflow before a GradScaler's factor reaches them in the backward; nor in
    fp64, which is for gradcheck and has no kernel for it.
    """
    return not spec.couples_tokens and dtype in (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class RowConfig:
    """What the statistics and their gradient depend on besides tensors."""

    transform: LogitTransform
    backend: str
    reference: bool = False  # logits of a reference are there
    entropy: bool = False
    kl_forward: bool = False
    top1: bool = False
    kl_gradient: bool = False  # the exact KL is part of the loss: the backward reads the reference's logits
    inplace: bool = False
    shard: VocabShard | None = None  # the logits are a part of the vocabulary

    @classmethod
    def of(
        cls,
        spec: LossSpec,
        transform: LogitTransform,
        backend: str,
        *,
        reference: bool,
        entropy: bool,
        inplace: bool = False,
        shard: VocabShard | None = None,
    ) -> RowConfig:
        """What a loss needs of its rows."""
        return cls(
            transform,
            backend,
            reference,
            entropy=entropy or bool(spec.entropy_coef),
            kl_forward=spec.exact_kl is not None and spec.exact_kl.kind == "exact_forward",
            kl_gradient=spec.exact_kl is not None,
            inplace=inplace,
            shard=shard,
        )

    @property
    def outputs(self) -> list[str]:
        """The statistics that the loss needs, by their names in `RowStats`."""
        names = ["logps"]
        if self.entropy:
            names += ["entropy"]
        if self.reference:
            names += ["ref_logps", "kl"]
        if self.kl_forward:
            names += ["kl_forward"]
        if self.top1:
            names += ["top1"]
        return names

    @property
    def constants(self) -> tuple[str, ...]:
        """The outputs that are not differentiated."""
        return ("ref_logps", "top1") if self.kl_gradient else ("ref_logps", "kl", "kl_forward", "top1")

    def empty_stats(
        self, rows: int, dtype: torch.dtype, device: torch.device, *, for_backward: bool
    ) -> RowStats:
        """Unfilled statistics; maxima and sums only where a backward will want them."""
        names = self.outputs
        if for_backward:
            names += ["shift", "sum_exp"]
            names += ["ref_shift", "ref_sum_exp"] if self.reference else []
        return RowStats(**{name: torch.empty(rows, dtype=dtype, device=device) for name in names})

    def merged(self, stats: RowStats, targets: Tensor, temperatures: Tensor | None) -> RowStats:
        """Of the whole vocabulary, where these are a part's."""
        if self.shard is None:
            return stats
        nats = backend.nats_per_shift(self.transform, temperatures)
        return merge(stats, targets, self.transform.vocab_size, nats, self.shard)

    def coefficients(self, grads: tuple[Tensor | None, ...]) -> Coefficients | None:
        """The gradients by `outputs`, as the kernels take them; None where there is nothing to do."""
        by = {name: g.contiguous() for name, g in zip(self.outputs, grads, strict=True) if g is not None}
        found = Coefficients(by.get("logps"), by.get("entropy"))
        if self.kl_gradient:
            found = found._replace(dkl=by.get("kl"), dkl_forward=by.get("kl_forward"))
        return None if all(x is None for x in found) else found


def row_statistics(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,
    targets: Tensor,  # [B * T]
    temperatures: Tensor | None,  # [B * T]
    config: RowConfig,
) -> RowStats:
    """Statistics of every row. Log-probability, entropy and exact KL are differentiable by the logits."""
    call = apply if config.shard is None else outside_graphs(apply)
    found = call(RowStatistics, (logits,), ref_logits, targets, temperatures, config)
    return RowStats(**dict(zip(config.outputs, found, strict=True)))


def fused_loss(
    logits: Tensor,  # [B, T, V]; overwritten with the gradient
    ref_logits: Tensor | None,
    targets: Tensor,  # [B * T]
    temperatures: Tensor | None,  # [B * T]
    inputs: TokenInputs,
    spec: LossSpec,
    config: RowConfig,
) -> tuple[Tensor, Tensor, RowStats]:
    """A token-local loss: its value, 0-dim and differentiable, `dlogp` `[B * T]`, and constant statistics."""
    loss, dlogp, *found = apply(FusedLoss, (logits,), ref_logits, targets, temperatures, inputs, spec, config)
    return loss, dlogp, RowStats(**dict(zip(config.outputs, found, strict=True)))


def loss_of_statistics(
    live: RowStats, spec: LossSpec, inputs: TokenInputs, layout: Layout, backend_name: str
) -> tuple[Tensor, RowStats, Coefficients]:
    """Any loss of differentiable statistics: 0-dim, and the constants that its metrics are made of."""
    stats = live.detach()
    values, derivatives = backend.row_loss(spec, stats, inputs, layout, backend_name)
    statistics = live.logps, live.entropy, live.kl, live.kl_forward
    loss = apply(KnownGradient, statistics, values, derivatives)
    return loss, stats, derivatives


class RowStatistics(torch.autograd.Function):
    """Returns `config.outputs`: tensors only, since torch.compile miscounts outputs when some are None."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor | None,
        targets: Tensor,
        temperatures: Tensor | None,
        config: RowConfig,
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        stats = config.empty_stats(
            targets.numel(), arithmetic_dtype(logits), logits.device, for_backward=True
        )
        backend.row_stats(logits, targets, stats, ref_logits, temperatures, config.transform, config.backend)
        stats = config.merged(stats, targets, temperatures)
        ctx.config, ctx.origin = config, origin
        ctx.save_for_backward(
            logits, ref_logits if config.kl_gradient else None, targets, temperatures, *stats
        )
        ctx.set_materialize_grads(False)
        outputs = {name: getattr(stats, name) for name in config.outputs}
        ctx.mark_non_differentiable(*(outputs[name] for name in config.constants if name in outputs))
        return tuple(outputs.values())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: RowConfig = ctx.config
        coefficients = config.coefficients(grads)
        if coefficients is None:
            return (None,) * 6
        logits, ref_logits, targets, temperatures, *saved = ctx.saved_tensors
        out = logits.detach()
        if not config.inplace:
            out = torch.empty_like(out, memory_format=torch.contiguous_format)
        backend.dlogits(
            out,
            logits,
            targets,
            RowStats(*saved),
            coefficients,
            ref_logits,
            temperatures,
            config.transform,
            config.backend,
        )
        if config.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 5


class KnownGradient(torch.autograd.Function):
    """The loss: a sum of values whose derivatives by the statistics have been computed beside them."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        kl_forward: Tensor | None,
        values: Tensor,  # [N]
        coefficients: Coefficients,
        origin: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.origin = origin
        ctx.save_for_backward(*coefficients)
        return values.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if c is None else grad * c for c in ctx.saved_tensors), None, None, None


class FusedLoss(torch.autograd.Function):
    """A loss whose forward overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor | None,
        targets: Tensor,
        temperatures: Tensor | None,
        inputs: TokenInputs,
        spec: LossSpec,
        config: RowConfig,
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        stats = config.empty_stats(
            targets.numel(), arithmetic_dtype(logits), logits.device, for_backward=False
        )
        value, dlogp = torch.empty_like(stats.logps), torch.empty_like(stats.logps)
        backend.fused_loss(
            logits,
            logits,
            targets,
            stats,
            value,
            dlogp,
            inputs,
            ref_logits,
            temperatures,
            config.transform,
            spec,
            config.backend,
        )
        # Whoever has saved the logits learns of it from their version, as after any in-place operation.
        torch.autograd.graph.increment_version(logits)
        ctx.backend, ctx.origin = config.backend, origin
        ctx.save_for_backward(logits)
        constants = [dlogp, *(getattr(stats, name) for name in config.outputs)]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return value.sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        (gradient,) = ctx.saved_tensors
        backend.scale_rows(gradient, grad, ctx.backend)
        # Once handed out the buffer is autograd's: a second backward must not take it for the gradient again.
        torch.autograd.graph.increment_version(gradient)
        return gradient.detach(), *(None,) * 7
