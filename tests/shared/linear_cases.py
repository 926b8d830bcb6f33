"""Cases of the loss from hidden states, with products that equal the logits of a `Case`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from parity import Case, Oracle, Result, user_loss
from products import GRID_BITS, assert_same_products, lengths, magnitudes, on_a_grid, rounding_bound
from torch import Tensor

from grpo_kernels import LossOutput, LossSpec, PPOClip, linear_grpo_loss
from grpo_kernels.reference import reference_loss


class LinearCase(NamedTuple):
    """Arguments of `linear_grpo_loss`."""

    spec: LossSpec
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    completion_ids: Tensor
    advantages: Tensor
    options: dict[str, Any]

    def with_options(self, **options: Any) -> LinearCase:
        return self._replace(options={**self.options, **options})

    def to(self, dtype: torch.dtype) -> LinearCase:
        """Return the same numbers in another dtype."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        fields = {name: cast(x) for name, x in self._asdict().items() if name != "options"}
        return LinearCase(**fields, options={name: cast(x) for name, x in self.options.items()})


class LinearResult(NamedTuple):
    out: LossOutput
    grads: tuple[Tensor, ...]  # of hidden states, weight and bias, if there is one


def factored(logits: Tensor, dtype: torch.dtype, extra: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and bias with a product near `logits`. Rows of NaN stay NaN.

    The product is exact (products.py): 3 bits times 17, or times the 7 that every 16-bit dtype holds.
    """
    rows = logits.double().nan_to_num().flatten(0, -2)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(logits.device)
    hidden = torch.randn(len(rows), len(rows) + extra, generator=generator, dtype=torch.float64)
    hidden = hidden.to(logits.device)
    hidden = on_a_grid(hidden, 3)
    weight = torch.linalg.pinv(hidden) @ (rows - bias)
    weight = on_a_grid(weight.t(), 17 if dtype.itemsize > 2 else GRID_BITS)
    hidden = hidden.view(*logits.shape[:-1], -1).masked_fill(logits.isnan().all(-1, keepdim=True), torch.nan)
    return hidden.to(dtype), weight.contiguous().to(dtype), bias.to(dtype)


def from_logits(case: Case, *, bias: bool = True) -> LinearCase:
    """Return `case` with its logits as products of hidden states and weights.

    The number of hidden dimensions is odd, and another one for the reference. Columns from `vocab_size` on
    become rows of NaN in the weights.
    """
    dtype, options = case.logits.dtype, dict(case.options)
    vocab = options.get("vocab_size", case.logits.shape[-1])

    def head(logits: Tensor, extra: int) -> list[Tensor]:
        hidden, *rest = factored(logits[..., :vocab], dtype, extra, seed=extra)
        return [hidden, *(torch.cat([x, x.new_full((5, *x.shape[1:]), torch.nan)]) for x in rest)]

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        return tensors if "vocab_size" in options else [tensors[0], *(x[:vocab] for x in tensors[1:])]

    odd = 1 - case.completion_ids.numel() % 2
    hidden, weight, b = cut(head(case.logits, odd))
    if (ref_logits := options.pop("ref_logits", None)) is not None:
        names = ("ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias")
        options |= dict(zip(names, cut(head(ref_logits, odd + 2)), strict=True))
    return LinearCase(case.spec, hidden, weight, b, case.completion_ids, case.advantages, options)


def logits_of(case: LinearCase, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Case:
    """Return the case with logits that eager PyTorch computes."""
    options = dict(case.options)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if (ref_hidden := options.pop("ref_hidden", None)) is not None:
        ref = options.pop("ref_lm_head_weight"), options.pop("ref_lm_head_bias", None)
        options["ref_logits"] = torch.nn.functional.linear(ref_hidden, *ref)
    return Case(case.spec, logits, case.completion_ids, case.advantages, options)


def leaves(case: LinearCase) -> list[Tensor]:
    tensors = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    return [x.detach().clone().requires_grad_() for x in tensors]


def run_linear(case: LinearCase, *, upstream: float = 1.0, **options: Any) -> LinearResult:
    hidden, weight, *bias = inputs = leaves(case)
    out = linear_grpo_loss(
        hidden,
        weight,
        case.completion_ids,
        case.advantages,
        spec=case.spec,
        lm_head_bias=bias[0] if bias else None,
        **{**case.options, **options},
    )
    grads = torch.autograd.grad(out.loss, inputs, torch.full_like(out.loss, upstream))
    return LinearResult(out, grads)


def run_eager(case: LinearCase) -> tuple[Result, Case, tuple[Tensor, ...]]:
    """Run the reference on eager logits. Return its result, the logits, and the gradients of the head.

    NaN at masked positions and in the vocabulary's padding becomes 0, because eager PyTorch would compute
    0 * NaN.
    """
    hidden, weight, *bias = inputs = [x.detach().nan_to_num().requires_grad_() for x in leaves(case)]
    logits_case = logits_of(case, hidden, weight, bias[0] if bias else None)
    logits_case.logits.retain_grad()
    out = reference_loss(
        logits_case.logits,
        case.completion_ids,
        case.advantages,
        spec=case.spec,
        **logits_case.options,
    )
    out.loss.backward()
    grad = logits_case.logits.grad
    assert grad is not None
    return (
        Result(out, grad),
        logits_case,
        tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs),
    )


class LinearOracle(NamedTuple):
    case: LinearCase
    by_logits: Oracle  # in fp64 and eager
    truth: tuple[Tensor, ...]  # gradients in fp64
    eager: tuple[Tensor, ...]
    terms: tuple[Tensor, ...]  # for each gradient, the sum of the magnitudes of its terms

    @property
    def lengths(self) -> dict[str, int]:
        return lengths(self.case.completion_ids.numel(), self.case.weight.shape[0])


def linear_oracle(case: LinearCase) -> LinearOracle:
    wide = case.to(torch.float64)
    truth, _, exact = run_eager(wide)
    eager, logits_case, grads = run_eager(case)
    dlogits = truth.grad.abs().flatten(0, -2)
    hidden, weight = (x.nan_to_num().abs() for x in (wide.hidden.flatten(0, -2), wide.weight))
    terms = (dlogits @ weight).view(wide.hidden.shape), dlogits.t() @ hidden, dlogits.sum(0)
    return LinearOracle(case, Oracle(logits_case, truth, eager), exact, grads, terms)


def assert_same(got: LinearResult, want: LinearResult, case: LinearCase, **options: Any) -> None:
    """Compare the results of `case` with those of another case that has the same exact logits.

    Results of the logits have the same bits. Gradients are equal up to the order of their sums.
    """
    for name, value in outputs(got.out).items():
        other = outputs(want.out)[name]
        same = (value == other) | (value.isnan() & other.isnan())
        assert value.shape == other.shape and bool(same.all()), name
    assert outputs(got.out).keys() == outputs(want.out).keys()
    assert_same_gradients(got, want, case, **options)


def assert_same_gradients(got: LinearResult, want: LinearResult, case: LinearCase, **options: Any) -> None:
    with magnitudes():
        sizes = run_linear(case, **options).grads
    terms = lengths(case.completion_ids.numel(), case.weight.shape[0])
    for name, x, y, size in zip(terms, got.grads, want.grads, sizes, strict=False):
        size = size.reshape(x.shape)  # padded or packed
        assert_same_products(x, y.reshape(x.shape), size, terms[name], f"gradient of {name}")


def outputs(out: LossOutput) -> dict[str, Tensor]:
    found = {**out._asdict(), **{f"metrics[{name!r}]": x for name, x in out.metrics.items()}}
    del found["metrics"]
    return {name: x for name, x in found.items() if x is not None}


def assert_gradients(
    got: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    terms: tuple[Tensor, ...],
    lengths: dict[str, int],
    what: str,
) -> None:
    """Assert that each row errs at most twice as much as eager PyTorch, plus some roundings of its terms.

    The order of summation contributes `rounding_bound`. The terms are gradients of logits. parity.py allows
    32 roundings in a row of them, and 1e-12 in fp64. A single entry may err more than its row, because its
    parts may cancel, such as `p - q` in a KL penalty. So this function allows twice as much, and the same
    share of an average row's terms. `lengths` is the number of terms of an entry.
    """
    for name, *gradients in zip(("hidden", "weight", "bias"), got, eager, truth, terms, strict=False):
        ours, theirs, exact, magnitude = (x if x.dim() > 1 else x[None] for x in gradients)
        assert ours.dtype == theirs.dtype, f"{what}: {name}"
        eps = torch.finfo(ours.dtype).eps
        # In fp64 eager is the truth itself. 16-bit gradients are rounded once, and so are their terms.
        share = {torch.float64: 2e-12, torch.float32: 64 * eps}.get(ours.dtype, 2 * eps)
        share += rounding_bound(lengths[name] + 1, ours.dtype)
        error, bar = ((x.double() - exact).norm(dim=-1) for x in (ours, theirs))
        size = magnitude.norm(dim=-1)
        size = size + size.mean()
        allowed = 2 * bar + share * size
        excess = (error - allowed).nan_to_num(nan=torch.inf).flatten()
        if excess.numel() and float(excess.max()) > 0:
            row = int(excess.argmax())
            raise AssertionError(
                f"{what}: gradient of {name}: row {row} errs {float(error.flatten()[row]):.3g}, eager "
                f"{float(bar.flatten()[row]):.3g}, allowed {float(allowed.flatten()[row]):.3g}"
            )


PPO = LossSpec(PPOClip())
LOCAL_AND_NOT = {"token-local": PPO, "callable": LossSpec(user_loss)}
local_and_not = pytest.mark.parametrize("spec", LOCAL_AND_NOT.values(), ids=LOCAL_AND_NOT)


def random_case(
    spec: LossSpec = PPO,
    *,
    shape: tuple[int, int] = (4, 16),
    H: int = 24,
    V: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> LinearCase:
    """Return a batch without a mask. Its logits are exact products (products.py)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return on_a_grid(torch.randn(*size, generator=generator)).to(device, dtype)

    ids = torch.randint(V, shape, generator=generator).to(device)
    advantages = torch.linspace(-1.0, 1.5, shape[0], device=device)
    return LinearCase(
        spec, normal(*shape, H), normal(V, H) / 2 ** (math.log2(H) // 2), None, ids, advantages, {}
    )
