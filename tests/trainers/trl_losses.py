"""TRL's loss and ours for the same batch and TRL's settings.

TRL's trainer computes its loss in two ways here. In fp64 it gets logits in place of a model, because its own
head computes only in fp32. This shows the gradient with respect to the logits to ten digits. In fp32 it gets
its model. Its parameters must get the same gradient from our loss of logits and from our loss of hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import grpo_kernels
from grpo_kernels import KL, LossOutput, LossSpec, PPOClip, grpo_loss

pytest.importorskip("trl", minversion="1.16")

TEMPERATURE = 0.7
MAX_COMPLETION = 9  # longer than any completion of the batch, as is usual
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # the losses that have delta
GLOBAL = ("cispo", "dapo", "vespo")  # divided by num_items_in_batch, the count of all micro-batches
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
    "cispo": "token-mean",
    "dapo": "token-mean",
    "vespo": "token-mean",
}
PENALTIES = {
    "no KL": (0.0, False),
    "no KL, corrected": (0.0, True),
    "KL": (0.04, False),
    "KL, corrected": (0.04, True),
}

loss_types = pytest.mark.parametrize("loss_type", LOSS_TYPES)
levels = pytest.mark.parametrize("level", ["token", "sequence"])


@dataclass(frozen=True)
class Settings:
    """The options that a user of TRL sets.

    No two numbers are equal, and none is a default, so that no option can be mistaken for another. TRL passes
    some of them to `torch.where`, which rounds them to fp32. Those are exact in fp32: see
    test_rounded_numbers.
    """

    loss_type: str = "grpo"
    level: str = "token"  # importance_sampling_level
    beta: float = 0.0
    corrected: bool = False  # use_bias_correction_kl
    epsilon: float = 0.15
    epsilon_high: float = 0.28  # for cispo, the bound itself
    delta: float | None = None
    sapo_temperatures: tuple[float, float] = (1.25, 1.75)  # for positive advantages, for the others
    vespo: tuple[float, float, float, float] = (
        1.875,
        2.75,
        2.625,
        1.5,
    )  # k_pos, lambda_pos, k_neg, lambda_neg
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    use_vllm: bool = False
    accumulation: int = 1
    steps_per_generation: int = 1
    training: bool = True

    @classmethod
    def of(cls, loss_type: str, level: str = "token", penalty: str = "no KL", **rest: Any) -> Settings:
        beta, corrected = PENALTIES[penalty]
        if loss_type == "cispo":
            rest.setdefault("epsilon_high", 2.3)
        return cls(loss_type=loss_type, level=level, beta=beta, corrected=corrected, **rest)

    def apply(self, trainer: Any) -> None:
        """Set every option, so that no option of an earlier case remains."""
        on_trainer = {
            "loss_type": self.loss_type,
            "importance_sampling_level": self.level,
            "beta": self.beta,
            "epsilon_low": self.epsilon,
            "epsilon_high": self.epsilon_high,
            "entropy_coef": self.entropy_coef,
            "_entropy_bonus_enabled": self.entropy_coef != 0,  # as GRPOTrainer.__init__
            "top_entropy_quantile": self.top_entropy_quantile,
            "off_policy_mask_threshold": self.off_policy_mask_threshold,
            "use_vllm": self.use_vllm,
            "vllm_importance_sampling_correction": self.use_vllm,
            "current_gradient_accumulation_steps": self.accumulation,
        }
        on_arguments = {
            "use_bias_correction_kl": self.corrected,
            "delta": self.delta,
            "sapo_temperature_pos": self.sapo_temperatures[0],
            "sapo_temperature_neg": self.sapo_temperatures[1],
            "vespo_k_pos": self.vespo[0],
            "vespo_lambda_pos": self.vespo[1],
            "vespo_k_neg": self.vespo[2],
            "vespo_lambda_neg": self.vespo[3],
            "steps_per_generation": self.steps_per_generation,
        }
        for owner, values in ((trainer, on_trainer), (trainer.args, on_arguments)):
            for name, value in values.items():
                # Setting a name that TRL does not have would have no effect.
                if name != "current_gradient_accumulation_steps":  # exists only in training
                    assert hasattr(owner, name), f"TRL has no {name}"
                setattr(owner, name, value)
        trainer.model.train(self.training)

    def spec(self) -> LossSpec:
        return LossSpec(
            self.surrogate(),
            KL("k3", beta=self.beta, ratio_corrected=self.corrected),
            # VESPO has one weight per sequence at either level: see test_vespo_at_sequence_level.
            level="token" if self.loss_type == "vespo" else self.level,
            aggregation=AGGREGATION[self.loss_type],
            max_tokens=MAX_COMPLETION if self.loss_type == "dr_grpo" else None,
            entropy_coef=self.entropy_coef,
        )

    def surrogate(self) -> Any:
        if self.loss_type == "cispo":
            return grpo_kernels.CISPO(ratio_max=self.epsilon_high, ratio_min=0.0)
        if self.loss_type == "sapo":
            tau_pos, tau_neg = self.sapo_temperatures
            return grpo_kernels.SAPO(tau_pos=tau_pos, tau_neg=tau_neg)
        if self.loss_type == "vespo":
            k_pos, lambda_pos, k_neg, lambda_neg = self.vespo
            return grpo_kernels.VESPO(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
        return PPOClip(eps_low=self.epsilon, eps_high=self.epsilon_high, delta=self.delta)

    def normalizer(self, inputs: dict[str, Tensor], processes: int = 1) -> Tensor | None:
        if self.loss_type not in GLOBAL:
            return None
        tokens = inputs["num_items_in_batch"] / processes
        return tokens * self.accumulation / self.steps_per_generation if self.training else tokens

    @property
    def divisor(self) -> int:
        """What our loss must still be divided by, if TRL has no count over all micro-batches."""
        return self.accumulation if self.training and self.loss_type not in GLOBAL else 1


class LogitsForModel(nn.Module):
    """Returns what a model with TRL's fused head would return, in the dtype of the logits.

    The logits are those before each token of the completions.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits.requires_grad_()  # [B, T, V]

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool
    ) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        assert fused_lm_head
        labels = labels[:, -self.logits.shape[1] :]
        scored = labels != -100
        log_p = torch.log_softmax(self.logits / TEMPERATURE, -1)
        logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return FusedCausalLMOutput(
            log_probs=logps.masked_fill(~scored, 0), entropy=entropy.masked_fill(~scored, 0)
        )


class Rollout(NamedTuple):
    """A batch as TRL's `_generate_and_score_completions` returns it, and the policy's own values for it."""

    inputs: dict[str, Tensor]
    logps: Tensor  # [B, T], 0 if masked
    entropies: Tensor  # [B, T], 0 if masked

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"] * self.inputs.get("tool_mask", 1)

    def without(self, *names: str) -> Rollout:
        return self._replace(inputs={name: x for name, x in self.inputs.items() if name not in names})

    def having(self, **values: Tensor) -> Rollout:
        return self._replace(inputs={**self.inputs, **values})


# Completions of every length, one without a token. For either sign of the advantage, each interval between
# the bounds of clipping and both values of delta contains a mean log-ratio.
LENGTHS = torch.tensor([7, 4, 1, 0, 6, 5, 3, 7, 2, 6, 5, 4])
ADVANTAGES = torch.tensor([1.3, -0.7, 0.9, 2.0, 0.0, -1.6, -0.4, 0.6, -1.1, 0.8, 1.1, -0.9])
MEAN_LOG_RATIO = torch.tensor([0.05, -0.1, 0.6, 0.0, 1.0, -0.8, 2.4, -3.5, 0.9, 0.18, 2.0, 0.21])
DELTAS = (
    None,
    4.0,
    1.1,  # inside the clip range: for A < 0, the bounded branch meets the clipped one on a slope
)
B, T, P, V = 12, 7, 3, 23


def logits_for_model(dtype: torch.dtype, seed: int = 0) -> LogitsForModel:
    """Make random logits in place of a model."""
    generator = torch.Generator().manual_seed(seed)
    return LogitsForModel(2 * torch.randn(B, T, V, generator=generator, dtype=dtype))


def rollout(trainer: Any, model: Any, seed: int = 10) -> Rollout:
    """Make a batch whose log-ratios scatter around the mean of their sequence, some by several nats."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, V, (B, P), generator=generator),
        "prompt_mask": (torch.arange(P) >= torch.arange(B)[:, None] % P).long(),  # padded on the left
        "completion_ids": torch.randint(2, V, (B, T), generator=generator) * mask,
        "completion_mask": mask,
        "num_items_in_batch": torch.tensor(83),  # about two micro-batches
    }
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], mask], 1),
            T,
            compute_entropy=True,
        )
    scatter = 0.3 * normal(B, T) + 3 * normal(B, T) * (torch.rand(B, T, generator=generator) < 0.25)
    scatter = scatter - (scatter * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = MEAN_LOG_RATIO[:, None] + scatter
    inputs |= {
        "advantages": ADVANTAGES.to(logps.dtype),
        "old_per_token_logps": ((logps - log_ratio) * mask).to(logps.dtype),
        "ref_per_token_logps": ((logps + 0.8 * normal(B, T)) * mask).to(logps.dtype),
    }
    return Rollout(inputs, logps, entropies)


def per_token_advantages(batch: Rollout) -> Rollout:
    """Replace the advantages by one per token, of both signs in every sequence, and some of them zero."""
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages[torch.rand(B, T, generator=generator) < 0.15] = 0.0
    return batch.having(advantages=advantages.to(batch.logps.dtype))


def theirs(trainer: Any, model: Any, settings: Settings, batch: Rollout) -> Tensor:
    """Compute TRL's loss."""
    settings.apply(trainer)
    return trainer._compute_loss(model, batch.inputs)


def ours(
    loss: Callable[..., LossOutput],
    sources: tuple[Tensor, ...],  # logits, or hidden states and the head
    settings: Settings,
    batch: Rollout,
    **options: Any,
) -> LossOutput:
    """Compute the same loss with this package.

    The options `token_weights` and `advantages` replace the values of the batch.
    """
    inputs = batch.inputs
    arguments = {
        "advantages": inputs["advantages"],
        "spec": settings.spec(),
        "completion_mask": batch.mask,
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs["ref_per_token_logps"] if settings.beta else None,
        "temperature": TEMPERATURE,
        "normalizer": settings.normalizer(inputs),
        "backend": "torch",
        **options,
    }
    out = loss(*sources, inputs["completion_ids"], arguments.pop("advantages"), **arguments)
    return out._replace(loss=out.loss / settings.divisor)


def assert_same(
    what: str, got: Tensor, wanted: Tensor, tolerance: float, *, scale: Tensor | None = None
) -> None:
    """Assert that the errors are at most `tolerance` times the largest entry, or times `scale`."""
    assert got.shape == wanted.shape, what
    error = (got.detach() - wanted.detach()).abs()
    scale = wanted.detach().abs().max() if scale is None else scale
    assert bool((error <= tolerance * scale).all()), (
        f"{what}: {float(error.max()):.3g} apart, at a size of {float(wanted.detach().abs().max()):.3g}"
    )


def assert_same_by_logits(
    trainer: Any, settings: Settings, batch: Rollout, model: LogitsForModel, **options: Any
) -> None:
    """Assert that loss and gradient agree.

    Each row of the gradient must be right relative to its own size, or exactly zero.
    """
    tolerance = 1e-10
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    logits = model.logits.detach().clone().requires_grad_()
    got = ours(grpo_loss, (logits,), settings, batch, **options)
    (got_grad,) = torch.autograd.grad(got.loss, logits)
    what = f"{settings}, {options}"
    assert float(wanted_grad.abs().max()) > 1e-3, f"{what}: the gradient is too small to compare"
    assert_same(f"{what}: loss", got.loss, wanted, tolerance, scale=wanted_grad.abs().sum())
    assert got.logps.dtype == torch.float64
    assert_same(f"{what}: logps", got.logps, batch.logps * batch.mask, tolerance)
    # Saturated rows of SAPO are an exception, because TRL's 1 - sigmoid leaves no digits of them.
    rows = wanted_grad.abs().amax(-1, keepdim=True)
    if settings.loss_type == "sapo":
        rows = rows.clamp(min=1e-4 * float(rows.max()))
    assert_same(f"{what}: gradient", got_grad, wanted_grad, tolerance, scale=rows)


def both_gradients(
    trainer: Any, settings: Settings, batch: Rollout, model: LogitsForModel, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return their loss and gradient, and our loss and gradient."""
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    logits = model.logits.detach().clone().requires_grad_()
    got = ours(grpo_loss, (logits,), settings, batch, **options).loss
    return wanted.detach(), wanted_grad, got.detach(), torch.autograd.grad(got, logits)[0]


def high_entropy(batch: Rollout, share: float) -> Tensor:
    """Return the `share` of the tokens with the largest entropies."""
    mask = batch.mask.bool()
    return mask & (batch.entropies >= torch.quantile(batch.entropies[mask], 1 - share))
