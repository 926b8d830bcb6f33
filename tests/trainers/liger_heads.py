"""Hidden states and a head, and both losses of them: Liger's chunked loss and ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from liger_cases import EPS_HIGH, EPS_LOW, RATIO_MAX, B, Batch, T, V, liger_options
from products import on_a_grid
from torch import Tensor

from grpo_kernels import LossSpec, linear_grpo_loss
from grpo_kernels.reference import reference_logps


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    @staticmethod
    def random(seed: int, device: str, *, bias: bool = True, vocab: int = V, H: int = 12) -> Head:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((B, T, H), (vocab, H), (vocab,))
        # The logits are exact for any order of the sums: see products.py.
        tensors = [on_a_grid(0.7 * torch.randn(*shape, generator=generator)).to(device) for shape in shapes]
        return Head(tensors[0], tensors[1], tensors[2] if bias else None)

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(*self)

    def leaves(self) -> Head:
        return Head(*(None if x is None else x.detach().clone().requires_grad_() for x in self))

    def grads(self) -> list[Tensor]:
        grads = [x.grad for x in self if x is not None]
        assert all(grad is not None for grad in grads)
        return grads  # type: ignore[return-value]


class LinearResult(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    grads: list[Tensor]  # of hidden states, weight and bias, if there is a bias


def from_head(batch: Batch, head: Head) -> Batch:
    """Return `batch` with its log-ratios, but relative to the log-probabilities of the head's logits."""
    before = reference_logps(batch.logits[:, :-1], batch.ids, temperature=batch.temperature)
    after = reference_logps(head.logits(), batch.ids, temperature=batch.temperature)
    moved = {
        name: None if x is None else x - before + after
        for name, x in (("old_logps", batch.old_logps), ("ref_logps", batch.ref_logps))
    }
    return batch._replace(**moved)


def ours_chunked(batch: Batch, head: Head, spec: LossSpec, ref: Head | None, backend: str) -> LinearResult:
    """Compute our loss from hidden states, and the gradients."""
    head = head.leaves()
    if spec.kl is None:
        reference = {}
    elif ref is None:
        reference = {"ref_logps": batch.ref_logps}
    else:
        names = ("ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias")
        reference = dict(zip(names, ref, strict=True))
    out = linear_grpo_loss(
        head.hidden,
        head.weight,
        batch.ids,
        batch.advantages,
        spec=spec,
        lm_head_bias=head.bias,
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        token_weights=batch.weights,
        temperature=batch.temperature,
        chunk_tokens=7,
        backend=backend,
        **reference,
    )
    out.loss.backward()
    return LinearResult(out.loss.detach(), head.grads())


def liger_chunked(
    batch: Batch, head: Head, loss_type: str, *, ref: Head | None = None, **options: Any
) -> LinearResult:
    """Compute Liger's loss from hidden states, and the gradients.

    It is written in PyTorch and differentiates the losses by autograd. It is not compiled here.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    level, kl = options.pop("level", "token"), options.pop("kl", None)
    loss_fn = LigerFusedLinearGRPOLoss(
        compiled=False,
        use_ref_model=kl is not None,
        chunk_size=2,
        epsilon_low=EPS_LOW,
        epsilon_high=RATIO_MAX if loss_type == "cispo" else EPS_HIGH,
        temperature=batch.temperature,
        **liger_options(loss_type, level=level, kl=kl),
        **options,
    )
    head = head.leaves()
    reference = {"ref_per_token_logps": batch.ref_logps}
    if ref is not None:
        reference = dict(zip(("ref_input", "ref_weight", "ref_bias"), ref, strict=True))
    loss, _ = loss_fn(
        head.hidden,
        head.weight,
        batch.ids,
        batch.mask,
        batch.advantages,
        head.bias,
        old_per_token_logps=batch.old_logps,
        vllm_is_ratio=batch.weights,
        **(reference if kl is not None else {}),
    )
    loss.backward()
    return LinearResult(loss.detach(), head.grads())


def assert_same_linear(found: LinearResult, expected: LinearResult, what: str = "") -> None:
    """Assert that loss and gradients agree."""
    torch.testing.assert_close(found.loss, expected.loss, rtol=3e-5, atol=1e-5)
    for name, got, wanted in zip(("hidden", "weight", "bias"), found.grads, expected.grads, strict=False):
        # A row of the weight's gradient is a sum over tokens, which may cancel.
        error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
        assert error <= 1e-5 * size, f"{what}: gradient by {name} errs {error} of {size}"
