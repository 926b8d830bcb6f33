"""The divergence of the student's logits from the teacher's, both computed from hidden states.

The forward computes loss and gradient, a chunk of tokens at a time, because the weight of each token is
known: 6 N V H FLOPs for the student and 2 N V H for the teacher, whose hidden size may be another H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import ops
from ..checks.tensors import traced
from ..spec.divergence import Divergence
from ..tokens.differentiation import apply, first_order, outside_graphs
from ..vocab.divergence import divergences, gradient, wanted
from ..vocab.operators import register
from ..vocab.rows import MASKED
from ..vocab.shard import VocabShard
from .autograd import scaled
from .chunks import Chunks
from .gradients import GradientSums, HeadGradients
from .operators import LINEAR_ROWS, flatten_rows, unflatten_rows
from .plan import RowPlan
from .rows import LinearRows


class LinearDivergences(NamedTuple):
    """The outputs of a pass. The gradients are of `sum(coefficient * value)`."""

    value: Tensor  # [N]
    entropy: Tensor | None  # [N], of the student
    gradients: HeadGradients


class TokenWeights(NamedTuple):
    """Weights of the tokens in the loss: `scale * coefficient`.

    The largest coefficient is between 8 and 16. With a smaller one the logits' gradient could underflow in
    fp16, because the factor of a GradScaler arrives only in the backward. With a larger one it could
    overflow.
    """

    coefficient: Tensor  # [N]
    scale: Tensor  # 0-dim

    @classmethod
    def of(cls, weights: Tensor) -> TokenWeights:
        if weights.numel() == 0:
            return cls(weights, weights.new_ones(()))
        smallest = torch.finfo(weights.dtype).tiny
        scale = weights.abs().amax().clamp(min=8 * smallest).log2().floor().exp2() / 8
        return cls(weights / scale, scale)


def linear_divergence(
    rows: LinearRows, weights: Tensor, spec: Divergence, shard: VocabShard | None, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss `sum(weights * divergence)`, differentiable, and divergences and entropies `[N]`.

    Masked rows are not run.
    """
    call = apply if shard is None else outside_graphs(apply)
    # A function's forward cannot ask whether gradients are enabled.
    needed = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in rows.head)
    settings = weights, spec, shard, entropy, needed
    loss, value, *rest = call(LinearDivergenceFunction, rows.head, rows.detach(), *settings)
    return loss, value, rest[0] if rest else None


class LinearDivergenceFunction(torch.autograd.Function):
    """Returns the loss, the divergence of each row, and if wanted the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        rows: LinearRows,
        weights: Tensor,  # [N]
        spec: Divergence,
        shard: VocabShard | None,
        entropy: bool,
        needed: tuple[bool, ...],
        origin: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        value = torch.empty(rows.num_rows, dtype=rows.dtype, device=hidden.device)
        out = LinearDivergences(
            value, torch.empty_like(value) if entropy else None, HeadGradients.empty(rows.head, needed)
        )
        tokens = TokenWeights.of(weights)
        divergence_pass(rows, tokens.coefficient, spec, shard, out)
        if shard is not None:
            shard.sum_over_ranks(out.gradients.dhidden)
        ctx.origin, ctx.backend = origin, rows.backend
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(tokens.scale, *out.gradients)
        constants = [x for x in (out.value, out.entropy) if x is not None]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return (weights * value).sum(), *constants

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        scale, *gradients = ctx.saved_tensors
        factor = grad * scale
        found = (
            None if x is None or dtype is None else scaled(x, factor, dtype, ctx.backend)
            for x, dtype in zip(gradients, ctx.dtypes)
        )
        return *found, *(None,) * 7


def divergence_pass(
    rows: LinearRows, coefficient: Tensor, spec: Divergence, shard: VocabShard | None, out: LinearDivergences
) -> None:
    """Fill `out`. Masked rows are not run, and get zeros. If the call is `traced`, this is one operator."""
    if not traced(rows.targets):
        fill(rows, coefficient, spec, shard, out)
        return
    given = {"value": out.value, "entropy": out.entropy, **out.gradients._asdict()}
    given = {name: x for name, x in given.items() if x is not None}
    settings = coefficient, spec.kind, spec.weight
    ops.linear_divergence([*given.values()], " ".join(given), *settings, *flatten_rows(rows))


def fill(
    rows: LinearRows, coefficient: Tensor, spec: Divergence, shard: VocabShard | None, out: LinearDivergences
) -> None:
    rows, head, compact = rows.cast(), out.gradients, rows.config.compact
    present = rows.targets != MASKED
    learns = any(x is not None for x in head)
    active = present & (coefficient != 0) if learns else torch.zeros_like(present)
    plan = RowPlan.of(present, active, compact=compact)
    plan = plan if learns else plan._replace(active=0)
    want, own = wanted(spec, entropy=out.entropy is not None, shard=shard), plan.take(coefficient)
    value = plan.empty_like(out.value)
    entropy = None if out.entropy is None else plan.empty_like(out.entropy)
    sums = GradientSums(rows.head, head, plan.selected)
    chunks = Chunks(rows, plan, shard)
    for start, stop in ((0, plan.active), (plan.active, plan.running)):
        for chunk in chunks(start, stop):
            place = chunk.place
            found = divergences(chunk.rows, spec, want)
            value[place] = found.value
            if entropy is not None and found.entropy is not None:
                entropy[place] = found.entropy
            if place.stop <= plan.active:
                gradient(chunk.rows, found.sums, found.slope, own[place], spec, chunk.dlogits)
                sums.add(chunk)
    sums.finish()
    plan.restore(value, out=out.value)
    if entropy is not None:
        plan.restore(entropy, out=out.entropy)


def divergence_operator(
    out: Sequence[Tensor], names: str, coefficient: Tensor, kind: Any, weight: float, *rows: Any
) -> None:
    given = dict(zip(names.split(), out))
    head = HeadGradients(*(given.get(name) for name in HeadGradients._fields))
    found = LinearDivergences(given["value"], given.get("entropy"), head)
    fill(unflatten_rows(*rows), coefficient, Divergence(kind, weight), None, found)


register(
    "linear_divergence",
    divergence_operator,
    f"Tensor(a!)[] out, str names, Tensor coefficient, str kind, float weight, {LINEAR_ROWS}",
)
