"""Random batches of hidden states for property tests, and comparisons of their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import LinearCase
from parity import DTYPES, per_token
from problems import (
    ADVANTAGES,
    OF_PACKED,
    VIEWS,
    Random,
    assert_same_bits,
    flat,
    options_of,
    policies,
    rows_at,
    sequences_of,
    shapes,
    specs,
    token_options,
    whole_references,
)
from products import assert_same_products, lengths, magnitudes, on_a_grid, rounding_bound
from torch import Tensor
from torch.nn.functional import linear

from grpo_kernels import LossOutput, LossSpec, Reinforce, linear_grpo_loss
from grpo_kernels.reference import reference_loss

pytest.importorskip("hypothesis")
from hypothesis import strategies as st

SCALES = {"normal": 2.0, "wide": 12.0, "flat": 0.0, "tiny": 1e-3}
PARTS = ("hidden", "weight", "bias")


class Found(NamedTuple):
    out: LossOutput
    grads: dict[str, Tensor]  # by name in PARTS; the gradient of "hidden" is that of the whole allocation


class LinearProblem(NamedTuple):
    case: LinearCase  # its hidden states are the whole allocation
    view: Callable[[Tensor], Tensor]  # the part that is passed to the loss
    how: dict[str, Any]  # chunk_tokens, compact, skip_inactive, logits_dtype
    frozen: tuple[str, ...] = ()

    def run(self, backend: str, *, upstream: float = 1.0, **options: Any) -> Found:
        leaves = {
            name: x.detach().clone().requires_grad_(name not in self.frozen)
            for name, x in zip(PARTS, (self.case.hidden, self.case.weight, self.case.bias), strict=True)
            if x is not None
        }
        case = self.case
        out = linear_grpo_loss(
            self.view(leaves["hidden"]), leaves["weight"], case.completion_ids, case.advantages,
            spec=case.spec, lm_head_bias=leaves.get("bias"), backend=backend,
            **{**case.options, **self.how, **options},
        )  # fmt: skip
        learning = {name: x for name, x in leaves.items() if x.requires_grad}
        grads = torch.autograd.grad(out.loss, list(learning.values()), torch.full_like(out.loss, upstream))
        return Found(out, dict(zip(learning, grads, strict=True)))

    @property
    def mask(self) -> Tensor:
        return self.case.options["completion_mask"] != 0

    def plain(self) -> LinearCase:
        """Return the case without the memory around its hidden states."""
        return self.case._replace(hidden=self.view(self.case.hidden).contiguous())

    def select(self, sequences: list[int], **options: Any) -> LinearProblem:
        """Return a contiguous batch of only these sequences, in this order."""
        case = self.plain()
        whole = sequences_of(case.completion_ids, case.options)
        index = torch.cat([whole[number] for number in sequences])
        rows = (case.hidden, case.completion_ids, per_token(case, case.advantages))  # type: ignore[arg-type]
        hidden, ids, advantages = (rows_at(index, x) for x in rows)
        picked = options_of(sequences, index, case.options) | options
        case = case._replace(hidden=hidden, completion_ids=ids, advantages=advantages, options=picked)
        return self._replace(case=case, view=lambda x: x)


@st.composite
def linear_problems(
    draw: st.DrawFn, device: str, *, callables: bool = True, exact: bool = False
) -> LinearProblem:
    """Draw a problem. With `exact`, products of hidden states and weights are exact (products.py)."""
    shape, spec = draw(shapes()), draw(specs(callables=callables))
    rows = shape.rows
    V = draw(st.one_of(st.integers(2, 40), st.sampled_from([128, 513])), label="V")
    H = draw(st.integers(1, 24), label="H")
    name = draw(st.sampled_from(list(DTYPES)), label="dtype")
    kinds = st.lists(st.sampled_from(list(SCALES)), min_size=shape.tokens, max_size=shape.tokens)
    scales = torch.tensor([SCALES[kind] for kind in draw(kinds, label="rows")]).view(*rows, 1)
    random = Random(draw(st.integers(0, 2**31), label="seed"))
    options = draw(token_options(shape, random))
    padding = draw(st.sampled_from([None, 0, 3]), label="padding rows")
    views = st.sampled_from(OF_PACKED if shape.packed else list(VIEWS))

    def allocated(hidden: Tensor, where: str, dtype: torch.dtype) -> Tensor:
        extent, view = VIEWS[where]
        new = torch.full(extent(*rows, V=hidden.shape[-1]), torch.nan, dtype=dtype)
        view(new).copy_(hidden)
        return new

    def padded(x: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
        return torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]).to(dtype)

    dtype, where = DTYPES[name], draw(views, label="strides")
    # The bias suppresses one vocabulary entry in three. These are never taken.
    biases = {"none": None, "normal": random.normal(V), "shifted": random.normal(V) + 100.0}
    biases["holes"] = torch.where(torch.arange(V) % 3 == 1, -torch.inf, random.normal(V))
    kind = draw(st.sampled_from(list(biases)), label="bias")
    ids = random.pick(torch.arange(0, V, 3) if kind == "holes" else torch.arange(V), *rows)
    digits = on_a_grid if exact else lambda x: x
    hidden, weight = digits(scales * random.normal(*rows, H)), digits(random.normal(V, H) / math.sqrt(H))
    bias = biases[kind]
    memory, view = allocated(hidden, where, dtype), VIEWS[where][1]
    parts = [memory, *(None if x is None else padded(x, padding or 0, dtype) for x in (weight, bias))]
    if padding is not None:
        options["vocab_size"] = V
    transform = {name: options[name] for name in ("temperature", "logit_scale", "logit_softcap")}
    rounded = [None if x is None else x[:V].double() for x in parts[1:]]
    logps = reference_loss(
        linear(view(memory).double(), *rounded),
        ids,
        torch.zeros(rows),
        spec=LossSpec(Reinforce()),
        **transform,
    ).logps
    whole_reference = draw(whole_references(spec))
    options |= draw(policies(logps, random, whole_reference=whole_reference))
    if whole_reference:
        # The reference is near the policy and has another width.
        more = draw(st.integers(0, 3), label="width of the reference")
        other = DTYPES[
            name if name == "fp64" else draw(st.sampled_from(["fp32", "bf16", "fp16"]), label="ref")
        ]
        there = draw(views, label="strides of the reference")
        wider = 0 if padding is None else draw(st.sampled_from([0, 2]), label="its padding")
        states = digits(torch.cat([hidden, 0.3 * random.normal(*rows, more)], -1))
        options["ref_hidden"] = VIEWS[there][1](allocated(states, there, other))
        ref_weight = digits(torch.cat([weight, random.normal(V, more)], -1))
        options["ref_lm_head_weight"] = padded(ref_weight, wider, other)
        if bias is not None:
            options["ref_lm_head_bias"] = padded(bias, wider, other)
    advantages = random.pick(ADVANTAGES, len(shape.seq_lens))
    if draw(st.booleans(), label="advantages per token"):
        advantages = random.pick(ADVANTAGES, *rows)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64]), label="ids"))
    compact = draw(st.booleans(), label="compact")
    how = {
        "chunk_tokens": draw(st.one_of(st.none(), st.integers(1, 5)), label="chunk_tokens"),
        "compact": compact,
        "skip_inactive": compact and draw(st.booleans(), label="skip_inactive"),
        "logits_dtype": torch.bfloat16
        if name == "bf16" and draw(st.booleans(), label="bf16 logits")
        else torch.float32,
    }
    learning = [part for part, x in zip(PARTS, parts, strict=True) if x is not None]
    frozen = draw(st.sets(st.sampled_from(learning), max_size=len(learning) - 1), label="frozen")
    tensors = (None if x is None else x.to(device) for x in (*parts, ids, advantages))
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return LinearProblem(LinearCase(spec, *tensors, options), view, how, tuple(sorted(frozen)))


def precision(problem: LinearProblem) -> float:
    """Return the precision of log-probabilities: a few roundings, and the error of products (products.py).

    Scale and temperature may double that, and a log-probability has the error of two logits.
    """
    case = problem.plain()
    hidden, weight, bias = (
        None if x is None else x.double().nan_to_num(neginf=0.0).abs()
        for x in (case.hidden, case.weight, case.bias)
    )
    dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    product = rounding_bound(case.hidden.shape[-1] + 1, dtype)
    return torch.finfo(dtype).eps * 100 + 4 * product * float(linear(hidden, weight, bias).max())


def without_skipped(out: Any, problem: LinearProblem) -> Any:
    """Return only the outputs that `skip_inactive` does not change."""
    if not problem.how["skip_inactive"]:
        return out
    return out._replace(logps=out.loss, ref_logps=None, entropy=None, metrics={})


def assert_gradient_close(
    name: str, got: Tensor, expected: Tensor, size: float, problem: LinearProblem, *, bar: float = 0.0
) -> None:
    """Compare a gradient up to rounding plus twice the error of eager PyTorch.

    A 16-bit gradient is rounded once at its end, and the gradient of the logits once as well. Another order
    of the sums may round a bf16 logit to a neighbor.

    Args:
        name: Name of the gradient.
        got: The gradient.
        expected: The expected gradient.
        size: Norm of all gradients.
        problem: The problem that gave them.
        bar: Error of eager PyTorch.
    """
    rounding = precision(problem) + 4 * torch.finfo(got.dtype).eps
    if problem.how["logits_dtype"] == torch.bfloat16:
        rounding *= 4
    error = float((got.double() - expected.double()).norm())
    allowed = 2 * bar + rounding * (size + 1e-1)
    assert error <= allowed, f"gradient of {name} errs {error:.3g} of {size:.3g}, allowed {allowed:.3g}"


def assert_same(got: Found, expected: Found, problem: LinearProblem, backend: str) -> None:
    """Compare bits of results of the exact logits, and gradients up to the order of their sums."""
    assert_same_gradients(got.grads, expected.grads, problem, backend)
    wanted = flat(expected.out)
    for name, value in flat(got.out).items():
        assert_same_bits(value, wanted[name], name)


def assert_same_gradients(
    got: dict[str, Tensor], expected: dict[str, Tensor], problem: LinearProblem, backend: str, **how: Any
) -> None:
    assert got.keys() == expected.keys()
    with magnitudes():
        sizes = problem.run(backend, **how).grads
    terms = lengths(problem.mask.numel(), problem.case.weight.shape[0])
    for name, grad in got.items():
        assert_same_products(grad, expected[name], sizes[name], terms[name], f"gradient of {name}")


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], problem: LinearProblem) -> None:
    size = sum(float(x.double().norm()) for x in expected.values())
    for name, x in got.items():
        assert_gradient_close(name, x, expected[name], size, problem)
