"""The code of docs/custom_losses.md runs unchanged and does what the page says."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_losses import PAGE, page
from torch import Tensor

from grpo_kernels import DRO, ImportanceRatio, LossOutput, LossSpec, PPOClip, grpo_loss, linear_grpo_loss
from grpo_kernels.spec.formula import TokenLoss
from grpo_kernels.spec.surrogates import Reinforce, Surrogate
from grpo_kernels.spec.surrogates.base import Clip
from grpo_kernels.testing import RandomBatch, make_batch


def loss_and_gradient(
    batch: RandomBatch, spec: LossSpec, *, device: str = "cpu", backend: str = "torch", **options: Any
) -> tuple[LossOutput, Tensor]:
    batch = RandomBatch(*(x.to(device) for x in batch))
    leaf = batch.logits.clone().requires_grad_()
    out = grpo_loss(
        leaf.clone(),
        batch.completion_ids,
        batch.advantages,
        spec=spec,
        completion_mask=batch.completion_mask,
        old_logps=batch.old_logps,
        backend=backend,
        **options,
    )
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def random_batch(seed: int = 0) -> RandomBatch:
    """Return a batch in fp64, in which two forms of a derivative agree to the last digits."""
    batch = make_batch(6, 7, 33, dtype=torch.float64, seed=seed)
    return batch._replace(old_logps=batch.old_logps.double(), advantages=batch.advantages.double())


def test_the_page_runs() -> None:
    out, logits, batch = (page()[name] for name in ("out", "logits", "batch"))
    unmasked = batch.completion_mask & (batch.advantages != 0)[:, None]
    assert float(out.loss.detach()) != 0
    assert bool((logits.grad[~batch.completion_mask] == 0).all())
    assert 0 < int((logits.grad != 0).any(-1).sum()) <= int(unmasked.sum())


@pytest.mark.parametrize(
    "name, built_in",
    [
        ("ppo_clip", LossSpec(PPOClip(eps_low=0.2, eps_high=0.28))),
        ("squared_sequence_ratio", LossSpec(DRO(beta=0.1), level="sequence")),
    ],
)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_a_callable_equals_the_built_in_loss(
    name: str, built_in: LossSpec, aggregation: str, backend: str, device: str
) -> None:
    """Loss and gradient are equal, in place and not."""
    surrogate = page()[name]
    if aggregation == "token-mean":
        assert page()["coupled"].surrogate is page()["squared_sequence_ratio"]
    built_in = LossSpec(built_in.surrogate, level=built_in.level, aggregation=aggregation)
    for seed in range(3):
        batch = random_batch(seed)
        theirs, grad = loss_and_gradient(batch, built_in, device=device)
        for inplace in (False, True):
            out, found = loss_and_gradient(
                batch,
                LossSpec(surrogate, aggregation=aggregation),
                device=device,
                backend=backend,
                inplace=inplace,
            )
            torch.testing.assert_close(out.loss, theirs.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)
        assert bool((grad != 0).any())


def test_a_callable_from_hidden_states(backend: str, device: str) -> None:
    """The coupled loss of the page works with `linear_grpo_loss`."""
    batch = random_batch()
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(*shape, 5, generator=generator).double() for shape in ((6, 7), (33,)))
    spec = page()["coupled"]

    def gradients(loss: Callable[[Tensor, Tensor], LossOutput]) -> tuple[Tensor, ...]:
        leaves = [x.to(device).clone().requires_grad_() for x in (hidden, head)]
        out = loss(*leaves)
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)

    options: dict[str, Any] = {
        "completion_mask": batch.completion_mask.to(device),
        "old_logps": batch.old_logps.to(device),
    }
    ids, advantages = batch.completion_ids.to(device), batch.advantages.to(device)
    linear = gradients(
        lambda hidden, head: linear_grpo_loss(
            hidden, head, ids, advantages, spec=spec, backend=backend, chunk_tokens=8, **options
        )
    )
    full = gradients(
        lambda hidden, head: grpo_loss(
            hidden @ head.T, ids, advantages, spec=spec, backend="torch", **options
        )
    )
    for one, other in zip(linear, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_callable_gets(packed: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """A callable gets the shapes and dtypes of the page's table, None if absent, and 0 where masked."""
    batch = RandomBatch(*(x.to(device) for x in make_batch(4, 5, 17, dtype=dtype, masked=0.4)))
    mask = batch.completion_mask
    assert 0 < int(mask.sum()) < mask.numel()
    options: dict[str, Any] = {}
    if packed:
        batch, options["seq_lens"] = batch.packed()
    shape = (20,) if packed else (4, 5)
    seen: dict[str, Tensor | None] = {}

    def spy(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        seen.update(logps=logps, old_logps=old_logps, ref_logps=ref_logps, advantages=advantages, mask=mask)
        # Masked positions may have a value of NaN and an infinite derivative.
        return torch.where(mask, -advantages * logps + (-logps).sqrt(), torch.nan)

    for given in ({}, {"old_logps": batch.old_logps}, {"ref_logits": batch.ref_logits}):
        for name, value in given.items():
            given[name] = value.masked_fill(
                ~(batch.completion_mask if value.dim() == len(shape) else batch.completion_mask[..., None]),
                torch.nan,
            )
        leaf = batch.logits.clone().requires_grad_()
        out = grpo_loss(
            leaf,
            batch.completion_ids,
            batch.advantages,
            spec=LossSpec(spy),
            completion_mask=batch.completion_mask,
            backend=backend,
            **given,
            **options,
        )
        out.loss.backward()
        assert bool(out.loss.isfinite()) and leaf.grad is not None and bool(leaf.grad.isfinite().all())
        assert ("ratio" in out.metrics) == ("log_ratio" in out.metrics) == ("old_logps" in given)
        present = {"logps", "advantages", "mask"} | {name.replace("logits", "logps") for name in given}
        assert {name for name, value in seen.items() if value is not None} == present
        assert seen["mask"] is not None and torch.equal(seen["mask"], batch.completion_mask)
        for name in present - {"mask"}:
            value = seen[name]
            assert value is not None and value.shape == shape
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert bool((value[~batch.completion_mask] == 0).all())
            assert value.requires_grad == (name == "logps")


def covariances(batch: RandomBatch, out: LossOutput) -> Tensor:
    """Return `[B, T]` covariances, with NaN at masked positions."""
    mask, advantages = batch.completion_mask, batch.advantages[:, None].expand(batch.completion_mask.shape)
    product = (out.logps - out.logps[mask].mean()) * (advantages - advantages[mask].mean())
    return product.where(mask, torch.nan)


def test_clip_cov_drops_some_tokens_of_high_covariance() -> None:
    """Dropped tokens have no gradient. The others have the gradient of PPO-clip."""
    dropped_in_all = 0
    for seed in range(5):
        batch = random_batch(seed)
        torch.manual_seed(seed)
        spec = LossSpec(functools.partial(page()["clip_cov"], fraction=0.1), aggregation="token-sum")
        out, grad = loss_and_gradient(batch, spec)
        _, unchanged = loss_and_gradient(batch, LossSpec(PPOClip(), aggregation="token-sum"))
        differs = (grad != unchanged).any(-1)
        assert bool((grad[differs] == 0).all())
        cov = covariances(batch, out)[differs]
        assert bool(((cov > 1) & (cov < 5)).all())
        assert len(cov) <= max(1, int(0.1 * int(batch.completion_mask.sum())))
        dropped_in_all += len(cov)
    assert dropped_in_all > 5


def test_kl_cov_holds_the_tokens_of_highest_covariance() -> None:
    """Chosen tokens have a penalty of `coef` times the absolute log-ratio. The others are unchanged."""
    for seed in range(5):
        batch = random_batch(seed)
        spec = LossSpec(functools.partial(page()["kl_cov"], fraction=0.1, coef=0.7), aggregation="token-sum")
        out, grad = loss_and_gradient(batch, spec)
        plain, unchanged = loss_and_gradient(batch, LossSpec(ImportanceRatio(), aggregation="token-sum"))
        differs = (grad != unchanged).any(-1)
        cov, count = covariances(batch, out), int(0.1 * int(batch.completion_mask.sum()))
        assert torch.equal(differs, cov >= cov[batch.completion_mask].topk(count).values[-1])
        log_ratio = (out.logps - batch.old_logps)[differs]
        torch.testing.assert_close(out.loss - plain.loss, 0.7 * log_ratio.abs().sum())
        # The derivative with respect to the taken token's logit is dlogp * (1 - p).
        taken = (grad - unchanged)[differs].gather(-1, batch.completion_ids[differs][:, None])[:, 0]
        torch.testing.assert_close(taken, 0.7 * log_ratio.sign() * (1 - out.logps[differs].exp()))


@dataclass(frozen=True)
class Squared(Surrogate):
    """`-A * logp + log_ratio^2 / 2`, without a Triton function."""

    anchor = "old"
    zero_without_advantage = False

    def token_loss(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, clamp: float) -> TokenLoss:
        return TokenLoss(-advantage * logp + log_ratio**2 / 2, -advantage, log_ratio)


def squared(logps: Tensor, old_logps: Tensor, ref_logps: None, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * logps + (logps - old_logps) ** 2 / 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_surrogate_without_a_triton_function(inplace: bool, backend: str) -> None:
    """PyTorch computes the loss of such a surrogate between the two kernels."""
    batch = make_batch(6, 7, 33)  # in fp32, for which there are fused kernels
    want, want_grad = loss_and_gradient(batch, LossSpec(squared))
    got, got_grad = loss_and_gradient(batch, LossSpec(Squared()), backend=backend, inplace=inplace)
    assert want_grad.any()
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got_grad, want_grad)


def test_a_surrogate_without_a_triton_function_from_hidden_states(backend: str) -> None:
    batch = make_batch(2, 4, 16)
    weight = torch.eye(16, requires_grad=True)
    tensors = batch.logits, weight, batch.completion_ids, batch.advantages
    given = {"completion_mask": batch.completion_mask, "old_logps": batch.old_logps}
    grads = []
    for surrogate in (squared, Squared()):
        out = linear_grpo_loss(*tensors, spec=LossSpec(surrogate), backend=backend, **given)
        grads += torch.autograd.grad(out.loss, weight)
    assert grads[0].any()
    torch.testing.assert_close(grads[1], grads[0])


@dataclass(frozen=True)
class Banded(Reinforce):
    """`-A * logp`, whose clip fraction counts log-ratios beyond a band."""

    uses_ratio = True

    @property
    def clip(self) -> Clip:
        return Clip("log band", -0.1, 0.2)


def test_clip_fraction_of_a_log_band(backend: str) -> None:
    """The kernel and PyTorch count log-ratios beyond the bound to which the advantage pushes them."""
    batch = make_batch(6, 7, 33)
    out, _ = loss_and_gradient(batch, LossSpec(Banded()), backend=backend)
    log_ratio, advantages = out.logps - batch.old_logps, batch.advantages[:, None]
    clipped = ((log_ratio < -0.1) & (advantages < 0)) | ((log_ratio > 0.2) & (advantages > 0))
    share = clipped[batch.completion_mask].float().mean()
    assert 0 < share < 1
    torch.testing.assert_close(out.metrics["clip_fraction"], share)


ADDED = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
import grpo_kernels
from grpo_kernels import LossSpec, grpo_loss
from grpo_kernels.spec.surrogates.length_damped import LengthDamped
from grpo_kernels.spec.surrogates.tanh_ratio import TanhRatio
from grpo_kernels.testing import make_batch

assert grpo_kernels.__file__.startswith(os.getcwd())
batch = make_batch(4, 5, 67)


def run(surrogate, **options):
    leaf = batch.logits.clone().requires_grad_()
    tensors = (leaf.clone(), batch.completion_ids, batch.advantages)
    given = {"completion_mask": batch.completion_mask, "old_logps": batch.old_logps}
    out = grpo_loss(*tensors, spec=LossSpec(surrogate), **given, **options)
    out.loss.backward()
    return out, leaf.grad


def tanh_ratio(logps, old_logps, ref_logps, advantages, mask):
    return -advantages * 0.2 * torch.tanh((torch.exp(logps - old_logps) - 1) / 0.2)


def length_damped(logps, old_logps, ref_logps, advantages, mask):
    return -advantages * logps / mask.sum(-1, keepdim=True).clamp(min=1).sqrt()


for surrogate, formula in ((TanhRatio(), tanh_ratio), (LengthDamped(), length_damped)):
    _, want = run(formula)
    assert want.any()
    for backend in sys.argv[1:]:
        for inplace in (False, True):
            out, got = run(surrogate, backend=backend, inplace=inplace)
            torch.testing.assert_close(got, want)
            assert ("clip_fraction" in out.metrics) == (surrogate == TanhRatio())
            if surrogate == TanhRatio():
                ratio, advantages = torch.exp(out.logps - batch.old_logps), batch.advantages[:, None]
                clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.2) & (advantages > 0))
                share = clipped[batch.completion_mask].float().mean()
                assert share > 0
                torch.testing.assert_close(out.metrics["clip_fraction"], share)
"""


def test_surrogates_of_the_page(tmp_path: Path) -> None:
    """The diffs of the page apply to a copy of the package and add two losses, with a metric of clipping.

    One does not couple tokens and takes two places, its class and its Triton function. The other couples
    tokens and takes one.
    """
    diffs = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) for diff in diffs] == [2, 1]
    shutil.copytree(PAGE.parents[1] / "grpo_kernels", tmp_path / "grpo_kernels")
    apply = ["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", "-"]
    for diff in diffs:
        diff = re.sub(r"^$(?!\Z)", " ", diff, flags=re.MULTILINE)  # an empty line of context lost its space
        subprocess.run(apply, input=diff, text=True, check=True, cwd=tmp_path)
    backends = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
    done = subprocess.run(
        [sys.executable, "-c", ADDED, *backends], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
