"""Hidden states and a head, verl's and our log-probabilities and entropies of them, and a small model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from verl_imported import VERLS_FUNCTION

pytest.importorskip("verl.trainer.ppo.core_algos")

from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module


class Fused(NamedTuple):
    """Outputs and gradients of one function."""

    logps: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor

    def errors(self, exact: Fused) -> list[float]:
        """Return the errors of all four tensors, relative in the L2 norm."""
        pairs = zip(self, exact, strict=True)
        return [float((x.double() - y).norm() / y.norm()) for x, y in pairs]


class Head(NamedTuple):
    """Hidden states, a head, token ids and gradients of the outputs."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [...]
    dlogps: Tensor  # [...]
    dentropy: Tensor  # [...]

    @classmethod
    def random(cls, *shape: int, dtype: torch.dtype = torch.float32, V: int = 83, H: int = 24) -> Head:
        generator = torch.Generator().manual_seed(sum(shape))
        normal = functools.partial(torch.randn, generator=generator)
        dlogps, dentropy = normal(*shape), 0.3 * normal(*shape)
        dlogps.view(-1)[:2] = dentropy.view(-1)[:2] = 0  # as for a prompt
        ids = torch.randint(V, shape, generator=generator)
        return cls(normal(*shape, H).to(dtype), 0.5 * normal(V, H).to(dtype), ids, dlogps, dentropy)

    def double(self) -> Head:
        return Head(*(x.double() if x.is_floating_point() else x for x in self))

    def run(self, function: Callable[..., Any], temperature: float | Tensor = 0.7) -> Fused:
        """Call `function(hidden, weight, ids, temperature)`, and compute its gradients."""
        hidden, weight = (x.clone().requires_grad_() for x in self[:2])
        logps, entropy = function(hidden, weight, self.ids, temperature)
        upstream = [x.to(y.dtype).view(y.shape) for x, y in ((self.dlogps, logps), (self.dentropy, entropy))]
        torch.autograd.backward([logps, entropy], upstream)
        assert hidden.grad is not None and weight.grad is not None
        return Fused(logps.detach(), entropy.detach(), hidden.grad, weight.grad)


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute the outputs with plain PyTorch."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def fused(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Call the function as verl's models do with the backend "torch"."""
    layer = FusedLinearForPPO(impl_backend="torch")
    return layer.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=temperature)


def verls(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Call verl's own function."""
    return VERLS_FUNCTION.apply(hidden, weight, ids, temperature, 16)


def crossed(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Call the function as verl's models do with the backend "triton"."""
    return cross_entropy_module.linear_cross_entropy(hidden, weight, ids, temperature, "none")


def tiny_model(*, tied: bool) -> Any:
    """Make a small Qwen2 with a class of its own, because verl patches the class."""

    class Tiny(Qwen2ForCausalLM):
        pass

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=83,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return Tiny(config)


def learn(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return log-probabilities, entropies and the gradients of all parameters, by name."""
    model.zero_grad()
    out = model(input_ids=ids, return_dict=True, use_cache=False, temperature=0.8, **options)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, ids.numel(), generator=generator)
    (out.log_probs.flatten() @ weights[0] + 0.3 * out.entropy.flatten() @ weights[1]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    values = {"log_probs": out.log_probs, "entropy": out.entropy}
    return {name: x.detach().flatten() for name, x in values.items()} | grads
