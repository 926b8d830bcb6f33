"""Batches and assertions of the hard cases from logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import SURROGATES, Case, Result, oracle, run
from torch import Tensor

from grpo_kernels import KL, ImportanceRatio, LossSpec, PPOClip, Reinforce, grpo_loss
from grpo_kernels.testing import assert_no_worse_than_eager, make_batch

Options = dict[str, Any]  # of grpo_loss
View = Callable[[Tensor], Tensor]

NAN, INF = math.nan, math.inf
TWO_BLOCKS = 2053  # the kernels take a full block of 2048 and a partial one
SUM = "token-sum"  # the loss of a batch of one token is the loss of the token

SPECS = {
    **{name: LossSpec(surrogate) for name, surrogate in SURROGATES.items() if surrogate is not None},
    "k3": LossSpec(PPOClip(), KL("k3", ratio_corrected=True), aggregation="seq-mean-token-mean"),
    "exact KL": LossSpec(PPOClip(), KL("exact"), entropy_coef=0.01),
    "entropy": LossSpec(Reinforce(), entropy_coef=0.1),
    "forward KL": LossSpec(None, KL("exact_forward")),
}
by_ratio = pytest.mark.parametrize("surrogate", [PPOClip(), ImportanceRatio()], ids=["PPO", "ratio"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Bounds of the loss of a negative advantage.
bounded = pytest.mark.parametrize(
    "surrogate, clamp, bound",
    [
        (PPOClip(), None, INF),
        (PPOClip(), 20.0, INF),
        (PPOClip(), 2.0, INF),
        (PPOClip(dual_clip=3.0), None, 3.0),
        (PPOClip(delta=4.0), None, 4.0),
    ],
    ids=["as TRL", "clamp 20", "clamp 2", "dual_clip", "delta"],
)
# Layouts of `[B, 4]` tensors that are not contiguous.
not_contiguous = pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.cat([x, x], 1)[:, :4],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.t().contiguous().t(),
    ],
    ids=["sliced", "every other", "transposed"],
)


def specs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", [SPECS[name] for name in names or SPECS], ids=names or SPECS)


def random_case(spec: LossSpec, *shape: int, device: str, bare: bool = False, **how: Any) -> Case:
    """Return a random batch with every option per token, or with `bare` no option and no masked token."""
    if bare:
        how = {"masked": 0, "inactive": 0, **how}
    batch = make_batch(*shape, **how)
    options = {
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        "ref_logits": batch.ref_logits,
        "token_weights": torch.linspace(0.5, 1.5, shape[0] * shape[1]).view(shape[:2]),
        "temperature": torch.linspace(0.8, 1.2, shape[0] * shape[1]).view(shape[:2]),
    }
    advantages = batch.advantages[:, None].repeat(1, shape[1])
    case = Case(spec, batch.logits, batch.completion_ids, advantages, {} if bare else options)
    return every_tensor(case, lambda _, x: x.to(device))


def every_tensor(case: Case, change: Callable[[str, Tensor], Tensor]) -> Case:
    options = {name: change(name, x) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    tensors = {name: change(name, getattr(case, name)) for name in ("logits", "completion_ids", "advantages")}
    return case._replace(**tensors, options=options)


def assert_right(case: Case, view: View = lambda x: x, **options: Any) -> Result:
    """Compare all outputs and the gradient with the reference, with tolerances for extreme inputs.

    If p is nearly 1, fp32 has few digits of `1 - p`, and eager PyTorch may be accurate by chance. The factor
    of 4 allows for that.
    """
    expected = oracle(case, view)
    got = run(grpo_loss, case, view, **options)
    torch.testing.assert_close(got.out.loss.double(), expected.truth.out.loss.detach(), rtol=1e-5, atol=1e-5)
    for name in ("logps", "ref_logps", "entropy"):
        value, exact = getattr(got.out, name), getattr(expected.truth.out, name)
        if value is not None:
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5, msg=name)
    for name in got.out.metrics.keys() & expected.truth.out.metrics.keys():
        exact = expected.truth.out.metrics[name]
        torch.testing.assert_close(got.out.metrics[name].double(), exact, rtol=1e-4, atol=1e-5, msg=name)
    assert_no_worse_than_eager(
        *(got.grad, expected.eager.grad, expected.truth.grad),
        factor=4,
        epsilon=2 * torch.finfo(got.grad.dtype).eps + 1e-5,
        what="gradient",
    )
    return got


def assert_same_bits(got: Result, want: Result) -> None:
    """Assert that all outputs have the same bits. NaN equals NaN, and -0 equals 0."""

    def same(a: Any, b: Any) -> bool:
        if a is None or b is None:
            return a is b
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())

    for name in ("loss", "logps", "ref_logps", "entropy"):
        assert same(getattr(got.out, name), getattr(want.out, name)), name
    assert same(got.grad, want.grad), "gradient"
    assert got.out.metrics.keys() == want.out.metrics.keys()
    for key, value in got.out.metrics.items():
        assert same(value, want.out.metrics[key]), key


def set_chunks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of logits that the torch backend computes at a time, on every device."""
    for name in ("THREAD_ELEMENTS", "CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"grpo_kernels.vocab.row_chunks.{name}", elements)
