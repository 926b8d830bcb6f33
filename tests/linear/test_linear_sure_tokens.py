"""Tokens of a probability of nearly 1, from hidden states: small relative errors, in one pass and in two.

The logits are exact products (products.py). For each token there is one hidden dimension that is 1 for this
token and 0 for the others. It raises the logit of the taken token alone. An entry of the weight's gradient is
the gradient of that logit, and not a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from linear_cases import LinearCase, run_linear
from products import on_a_grid
from sure_tokens import BOUNDS, GAPS, SureTokens, Truth, assert_relative, places, truth_of
from torch import Tensor

from grpo_kernels import KL, LossSpec, Reinforce, linear_logps
from grpo_kernels.testing import relative_error

V, WIDTH = 300, 16
LIKE = [0.7, -1.5, 4.0]  # gaps of the reference, relative to those of the policy


def reinforce(logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * logps


def nothing(logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return 0 * logps


LOGP = {"one pass": Reinforce(), "two passes": reinforce}
DIVERGENCE = {"one pass": None, "two passes": nothing}
passes = pytest.mark.parametrize("passes", LOGP)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


class Model(NamedTuple):
    hidden: Tensor  # [1, N, WIDTH + N]
    weight: Tensor  # [V, WIDTH + N]

    @property
    def logits(self) -> Tensor:
        return self.hidden.double() @ self.weight.double().t()


def model(ids: Tensor, gaps: list[float], generator: torch.Generator) -> Model:
    """Return a model with these gaps, up to half of the rounding of the raised logits to halves."""
    hidden = on_a_grid(torch.randn(len(gaps), WIDTH, generator=generator), 4)
    weight = on_a_grid(torch.randn(V, WIDTH, generator=generator), 4) / 4
    logits = (hidden @ weight.t()).double()
    others = logits.scatter(-1, ids[:, None], -torch.inf).logsumexp(-1)
    raised = others + torch.tensor(gaps) - logits.gather(-1, ids[:, None])[:, 0]
    steps = torch.zeros(V, len(gaps)).index_put(
        (ids, torch.arange(len(gaps))), (2 * raised).round().float() / 2
    )
    return Model(torch.cat([hidden, torch.eye(len(gaps))], -1)[None], torch.cat([weight, steps], -1))


class Models(NamedTuple):
    """A case from hidden states, and its truth."""

    case: LinearCase
    truth: Truth

    def own_entries(self, weight_grad: Tensor) -> Tensor:
        """Return the entries of the weight's gradient that are the gradients of the taken logits."""
        ids = self.case.completion_ids[0]
        return weight_grad[ids, WIDTH + torch.arange(len(ids), device=ids.device)][None]

    def check(self, grads: tuple[Tensor, ...], dlogits: Tensor) -> None:
        """Compare the gradients of hidden states and weight with those of the gradient of the logits."""
        case, bounds = self.case, BOUNDS[self.case.hidden.dtype]
        bound = bounds.gradient + (
            torch.finfo(case.hidden.dtype).eps if case.hidden.dtype.itemsize == 2 else 0
        )
        taken = dlogits.gather(-1, case.completion_ids[..., None])[..., 0]
        # The 16-bit gradient of the logits is rounded, and so is its product.
        assert_relative("gradient of a taken logit", self.own_entries(grads[1]), taken, 2 * bound)
        wanted = dlogits @ case.weight.double(), dlogits[0].t() @ case.hidden[0].double()
        assert float(relative_error(grads[0], wanted[0]).max()) <= 2 * bound
        # In a column of the weight, the largest entries belong to the token with the smallest gap.
        assert float(relative_error(grads[1].t(), wanted[1].t()).max()) <= 2 * bound


def models(spec: LossSpec, dtype: torch.dtype, device: str) -> Models:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([places(V)[i % 4] for i in range(len(GAPS))])
    policy = model(ids, GAPS, generator)
    reference = model(ids, [gap + LIKE[i % len(LIKE)] for i, gap in enumerate(GAPS)], generator)
    options = {"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": None}
    truth = truth_of(SureTokens(policy.logits, reference.logits, ids[None], options))
    given = {"ref_hidden": reference.hidden, "ref_lm_head_weight": reference.weight}
    tensors = {name: x.to(device, dtype) for name, x in given.items()}
    case = LinearCase(
        spec,
        policy.hidden.to(device, dtype),
        policy.weight.to(device, dtype),
        None,
        ids[None].to(device),
        torch.ones(1, device=device),
        tensors,
    )
    assert torch.equal(Model(case.hidden.cpu(), case.weight.cpu()).logits, policy.logits)
    return Models(case, Truth(*(x.to(device) for x in truth)))


@passes
@dtypes
def test_log_probability(dtype: torch.dtype, passes: str, backend: str, device: str) -> None:
    given = models(LossSpec(LOGP[passes], aggregation="token-sum"), dtype, device)
    got = run_linear(given.case, backend=backend, return_entropy=True, chunk_tokens=4)
    for name in ("logps", "ref_logps", "entropy"):
        assert_relative(name, getattr(got.out, name), getattr(given.truth, name), BOUNDS[dtype].statistic)
    given.check(got.grads, -given.truth.dlogps)


@passes
@dtypes
@pytest.mark.parametrize("kind", ["exact", "exact_forward"])
def test_exact_kl(kind: str, dtype: torch.dtype, passes: str, backend: str, device: str) -> None:
    spec = LossSpec(DIVERGENCE[passes], KL(kind, beta=1.0), aggregation="token-sum")
    given = models(spec, dtype, device)
    truth = given.truth
    want, dlogits = (truth.kl, truth.dkl) if kind == "exact" else (truth.kl_forward, truth.dkl_forward)
    got = run_linear(given.case, backend=backend, chunk_tokens=4)
    assert_relative("sum of the KL", got.out.loss, want.sum(), BOUNDS[dtype].gradient)
    given.check(got.grads, dlogits)


@dtypes
def test_linear_logps(dtype: torch.dtype, backend: str, device: str) -> None:
    given = models(LossSpec(Reinforce()), dtype, device)
    case, truth = given.case, given.truth
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    options = {"backend": backend, "chunk_tokens": 4}
    logps, entropy = linear_logps(hidden, weight, case.completion_ids, return_entropy=True, **options)
    assert_relative("logps", logps, truth.logps, BOUNDS[dtype].statistic)
    assert_relative("entropy", entropy, truth.entropy, BOUNDS[dtype].statistic)
    for value, dlogits in ((logps, truth.dlogps), (entropy, truth.dentropy)):
        given.check(torch.autograd.grad(value.sum(), (hidden, weight), retain_graph=True), dlogits)
