"""Every loss is differentiable once: a second derivative raises, however it is asked for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import user_loss
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    KL,
    GRPOLoss,
    ImportanceRatio,
    LinearGRPOLoss,
    LossSpec,
    PPOClip,
    VocabShard,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    log_ratio_loss,
    selective_logps,
)
from grpo_kernels.policy_loss import policy_loss

MESSAGE = "the losses of grpo_kernels are differentiable once"
B, T, V, H = 2, 3, 11, 4
FULL = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1)

Scalar = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(B * T).view(B, T) % V
ADVANTAGES = normal(B, seed=1)
OLD = normal(B, T, seed=2) - 3
REFERENCE = normal(B, T, V, seed=3)
WEIGHT = normal(V, H, seed=4)
HIDDEN = normal(B, T, H, seed=5)
BIAS = normal(V, seed=6)
LOGITS = normal(B, T, V, seed=7)
CALLABLE = LossSpec(user_loss)


def from_logits(spec: LossSpec | str, **options: Any) -> tuple[Scalar, Tensor]:
    def loss(z: Tensor) -> Tensor:
        # A leaf cannot be overwritten with the gradient.
        z = z.clone() if options.get("inplace") else z
        return grpo_loss(z, IDS, ADVANTAGES, spec=spec, old_logps=OLD, **options).loss

    return loss, LOGITS


def from_hidden(
    spec: LossSpec | str, of: str = "hidden", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Scalar, Tensor]:
    """A loss as a function of one of the three tensors of a head."""
    given = {"hidden": HIDDEN.to(dtype), "weight": WEIGHT.to(dtype), "bias": BIAS.to(dtype)}

    def loss(x: Tensor) -> Tensor:
        hidden, weight, bias = {**given, of: x}.values()
        args = (hidden, weight, IDS, ADVANTAGES)
        return linear_grpo_loss(*args, lm_head_bias=bias, spec=spec, old_logps=OLD, **options).loss

    return loss, given[of]


def losses() -> dict[str, tuple[Scalar, Tensor]]:
    """Every loss in every form, as a function from one tensor to a scalar, and that tensor."""
    k3 = LossSpec(PPOClip(), KL("k3"), entropy_coef=0.1)
    coupled = LossSpec(ImportanceRatio(), level="sequence")  # unclipped: no token is without a gradient
    return {
        "grpo_loss": from_logits("grpo"),
        "grpo_loss, everything": from_logits(FULL, ref_logits=REFERENCE),
        "grpo_loss, sequence": from_logits(coupled),
        "grpo_loss, callable": from_logits(CALLABLE),
        "grpo_loss in place": from_logits(FULL, ref_logits=REFERENCE, inplace=True),
        "grpo_loss in place, sequence": from_logits(coupled, inplace=True),
        "log_ratio_loss": (lambda z: log_ratio_loss(z, REFERENCE, IDS, ADVANTAGES).loss, LOGITS),
        "GRPOLoss": (lambda z: GRPOLoss("dapo")(z, IDS, ADVANTAGES, old_logps=OLD).loss, LOGITS),
        "linear_grpo_loss, one pass": from_hidden("grpo"),
        "linear_grpo_loss, one pass, weight": from_hidden("grpo", "weight"),
        "linear_grpo_loss, one pass, bias": from_hidden("grpo", "bias"),
        "linear_grpo_loss, one pass, rows in place": from_hidden("grpo", compact=False),
        "linear_grpo_loss, two passes": from_hidden(coupled),
        "linear_grpo_loss, two passes, weight": from_hidden(CALLABLE, "weight"),
        "linear_grpo_loss, two passes, bias": from_hidden(coupled, "bias"),
        "linear_grpo_loss, fp16": from_hidden("grpo", dtype=torch.float16),
        "LinearGRPOLoss": (
            lambda h: LinearGRPOLoss("dapo")(h, WEIGHT, IDS, ADVANTAGES, old_logps=OLD).loss,
            HIDDEN,
        ),
        "selective_logps": (lambda z: selective_logps(z, IDS).sum(), LOGITS),
        "selective_logps, entropy": (lambda z: selective_logps(z, IDS, return_entropy=True)[1].sum(), LOGITS),
        "linear_logps": (lambda h: linear_logps(h, WEIGHT, IDS).sum(), HIDDEN),
        "linear_logps, weight": (lambda w: linear_logps(HIDDEN, w, IDS).sum(), WEIGHT),
        "policy_loss": (lambda x: policy_loss(x, ADVANTAGES, old_logps=OLD).loss, OLD + 0.01),
        "policy_loss, sequence": (lambda x: policy_loss(x, ADVANTAGES, spec="gspo").loss, OLD),
        "policy_loss, entropy": (
            lambda x: policy_loss(OLD, ADVANTAGES, spec=k3, entropy=x, ref_logps=OLD).loss,
            OLD.abs(),
        ),
    }


def gradient(loss: Scalar, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return found


def of_a_gradient(loss: Scalar, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(gradient(loss, x).pow(2).sum(), x)


def of_a_gradient_if_used(loss: Scalar, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(gradient(loss, x).pow(2).sum(), x, allow_unused=True)


def of_a_penalty(loss: Scalar, x: Tensor) -> Any:
    """The second derivative together with that of a smooth term."""
    x = x.clone().requires_grad_()
    (x.square().sum() + gradient(loss, x).square().sum()).backward()


def of_an_intermediate(loss: Scalar, x: Tensor) -> Any:
    """The loss receives a tensor that is computed from the leaf."""
    x = x.clone().requires_grad_()
    given = x * 1.0
    return torch.autograd.grad(gradient(loss, given).sum(), x)


def by_the_incoming_gradient(loss: Scalar, x: Tensor) -> Any:
    x, factor = x.clone().requires_grad_(), torch.ones((), requires_grad=True)
    (found,) = torch.autograd.grad(loss(x), x, factor.to(loss(x).dtype), create_graph=True)
    return torch.autograd.grad(found.sum(), factor)


def forward_over_reverse(loss: Scalar, x: Tensor) -> Any:
    return functional.hessian(loss, x, outer_jacobian_strategy="forward-mode", vectorize=True)


def by_dual_numbers(loss: Scalar, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x))).tangent


WAYS: dict[str, Callable[[Scalar, Tensor], Any]] = {
    "autograd.grad": of_a_gradient,
    "autograd.grad, allow_unused": of_a_gradient_if_used,
    "backward": of_a_penalty,
    "an intermediate": of_an_intermediate,
    "the incoming gradient": by_the_incoming_gradient,
    "hessian": functional.hessian,
    "hessian, vectorized": lambda f, x: functional.hessian(f, x, vectorize=True),
    "hessian, forward over reverse": forward_over_reverse,
    "jacobian of jacobian": lambda f, x: functional.jacobian(
        lambda y: functional.jacobian(f, y, create_graph=True), x
    ),
    "hvp": lambda f, x: functional.hvp(f, x, x),
    "vhp": lambda f, x: functional.vhp(f, x, x),
    "jvp": lambda f, x: functional.jvp(f, x, x),  # differentiates with respect to the incoming gradient
    "dual numbers": by_dual_numbers,
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.jacrev of func.grad": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", losses())
def test_raises(name: str, way: str) -> None:
    loss, x = losses()[name]
    with pytest.raises(RuntimeError, match=MESSAGE):
        WAYS[way](loss, x)


@pytest.mark.parametrize("way", ["autograd.grad", "hvp"])
@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
@pytest.mark.usefixtures("needs_triton")
def test_kernels(way: str, inplace: bool) -> None:
    loss, x = from_logits(FULL, ref_logits=REFERENCE, inplace=inplace, backend="triton")
    with pytest.raises(RuntimeError, match=MESSAGE):
        WAYS[way](loss, x)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VocabShard]:
    """The whole vocabulary as the shard of the only rank."""
    store = Path(tmp_path_factory.mktemp("ranks")) / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield VocabShard(0, V)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["autograd.grad", "hessian", "hvp"])
def test_vocab_shard(way: str, shard: VocabShard) -> None:
    for loss, x in (
        from_logits(FULL, ref_logits=REFERENCE, shard=shard),
        from_hidden("grpo", shard=shard),
        from_hidden("gspo", "weight", shard=shard),
    ):
        with pytest.raises(RuntimeError, match=MESSAGE):
            WAYS[way](loss, x)


def test_a_mixed_derivative_raises() -> None:
    """The gradient of the weight is differentiated with respect to the hidden states."""
    for spec in ("grpo", "gspo"):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        loss = linear_grpo_loss(hidden, weight, IDS, ADVANTAGES, spec=spec).loss
        (dweight,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match=MESSAGE):
            torch.autograd.grad(dweight.sum(), hidden)


def test_with_respect_to_a_factor_of_the_log_probabilities_raises() -> None:
    """The gradient depends on the factor only through the incoming gradient."""
    logits, factor = LOGITS.clone().requires_grad_(), torch.ones(B, T, requires_grad=True)
    (grad,) = torch.autograd.grad((factor * selective_logps(logits, IDS)).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(grad.sum(), factor)


class TestFirstOrder:
    """Without a second derivative, results are the same with `create_graph` as without."""

    @pytest.mark.parametrize("name", losses())
    def test_same_gradient_under_create_graph(self, name: str) -> None:
        loss, x = losses()[name]
        x = x.clone().requires_grad_()
        want = torch.autograd.grad(loss(x), x)[0]
        got = gradient(loss, x)
        assert torch.equal(got, want) and want.any() and got.requires_grad

    @pytest.mark.parametrize("name", losses())
    def test_the_gradient_may_be_changed_in_place(self, name: str) -> None:
        """Gradient clipping does that."""
        loss, x = losses()[name]
        x = x.clone().requires_grad_()
        got = gradient(loss, x)
        want = 2 * got.detach()
        with torch.no_grad():
            got.mul_(2)
        assert torch.equal(got, want)
        other = gradient(loss, x)
        other *= 2
        assert torch.equal(other, want)

    def test_a_penalty_on_another_gradient(self) -> None:
        """The penalty is on the gradient of a smooth term, and the loss is in the same graph."""
        weight = WEIGHT.clone().requires_grad_()

        def smooth(w: Tensor) -> Tensor:
            return (HIDDEN @ w.t()).exp().mean()

        (grad,) = torch.autograd.grad(smooth(weight), weight, create_graph=True)
        (want,) = torch.autograd.grad(grad.square().sum(), weight, retain_graph=True)
        (loss_grad,) = torch.autograd.grad(
            loss := grpo_loss(HIDDEN @ weight.t(), IDS, ADVANTAGES).loss, weight, retain_graph=True
        )
        (grad.square().sum() + loss).backward()
        torch.testing.assert_close(weight.grad, want + loss_grad)

    def test_the_gradient_may_be_a_constant_elsewhere(self) -> None:
        x = LOGITS.clone().requires_grad_()
        grad = gradient(from_logits("grpo")[0], x)
        (grad.detach() * x).sum().backward()
        assert torch.equal(x.grad, grad)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", ["grpo_loss", "linear_grpo_loss, one pass", "linear_logps"])
    def test_checkpointing(self, name: str, reentrant: bool) -> None:
        loss, x = losses()[name]
        grads = []
        for call in (loss, lambda y: checkpoint(loss, y, use_reentrant=reentrant)):
            leaf = x.clone().requires_grad_()
            call(leaf * 1.0).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    def test_checkpointing_knows_of_second_derivatives(self) -> None:
        loss, x = losses()["linear_grpo_loss, one pass"]
        with pytest.raises(RuntimeError, match=MESSAGE):
            of_a_gradient(lambda y: checkpoint(loss, y, use_reentrant=False), x)


class TestMemory:
    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.parametrize("name", losses())
    def test_no_reference_cycle(self, name: str, create_graph: bool) -> None:
        """The tensor is freed with its last reference, without a garbage collection."""
        loss, x = losses()[name]
        gc.collect()
        gc.disable()
        try:
            x = x.clone().requires_grad_()
            given = x * 1.0
            gone = weakref.ref(given.untyped_storage())
            found = torch.autograd.grad(loss(given), x, create_graph=create_graph)
            del given, found
            assert gone() is None
        finally:
            gc.enable()

    def test_one_pass_keeps_no_hidden_states(self) -> None:
        """The forward computes the gradient, and keeps nothing else until the backward."""
        leaf = HIDDEN.clone().requires_grad_()
        hidden = leaf * 1.0
        gone = weakref.ref(hidden.untyped_storage())
        loss = linear_grpo_loss(hidden, WEIGHT, IDS, ADVANTAGES).loss
        del hidden
        assert gone() is None
        loss.backward()
        assert leaf.grad.any()

    def test_policy_loss_keeps_no_log_probabilities(self) -> None:
        saved: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            saved.append(x)
            return x

        leaf = OLD.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            policy_loss(leaf, ADVANTAGES)
        kept = [x for x in saved if x.dtype != torch.bool and x.dim()]
        assert len(kept) == 1  # the derivative
