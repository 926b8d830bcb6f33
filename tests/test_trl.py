"""The loss of TRL's GRPOTrainer is one of ours under another name, whatever its user sets.

A real trainer computes its loss twice over. In fp64 it is handed logits in the place of a model, because its
own head computes in fp32 only: that shows the gradient by the logits to ten digits. In fp32 it is handed its
model, whose parameters then get the same gradients from us, by way of logits and of hidden states. Where we
differ by design, a test says by how much.
"""

from __future__ import annotations

import copy
import itertools
import os

# Nothing is downloaded: the Hub's client reads this when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import grpo_kernels
from grpo_kernels import KL, LossOutput, LossSpec, PPOClip, grpo_loss, linear_grpo_loss

trl = pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

TEMPERATURE = 0.7
MAX_COMPLETION = 9  # longer than any completion of the batch, as max_completion_length may well be
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # the losses that know delta
GLOBAL = ("cispo", "dapo", "vespo")  # divided by num_items_in_batch, and so once for all micro-batches
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
    """What a user of TRL sets. No two numbers are equal or a default, so that none can stand for another.

    Those that TRL gives to `torch.where`, which makes fp32 of them, are exact in it: test_rounded_numbers.
    """

    loss_type: str = "grpo"
    level: str = "token"  # importance_sampling_level
    beta: float = 0.0
    corrected: bool = False  # use_bias_correction_kl
    epsilon: float = 0.15
    epsilon_high: float = 0.28  # for cispo the bound itself
    delta: float | None = None
    sapo_temperatures: tuple[float, float] = (1.25, 1.75)  # of positive advantages, of the others
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
        """All of it, so that nothing remains of the case before."""
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
                # A name that TRL does not have would be set in vain.
                if name != "current_gradient_accumulation_steps":  # which exists while it trains
                    assert hasattr(owner, name), f"TRL has no {name}"
                setattr(owner, name, value)
        trainer.model.train(self.training)

    def spec(self) -> LossSpec:
        return LossSpec(
            self.surrogate(),
            KL("k3", beta=self.beta, ratio_corrected=self.corrected),
            # The weights of VESPO are a sequence's at either level: see test_vespo_at_sequence_level.
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
        """What remains to divide our loss by, where TRL has no count of all micro-batches."""
        return self.accumulation if self.training and self.loss_type not in GLOBAL else 1


class LogitsForModel(nn.Module):
    """Answers as a model with TRL's fused head, in the dtype of the logits; they lead up to completions."""

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
    """A batch as TRL's `_generate_and_score_completions` makes it, and what the policy thinks of it."""

    inputs: dict[str, Tensor]
    logps: Tensor  # [B, T], 0 where masked
    entropies: Tensor  # likewise

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"] * self.inputs.get("tool_mask", 1)

    def without(self, *names: str) -> Rollout:
        return self._replace(inputs={name: x for name, x in self.inputs.items() if name not in names})

    def having(self, **values: Tensor) -> Rollout:
        return self._replace(inputs={**self.inputs, **values})


# Completions of every length, one without a token. The mean log-ratios lie, under either sign of the
# advantage, in every interval between the bounds of clipping and both values of delta.
LENGTHS = torch.tensor([7, 4, 1, 0, 6, 5, 3, 7, 2, 6, 5, 4])
ADVANTAGES = torch.tensor([1.3, -0.7, 0.9, 2.0, 0.0, -1.6, -0.4, 0.6, -1.1, 0.8, 1.1, -0.9])
MEAN_LOG_RATIO = torch.tensor([0.05, -0.1, 0.6, 0.0, 1.0, -0.8, 2.4, -3.5, 0.9, 0.18, 2.0, 0.21])
DELTAS = (
    None,
    4.0,
    1.1,  # inside the band, where for A < 0 the bounded branch meets the clipped one on a slope
)
B, T, P, V = 12, 7, 3, 23


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Stock TRL, loaded from a folder as from the Hub: a Llama of one layer and a tokenizer of digits."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    tokens = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(V - 2))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=P + T,
        initializer_range=0.5,  # distributions that are far from uniform
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    args = trl.GRPOConfig(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=MAX_COMPLETION,
        temperature=TEMPERATURE,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    yield trl.GRPOTrainer(
        str(folder / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1 2"}] * 2),
    )


def logits_for_model(dtype: torch.dtype, seed: int = 0) -> LogitsForModel:
    generator = torch.Generator().manual_seed(seed)
    return LogitsForModel(2 * torch.randn(B, T, V, generator=generator, dtype=dtype))


def rollout(trainer: Any, model: Any, seed: int = 10) -> Rollout:
    """Log-ratios scatter about their sequence's mean, some by several nats."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, V, (B, P), generator=generator),
        "prompt_mask": (torch.arange(P) >= torch.arange(B)[:, None] % P).long(),  # padded on the left
        "completion_ids": torch.randint(2, V, (B, T), generator=generator) * mask,
        "completion_mask": mask,
        "num_items_in_batch": torch.tensor(83),  # of two micro-batches or so
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
    """Of both signs in every sequence, and zero here and there."""
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages[torch.rand(B, T, generator=generator) < 0.15] = 0.0
    return batch.having(advantages=advantages.to(batch.logps.dtype))


def theirs(trainer: Any, model: Any, settings: Settings, batch: Rollout) -> Tensor:
    settings.apply(trainer)
    return trainer._compute_loss(model, batch.inputs)


def ours(
    loss: Callable[..., LossOutput],
    sources: tuple[Tensor, ...],  # logits, or hidden states and the head
    settings: Settings,
    batch: Rollout,
    **options: Any,
) -> LossOutput:
    """The same loss; `token_weights` and `advantages` among the options replace what the batch holds."""
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
    """Relative to the largest entry, or to `scale`."""
    assert got.shape == wanted.shape, what
    error = (got.detach() - wanted.detach()).abs()
    scale = wanted.detach().abs().max() if scale is None else scale
    assert bool((error <= tolerance * scale).all()), (
        f"{what}: {float(error.max()):.3g} apart, at a size of {float(wanted.detach().abs().max()):.3g}"
    )


def assert_same_by_logits(
    trainer: Any, settings: Settings, batch: Rollout, model: LogitsForModel, **options: Any
) -> None:
    """Loss and gradient. Each row of the gradient has to be right by its own size, or exactly zero."""
    tolerance = 1e-10
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    logits = model.logits.detach().clone().requires_grad_()
    got = ours(grpo_loss, (logits,), settings, batch, **options)
    (got_grad,) = torch.autograd.grad(got.loss, logits)
    what = f"{settings}, {options}"
    assert float(wanted_grad.abs().max()) > 1e-3, f"{what}: there is nothing to compare"
    assert_same(f"{what}: loss", got.loss, wanted, tolerance, scale=wanted_grad.abs().sum())
    assert got.logps.dtype == torch.float64
    assert_same(f"{what}: logps", got.logps, batch.logps * batch.mask, tolerance)
    # But for saturated SAPO, of which TRL's own 1 - sigmoid leaves no digits.
    rows = wanted_grad.abs().amax(-1, keepdim=True)
    if settings.loss_type == "sapo":
        rows = rows.clamp(min=1e-4 * float(rows.max()))
    assert_same(f"{what}: gradient", got_grad, wanted_grad, tolerance, scale=rows)


def settings_with_every_delta(settings: Settings) -> list[Settings]:
    return [
        replace(settings, delta=delta) for delta in (DELTAS if settings.loss_type in CLIPPED else (None,))
    ]


def skip_vespo_at_sequence_level(loss_type: str, level: str, penalty: str) -> None:
    if (loss_type, level, penalty) == ("vespo", "sequence", "KL, corrected"):
        pytest.skip("differs: test_vespo_at_sequence_level")


def test_batch_takes_every_branch(trainer: Any) -> None:
    """What the parity below is worth: either level, either sign, every interval between the bounds."""
    batch = rollout(trainer, logits_for_model(torch.float64))
    settings, mask = Settings(), batch.mask.bool()
    log_ratio = (batch.logps - batch.inputs["old_per_token_logps"]).where(mask, 0)
    by_sequence = log_ratio.sum(-1) / batch.mask.sum(-1).clamp(min=1)
    assert not mask[LENGTHS == 0].any()
    assert float(log_ratio.abs().max()) > 4
    per_token = per_token_advantages(batch).inputs["advantages"]
    for ratio, advantages in (
        (log_ratio[mask].exp(), batch.inputs["advantages"][:, None].expand(B, T)[mask]),
        (log_ratio[mask].exp(), per_token[mask]),
        (by_sequence.exp(), batch.inputs["advantages"]),
    ):
        edges = [0, 1 - settings.epsilon, 1.1, 1 + settings.epsilon_high, 4.0, torch.inf]
        for low, high in itertools.pairwise(edges):
            inside = (ratio > low) & (ratio < high)
            assert {-1.0, 1.0} <= set(advantages[inside].sign().tolist()), (low, high)


@pytest.mark.parametrize("penalty", PENALTIES)
@levels
@loss_types
def test_every_loss(trainer: Any, loss_type: str, level: str, penalty: str) -> None:
    """Gradients by the logits in fp64; on-policy and off, advantages per sequence and per token."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    skip_vespo_at_sequence_level(loss_type, level, penalty)
    for settings in settings_with_every_delta(Settings.of(loss_type, level, penalty)):
        for off_policy in (batch, per_token_advantages(batch)):
            for each in (off_policy, off_policy.without("old_per_token_logps")):
                assert_same_by_logits(trainer, settings, each, model)


@pytest.mark.parametrize("penalty", PENALTIES)
@levels
@loss_types
def test_every_loss_of_a_model(trainer: Any, loss_type: str, level: str, penalty: str) -> None:
    """TRL runs its model and its own head, in fp32. Every parameter gets the same gradient from logits and
    from hidden states, in chunks that cut sequences apart."""
    model = trainer.model
    batch = rollout(trainer, model)
    skip_vespo_at_sequence_level(loss_type, level, penalty)
    for settings in settings_with_every_delta(Settings.of(loss_type, level, penalty)):
        for each in (per_token_advantages(batch), batch.without("old_per_token_logps")):
            wanted = theirs(trainer, model, settings, each)
            head = model.lm_head.weight
            for got in (
                ours(grpo_loss, (completion_logits(model, each),), settings, each),
                ours(
                    linear_grpo_loss, (completion_states(model, each), head), settings, each, chunk_tokens=5
                ),
            ):
                assert_same_by_parameters(str(settings), model, got.loss, wanted)


def assert_same_by_parameters(what: str, model: Any, got: Tensor, wanted: Tensor) -> None:
    assert_same(f"{what}: loss", got, wanted, 1e-5, scale=1 + wanted.abs())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (got, wanted))
    for name, grad, wanted_grad in zip(names, *grads, strict=True):
        assert_same(f"{what}: {name}", grad, wanted_grad, 1e-5)


def model_inputs(batch: Rollout) -> dict[str, Any]:
    return {
        "input_ids": torch.cat([batch.inputs["prompt_ids"], batch.inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([batch.inputs["prompt_mask"], batch.inputs["completion_mask"]], 1),
        "use_cache": False,
    }


def completion_logits(model: Any, batch: Rollout) -> Tensor:
    return model(**model_inputs(batch)).logits[:, -T - 1 : -1]


def completion_states(model: Any, batch: Rollout) -> Tensor:
    return model.base_model(**model_inputs(batch)).last_hidden_state[:, -T - 1 : -1]


@levels
@loss_types
def test_packed(trainer: Any, loss_type: str, level: str) -> None:
    """The same tokens end to end, which TRL's loss does not know: the empty sequence is one of length 0."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", entropy_coef=0.0 if loss_type in GLOBAL else 0.03)
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    kept = batch.mask.bool()
    logits = model.logits.detach()[kept].requires_grad_()
    packed = batch.having(**{name: x[kept] for name, x in batch.inputs.items() if x.shape == kept.shape})
    got = ours(grpo_loss, (logits,), settings, packed, seq_lens=LENGTHS).loss
    (got_grad,) = torch.autograd.grad(got, logits)
    assert_same("loss", got, wanted, 1e-10)
    assert_same("gradient", got_grad, wanted_grad[kept], 1e-10)


@pytest.mark.parametrize("scale, softcap", [(0.6, None), (1.0, 1.5), (0.6, 1.5)])
def test_logit_transforms(trainer: Any, scale: float, softcap: float | None) -> None:
    """Cohere scales its logits, Gemma 2 caps them: TRL reads both from the model's config."""
    from trl.trainer.utils import add_fused_lm_head

    model = copy.deepcopy(trainer.model)
    model.config.logit_scale, model.config.final_logit_softcapping = scale, softcap
    model.forward = type(model).forward.__get__(model)  # without the head that was bound to the original
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    batch = rollout(trainer, model)
    settings = Settings.of("grpo", penalty="KL", entropy_coef=0.03)
    wanted = theirs(trainer, model, settings, batch)
    sources = (completion_states(model, batch), model.lm_head.weight)
    got = ours(linear_grpo_loss, sources, settings, batch, logit_scale=scale, logit_softcap=softcap)
    assert_same_by_parameters("", model, got.loss, wanted)


# --- What TRL multiplies the loss of a token with -----------------------------------------------------------


def sampler_ratio(batch: Rollout, kind: str) -> Tensor:
    """As of vLLM: per token or per sequence, truncated or masked; 1 at masked positions, as TRL has it."""
    generator = torch.Generator().manual_seed(2)
    width = 1 if kind.startswith("sequence") else T
    ratio = torch.exp(0.5 * torch.randn(B, width, generator=generator, dtype=torch.float64))
    if width == T:
        ratio = ratio.where(batch.mask.bool(), 1)
    ratio = ratio.clamp(max=1.5) if kind.endswith("truncate") else ratio.where(ratio <= 1.5, 0)
    return ratio.to(batch.logps.dtype)


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@levels
@loss_types
def test_sampler_ratio_is_token_weights(trainer: Any, loss_type: str, level: str, kind: str) -> None:
    """The correction for vLLM, before the KL term. VESPO folds it into its weight."""
    if loss_type == "vespo" and kind.startswith("sequence"):
        pytest.skip("GRPOTrainer refuses it")
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    ratio = sampler_ratio(batch, kind)
    settings = Settings.of(loss_type, level, "KL", use_vllm=True)
    for each in (batch, per_token_advantages(batch)):
        each = each.having(importance_sampling_ratio=ratio)
        assert_same_by_logits(trainer, settings, each, model, token_weights=ratio)


def kept_on_policy(batch: Rollout, threshold: float) -> Tensor:
    """DeepSeek-V3.2's: a sequence (a token, where it has its own advantage) is dropped whose advantage is
    negative and which the sampler finds likelier than the policy by more than `threshold` a token."""
    advantages = batch.inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    sampler = batch.inputs.get("sampling_per_token_logps", batch.inputs.get("old_per_token_logps"))
    drift = ((sampler - batch.logps) * batch.mask).sum(-1) / batch.mask.sum(-1).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)[:, None]


def high_entropy(batch: Rollout, share: float) -> Tensor:
    mask = batch.mask.bool()
    return mask & (batch.entropies >= torch.quantile(batch.entropies[mask], 1 - share))


def masked_tokens(settings: Settings, batch: Rollout, kept: Tensor) -> dict[str, Tensor]:
    """A weight of zero for every token that is not kept; for VESPO, which would take the weights for sampler
    ratios, an advantage of zero."""
    kept = kept.to(batch.logps.dtype)
    if settings.loss_type != "vespo":
        return {"token_weights": kept}
    advantages = batch.inputs["advantages"]
    return {"advantages": (advantages[:, None] if advantages.dim() == 1 else advantages) * kept}


@levels
@loss_types
def test_off_policy_mask_is_token_weights(trainer: Any, loss_type: str, level: str) -> None:
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    sampled = batch.having(sampling_per_token_logps=batch.inputs["old_per_token_logps"].roll(1, 0))
    settings = Settings.of(loss_type, level, "KL", off_policy_mask_threshold=0.05)
    for each in (batch, per_token_advantages(batch), sampled):
        kept = kept_on_policy(each, 0.05)
        assert 0 < int((~kept).sum()) < kept.numel()
        assert_same_by_logits(trainer, settings, each, model, **masked_tokens(settings, each, kept))


@levels
@loss_types
def test_entropy_mask_is_token_weights(trainer: Any, loss_type: str, level: str) -> None:
    """ "Beyond the 80/20 rule": only the tokens of high entropy learn; the KL term keeps all."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", top_entropy_quantile=0.33)
    kept = high_entropy(batch, 0.33)
    assert 0 < int(kept.sum()) < int(batch.mask.sum())
    for each in (batch, per_token_advantages(batch)):
        assert_same_by_logits(trainer, settings, each, model, **masked_tokens(settings, each, kept))


@loss_types
def test_weights_multiply(trainer: Any, loss_type: str) -> None:
    """All three at once, beside tokens that a tool wrote: attended to, not trained on."""
    model = logits_for_model(torch.float64)
    generator = torch.Generator().manual_seed(3)
    batch = rollout(trainer, model).having(tool_mask=(torch.rand(B, T, generator=generator) < 0.7).long())
    ratio = sampler_ratio(batch, "token_truncate")
    batch = per_token_advantages(batch).having(importance_sampling_ratio=ratio)
    settings = Settings.of(
        loss_type, "token", "KL", use_vllm=True, off_policy_mask_threshold=0.05, top_entropy_quantile=0.6
    )
    kept = kept_on_policy(batch, 0.05) & high_entropy(batch, 0.6)
    options = masked_tokens(settings, batch, kept)
    options["token_weights"] = ratio * options.get("token_weights", 1)
    assert_same_by_logits(trainer, settings, batch, model, **options)


# --- Accumulation, ranks, evaluation, entropy bonus ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@loss_types
def test_accumulation(trainer: Any, loss_type: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three micro-batches on one of two ranks; an evaluation accumulates nothing."""
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(
        loss_type, "token", "KL", accumulation=3, steps_per_generation=6, training=training
    )
    normalizer = settings.normalizer(batch.inputs, processes=2)
    assert_same_by_logits(trainer, settings, batch, model, normalizer=normalizer)
    if loss_type in GLOBAL or not training:
        return
    # Instead of dividing our loss: the same number as a normalizer.
    sequences = AGGREGATION[loss_type].startswith("seq")
    count = 3 * (B if sequences else int(batch.mask.sum()))
    wanted = theirs(trainer, model, settings, batch)
    got = ours(grpo_loss, (model.logits,), replace(settings, accumulation=1), batch, normalizer=count)
    assert_same("loss", got.loss, wanted, 1e-12)


@levels
@loss_types
def test_entropy_bonus(trainer: Any, loss_type: str, level: str) -> None:
    """A mean over the micro-batch's tokens. Where we are given a normalizer, ours is divided by that: the
    coefficient makes up for it."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, level, "KL", entropy_coef=0.05, accumulation=3, steps_per_generation=2)
    spec = settings.spec()
    normalizer = settings.normalizer(batch.inputs)
    if normalizer is not None:
        tokens = int(batch.mask.sum()) * settings.accumulation
        spec = replace(spec, entropy_coef=settings.entropy_coef * float(normalizer) / tokens)
    assert_same_by_logits(trainer, settings, batch, model, spec=spec)


@pytest.mark.parametrize("delta", [None, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratio_on_its_bound(trainer: Any, level: str, delta: float | None) -> None:
    """On-policy without a band every bound is 1, as is every ratio: both keep the whole gradient."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model).without("old_per_token_logps")
    settings = Settings.of("grpo", level, epsilon=0.0, epsilon_high=0.0, delta=delta)
    assert_same_by_logits(trainer, settings, batch, model)
    free = ours(grpo_loss, (model.logits,), Settings.of("grpo", level), batch).loss
    tied = theirs(trainer, model, settings, batch)
    both = (torch.autograd.grad(loss, model.logits)[0] for loss in (tied, free))
    assert_same("as without a bound", *both, 1e-10)


@pytest.mark.parametrize("rates", [(2.75, 1.5), (0.0, 1.5), (2.75, 0.0)])
def test_bounds_of_vespo(trainer: Any, rates: tuple[float, float]) -> None:
    """Log-ratios beyond 20 count as 20, a sequence's from log(1e-8) to 20, and a rate of 0 as 1e-4."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    # Sums of +25 and -19.5 (bounded, 0.5), +25 alone, -25 alone, and three bounded ones.
    log_ratio = torch.zeros(B, T, dtype=torch.float64)
    log_ratio[:2, :2] = torch.tensor([25.0, -19.5])
    log_ratio[[4, 5], 0], log_ratio[[6, 7], 0] = 25.0, -25.0
    log_ratio[8:10, :2] = torch.tensor([-30.0, 19.8])
    batch = batch.having(old_per_token_logps=(batch.logps - log_ratio) * batch.mask)
    for each in (batch, per_token_advantages(batch)):
        settings = Settings.of("vespo", vespo=(1.875, rates[0], 2.625, rates[1]))
        assert_same_by_logits(trainer, settings, each, model)


def test_empty_batch(trainer: Any) -> None:
    """No token at all: loss and gradient are 0 on both sides."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    nothing = batch.having(completion_mask=torch.zeros_like(batch.mask), num_items_in_batch=torch.tensor(0))
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        settings = Settings.of(loss_type, level, "KL", entropy_coef=0.05)
        logits = model.logits.detach().clone().requires_grad_()
        got = ours(grpo_loss, (logits,), settings, nothing).loss
        for loss, leaf in ((theirs(trainer, model, settings, nothing), model.logits), (got, logits)):
            assert float(loss.detach()) == 0, settings
            assert not torch.autograd.grad(loss, leaf)[0].any(), settings


DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "sapo_temperatures": (1.0, 1.05),
    "vespo": (2.0, 3.0, 3.0, 2.0),
}
GSPO = {"epsilon": 3e-4, "epsilon_high": 4e-4}  # arXiv:2507.18071v2, section 5.1
PRESETS = {
    "grpo": Settings("grpo", **DEFAULTS),
    "bnpo": Settings("bnpo", **DEFAULTS),
    "dapo": Settings("dapo", **{**DEFAULTS, "epsilon_high": 0.28}),
    "dr_grpo": Settings("dr_grpo", **DEFAULTS),
    "gspo": Settings("grpo", "sequence", **{**DEFAULTS, **GSPO}),
    "luspo": Settings("luspo", "sequence", **{**DEFAULTS, **GSPO}),
    "sapo": Settings("sapo", **DEFAULTS),
    "vespo": Settings("vespo", **DEFAULTS),
    "cispo": Settings("cispo", **{**DEFAULTS, "epsilon_high": 5.0}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    """Our presets have TRL's defaults, except for two bounds.

    TRL leaves open the upper bound of `dapo` and `cispo`. It documents GSPO's bounds, but does not set them.
    """
    defaults = trl.GRPOConfig.__dataclass_fields__
    assert (defaults["epsilon"].default, defaults["epsilon_high"].default) == (DEFAULTS["epsilon"], None)
    for key, names in (
        ("sapo_temperatures", ("sapo_temperature_pos", "sapo_temperature_neg")),
        ("vespo", ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    ):
        assert tuple(defaults[name].default for name in names) == DEFAULTS[key]
    spec = replace(PRESETS[name].spec(), kl=None)
    assert LossSpec.preset(name, **({"max_tokens": MAX_COMPLETION} if name == "dr_grpo" else {})) == spec


# --- Where we differ ----------------------------------------------------------------------------------------


def both_gradients(
    trainer: Any, settings: Settings, batch: Rollout, model: LogitsForModel, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Their loss and gradient, our loss and gradient."""
    wanted = theirs(trainer, model, settings, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.logits)
    logits = model.logits.detach().clone().requires_grad_()
    got = ours(grpo_loss, (logits,), settings, batch, **options).loss
    return wanted.detach(), wanted_grad, got.detach(), torch.autograd.grad(got, logits)[0]


def overflowing(batch: Rollout, rows: Tensor) -> Rollout:
    """Ratios of exp(100), infinite in fp32, in the sequences `rows`."""
    old = batch.inputs["old_per_token_logps"].clone()
    old[rows] = batch.logps[rows] - 100
    return batch.having(old_per_token_logps=old)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "sapo", "cispo", "vespo"])
def test_infinite_ratio_without_advantage(trainer: Any, loss_type: str) -> None:
    """0 * inf: TRL's loss is NaN with the clipped ratio, and its gradient with SAPO. Ours are those of the
    batch without that ratio; so are TRL's CISPO and VESPO, which bound it first."""
    model = logits_for_model(torch.float32)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type)
    harmless, harmless_grad, _, _ = both_gradients(trainer, settings, batch, model)
    wanted, wanted_grad, got, got_grad = both_gradients(
        trainer, settings, overflowing(batch, ADVANTAGES == 0), model
    )
    bounded = loss_type in ("cispo", "vespo")
    assert bool(wanted.isnan()) == (loss_type in CLIPPED)
    assert bool(wanted_grad.isnan().any()) == (not bounded)
    if bounded:
        assert_same("their gradient", wanted_grad, harmless_grad, 1e-5)
    assert_same("loss", got, harmless, 1e-5)
    assert_same("gradient", got_grad, harmless_grad, 1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "cispo", "vespo"])
def test_infinite_ratio_beyond_the_bound(trainer: Any, loss_type: str) -> None:
    """A clipped token's gradient is 0 times the ratio: NaN in TRL, which gates the value and not the
    derivative. CISPO and VESPO detach the ratio, and there both agree."""
    model = logits_for_model(torch.float32)
    large = ADVANTAGES.abs() > 1  # of either sign: delta bounds what the band does not
    batch = overflowing(rollout(trainer, model), large)
    settings = Settings.of(loss_type, delta=4.0)
    wanted, wanted_grad, got, got_grad = both_gradients(trainer, settings, batch, model)
    assert_same("loss", got, wanted, 1e-5)
    rows = large[:, None] & batch.mask.bool()
    if loss_type in ("cispo", "vespo"):
        assert_same("gradient", got_grad, wanted_grad, 1e-5)
        return
    assert wanted_grad[rows].isnan().all()
    assert not got_grad[rows].any()
    assert_same("other rows", got_grad[~rows], wanted_grad[~rows], 1e-5)


def test_saturated_sapo(trainer: Any) -> None:
    """Ratios of 5 to 11: 1 - sigmoid, of which TRL's derivative is made, keeps no digit in fp32 of what
    sigmoid of the negative is good to. The loss itself agrees."""
    found = {}
    for name, dtype in DTYPES.items():
        model = LogitsForModel(logits_for_model(torch.float32).logits.detach().to(dtype))
        batch = rollout(trainer, model)
        ratio = torch.linspace(5, 11, B * T, dtype=dtype).view(B, T)
        batch = batch.having(old_per_token_logps=(batch.logps - ratio.log()) * batch.mask)
        found[name] = [x.double() for x in both_gradients(trainer, Settings.of("sapo"), batch, model)]
    truth, truth_grad, got, got_grad = found["fp64"]
    kept = batch.mask.bool() & (ADVANTAGES != 0)[:, None]
    size = truth_grad.abs().amax(-1)[kept]

    def worst_row(grad: Tensor) -> float:
        return float(((grad - truth_grad).abs().amax(-1)[kept] / size).max())

    assert_same("fp64", got, truth, 1e-12)
    assert worst_row(got_grad) < 1e-6
    wanted, wanted_grad, got, got_grad = found["fp32"]
    assert_same("loss", got, wanted, 1e-5)
    assert worst_row(wanted_grad) > 0.5
    assert worst_row(got_grad) < 1e-4


@loss_types
def test_masked_positions(trainer: Any, loss_type: str) -> None:
    """What a masked position holds reaches TRL's loss, where NaN * 0 is NaN; it never reaches ours."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of(loss_type, penalty="KL")
    harmless, harmless_grad, _, _ = both_gradients(trainer, settings, batch, model)
    masked = batch.mask == 0
    spoiled = batch.having(
        **{
            name: batch.inputs[name].masked_fill(masked, torch.nan)
            for name in ("old_per_token_logps", "ref_per_token_logps")
        }
    )
    wanted, _, got, got_grad = both_gradients(trainer, settings, spoiled, model)
    assert wanted.isnan()
    assert_same("loss", got, harmless, 1e-10)
    assert_same("gradient", got_grad, harmless_grad, 1e-10)


def test_small_divergence(trainer: Any) -> None:
    """k3 at a distance of 1e-4 is 5e-9, of which exp(x) - x - 1 leaves nothing in fp32; expm1(x) - x does."""
    found = {}
    for name, dtype in DTYPES.items():
        model = LogitsForModel(logits_for_model(torch.float32).logits.detach().to(dtype))
        batch = rollout(trainer, model)
        # x as fp32 has it, for both.
        wide = rollout(trainer, LogitsForModel(model.logits.detach().double())).logps
        ref = ((wide.float() + 1e-4) * batch.mask).to(dtype)
        batch = batch.having(ref_per_token_logps=ref, advantages=torch.zeros(B, dtype=dtype))
        settings = Settings.of("bnpo", penalty="KL")
        found[name] = both_gradients(trainer, replace(settings, beta=1.0), batch, model)
    truth, truth_grad, _, _ = found["fp64"]
    assert_same("fp64", found["fp64"][2], truth, 1e-7)
    wanted, wanted_grad, got, got_grad = (x.double() for x in found["fp32"])
    assert float((wanted - truth).abs() / truth) > 0.9
    # A log-probability near -10 is a logit less the maximum, less the logarithm of a sum of 23, each rounded:
    # good to 3e-6 in fp32, which is 0.03 of the distance. k3 has its square.
    assert float((got - truth).abs() / truth) < 0.06
    assert_same("our gradient", got_grad, truth_grad, 0.03)
    assert_same("their gradient", wanted_grad, truth_grad, 0.03)


@pytest.mark.parametrize("loss_type", GLOBAL)
def test_entropy_bonus_of_a_window(trainer: Any, loss_type: str) -> None:
    """Two micro-batches of unlike length. With a normalizer our bonuses sum to the mean over all tokens of
    the window; TRL's to the mean of two means, which weighs the tokens of the shorter one more."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    halves = [torch.arange(B) % 5 < 2, torch.arange(B) % 5 >= 2]
    settings = Settings.of(loss_type, accumulation=2, steps_per_generation=2)
    bonus = replace(settings, entropy_coef=1.0)
    window = batch.mask.sum()
    sums, means = {"theirs": 0.0, "ours": 0.0}, []
    for rows in halves:
        part = Rollout(
            {name: x[rows] for name, x in batch.inputs.items() if x.dim()} | {"num_items_in_batch": window},
            batch.logps[rows],
            batch.entropies[rows],
        )
        logits = LogitsForModel(model.logits.detach()[rows].clone())
        means.append(float(part.entropies.sum() / part.mask.sum()))
        for name, loss in (
            ("theirs", lambda s, logits=logits, part=part: theirs(trainer, logits, s, part)),
            ("ours", lambda s, logits=logits, part=part: ours(grpo_loss, (logits.logits,), s, part).loss),
        ):
            sums[name] -= float((loss(bonus) - loss(settings)).detach())
    assert sums["ours"] == pytest.approx(float(batch.entropies.sum() / window), rel=1e-9)
    assert sums["theirs"] == pytest.approx(sum(means) / 2, rel=1e-9)
    assert abs(sums["theirs"] / sums["ours"] - 1) > 1e-3


def test_entropy_bonus_of_high_entropy_tokens(trainer: Any) -> None:
    """TRL's entropy mask restricts the bonus as well as the surrogate; token weights leave our bonus alone.
    Without a KL term, TRL's is ours with all but those tokens masked, scaled to its own means."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    settings = Settings.of("bnpo", entropy_coef=0.05, top_entropy_quantile=0.33)
    kept = high_entropy(batch, 0.33)
    without = replace(settings, entropy_coef=0.0)
    wanted = float(
        (theirs(trainer, model, without, batch) - theirs(trainer, model, settings, batch)).detach()
    )
    weights = {"token_weights": kept.double()}
    surrogate = ours(grpo_loss, (model.logits,), without, batch, **weights)
    bonus = surrogate.loss - ours(grpo_loss, (model.logits,), settings, batch, **weights).loss
    got = float(bonus.detach())
    assert wanted == pytest.approx(0.05 * float(batch.entropies[kept].mean()), rel=1e-9)
    assert got == pytest.approx(0.05 * float(batch.entropies.sum() / batch.mask.sum()), rel=1e-9)
    assert wanted > 1.2 * got


def test_vespo_takes_token_weights_for_sampler_ratios(trainer: Any) -> None:
    """A weight of zero is a sampler's ratio below any that its weight tells apart, for every token of the
    sequence. TRL's masks of entropy and policy multiply instead, token by token: see `masked_tokens`."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    kept = high_entropy(batch, 0.33).double()
    settings = Settings.of("vespo", top_entropy_quantile=0.33)
    as_weights = both_gradients(trainer, settings, batch, model, token_weights=kept)
    folded = batch.having(importance_sampling_ratio=kept.where(batch.mask.bool(), 1))
    wanted = theirs(trainer, model, replace(settings, top_entropy_quantile=1.0), folded)
    assert_same("folded", as_weights[2], wanted, 1e-10)
    assert abs(float(as_weights[2] / as_weights[0]) - 1) > 0.1


def test_vespo_at_sequence_level(trainer: Any) -> None:
    """TRL warns that the level is without meaning for VESPO, whose weights are a sequence's anyway, yet lets
    it choose the ratio that corrects the KL term. We refuse it."""
    settings = Settings.of("vespo", "sequence", "KL, corrected")
    with pytest.raises(ValueError, match="VESPO takes level 'token'"):
        LossSpec(settings.surrogate(), level="sequence")
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    wanted, _, got, _ = both_gradients(trainer, settings, batch, model)
    by_token = theirs(trainer, model, replace(settings, level="token"), batch)
    assert_same("by token", got, by_token, 1e-10)
    assert abs(float(wanted / got) - 1) > 1e-3
    # The rest of TRL's loss: the KL term of any loss at sequence level.
    penalty = LossSpec(None, settings.spec().kl, level="sequence", aggregation="token-mean")
    alone = ours(grpo_loss, (model.logits,), settings, batch, spec=penalty).loss
    surrogate = replace(settings.spec(), kl=None)
    assert_same(
        "sum", ours(grpo_loss, (model.logits,), settings, batch, spec=surrogate).loss + alone, wanted, 1e-10
    )


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_rounded_numbers(trainer: Any, loss_type: str) -> None:
    """`torch.where` of two Python numbers is an fp32 tensor: in fp64 TRL's constants have seven digits."""
    model = logits_for_model(torch.float64)
    batch = rollout(trainer, model)
    numbers = {"sapo_temperatures": (1.3, 1.7), "vespo": (1.9, 2.7, 2.6, 1.6)}
    settings = Settings.of(loss_type, **numbers)
    wanted, _, got, _ = both_gradients(trainer, settings, batch, model)
    assert_same("to seven digits", got, wanted, 1e-6)
    assert abs(float(got / wanted) - 1) > 1e-10
    rounded = {name: tuple(torch.tensor(values).tolist()) for name, values in numbers.items()}
    assert_same_by_logits(trainer, settings, batch, model, spec=Settings.of(loss_type, **rounded).spec())
