"""Cases of the distillation losses, and the divergences in eager PyTorch as their oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from parity import assert_near
from torch import Tensor

from grpo_kernels import LossOutput, distillation_loss
from grpo_kernels.testing import assert_no_worse_than_eager

KINDS = ("reverse_kl", "forward_kl", "jsd")
V = 1300  # two blocks of the kernels at most, and a partial one


class Case(NamedTuple):
    """Arguments of `distillation_loss`. `teacher` are logits, of the same shape in `oracle`."""

    logits: Tensor
    teacher: Tensor
    options: dict[str, Any]

    def with_options(self, **options: Any) -> Case:
        return self._replace(options={**self.options, **options})

    def wide(self) -> Case:
        options = {name: widened(x) for name, x in self.options.items()}
        return Case(widened(self.logits), widened(self.teacher), options)


class Result(NamedTuple):
    out: LossOutput
    grad: Tensor


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def batch(
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "reverse_kl",
    distance: float = 1.0,
    packed: bool = False,
    device: str = "cpu",
    vocab: int = V,
    seed: int = 0,
) -> Case:
    """Return 3 sequences of 4 tokens, the last without unmasked ones. Masked rows are NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = 3 * normal(3, 4, vocab)
    teacher = logits + distance * normal(3, 4, vocab)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    logits[~mask], teacher[~mask] = torch.nan, torch.inf
    options: dict[str, Any] = {"divergence": kind, "jsd_weight": 0.3, "completion_mask": mask}
    if packed:
        logits, teacher, options["completion_mask"] = (x.flatten(0, 1) for x in (logits, teacher, mask))
        options["seq_lens"] = torch.tensor([4, 4, 4])
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return Case(logits.to(device, dtype), teacher.to(device, dtype), options)


def run(
    case: Case, view: Callable[[Tensor], Tensor] = lambda x: x, upstream: float = 1.0, **options: Any
) -> Result:
    """Run forward and backward on `view(logits)`, and return the gradient of all logits."""
    leaf = case.logits.detach().clone().requires_grad_()
    logits = view(leaf.clone())  # inplace=True may not overwrite a leaf
    out = distillation_loss(logits, teacher_logits=case.teacher, **case.options, **options)
    out.loss.backward(torch.full_like(out.loss, upstream))
    assert leaf.grad is not None
    return Result(out, leaf.grad)


def log_probs(
    z: Tensor, scale: float, softcap: float | None, temperature: float | Tensor, kept: Tensor | None
) -> Tensor:
    """Return log-probabilities `[..., V]` in fp32, or fp64 for fp64."""
    y = (z if z.dtype == torch.float64 else z.float()) * scale
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(z.shape[:-1]).unsqueeze(-1)
    y = y / temperature
    return (y if kept is None else y.masked_fill(~kept, -torch.inf)).log_softmax(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    possible = a > -torch.inf
    safe = torch.where(possible, a, 0.0)
    return torch.where(possible, safe.exp() * (safe - torch.where(possible, b, 0.0)), 0.0).sum(-1)


def divergence(p: Tensor, q: Tensor, kind: str, weight: float) -> Tensor:
    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "forward_kl":
        return kl(q, p)
    either = (p > -torch.inf) | (q > -torch.inf)
    # The derivative of logaddexp is NaN if both are -inf.
    student, teacher = torch.where(either, p, 0.0), torch.where(either, q, 0.0)
    m = torch.logaddexp(student + math.log1p(-weight), teacher + math.log(weight))
    m = torch.where(either, m, -torch.inf)
    return weight * kl(q, m) + (1 - weight) * kl(p, m)


def eager(case: Case, view: Callable[[Tensor], Tensor] = lambda x: x) -> Result:
    """Compute what `distillation_loss` does, in eager PyTorch. Only "token-mean" and "token-sum"."""
    options = dict(case.options)
    leaf = case.logits.detach().clone().requires_grad_()
    logits = view(leaf)
    width = options.get("vocab_size", logits.shape[-1])
    mask = options.get("completion_mask", torch.ones(logits.shape[:-1], device=logits.device)) != 0
    words, kept = options.get("sampling_mask"), None
    if words is not None:
        columns = torch.arange(width, device=words.device)
        kept = (words[..., columns // 32] >> (columns % 32)) & 1 != 0
    temperature = options.get("temperature", 1.0)
    scale, softcap = options.get("logit_scale", 1.0), options.get("logit_softcap")
    ref_scale = options.get("ref_logit_scale") or scale
    ref_softcap = options.get("ref_logit_softcap") or softcap
    z, t = (x[..., :width].masked_fill(~mask[..., None], 0.0) for x in (logits, case.teacher))
    if kept is not None:
        z, t = (x.masked_fill(~kept, 0.0) for x in (z, t))
    p = log_probs(z, scale, softcap, temperature, kept)
    q = log_probs(t, ref_scale, ref_softcap, temperature, kept)
    value = divergence(p, q, options["divergence"], options.get("jsd_weight", 0.5))
    value = torch.where(mask, value, 0.0)
    count = 1.0 if options.get("aggregation") == "token-sum" else mask.sum()
    loss = value.sum() / options.get("normalizer", count)
    loss.backward()
    entropy = torch.where(mask, -torch.special.entr(p.exp()).sum(-1).neg(), 0.0).detach()
    mean = value.detach().sum() / mask.sum()
    metrics = {"kl": mean, "entropy": entropy.sum() / mask.sum()}
    if options["divergence"] == "reverse_kl":
        metrics["kl_exact"] = mean
    assert leaf.grad is not None
    return Result(LossOutput(loss, metrics, None, None, entropy), leaf.grad)  # type: ignore[arg-type]


def assert_parity(
    case: Case, view: Callable[[Tensor], Tensor] = lambda x: x, *, what: str = "", **options: Any
) -> Result:
    """Compare loss, metrics, entropy and gradient with fp64 and eager PyTorch."""
    got = run(case, view, return_entropy=True, **options)
    truth, other = eager(case.wide(), view), eager(case, view)
    assert_outputs(case, got.out, truth, other, what=what)
    grads = (view(x.grad) for x in (got, other, truth))
    assert_gradient(*grads, what=what)
    outside = torch.ones_like(got.grad)
    view(outside).zero_()
    assert bool((got.grad[outside == 1] == 0).all()), what
    return got


def assert_outputs(case: Case, out: LossOutput, truth: Result, other: Result, *, what: str) -> None:
    double = case.logits.dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    assert out.loss.dtype == (torch.float64 if double else torch.float32), what
    assert out.loss.shape == () and out.logps is None and out.ref_logps is None, what
    size = float(truth.out.loss.detach().abs())
    assert_near(f"{what}: loss", out.loss, truth.out.loss, other.out.loss, 64 * eps * size)
    assert out.metrics.keys() == truth.out.metrics.keys(), what
    for name, exact in truth.out.metrics.items():
        assert not out.metrics[name].requires_grad, f"{what}: {name}"
        bound = 64 * eps * float(exact.abs())
        assert_near(f"{what}: {name}", out.metrics[name], exact, other.out.metrics[name], bound)
    assert out.entropy is not None and truth.out.entropy is not None and not out.entropy.requires_grad
    error = float((out.entropy.double() - truth.out.entropy).abs().max())
    assert error <= (1e-12 if double else 1e-5), f"{what}: entropy errs {error:.3g}"
    assert bool((out.entropy[truth.out.entropy == 0] == 0).all()), f"{what}: entropy at masked positions"


def assert_gradient(got: Tensor, other: Tensor, truth: Tensor, *, what: str) -> None:
    """Compare rows of the gradient. A log-probability of size 10 errs by a few roundings."""
    assert got.dtype == other.dtype, what
    eps = torch.finfo(got.dtype).eps
    epsilon = {torch.float64: 1e-12, torch.float32: 32 * eps}.get(got.dtype, 1.25 * eps)
    assert_no_worse_than_eager(got, other, truth, epsilon=epsilon, what=f"{what}: gradient")
