"""The number of kernels that a call launches. Each launch costs a GPU about 2 us."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from grpo_kernels import KL, LossSpec, PPOClip, distillation_loss, grpo_loss, linear_grpo_loss
from grpo_kernels.testing import make_batch

pytest.importorskip("triton")
from grpo_kernels.kernels import divergence, dlogits, fused, row_stats, token_loss

pytestmark = pytest.mark.usefixtures("needs_triton")

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "_local_scalar_dense"}


class Launches(TorchDispatchMode):
    """Count the operators that compute, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> None:
    """Turn the fixture off, because the fills would be counted."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Count a Triton kernel as one launch, although the interpreter copies tensors with PyTorch."""
    found = Launches()

    @contextmanager
    def one_kernel(tensor: torch.Tensor) -> Iterator[None]:
        found.counts["kernel"] += 1
        with _disable_current_modes():
            yield

    for module in (row_stats, dlogits, token_loss, fused, divergence):
        monkeypatch.setattr(module, "on_device_of", one_kernel)
    return found


# The launches check the batch and compute weights, metrics and gradients. PyTorch takes 90 more for k3.
@pytest.mark.parametrize(
    "form, options, most",
    [
        ("logits", {}, 35),
        ("logits", {"inplace": True}, 35),
        ("linear", {}, 75),
    ],
)
@pytest.mark.parametrize("spec", ["grpo", LossSpec(PPOClip(), KL("k3", beta=0.04))], ids=["grpo", "k3"])
def test_launches(
    form: str, options: dict[str, Any], most: int, spec: LossSpec | str, device: str, launches: Launches
) -> None:
    batch = make_batch(4, 5, 64, dtype=torch.bfloat16, device=device)
    given = {
        "spec": spec,
        "backend": "triton",
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        **options,
    }
    if form == "logits":
        logits = batch.logits.clone().requires_grad_()

        def step() -> None:
            out = grpo_loss(
                logits.clone(), batch.completion_ids, batch.advantages, ref_logits=batch.ref_logits, **given
            )
            out.loss.backward()
    else:
        hidden = torch.randn(4, 5, 16, dtype=torch.bfloat16, device=device).requires_grad_()
        weight = torch.randn(64, 16, dtype=torch.bfloat16, device=device).requires_grad_()

        def step() -> None:
            out = linear_grpo_loss(
                hidden,
                weight,
                batch.completion_ids,
                batch.advantages,
                ref_hidden=hidden.detach(),
                ref_lm_head_weight=weight.detach(),
                **given,
            )
            out.loss.backward()

    step()
    launches.counts.clear()
    with launches:
        step()
    assert launches.counts.total() <= most, launches.counts


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_launches_of_a_distillation(kind: str, device: str, launches: Launches) -> None:
    """There are three kernels over rows. PyTorch weighs the tokens and sums the metrics."""
    batch = make_batch(4, 5, 64, dtype=torch.bfloat16, device=device)
    logits = batch.logits.clone().requires_grad_()

    def step() -> None:
        out = distillation_loss(
            logits,
            teacher_logits=batch.ref_logits,
            divergence=kind,  # type: ignore[arg-type]
            completion_mask=batch.completion_mask,
            backend="triton",
        )
        out.loss.backward()

    step()
    launches.counts.clear()
    with launches:
        step()
    assert launches.counts["kernel"] == 3
    assert launches.counts.total() <= 35, launches.counts
