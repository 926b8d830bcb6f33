"""`linear_distillation_loss` equals `distillation_loss` of the products."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from distillation_cases import KINDS
from parity import DTYPES
from torch import Tensor
from torch.nn.functional import linear

from grpo_kernels import distillation_loss, linear_distillation_loss, pack_sampling_mask
from grpo_kernels.linear import chunks
from grpo_kernels.linear.divergence import TokenWeights

kinds = pytest.mark.parametrize("kind", KINDS)
V, H, TEACHER_H = 303, 24, 10
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


class Heads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    def wide(self) -> Heads:
        return Heads(*(None if x is None else x.double() for x in self))  # type: ignore[arg-type]


def draw(dtype: torch.dtype, device: str, *, bias: bool = True, extra: int = 0, seed: int = 0) -> Heads:
    """Return heads whose masked hidden states are NaN. `extra` rows of padding are NaN as well."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def padded(x: Tensor, count: int) -> Tensor:
        return torch.cat([x, x.new_full((count, *x.shape[1:]), torch.nan)])

    hidden, teacher_hidden = normal(3, 4, H), normal(3, 4, TEACHER_H)
    hidden[~MASK], teacher_hidden[~MASK] = torch.nan, torch.inf
    weight, teacher_weight = normal(V, H) / 2, normal(V, TEACHER_H) / 2
    found = [hidden, padded(weight, extra), padded(normal(V), extra) if bias else None]
    more = 2 * extra
    found += [teacher_hidden, padded(teacher_weight, more), padded(normal(V), more) if bias else None]
    return Heads(*(None if x is None else x.to(device, dtype) for x in found))


def run(heads: Heads, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    leaves = [x for x in heads[:3] if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = linear_distillation_loss(
        leaves[0], leaves[1], lm_head_bias=leaves[2] if len(leaves) > 2 else None,
        teacher_hidden=heads.teacher_hidden, teacher_lm_head_weight=heads.teacher_weight,
        teacher_lm_head_bias=heads.teacher_bias, **options,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, leaves)


def run_logits(heads: Heads, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Run the form from logits in PyTorch. Masked hidden states are set to 0, because 0 * NaN is NaN."""
    options["backend"] = "torch"
    mask = options["completion_mask"][..., None]
    leaves = [x.detach().clone() for x in heads[:3] if x is not None]
    leaves[0] = torch.where(mask, leaves[0], 0.0)
    width = options.get("vocab_size", len(leaves[1]))
    leaves = [leaves[0], *(x[:width] for x in leaves[1:])]
    leaves = [x.clone().requires_grad_() for x in leaves]
    teacher = torch.where(mask, heads.teacher_hidden, 0.0)
    bias = None if heads.teacher_bias is None else heads.teacher_bias[:width]
    for name in ("vocab_size", "chunk_tokens", "compact", "logits_dtype"):
        options.pop(name, None)
    teacher_logits = linear(teacher, heads.teacher_weight[:width], bias)
    out = distillation_loss(linear(*leaves), teacher_logits=teacher_logits, **options)
    return out, torch.autograd.grad(out.loss, leaves)


def assert_same(heads: Heads, dtype: torch.dtype, **options: Any) -> None:
    """Compare with the form from logits in fp64, up to the rounding of `dtype`."""
    out, grads = run(heads, **options, return_entropy=True)
    want, exact = run_logits(heads.wide(), **options, return_entropy=True)
    eps = torch.finfo(dtype).eps
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=rtol, atol=rtol)
    torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=rtol, atol=rtol)
    assert out.metrics.keys() == want.metrics.keys()
    for name, x in out.metrics.items():
        torch.testing.assert_close(x.double(), want.metrics[name], rtol=rtol, atol=rtol)
    for got, truth in zip(grads, exact, strict=True):
        assert got.dtype == dtype
        got, rest = got[: len(truth)], got[len(truth) :]
        assert bool((rest == 0).all()), "the gradient of padding"
        # The gradient of a chunk of logits is rounded to the dtype of the products, then the sum is.
        allowed = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * eps)
        assert float((got.double() - truth).norm()) <= allowed * float(truth.norm())


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "all rows"])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_parity(
    kind: str, dtype: str, compact: bool, chunk_tokens: int | None, backend: str, device: str
) -> None:
    options: dict[str, Any] = {
        "divergence": kind, "jsd_weight": 0.3, "completion_mask": MASK.to(device), "compact": compact,
        "chunk_tokens": chunk_tokens, "backend": backend,
    }  # fmt: skip
    assert_same(draw(DTYPES[dtype], device), DTYPES[dtype], **options)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "logit_softcap": 5.0, "ref_logit_scale": 0.5},
        {"vocab_size": V},
        {"aggregation": "seq-mean-token-mean"},
        {"normalizer": torch.tensor(123456.0)},
        {"temperature": torch.linspace(0.5, 1.5, 12).view(3, 4)},
    ],
    ids=["transform", "padding", "aggregation", "normalizer", "temperatures"],
)
def test_options(kind: str, options: dict[str, Any], backend: str, device: str) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    heads = draw(torch.float32, device, bias=False, extra=3 if "vocab_size" in options else 0)
    given = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend, "chunk_tokens": 3}
    assert_same(heads, torch.float32, **given, **options)


@kinds
def test_packed(kind: str, backend: str, device: str) -> None:
    heads = draw(torch.float64, device)
    options: dict[str, Any] = {"divergence": kind, "aggregation": "seq-mean-token-mean", "backend": backend}
    mask, lengths = MASK.to(device), torch.tensor([4, 4, 4], device=device)
    out, grads = run(heads, completion_mask=mask, **options)
    flat = heads._replace(
        hidden=heads.hidden.flatten(0, 1), teacher_hidden=heads.teacher_hidden.flatten(0, 1)
    )
    packed, packed_grads = run(flat, completion_mask=mask.flatten(), seq_lens=lengths, **options)
    torch.testing.assert_close(packed.loss, out.loss)
    for x, y in zip(packed_grads, grads, strict=True):
        torch.testing.assert_close(x, y.view(x.shape))


def test_sampling_mask(backend: str, device: str) -> None:
    heads = draw(torch.float64, device)
    keep = torch.rand(3, 4, V, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[..., 0] = True
    options = {"completion_mask": MASK.to(device), "sampling_mask": pack_sampling_mask(keep.to(device))}
    assert_same(heads, torch.float64, **options, backend=backend, chunk_tokens=2)


@kinds
def test_bf16_logits(kind: str, backend: str, device: str) -> None:
    """Logits rounded to bf16 give about three digits."""
    heads = draw(torch.bfloat16, device)
    options: dict[str, Any] = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend}
    out, grads = run(heads, logits_dtype=torch.bfloat16, **options)
    want, exact = run_logits(heads.wide(), **options)
    assert float(out.loss.detach()) == pytest.approx(float(want.loss.detach()), rel=2e-2)
    for x, y in zip(grads, exact, strict=True):
        assert float((x.double() - y).norm()) <= 3e-2 * float(y.norm())


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2)], ids=str)
def test_frozen_parts(frozen: tuple[int, ...], backend: str, device: str) -> None:
    heads = draw(torch.float32, device)
    options: dict[str, Any] = {"completion_mask": MASK.to(device), "backend": backend, "divergence": "jsd"}
    _, every = run(heads, **options)
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(heads[:3]) if x is not None]
    out = linear_distillation_loss(
        *leaves[:2], lm_head_bias=leaves[2], teacher_hidden=heads.teacher_hidden,
        teacher_lm_head_weight=heads.teacher_weight, teacher_lm_head_bias=heads.teacher_bias, **options,
    )  # fmt: skip
    out.loss.backward()
    for i, (x, want) in enumerate(zip(leaves, every, strict=True)):
        assert (x.grad is None) == (i in frozen)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, want)


@kinds
def test_no_grad(kind: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient, values are the same, and no buffer for a gradient is allocated."""
    heads = draw(torch.float32, device)
    options: dict[str, Any] = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend}
    out, _ = run(heads, **options)
    plans: list[Any] = []
    init = chunks.Chunks.__init__

    def recorded(self: Any, rows: Any, plan: Any, *more: Any) -> None:
        plans.append(plan)
        init(self, rows, plan, *more)

    monkeypatch.setattr(chunks.Chunks, "__init__", recorded)
    for compact in (True, False):
        with torch.no_grad():
            got = linear_distillation_loss(
                *heads[:2], lm_head_bias=heads.bias, teacher_hidden=heads.teacher_hidden,
                teacher_lm_head_weight=heads.teacher_weight, teacher_lm_head_bias=heads.teacher_bias,
                compact=compact, **options,
            )  # fmt: skip
        torch.testing.assert_close(got.loss, out.loss.detach())  # products of other numbers of rows
    assert [plan.active for plan in plans] == [0, 0]
    assert [plan.running for plan in plans] == [int(MASK.sum()), MASK.numel()]


@pytest.mark.parametrize("scale", [1e-38, 1e-7, 0.3, 4096.0, 1e30])
def test_token_weights(scale: float, device: str) -> None:
    """Coefficients are in the range of fp16 whatever the weights are."""
    weights = torch.tensor([0.0, 0.25, 1.0, 0.9], device=device) * scale
    coefficient, factor = TokenWeights.of(weights)
    torch.testing.assert_close(coefficient * factor, weights, rtol=1e-6, atol=0)
    assert scale < 1e-37 or 8 <= float(coefficient.max()) < 16.1
    assert float(coefficient.max()) < 17


@kinds
def test_fp16_gradients_do_not_underflow(kind: str, backend: str, device: str) -> None:
    """A normalizer of 1e7 tokens, and a GradScaler's factor that arrives in the backward."""
    heads = draw(torch.float16, device)
    options: dict[str, Any] = {"divergence": kind, "completion_mask": MASK.to(device), "backend": backend}
    leaves = [x.clone().requires_grad_() for x in heads[:3] if x is not None]
    out = linear_distillation_loss(
        *leaves[:2], lm_head_bias=leaves[2], teacher_hidden=heads.teacher_hidden,
        teacher_lm_head_weight=heads.teacher_weight, teacher_lm_head_bias=heads.teacher_bias,
        normalizer=1e7, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, leaves, torch.tensor(1e7, device=device))
    _, exact = run_logits(heads.wide(), normalizer=1.0, **options)
    for x, y in zip(grads, exact, strict=True):
        assert float((x.double() - y).norm()) <= 4e-3 * float(y.norm())
