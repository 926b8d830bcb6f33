"""Cases of the loss, and comparisons of the package with eager PyTorch in the same dtype and in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    ImportanceRatio,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
)
from grpo_kernels.reference import ReferenceOutput, reference_loss
from grpo_kernels.testing import assert_no_worse_than_eager

TORCH = tuple(int(x) for x in torch.__version__.split(".")[:2])
NEEDS_SPECS_IN_GRAPHS = pytest.mark.skipif(
    TORCH < (2, 13),
    reason="the Dynamo of torch 2.11 cannot make a LossSpec in a graph, nor rebuild rows after a break",
)
NEEDS_DYNAMO = pytest.mark.skipif(
    TORCH == (2, 8), reason="the Dynamo of torch 2.8 cannot trace NamedTuple._replace"
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "prompt-mean",
)


def user_loss(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None, advantages: Tensor, mask: Tensor
) -> Tensor:
    """A callable surrogate that couples the tokens along the last dimension, unlike any built-in one."""
    ratio = torch.exp(logps - (logps.detach() if old_logps is None else old_logps))
    coupled = (logps * mask).sum(-1, keepdim=True) / mask.shape[-1]
    return -advantages * torch.tanh(ratio) + 0.01 * coupled**2


SURROGATES: dict[str, Any] = {
    "LogRatio": LogRatio(),
    "ImportanceRatio": ImportanceRatio(),
    "ImportanceRatio(ref)": ImportanceRatio(anchor="ref"),
    "ImportanceRatio(max_ratio)": ImportanceRatio(max_ratio=1.4),
    "PPOClip": PPOClip(eps_low=0.2, eps_high=0.28),
    "PPOClip(delta)": PPOClip(delta=4.0),
    "PPOClip(dual_clip)": PPOClip(dual_clip=3.0),
    "Reinforce": Reinforce(),
    "CISPO": CISPO(ratio_max=1.25, ratio_min=0.8),
    "SAPO": SAPO(tau_pos=1.5, tau_neg=2.0),
    "DRO": DRO(beta=0.4),
    "DRO(ref)": DRO(beta=0.3, anchor="ref"),
    "DPPO(tv)": DPPO("tv", low=0.1, high=0.15),
    "DPPO(kl)": DPPO("kl", low=0.05, high=0.02, ratio_cap=1.3),
    "DPPO(no cap)": DPPO("tv", low=0.1, high=0.15, ratio_cap=None),
    "VESPO": VESPO(),
    "GMPO": GMPO(eps_low=0.3, eps_high=0.2),
    "None": None,
    "callable": user_loss,
}

KLS: dict[str, KL | None] = {
    "None": None,
    "k1": KL("k1", beta=0.2),
    "k2": KL("k2", beta=0.2),
    "k3": KL("k3", beta=0.2),
    "abs": KL("abs", beta=0.2),
    "exact": KL("exact", beta=0.2),
    "exact_forward": KL("exact_forward", beta=0.2),
    "clamp": KL("k3", beta=0.2, clamp=0.35),
    "output_clamp": KL("k2", beta=0.2, output_clamp=0.06),
    "ratio_corrected": KL("k3", beta=0.2, ratio_corrected=True),
    "straight_through": KL("k1", beta=0.2, straight_through=True),
}


# Every surrogate without a KL, with a KL that shares its ratio and with a KL over the vocabulary. Every KL
# with PPO-clip and alone.
PAIRS = [
    (surrogate, kl)
    for surrogate in SURROGATES
    for kl in KLS
    if kl in ("None", "ratio_corrected", "exact") or surrogate in ("PPOClip", "None")
    if not surrogate == kl == "None"
]

# Losses with a sequence-level ratio.
SEQUENCE_LEVEL: dict[str, tuple[str, str]] = {
    f"{name}, {level}": (name, level)
    for name in SURROGATES
    for level in getattr(SURROGATES[name], "levels", ("token",))[1:]
}


class Case(NamedTuple):
    """Arguments of a loss."""

    spec: LossSpec
    logits: Tensor
    completion_ids: Tensor
    advantages: Tensor
    options: dict[str, Any]

    def wide(self) -> Case:
        """Return the same numbers in fp64."""
        options = {name: widened(value) for name, value in self.options.items()}
        return self._replace(
            logits=widened(self.logits), advantages=widened(self.advantages), options=options
        )

    def with_options(self, **options: Any) -> Case:
        return self._replace(options={**self.options, **options})


class Result(NamedTuple):
    out: LossOutput | ReferenceOutput
    grad: Tensor  # of the loss, with respect to Case.logits


class Oracle(NamedTuple):
    case: Case
    truth: Result
    eager: Result


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run(
    loss: Callable[..., Any],
    case: Case,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    *,
    upstream: float = 1.0,
    **options: Any,
) -> Result:
    """Run forward and backward on `view(logits)`, and return the gradient of all logits."""
    leaf = case.logits.detach().clone().requires_grad_()
    # inplace=True may not overwrite a leaf.
    logits = view(leaf.clone())
    out = loss(logits, case.completion_ids, case.advantages, spec=case.spec, **case.options, **options)
    out.loss.backward(torch.full_like(out.loss, upstream))
    assert leaf.grad is not None
    return Result(out, leaf.grad)


def oracle(case: Case, view: Callable[[Tensor], Tensor] = lambda x: x) -> Oracle:
    return Oracle(case, run(reference_loss, case.wide(), view), run(reference_loss, case, view))


def assert_parity(
    expected: Oracle, *, what: str = "", view: Callable[[Tensor], Tensor] = lambda x: x, **options: Any
) -> Result:
    """Compare all outputs and the gradient of `grpo_loss` with fp64 and eager PyTorch.

    `options` are passed to `grpo_loss` only: backend, inplace, return_entropy.
    """
    case, truth, eager = expected
    got = run(grpo_loss, case, view, **options)
    assert isinstance(got.out, LossOutput)
    assert_outputs(expected, got.out, what=what, return_entropy=options.get("return_entropy", False))
    rows = [view(result.grad) for result in (got, eager, truth)]
    assert_rows_no_worse(*rows, ids=case.completion_ids, logps=truth.out.logps, what=what)
    outside = torch.ones_like(got.grad)
    view(outside).zero_()
    assert bool((got.grad[outside == 1] == 0).all()), (
        f"{what}: gradient of logits that the loss was not given"
    )
    return got


def assert_outputs(expected: Oracle, out: LossOutput, *, what: str, return_entropy: bool = False) -> None:
    """Compare all outputs of a loss with fp64 and eager PyTorch."""
    case, truth, eager = expected
    double = case.logits.dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    assert out.loss.dtype == (torch.float64 if double else torch.float32), what
    assert out.loss.shape == (), what

    # The loss may err by a few roundings of every log-probability. In fp64 eager is the truth itself.
    scale = float(truth.out.loss.detach().abs() + truth.grad.abs().sum())
    assert_near(
        f"{what}: loss", out.loss, truth.out.loss, eager.out.loss, (64 if double else 24) * eps * scale
    )

    tokens = {"logps": True, "ref_logps": truth.out.ref_logps is not None}
    tokens["entropy"] = return_entropy or bool(case.spec.entropy_coef)
    for name, present in tokens.items():
        value = getattr(out, name)
        assert (value is not None) == present, f"{what}: {name}"
        if present:
            assert not value.requires_grad, f"{what}: {name}"
            exact = getattr(truth.out, name)
            error = float((value.double() - exact).abs().max()) if exact.numel() else 0.0
            assert error <= (1e-12 if double else 1e-5), f"{what}: {name} errs {error:.3g}"
            assert bool((value[exact == 0] == 0).all()), f"{what}: {name} at masked positions"

    found, wanted = out.metrics, expected_metrics(expected, entropy=tokens["entropy"])
    assert found.keys() == wanted.keys(), what
    for name, exact in wanted.items():
        bar = eager.out.metrics.get(name, exact)
        assert not found[name].requires_grad, f"{what}: metrics[{name!r}]"
        epsilon = 64 * eps * (1 + float(exact.abs()))
        assert_near(f"{what}: metrics[{name!r}]", found[name], exact, bar, epsilon)


def assert_near(what: str, got: Tensor, truth: Tensor, eager: Tensor, epsilon: float) -> None:
    got, truth, eager = (x.detach().double() for x in (got, truth, eager))
    error, theirs = float((got - truth).abs()), float((eager - truth).abs())
    within = error <= 2 * theirs + epsilon or bool(got == truth)  # infinities may be equal
    assert within, f"{what} errs {error:.3g}, eager {theirs:.3g}, {epsilon = :.3g}"


def assert_rows_no_worse(
    got: Tensor, eager: Tensor, truth: Tensor, *, ids: Tensor, logps: Tensor, what: str
) -> None:
    """Compare gradient rows, their entries at the taken token, and the rest, which are much smaller."""
    assert got.dtype == eager.dtype, what
    ids = ids.long().clamp(0, got.shape[-1] - 1)[..., None]
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "gradient": lambda grad: grad,
        "gradient at the taken token": lambda grad: grad.gather(-1, ids),
        "gradient but the taken token's": lambda grad: grad.scatter(-1, ids, 0),
    }
    # A log-probability of size 10 errs by a few roundings, and so does a coefficient computed from it. 16-bit
    # gradients are rounded once, but Triton's interpreter truncates to bf16.
    eps = torch.finfo(got.dtype).eps
    epsilon = {torch.float64: 1e-12, torch.float32: 32 * eps}.get(got.dtype, 1.25 * eps)
    # If p is nearly 1, the row is as small as 1 - p, which has the rounding error of p.
    others = -torch.expm1(logps.detach().double())
    rounding = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    epsilon = epsilon + (rounding / others).where(others > 0, 0)
    for name, part in parts.items():
        grads = (part(grad) for grad in (got, eager, truth))
        assert_no_worse_than_eager(*grads, epsilon=epsilon, what=f"{what}: {name}")


def per_token(case: Case, x: Tensor) -> Tensor:
    """Expand one value per sequence to one per token."""
    shape = case.completion_ids.shape
    if len(shape) == 1 and x.shape != shape:
        return x.repeat_interleave(case.options["seq_lens"].to(x.device))
    return x.reshape(-1, 1).expand(shape) if x.dim() == 1 and len(shape) == 2 else x.expand(shape)


def expected_metrics(expected: Oracle, *, entropy: bool) -> dict[str, Tensor]:
    """Return the oracle's metrics, and those that are counted from other results."""
    case, truth, _ = expected
    wanted = dict(truth.out.metrics)
    if not entropy:
        del wanted["entropy"]
    mask = case.options.get("completion_mask")
    mask = torch.ones_like(case.completion_ids, dtype=torch.bool) if mask is None else mask != 0

    def fraction(tokens: Tensor) -> Tensor:
        return (tokens & mask).sum().double() / mask.sum().clamp(min=1)

    wanted["active_fraction"] = fraction((truth.grad != 0).any(-1))
    return wanted


# The batch has two different sequences, a short one without advantage, and one without tokens. The log-ratios
# take every branch of every surrogate, and the distances to the reference lie inside and outside the bounds
# of KLS. No distance is so small that rounding dominates its gradient.
MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
ADVANTAGES = torch.tensor([1.3, -0.7, 0.0, 2.0])
LOGP = torch.tensor([[-1.2, -9, -3.0], [-0.7, -6.0, -0.05], [-2.0, -9, -9], [-9, -9, -9]])
LOG_RATIO = torch.tensor([[0.1, 0, 0.5], [-0.5, 1.6, 0.15], [0.3, 0, 0], [0, 0, 0]])  # logp - old_logp
DISTANCE = torch.tensor([[0.4, 0, -0.5], [0.3, -0.3, -0.6], [0.25, 0, 0], [0, 0, 0]])  # ref_logp - logp

# The second and the third sequence answer one prompt. The prompt of the last one has no tokens.
PROMPT_IDS = torch.tensor([-(2**40), 3, 3, 2**62])


def every_branch(
    spec: LossSpec,
    V: int,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    ref: str | None = "logits",
    device: str = "cpu",
) -> Case:
    """Return a batch that takes every branch of the loss. Masked positions hold NaN.

    Args:
        spec: Loss of the case.
        V: Size of the vocabulary.
        dtype: Dtype of the logits.
        packed: Whether the sequences lie end to end without padding. The empty sequence is then the last.
        ref: Form of the reference: "logits", "logps" or None.
        device: Device of all tensors.
    """
    generator = torch.Generator().manual_seed(V)

    def normal() -> Tensor:
        return torch.randn(*MASK.shape, V, generator=generator)

    ids = torch.randint(V, MASK.shape, generator=generator)
    ids[1, :2] = torch.tensor([0, V - 1])
    logits = 2 * normal()
    ref_logits = logits + 0.3 * normal()
    for z, logp in (logits, LOGP), (ref_logits, LOGP + DISTANCE):
        others = z.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1)
        z.scatter_(-1, ids[..., None], (others - torch.log(torch.expm1(-logp)))[..., None])
    masked = ~MASK
    tokens: dict[str, Tensor] = {
        "logits": logits.to(dtype).masked_fill(masked[..., None], torch.nan),
        "completion_ids": ids.masked_fill(masked, -100),
        "completion_mask": MASK,
        "old_logps": (LOGP - LOG_RATIO).masked_fill(masked, torch.nan),
    }
    if ref == "logits":
        tokens["ref_logits"] = ref_logits.to(dtype).masked_fill(masked[..., None], torch.nan)
    elif ref == "logps":
        tokens["ref_logps"] = (LOGP + DISTANCE).masked_fill(masked, torch.nan)
    options: dict[str, Any] = {"prompt_ids": PROMPT_IDS} if spec.aggregation == "prompt-mean" else {}
    if packed:
        keep = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
        tokens = {name: x[keep] for name, x in tokens.items()}
        options["seq_lens"] = keep.sum(-1)
    options |= tokens
    options = {name: x.to(device) for name, x in options.items()}
    return Case(spec, options.pop("logits"), options.pop("completion_ids"), ADVANTAGES.to(device), options)


EVERYTHING = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1)


def small(
    device: str, spec: LossSpec = EVERYTHING, dtype: torch.dtype = torch.float32, V: int = 37, **how: Any
) -> Case:
    return every_branch(spec, V, dtype, device=device, **how)
