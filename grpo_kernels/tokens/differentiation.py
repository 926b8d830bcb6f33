"""Makes autograd functions differentiable only once. A second derivative raises an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


def not_differentiable(x: Tensor, *sources: Tensor | None) -> Tensor:
    """Return `x` as a function of `sources` whose derivative raises an error."""
    error = torch._C._functions.DelayedError(
        "the losses of grpo_kernels are differentiable once", 1 + len(sources)
    )
    return error(x, *sources)[0]


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make every derivative of the gradient that `backward` returns raise an error.

    `torch.autograd.function.once_differentiable` does so only if the incoming gradient requires grad. The
    one that enters at a loss does not, so a penalty on the gradient would silently drop out. The engine also
    skips nodes that lead to none of the requested inputs. Therefore the returned gradient depends on the
    origin of the forward's inputs (see `apply`) and on the incoming gradients.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return tuple(None if x is None else not_differentiable(x, *ctx.origin, *grads) for x in found)

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
    origin = (not_differentiable(torch.empty(0), *inputs),) if torch.is_grad_enabled() else ()
    return function.apply(*inputs, *rest, origin)


def graph_is_kept() -> bool:
    """Return whether another backward through the same graph may follow the one that runs."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is None or torch.compiler.is_compiling() or keeps_graph()


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """Break the graph of `torch.compile` at this function, which communicates between ranks.

    `torch.compiler.disable` is called late, because it imports the compiler and with it Triton.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> T:
        call = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return call(*args)

    return wrapper
