"""Every policy loss and KL penalty of verl 0.9.1, against this package: value and gradient, in fp64.

In an environment of its own: `make test-verl`. Where the two differ, a test says how, and with which options
they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from documented_losses import page
from torch import Tensor

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    ImportanceRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
)

# Not "verl": where it is missing, tests/verl would pass for it, as a namespace package.
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

# The tensors are so small that threads only wait for one another.
torch.set_num_threads(1)

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")
KL_COEF = 0.3

# verl bounds the log-ratio to ±20 in all losses but geo_mean, dro, gpg and gspo.
CLAMP = 20.0
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


class Loss(NamedTuple):
    """One entry of verl's registry: how it is configured there and what it is here."""

    options: dict[str, Any]  # of ActorConfig
    spec: LossSpec
    modes: tuple[str, ...] = MODES  # the loss_agg_modes that it has regard for
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
CUSTOM = {"clip_cov", "kl_cov"}  # callables of docs/custom_losses.md
OTHERS = {"bypass_mode"}  # vanilla or REINFORCE on a mask and weights of its own

# low_var_kl is bounded twice.
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
    return KL(kl.kind, kl.beta, straight_through=True, clamp=kl.clamp, output_clamp=kl.output_clamp)


KLS |= {f"{name}+": straight_through(kl) for name, kl in KLS.items() if kl is not None}


class Batch(NamedTuple):
    """Random, fp64, with what tells losses apart."""

    logits: Tensor  # [B, T, V]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B] or [B, T]
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]
    weights: Tensor  # [B, T]

    @property
    def sequences(self) -> int:
        """As verl counts them: those with a token."""
        return int(self.mask.any(-1).sum())

    def logps(self, logits: Tensor | None = None) -> Tensor:
        logits = self.logits if logits is None else logits
        return torch.log_softmax(logits, -1).gather(-1, self.ids[..., None])[..., 0]

    def full(self) -> Batch:
        """Without the sequence that has no token."""
        return Batch(*(x[self.mask.any(-1)] for x in self))

    def with_log_ratio(self, log_ratio: Tensor) -> Batch:
        return self._replace(old_logps=self.logps() - log_ratio)


WIDTH = 8  # of every batch; verl divides by it unless it has a loss_scale_factor


@functools.cache
def random_batch(seed: int, *, per_token: bool = False) -> Batch:
    """Uneven lengths, one with a hole and one of 0; ratios far out; zero advantages, a zero weight."""
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
        if value < 0:  # a token that has become this unlikely was less than certain before
            logits[(*place, ids[place])] += value - 4
    batch = Batch(logits, ids, mask, normal(B), normal(B, T), normal(B, T), 2 * normal(B, T).abs())
    old_logps = (batch.logps() - log_ratio).clamp(max=-1e-3)
    ref_logps = batch.logps() + normal(B, T)
    ref_logps[0, 2] = batch.logps()[0, 2] + 5  # beyond low_var_kl's bound on the value
    ref_logps[3, 0] = batch.logps()[3, 0] + 30  # and beyond that on the log-ratio
    batch.weights[2, 1] = 0
    advantages = torch.tensor([1.2, -0.8, 0.0, -1.5, 2.0, 0.7, -0.4], dtype=torch.float64) + 0.1 * normal(B)
    advantages[2] = 0
    if per_token:
        advantages = normal(B, T)
        advantages[0, 3] = advantages[6, 2] = 0
    return batch._replace(advantages=advantages, old_logps=old_logps, ref_logps=ref_logps)


class Result(NamedTuple):
    loss: Tensor
    grad: Tensor  # by the logits
    metrics: dict[str, Any]


def actor_config(name: str, **options: Any) -> ActorConfig:
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
    """verl's policy loss and KL penalty, put together as its `ppo_loss` does."""
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
    leaf = batch.logits.clone().requires_grad_()
    out = loss_of(leaf, spec, batch, weights=weights, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return Result(out.loss.detach(), grad, out.metrics)


def loss_of(
    logits: Tensor, spec: LossSpec, batch: Batch, *, weights: bool = False, **options: Any
) -> LossOutput:
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
    """We count a sequence without a token, as TRL does; verl does not."""
    return {"normalizer": float(batch.sequences)} if mode.startswith("seq") else {}


def error(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number of the two."""
    scale = max(float(one.abs().max()), float(other.abs().max()))
    return float((one - other).abs().max()) / scale if scale else 0.0


def assert_same(one: Result, other: Result, tolerance: float = 1e-11) -> None:
    assert bool(one.loss.isfinite()) and bool(one.grad.isfinite().all())
    assert bool((one.grad != 0).any())
    assert error(one.loss, other.loss) < tolerance, (one.loss, other.loss)
    # Row by row, because the ratios are far apart; a hundredth of the largest is where verl's own digits end.
    largest = other.grad.abs().amax(-1)
    scale = largest.clamp(min=1e-2 * float(largest.max()))
    excess = (one.grad - other.grad).abs().amax(-1) / scale
    assert float(excess.max()) < tolerance, excess


def test_every_loss_of_the_registry_has_its_place() -> None:
    assert set(core_algos.POLICY_LOSS_REGISTRY) == LOSSES.keys() | CUSTOM | OTHERS


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "name, mode", [(name, mode) for name, entry in LOSSES.items() for mode in entry.modes]
)
def test_every_loss(name: str, mode: str, kl: str) -> None:
    """x advantages per sequence and per token, x token weights.

    Where verl's mean is over the sequences that have a token, `normalizer` is their number.
    """
    spec = replace(LOSSES[name].spec, kl=KLS[kl], aggregation=mode, max_tokens=WIDTH)
    for seed in range(2):
        for per_token in (False, True):
            batch = random_batch(seed, per_token=per_token)
            normalizer = verl_normalizer(mode, batch)
            if name == "geo_mean":
                # verl counts the sequence without a token in the policy loss, but not in the KL.
                batch, normalizer = (batch, {}) if kl == "none" else (batch.full(), {})
            for weights in (False, True):
                expected = theirs(name, batch, mode, kl, weights=weights)
                assert_same(ours(spec, batch, weights=weights, **normalizer), expected)
                clipped = expected.metrics.get("actor/pg_clipfrac", 0.5)
                assert 0 < clipped < 1 or name == "sapo", "the batch tells nothing of the clip"


@pytest.mark.parametrize("mode", MODES)
def test_global_batch(mode: str) -> None:
    """What verl is told of the other ranks and micro-batches is our `normalizer`."""
    batch = random_batch(3)
    info = {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 64, "loss_scale_factor": 50}
    expected = theirs("vanilla", batch, mode, "k3", weights=True, global_batch_info=info)
    spec = replace(LOSSES["vanilla"].spec, kl=KLS["k3"], aggregation=mode, max_tokens=50)
    count = {"token-mean": 1000, "token-sum": 1}.get(mode, 64)
    assert_same(ours(spec, batch, weights=True, normalizer=count / 4), expected)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "dro"])
@pytest.mark.parametrize("mode", MODES)
def test_the_whole_actor_loss(name: str, mode: str) -> None:
    """verl's `ppo_loss`, as its workers call it: policy loss, rollout weights, entropy bonus and KL."""
    batch = random_batch(5, per_token=True)
    B, T = batch.mask.shape
    prompt = 2
    config = actor_config(
        name,
        loss_agg_mode=mode,
        use_kl_loss=True,
        kl_loss_coef=KL_COEF,
        kl_loss_type="k3+",
        entropy_coeff=0.2,
    )
    leaf = batch.logits.clone().requires_grad_()

    def as_model_output(x: Tensor) -> Tensor:
        """Unpadded, each position's value one to the left of its token."""
        row = torch.cat([x.new_zeros(B, prompt - 1), x, x.new_zeros(B, 1)], -1)
        return torch.nested.nested_tensor_from_jagged(row.flatten(), torch.arange(B + 1) * (prompt + T))

    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.zeros(B, prompt, dtype=torch.int64),
            "responses": batch.ids,
            "attention_mask": torch.ones(B, prompt + T, dtype=torch.int64),
            "response_mask": batch.mask.long(),
            "old_log_probs": batch.old_logps,
            "ref_log_prob": batch.ref_logps,
            "advantages": batch.advantages,
            "rollout_is_weights": batch.weights,
        },
        {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": batch.sequences},
    )
    log_p = torch.log_softmax(leaf, -1)
    output = {
        "log_probs": as_model_output(batch.logps(leaf)),
        "entropy": as_model_output(-(log_p.exp() * log_p).sum(-1)),
    }
    loss, _ = ppo_loss(config, output, data)
    (grad,) = torch.autograd.grad(loss, leaf)
    spec = replace(LOSSES[name].spec, kl=KLS["k3+"], aggregation=mode, max_tokens=WIDTH, entropy_coef=0.2)
    # With a normalizer the entropy is weighted as the loss is; alone it is a mean over tokens, as TRL's.
    count = {"token-mean": int(batch.mask.sum()), "token-sum": 1}.get(mode, batch.sequences)
    assert_same(ours(spec, batch, weights=True, normalizer=count), Result(loss.detach(), grad, {}))
    alone = ours(spec, batch, weights=True, **verl_normalizer(mode, batch))
    same = mode != "token-sum"  # either a normalizer was given, or the mean is over the tokens
    assert (error(alone.grad, grad) < 1e-11) == same


# By our presets' names: what verl's defaults come to.
DEFAULTS: dict[str, LossSpec] = {
    "vanilla": LossSpec.preset("bnpo", dual_clip=3.0, log_ratio_clamp=CLAMP),
    "dppo_tv": LossSpec.preset("dppo_tv", ratio_cap=3.0, log_ratio_clamp=CLAMP),
    "dppo_kl": LossSpec.preset("dppo_kl", ratio_cap=3.0, log_ratio_clamp=CLAMP),
    "gspo": LossSpec.preset("gspo_token", eps_low=0.2, eps_high=0.2, aggregation="token-mean"),
    "sapo": LossSpec.preset("sapo", log_ratio_clamp=CLAMP),
    "gpg": LossSpec.preset("reinforce"),
    "geo_mean": LossSpec.preset("gmpo", eps_low=0.2, eps_high=0.2),
    "dro": LossSpec.preset("dro", beta=0.4),
    "cispo": LossSpec.preset("cispo", ratio_max=1.2, ratio_min=0.8, log_ratio_clamp=CLAMP),
}


@pytest.mark.parametrize("name", LOSSES)
def test_defaults(name: str) -> None:
    batch = random_batch(11).full()
    config = {key: getattr(ActorConfig, key) for key in LOSSES[name].options}
    assert_same(ours(DEFAULTS[name], batch), theirs(name, batch, **config))


def test_metrics() -> None:
    """verl's clip fractions and approximate KL, under our names."""
    for per_token in (False, True):
        batch = random_batch(7, per_token=per_token)
        batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
        # DPPO's fraction counts tokens without advantage there; CISPO's counts both bounds for either sign.
        unmoved = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, -1.0))
        for name in ("vanilla", "gspo", "dppo_tv", "dppo_kl"):
            expected, found = theirs(name, unmoved).metrics, ours(LOSSES[name].spec, unmoved).metrics
            assert float(found["clip_fraction"]) == pytest.approx(expected["actor/pg_clipfrac"], abs=1e-6)
        for name in ("vanilla", "gspo", "dppo_tv", "dppo_kl", "sapo", "geo_mean", "dro", "cispo"):
            expected, found = theirs(name, batch).metrics, ours(LOSSES[name].spec, batch).metrics
            assert -float(found["log_ratio"]) == pytest.approx(expected["actor/ppo_kl"], abs=1e-6)


# docs/custom_losses.md


COV = {
    "clip_cov": (
        {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.5, "clip_cov_ub": 3.0},
        {"eps": 0.2, "fraction": 0.1, "low": 0.5, "high": 3.0},
    ),
    "kl_cov": ({}, {"kl_cov_ratio": 0.15, "ppo_kl_coef": 0.7}, {"fraction": 0.15, "coef": 0.7}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COV)
def test_custom_losses(name: str, mode: str) -> None:
    """The page's callables are verl's losses; Clip-Cov's random choice is seeded alike."""
    options, policy_loss, arguments = COV[name]
    custom = functools.partial(page()[name], **arguments)
    spec = LossSpec(custom, kl=KLS["k3"], aggregation=mode, max_tokens=WIDTH)
    chosen: list[int] = []
    without = replace(spec, surrogate=PPOClip() if name == "clip_cov" else ImportanceRatio())
    for seed in range(4):
        batch = random_batch(seed, per_token=bool(seed % 2))
        batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
        for weights in (False, True):
            torch.manual_seed(seed)
            expected = theirs(name, batch, mode, "k3", weights=weights, policy_loss=policy_loss, **options)
            torch.manual_seed(seed)
            found = ours(spec, batch, weights=weights, **verl_normalizer(mode, batch))
            assert_same(found, expected)
            unchanged = ours(without, batch, weights=weights, **verl_normalizer(mode, batch))
            chosen.append(int((unchanged.grad != found.grad).any(-1).sum()))
    assert min(chosen) >= 1 and max(chosen) > 2, "the batches tell nothing of the choice"


# Where the two differ.


def differ(one: Result, other: Result) -> bool:
    return error(one.loss, other.loss) > 1e-4 and error(one.grad, other.grad) > 1e-4


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("seq")])
def test_a_sequence_without_tokens(mode: str) -> None:
    """verl leaves it out of the mean over sequences, we count it as TRL does; `normalizer` decides."""
    batch = random_batch(0)
    assert batch.sequences == 6 and len(batch.mask) == 7
    spec = replace(LOSSES["vanilla"].spec, aggregation=mode, max_tokens=WIDTH)
    expected, alone = theirs("vanilla", batch, mode), ours(spec, batch)
    assert_same(alone._replace(loss=alone.loss * 7 / 6, grad=alone.grad * 7 / 6), expected)
    assert_same(ours(spec, batch, normalizer=6.0), expected)
    assert_same(ours(spec, batch.full()), theirs("vanilla", batch.full(), mode))


def test_geo_mean_counts_a_sequence_without_tokens() -> None:
    """Unlike all of verl's other losses, and unlike the KL that is added to it."""
    batch = random_batch(0)
    spec = replace(LOSSES["geo_mean"].spec, aggregation="seq-mean-token-mean")
    assert_same(ours(spec, batch), theirs("geo_mean", batch))
    assert differ(ours(spec, batch, normalizer=6.0), theirs("geo_mean", batch))
    with_kl = replace(spec, kl=KLS["k3"])
    expected = theirs("geo_mean", batch, "seq-mean-token-mean", "k3")
    assert differ(ours(with_kl, batch), expected)
    assert differ(ours(with_kl, batch, normalizer=6.0), expected)


@pytest.mark.parametrize("name", ["sapo", "geo_mean"])
def test_two_losses_have_no_regard_for_loss_agg_mode(name: str) -> None:
    batch = random_batch(0).full()
    first = theirs(name, batch, "seq-mean-token-mean")
    for mode in MODES:
        assert_same(theirs(name, batch, mode), first)
        spec = replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH)
        assert differ(ours(spec, batch), first) == (mode != "seq-mean-token-mean")


def test_geo_mean_has_no_regard_for_the_global_batch() -> None:
    """Micro-batches of different sizes do not add up to the batch; with `normalizer` ours do."""
    batch = random_batch(0).full()
    halves = [Batch(*(x[part] for x in batch)) for part in (slice(0, 2), slice(2, 6))]
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 6}
    whole = theirs("geo_mean", batch, global_batch_info=info).loss
    verl = sum(theirs("geo_mean", half, global_batch_info=info).loss for half in halves)
    assert abs(float(verl / whole) - 1) > 0.1
    spec = replace(LOSSES["geo_mean"].spec, aggregation="seq-mean-token-mean")
    added = sum(ours(spec, half, normalizer=6.0).loss for half in halves)
    assert float(added) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("name, mode", [(name, entry.modes[0]) for name, entry in LOSSES.items()])
def test_a_batch_without_tokens(name: str, mode: str) -> None:
    """verl's loss is 0 / 0, ours 0; nobody has a gradient."""
    batch = random_batch(0)
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    expected = theirs(name, batch, mode)
    assert bool(expected.loss.isnan()) == (name != "geo_mean")
    found = ours(replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH), batch)
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all()) and bool((expected.grad == 0).all())


@pytest.mark.parametrize(
    "name, mode, verl_loss, verl_gradient",
    [
        ("vanilla", "token-mean", True, True),  # the clamp has no gradient there
        ("vanilla", "seq-mean-token-mean", False, True),
        ("gspo", "token-mean", False, True),
        ("geo_mean", "seq-mean-token-mean", False, False),
        ("dro", "token-mean", True, False),
        ("cispo", "token-mean", True, False),
        ("dppo_tv", "seq-mean-token-sum", False, False),
    ],
)
def test_nan_at_a_masked_position(name: str, mode: str, verl_loss: bool, verl_gradient: bool) -> None:
    """What stands there in old_logps matters in verl, by loss and aggregation; here never."""
    batch = random_batch(0).full()
    spec = replace(LOSSES[name].spec, aggregation=mode, max_tokens=WIDTH)
    clean = ours(spec, batch)
    assert_same(clean, theirs(name, batch, mode))
    batch = batch._replace(old_logps=batch.old_logps.where(batch.mask, torch.nan))
    found, expected = ours(spec, batch), theirs(name, batch, mode)
    assert torch.equal(found.loss, clean.loss) and torch.equal(found.grad, clean.grad)
    assert bool(expected.loss.isfinite()) == verl_loss
    assert bool(expected.grad.isfinite().all()) == verl_gradient


@pytest.mark.parametrize("name", ["vanilla", "gspo", "geo_mean", "sapo", "cispo", "dppo_tv", "dppo_kl"])
def test_infinite_ratio_without_advantage(name: str) -> None:
    """0 * inf: verl's clamps prevent it, and geo_mean has none. Ours is 0 with a clamp and without."""
    batch = random_batch(0).full()
    batch = batch._replace(old_logps=batch.old_logps.clone())
    batch.old_logps[2, 0] = -torch.inf
    assert float(batch.advantages[2]) == 0
    expected = theirs(name, batch, LOSSES[name].modes[0])
    assert bool(expected.loss.isfinite()) == (name != "geo_mean")
    for clamp in (LOSSES[name].spec.log_ratio_clamp, None):
        spec = replace(LOSSES[name].spec, aggregation=LOSSES[name].modes[0], log_ratio_clamp=clamp)
        found = ours(spec, batch)
        assert bool((found.grad[2] == 0).all())
        assert bool(found.grad.isfinite().all())
        if clamp is not None:
            assert_same(found, expected)


def test_gspo_is_clamped_from_above_only() -> None:
    """At 10, value and gradient. `log_ratio_clamp=10` is that, and a bound from below that verl has not."""
    batch = random_batch(0).full()
    level = torch.tensor([12.0, 9.0, 11.0, -9.0, -12.0, 0.1], dtype=torch.float64)
    batch = batch.with_log_ratio(level[:, None] + 0.1 * batch.advantages[:, None])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    batch = batch._replace(advantages=advantages)
    above = Batch(*(x[:4] for x in batch))
    spec = LOSSES["gspo"].spec
    expected = theirs("gspo", above)
    assert bool((expected.grad[0] == 0).all()) and bool((expected.grad[1] != 0).any())
    assert_same(ours(replace(spec, log_ratio_clamp=10.0), above), expected)
    assert differ(ours(spec, above), expected)
    below = Batch(*(x[4:] for x in batch))
    expected = theirs("gspo", below)
    assert bool((expected.grad[0] != 0).any())
    assert_same(ours(spec, below), expected)
    assert bool((ours(replace(spec, log_ratio_clamp=10.0), below).grad[0] == 0).all())


def test_a_floating_point_mask_costs_verl_digits() -> None:
    """Its `+ 1e-8` in the lengths vanishes in fp32, in which bool and integer masks end up, not in fp64."""
    batch = random_batch(0).full()
    for name in ("vanilla", "geo_mean"):
        spec = replace(LOSSES[name].spec, aggregation="seq-mean-token-mean")
        found = ours(spec, batch)
        for dtype in (torch.bool, torch.int64, torch.float32):
            assert_same(found, theirs(name, batch, "seq-mean-token-mean", mask=batch.mask.to(dtype)))
        inexact = theirs(name, batch, "seq-mean-token-mean", mask=batch.mask.double())
        assert 1e-10 < error(inexact.loss, found.loss) < 1e-7


def test_a_tie_at_the_dual_clip() -> None:
    """Ratio exactly at the bound: verl halves the gradient, as torch.min does; here it counts as inside."""
    one = random_batch(0).full()
    batch = Batch(*(x[1:2, :1] if x.dim() > 1 else x[1:2] for x in one))  # a token, of advantage < 0
    batch = batch._replace(logits=torch.zeros(1, 1, 2, dtype=torch.float64), ids=batch.ids * 0)
    batch = batch._replace(old_logps=batch.logps() * 2, advantages=-torch.ones_like(batch.advantages))
    assert float((batch.logps() - batch.old_logps).exp()) == 2
    spec = replace(LOSSES["vanilla"].spec, surrogate=PPOClip(dual_clip=2.0))
    found, expected = ours(spec, batch), theirs("vanilla", batch, clip_ratio_c=2.0)
    assert float(found.loss) == float(expected.loss) == 2
    torch.testing.assert_close(found.grad, 2 * expected.grad)
    # A tie at PPO's own bound counts as inside in both.
    spec = replace(spec, surrogate=PPOClip(eps_high=1.0))
    batch = batch._replace(advantages=-batch.advantages)
    found, expected = ours(spec, batch), theirs("vanilla", batch, clip_ratio_high=1.0)
    assert_same(found, expected)


def test_the_cap_of_dppo() -> None:
    """verl's functions mean it to be 20, but `ActorConfig.clip_ratio_c`, which is always there, is 3."""
    batch = random_batch(0)
    thresholds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    expected = theirs("dppo_tv", batch, clip_ratio_c=ActorConfig.clip_ratio_c, **thresholds)
    assert differ(ours(LossSpec(DPPO("tv"), log_ratio_clamp=CLAMP), batch), expected)
    assert_same(ours(LossSpec(DPPO("tv", ratio_cap=3.0), log_ratio_clamp=CLAMP), batch), expected)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_the_trust_region_of_certain_tokens(name: str) -> None:
    """Every other token has become certain: without verl's epsilon its binary KL would be infinite.

    Its gradient is 0 inside the region and outside, so that only the fraction outside tells of it.
    """
    batch = random_batch(0).full()
    batch = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, 1.0))
    logits = torch.zeros_like(batch.logits).scatter(-1, batch.ids[..., None], 60.0)  # a probability of 1
    logits[:, ::2] = batch.logits[:, ::2]
    batch = batch._replace(logits=logits)
    steps = torch.tensor([1e-13, 1e-10, 1e-8, 1e-3, 1e-2, 1.0, 3.0, 30.0], dtype=torch.float64)
    batch = batch._replace(old_logps=-steps.expand(batch.mask.shape))
    expected = theirs(name, batch)
    found = ours(LOSSES[name].spec, batch)
    assert_same(found, expected)
    assert float(batch.logps()[0, 3].exp()) == 1
    clipped = expected.metrics["actor/pg_clipfrac"]
    assert 0 < clipped < 1 and float(found.metrics["clip_fraction"]) == pytest.approx(clipped, abs=1e-6)


def test_low_var_kl_lets_go_of_the_tokens_furthest_away() -> None:
    """Where k3 exceeds 10, from ref_logp - logp = 2.6 on, verl's clamp leaves no gradient; k3 has one."""
    batch = random_batch(0).full()
    batch = batch._replace(ref_logps=batch.logps() + 3.0, advantages=torch.zeros_like(batch.advantages))
    expected = theirs("vanilla", batch, "token-mean", "low_var_kl")
    assert float(expected.loss) == pytest.approx(KL_COEF * 10) and bool((expected.grad == 0).all())
    found = ours(replace(LOSSES["vanilla"].spec, kl=LOW_VAR_KL), batch)
    assert float(found.loss) == pytest.approx(KL_COEF * 10) and bool((found.grad == 0).all())
    free = ours(replace(LOSSES["vanilla"].spec, kl=KL("k3", beta=KL_COEF)), batch)
    assert bool((free.grad[batch.mask] != 0).any(-1).all())


def test_digits_of_k3() -> None:
    """exp(x) - x - 1 in fp32 has none left at x = 1e-4, where it is 5e-9."""
    x = torch.tensor([1e-4, -3e-4, 1e-3])
    exact = torch.expm1(x.double()) - x.double()
    verl = core_algos.kl_penalty(-x, torch.zeros_like(x), "k3").double()
    assert float(((verl - exact) / exact).abs().max()) > 0.1
    for x_t, value in zip(x, exact, strict=True):
        out = grpo_loss(
            torch.zeros(1, 1, 1, requires_grad=True),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1),
            spec=LossSpec(kl=KL("k3", beta=1.0)),
            ref_logps=x_t.view(1, 1),
            backend="torch",
        )
        assert float(out.loss.detach()) == pytest.approx(float(value), rel=1e-2)


def test_digits_of_sapo() -> None:
    """1 - sigmoid(x) in autograd's derivative has none left in fp32 where the ratio is large."""
    batch = random_batch(0).full()
    ratios = torch.tensor([10.0, 14.0, 18.0], dtype=torch.float64)
    batch = batch.with_log_ratio(ratios.log().repeat(3)[:8].expand(batch.mask.shape))
    batch = batch._replace(advantages=torch.ones_like(batch.advantages))
    spec = LossSpec.preset("sapo")
    exact = ours(spec, batch).grad[batch.mask]
    single = Batch(*(x.float() if x.is_floating_point() else x for x in batch))
    single = single._replace(old_logps=single.logps() - ratios.log().float().repeat(3)[:8])
    defaults = {"tau_pos": 1.0, "tau_neg": 1.05}

    def worst(grad: Tensor) -> float:
        rows = grad[batch.mask].double()
        return float(((rows - exact).norm(dim=-1) / exact.norm(dim=-1)).max())

    assert worst(ours(spec, single).grad) < 1e-3
    assert worst(theirs("sapo", single, "seq-mean-token-mean", **defaults).grad) > 0.2


def test_kl_over_the_whole_vocabulary() -> None:
    """verl has a name for it and no implementation."""
    batch = random_batch(0)
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(batch.logits, batch.logits, "full")
    out = grpo_loss(
        batch.logits.clone().requires_grad_(),
        batch.ids,
        batch.advantages,
        spec=LossSpec(None, kl=KL("exact", beta=1.0)),
        completion_mask=batch.mask,
        ref_logits=batch.logits.flip(-1),
        backend="torch",
    )
    log_p = torch.log_softmax(batch.logits, -1)
    expected = (log_p.exp() * (log_p - log_p.flip(-1))).sum(-1)[batch.mask].mean()
    torch.testing.assert_close(out.loss.detach(), expected)
