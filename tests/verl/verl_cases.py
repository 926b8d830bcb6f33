"""verl's policy losses with our equivalents, a random batch, and both losses of the batch in fp64."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import CISPO, DPPO, DRO, GMPO, KL, SAPO, LossOutput, LossSpec, PPOClip, Reinforce, grpo_loss

# Not "verl": if verl is missing, the folder tests/verl would be imported as a namespace package.
pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

# The tensors are too small for several threads.
torch.set_num_threads(1)

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")
KL_COEF = 0.3

# verl bounds the log-ratio to ±20 in all losses but geo_mean, dro, gpg and gspo.
CLAMP = 20.0
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


class Loss(NamedTuple):
    """One entry of verl's registry: verl's options and our spec."""

    options: dict[str, Any]  # of ActorConfig
    spec: LossSpec
    modes: tuple[str, ...] = MODES  # the values of loss_agg_mode that have an effect
    policy_loss: Mapping[str, Any] = MappingProxyType({})  # of PolicyLossConfig


LOSSES: dict[str, Loss] = {
    "vanilla": Loss(
        {**CLIP, "clip_ratio_c": 3.0},
        LossSpec(PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), log_ratio_clamp=CLAMP),
    ),
    "dppo_tv": Loss(
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 4.0},
        LossSpec(DPPO("tv", low=0.05, high=0.1, ratio_cap=4.0), log_ratio_clamp=CLAMP),
    ),
    "dppo_kl": Loss(
        {"clip_ratio_low": 0.005, "clip_ratio_high": 0.02, "clip_ratio_c": 4.0},
        LossSpec(DPPO("kl", low=0.005, high=0.02, ratio_cap=4.0), log_ratio_clamp=CLAMP),
    ),
    "gspo": Loss(CLIP, LossSpec(PPOClip(eps_low=0.2, eps_high=0.28), level="sequence-token")),
    "sapo": Loss(
        {"tau_pos": 1.1, "tau_neg": 1.7},
        LossSpec(SAPO(tau_pos=1.1, tau_neg=1.7), log_ratio_clamp=CLAMP),
        modes=("seq-mean-token-mean",),
    ),
    "gpg": Loss({}, LossSpec(Reinforce())),
    "geo_mean": Loss(
        {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
        LossSpec(GMPO(eps_low=0.3, eps_high=0.4)),
        modes=("seq-mean-token-mean",),
    ),
    "dro": Loss({}, LossSpec(DRO(beta=0.4)), policy_loss={"dro_beta": 0.4}),
    "cispo": Loss(
        {"clip_ratio_low": 0.5, "clip_ratio_high": 0.7},
        LossSpec(CISPO(ratio_max=1.7, ratio_min=0.5), log_ratio_clamp=CLAMP),
    ),
}
CUSTOM = {"clip_cov", "kl_cov"}  # implemented as callables in docs/custom_losses.md
OTHERS = {"bypass_mode"}  # vanilla or REINFORCE with its own mask and weights

# low_var_kl has two bounds.
LOW_VAR_KL = KL("k3", beta=KL_COEF, clamp=20.0, output_clamp=10.0)
KLS: dict[str, KL | None] = {
    "none": None,
    "kl": KL("k1", beta=KL_COEF),
    "k1": KL("k1", beta=KL_COEF),
    "abs": KL("abs", beta=KL_COEF),
    "mse": KL("k2", beta=KL_COEF),
    "k2": KL("k2", beta=KL_COEF),
    "low_var_kl": LOW_VAR_KL,
    "k3": LOW_VAR_KL,
}


def straight_through(kl: KL) -> KL:
    """Return the KL with the straight-through gradient, which verl marks with a `+`."""
    return KL(kl.kind, kl.beta, straight_through=True, clamp=kl.clamp, output_clamp=kl.output_clamp)


KLS |= {f"{name}+": straight_through(kl) for name, kl in KLS.items() if kl is not None}


class Batch(NamedTuple):
    """A random batch in fp64."""

    logits: Tensor  # [B, T, V]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B] or [B, T]
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]
    weights: Tensor  # [B, T]

    @property
    def sequences(self) -> int:
        """The number of sequences that have a token, which is verl's count."""
        return int(self.mask.any(-1).sum())

    def logps(self, logits: Tensor | None = None) -> Tensor:
        logits = self.logits if logits is None else logits
        return torch.log_softmax(logits, -1).gather(-1, self.ids[..., None])[..., 0]

    def full(self) -> Batch:
        """Return the batch without the sequence that has no token."""
        return Batch(*(x[self.mask.any(-1)] for x in self))

    def with_log_ratio(self, log_ratio: Tensor) -> Batch:
        return self._replace(old_logps=self.logps() - log_ratio)


WIDTH = 8  # of every batch; verl divides by it unless loss_scale_factor is set


@functools.cache
def random_batch(seed: int, *, per_token: bool = False) -> Batch:
    """Make a batch with several lengths, one of them 0, and with a masked position inside a sequence.

    Some ratios are far from 1. Some advantages and one weight are 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, T, V = 7, WIDTH, 19
    logits = 2 * normal(B, T, V)
    drawn = torch.multinomial(torch.softmax(logits, -1).view(-1, V), 1, generator=generator)
    ids = drawn.view(B, T)
    mask = torch.arange(T) < torch.tensor([8, 1, 5, 8, 0, 3, 6])[:, None]
    mask[3, 2] = False
    log_ratio = 0.5 * normal(B, T)
    for place, value in {(0, 1): 3.0, (2, 0): -4.0, (3, 4): 25.0, (3, 5): 2.0, (6, 1): -25.0}.items():
        log_ratio[place] = value
        if value < 0:  # so that the old probability is below 1
            logits[(*place, ids[place])] += value - 4
    batch = Batch(logits, ids, mask, normal(B), normal(B, T), normal(B, T), 2 * normal(B, T).abs())
    old_logps = (batch.logps() - log_ratio).clamp(max=-1e-3)
    ref_logps = batch.logps() + normal(B, T)
    ref_logps[0, 2] = batch.logps()[0, 2] + 5  # exceeds low_var_kl's bound on the value
    ref_logps[3, 0] = batch.logps()[3, 0] + 30  # exceeds its bound on the log-ratio
    batch.weights[2, 1] = 0
    advantages = torch.tensor([1.2, -0.8, 0.0, -1.5, 2.0, 0.7, -0.4], dtype=torch.float64) + 0.1 * normal(B)
    advantages[2] = 0
    if per_token:
        advantages = normal(B, T)
        advantages[0, 3] = advantages[6, 2] = 0
    return batch._replace(advantages=advantages, old_logps=old_logps, ref_logps=ref_logps)


class Result(NamedTuple):
    """A loss, its gradient and its metrics."""

    loss: Tensor
    grad: Tensor  # with respect to the logits
    metrics: dict[str, Any]


def actor_config(name: str, **options: Any) -> ActorConfig:
    """Return verl's config for one loss."""
    entry = LOSSES.get(name, Loss({}, LossSpec()))
    policy_loss = {**entry.policy_loss, **options.pop("policy_loss", {})}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=name, **policy_loss),
        **{**entry.options, **options},
    )


def theirs(
    name: str,
    batch: Batch,
    mode: str = "token-mean",
    kl: str = "none",
    *,
    weights: bool = False,
    mask: Tensor | None = None,
    **options: Any,
) -> Result:
    """Compute verl's policy loss and KL penalty, combined as in its `ppo_loss`."""
    config = actor_config(name, loss_agg_mode=mode, **options)
    leaf = batch.logits.clone().requires_grad_()
    logps = batch.logps(leaf)
    mask = batch.mask if mask is None else mask
    A = batch.advantages
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=batch.old_logps,
        log_prob=logps,
        advantages=A if A.dim() == 2 else A[:, None].expand(batch.mask.shape),
        response_mask=mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=batch.weights if weights else None,
    )
    if kl != "none":
        values = core_algos.kl_penalty(logps, batch.ref_logps, kl)
        loss = loss + KL_COEF * core_algos.agg_loss(values, mask, mode, **config.global_batch_info)
    (grad,) = torch.autograd.grad(loss, leaf)
    return Result(loss.detach(), grad, metrics)


def ours(spec: LossSpec, batch: Batch, *, weights: bool = False, **options: Any) -> Result:
    """Compute our loss and its gradient."""
    leaf = batch.logits.clone().requires_grad_()
    out = loss_of(leaf, spec, batch, weights=weights, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return Result(out.loss.detach(), grad, out.metrics)


def loss_of(
    logits: Tensor, spec: LossSpec, batch: Batch, *, weights: bool = False, **options: Any
) -> LossOutput:
    """Compute our loss of some logits."""
    return grpo_loss(
        logits,
        batch.ids,
        batch.advantages,
        spec=spec,
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logps=None if spec.kl is None else batch.ref_logps,
        token_weights=batch.weights if weights else None,
        backend="torch",
        **options,
    )


def verl_normalizer(mode: str, batch: Batch) -> dict[str, float]:
    """Return the normalizer that leaves out sequences without a token, as verl does.

    Our default counts them, as TRL does.
    """
    return {"normalizer": float(batch.sequences)} if mode.startswith("seq") else {}


def error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest number of the two."""
    scale = max(float(one.abs().max()), float(other.abs().max()))
    return float((one - other).abs().max()) / scale if scale else 0.0


def assert_same(one: Result, other: Result, tolerance: float = 1e-11) -> None:
    """Assert that loss and gradient agree, row by row."""
    assert bool(one.loss.isfinite()) and bool(one.grad.isfinite().all())
    assert bool((one.grad != 0).any())
    assert error(one.loss, other.loss) < tolerance, (one.loss, other.loss)
    # Each row has its own scale, because the ratios are far apart. verl is not exact below a hundredth of the
    # largest row.
    largest = other.grad.abs().amax(-1)
    scale = largest.clamp(min=1e-2 * float(largest.max()))
    excess = (one.grad - other.grad).abs().amax(-1) / scale
    assert float(excess.max()) < tolerance, excess


def differ(one: Result, other: Result) -> bool:
    """Whether both losses and gradients clearly differ."""
    return error(one.loss, other.loss) > 1e-4 and error(one.grad, other.grad) > 1e-4
