"""verl with `grpo_kernels.integrations.verl` imported: its registry, its actor loss, its fused kernels.

In verl's environment: `make test-verl`. What verl's losses are here, test_verl.py tells.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from distributed.launch import run_workers, session_folder
from distributed.worker import Cases
from test_verl import KL_COEF, LOSSES, MODES, Batch, Result, actor_config, assert_same, random_batch, theirs
from torch import Tensor
from torch import distributed as dist

from grpo_kernels import DRO, KL, LossSpec, PPOClip, backend, grpo_loss

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")

import verl  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402
from verl.utils.import_utils import import_external_libs  # noqa: E402
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module  # noqa: E402
from verl.workers.config import FSDPEngineConfig, HFModelConfig  # noqa: E402
from verl.workers.utils import losses as actor_losses  # noqa: E402

MODULE = "grpo_kernels.integrations.verl"
PREFIX = "grpo_kernels."

# What stands in verl before the import, and again after these tests: those of test_verl.py may follow.
VERLS_LOSSES = dict(core_algos.POLICY_LOSS_REGISTRY)
VERLS_FUNCTION = torch_functional.FusedLinearForPPOFunction
VERLS_CROSS_ENTROPY = cross_entropy_module.linear_cross_entropy
VERLS_PPO_LOSS = actor_losses.ppo_loss
VERLS_PATCH = monkey_patch.patch_forward_with_backends

# Of our presets, with verl's configuration, verl's losses.
TWINS = {
    "grpo": "vanilla",
    "bnpo": "vanilla",
    "dapo": "vanilla",
    "dr_grpo": "vanilla",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "gspo_token": "gspo",
    "sapo": "sapo",
    "reinforce": "gpg",
    "log_ratio": "gpg",  # without a reference: up to a constant that has no gradient
    "gmpo": "geo_mean",
    "dro": "dro",
    "cispo": "cispo",
}
GLOBAL = {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 64, "loss_scale_factor": 50}


def verl_logps() -> ModuleType:
    """The half of it that holds the log-probabilities."""
    return sys.modules[f"{MODULE}.logps"]


@pytest.fixture(scope="module", autouse=True)
def integration() -> Iterator[ModuleType]:
    """Imported as verl's workers import it."""
    import_external_libs(MODULE)
    yield sys.modules[MODULE]
    core_algos.POLICY_LOSS_REGISTRY.clear()
    core_algos.POLICY_LOSS_REGISTRY.update(VERLS_LOSSES)
    del sys.modules[MODULE]
    verl_logps().replace_in_verl(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    verl_logps().replace_in_verl(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    verl_logps().replace_in_verl(actor_losses, "ppo_loss", VERLS_PPO_LOSS)
    verl_logps().replace_in_verl(monkey_patch, "patch_forward_with_backends", VERLS_PATCH)


@pytest.fixture
def warned(integration: ModuleType, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Warnings that are given once per process are given again."""
    backend.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="grpo_kernels")
    return caplog


# The registry.


def test_names(integration: ModuleType) -> None:
    """Each preset under the prefix, the log-ratio under its own name too, and verl's losses as they were."""
    registry = core_algos.POLICY_LOSS_REGISTRY
    added = registry.keys() - VERLS_LOSSES.keys()
    assert added == {"log_ratio"} | {PREFIX + preset for preset in integration.PRESET_NAMES}
    assert all(registry[name] is loss for name, loss in VERLS_LOSSES.items())


def ours(name: str, twin: str, batch: Batch, mode: str, **options: Any) -> Result:
    """A loss of ours out of verl's registry, under the options that `test_verl` gives the loss `twin`."""
    entry = LOSSES[twin]
    return theirs(name, batch, mode, policy_loss=dict(entry.policy_loss), **{**entry.options, **options})


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("whole", [False, True], ids=["", "global"])
@pytest.mark.parametrize("name, mode", [(name, mode) for name in TWINS for mode in LOSSES[TWINS[name]].modes])
def test_losses(name: str, mode: str, whole: bool, weights: bool) -> None:
    """Value and gradient as verl's, of which geo_mean counts every sequence and knows no other ranks."""
    twin = TWINS[name]
    for seed, per_token in [(0, False), (1, True)]:
        batch, info = random_batch(seed, per_token=per_token), GLOBAL if whole else {}
        if twin == "geo_mean":
            batch, info = batch.full(), {}
        options = {"weights": weights, "global_batch_info": dict(info)}
        assert_same(ours(PREFIX + name, twin, batch, mode, **options), theirs(twin, batch, mode, **options))


@pytest.mark.parametrize("mode", MODES)
def test_global_batch_of_gmpo(mode: str) -> None:
    """Micro-batches of different sizes add up to the batch, as those of verl's geo_mean do not."""
    batch = random_batch(0).full()
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 6}
    found = functools.partial(ours, PREFIX + "gmpo", "geo_mean", mode=mode, global_batch_info=info)
    parts = [found(batch=Batch(*(x[part] for x in batch))) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, found(batch=batch).loss)


def test_metrics() -> None:
    """Under verl's names, with verl's values, as floats."""
    batch = random_batch(7)
    # DPPO's fraction counts tokens without advantage there.
    batch = batch._replace(advantages=batch.advantages.where(batch.advantages != 0, -1.0))
    # One ratio beyond verl's bound on it, 20, and no other on the opposite side.
    batch = batch._replace(old_logps=batch.old_logps.where(batch.logps() - batch.old_logps > -20, -1.0))
    assert int((batch.logps() - batch.old_logps > 20)[batch.mask].sum()) == 1
    # Those of cispo and geo_mean count the other side, too: metrics of another meaning.
    of_verl_alone = {"sapo": {"actor/pg_clipfrac"}, "gspo": {"actor/pg_clipfrac_lower"}}
    fractions = {"vanilla": 2, "gspo": 1, "dppo_tv": 1, "dppo_kl": 1}
    for name, twin in TWINS.items():
        expected = theirs(twin, batch, LOSSES[twin].modes[0]).metrics
        found = ours(PREFIX + name, twin, batch, LOSSES[twin].modes[0]).metrics
        assert all(type(value) is float for value in found.values())
        if twin == "gpg":  # which reports nothing
            expected = {"actor/ppo_kl": float((batch.old_logps - batch.logps())[batch.mask].mean())}
        assert found["actor/ppo_kl"] == pytest.approx(expected["actor/ppo_kl"], abs=1e-9)
        for key in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")[: fractions.get(twin, 0)]:
            # Means that verl takes in fp32 and divides by the tokens + 1e-8.
            assert found[key] == pytest.approx(expected[key], abs=1e-6)
            assert 0 < found[key] < 1, "the batch tells nothing of the clip"
        assert not found.keys() & of_verl_alone.get(twin, set()), "a constant 0 is no metric"


def test_ranks_without_their_number_of_tokens() -> None:
    batch = random_batch(0)
    for mode in MODES:
        config = {"mode": mode, "global_batch_info": {"dp_size": 2}}
        if mode == "token-sum":
            assert_same(ours("log_ratio", "gpg", batch, **config), theirs("gpg", batch, **config))
            continue
        for run in (
            functools.partial(ours, "log_ratio", "gpg", batch),
            functools.partial(theirs, "gpg", batch),
        ):
            with pytest.raises(
                ValueError, match="batch_num_tokens" if mode == "token-mean" else "global_batch_size"
            ):
                run(**config)


def test_what_verl_cannot_say() -> None:
    """A batch without tokens has loss 0 and what a masked position holds never matters."""
    batch = random_batch(0)
    empty = batch._replace(mask=torch.zeros_like(batch.mask))
    dirty = batch._replace(old_logps=batch.old_logps.where(batch.mask, torch.nan))
    for mode in MODES:
        found = ours("grpo_kernels.dapo", "vanilla", empty, mode)
        assert float(found.loss) == 0 and bool((found.grad == 0).all())
        assert set(found.metrics.values()) == {0.0}
        clean, found = (ours("grpo_kernels.dapo", "vanilla", x, mode) for x in (batch, dirty))
        assert torch.equal(found.loss, clean.loss) and torch.equal(found.grad, clean.grad)
        assert found.metrics == clean.metrics


def test_the_aggregation_is_verls(warned: pytest.LogCaptureFixture) -> None:
    batch = random_batch(0)
    for _ in range(2):
        ours("grpo_kernels.luspo", "vanilla", batch, "token-mean")
        ours("grpo_kernels.luspo", "vanilla", batch, "seq-mean-token-sum")
    (record,) = warned.records
    assert "grpo_kernels.luspo" in record.message and "loss_agg_mode=token-mean" in record.message
    with pytest.raises(ValueError, match="aggregation"):
        core_algos.get_policy_loss_fn("log_ratio")(
            *(batch.old_logps, batch.logps(), batch.old_logps, batch.mask), "mean", actor_config("vanilla")
        )


def test_missing_options() -> None:
    batch = random_batch(0)
    with pytest.raises(ValueError, match="dro_beta"):
        theirs("grpo_kernels.dro", batch)
    with pytest.raises(ValueError, match="dual_clip"):
        theirs("grpo_kernels.dapo", batch, clip_ratio_c=1.0)


# The whole actor loss.


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def actor_loss(
    name: str, twin: str, batch: Batch, mode: str, reference: bool = True, **options: Any
) -> Result:
    """verl's `ppo_loss` of a batch without padding, as its engines hand it over."""
    prompt, lengths = 2, [int(x.nonzero().max()) + 1 for x in batch.mask]
    leaf = batch.logits.clone().requires_grad_()

    def responses(x: Tensor) -> Tensor:
        return jagged([row[:length] for row, length in zip(x, lengths, strict=True)])

    def as_model_output(x: Tensor) -> Tensor:
        """Each position's value one to the left of its token."""
        rows = [
            torch.cat([x.new_zeros(prompt - 1), row[:length], x.new_zeros(1)])
            for row, length in zip(x, lengths, strict=True)
        ]
        return jagged(rows)

    fields = {
        "prompts": jagged([torch.zeros(prompt, dtype=torch.int64) for _ in lengths]),
        "responses": responses(batch.ids),
        "response_mask": responses(batch.mask.long()),
        "old_log_probs": responses(batch.old_logps),
        "advantages": responses(batch.advantages),
        "rollout_is_weights": responses(batch.weights),
    }
    if reference:
        fields["ref_log_prob"] = responses(batch.ref_logps)
    info = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 24}
    data = tensordict_utils.get_tensordict(fields, info)
    log_p = torch.log_softmax(leaf, -1)
    output = {
        "log_probs": as_model_output(batch.logps(leaf)),
        "entropy": as_model_output(-(log_p.exp() * log_p).sum(-1)),
    }
    entry = LOSSES[twin]
    config = actor_config(
        name,
        loss_agg_mode=mode,
        loss_scale_factor=40,
        policy_loss=dict(entry.policy_loss),
        **{**entry.options, **options},
    )
    loss, metrics = actor_losses.ppo_loss(config, output, data)
    (grad,) = torch.autograd.grad(loss, leaf)
    values = {key: x.aggregate() if hasattr(x, "aggregate") else x for key, x in metrics.items()}
    return Result(loss.detach(), grad, values)


@pytest.mark.parametrize("name", ["dapo", "gspo_token", "cispo", "sapo", "dro", "reinforce"])
def test_actor_loss(name: str) -> None:
    """With verl's KL and entropy bonus, which are added in place to what the loss returned."""
    twin, batch = TWINS[name], random_batch(5, per_token=True).full()
    for mode in LOSSES[twin].modes:
        options = {"use_kl_loss": True, "kl_loss_coef": KL_COEF, "kl_loss_type": "k3+", "entropy_coeff": 0.2}
        expected = actor_loss(twin, twin, batch, mode, **options)
        found = actor_loss(PREFIX + name, twin, batch, mode, **options)
        assert_same(found, expected)
        for key in ("actor/pg_loss", "actor/entropy_loss", "kl_loss", "kl_coef"):
            assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_log_ratio(mode: str, warned: pytest.LogCaptureFixture) -> None:
    """To the reference where verl computes it; without it the same gradient, and a word on the value."""
    batch = random_batch(3, per_token=True).full()
    options = {"use_kl_loss": True, "kl_loss_coef": 0.0}
    found = actor_loss("log_ratio", "gpg", batch, mode, **options)
    log_ratio = batch.logps() - batch.ref_logps
    info = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 24, "loss_scale_factor": 40}
    losses = -batch.advantages * log_ratio * batch.weights
    torch.testing.assert_close(found.loss, core_algos.agg_loss(losses, batch.mask, mode, **info))
    assert not warned.records

    without = [actor_loss("log_ratio", "gpg", batch, mode, reference=False) for _ in range(2)]
    assert_same(without[0], actor_loss("gpg", "gpg", batch, mode))
    torch.testing.assert_close(without[0].grad, found.grad, rtol=1e-12, atol=0)
    assert abs(float(without[0].loss - found.loss)) > 1e-3
    (record,) = warned.records
    assert "use_kl_loss=True" in record.message


@pytest.mark.parametrize("mode", MODES)
def test_opmd(mode: str) -> None:
    """Its square pulls towards the reference: with it as `grpo_loss`, without it not at all."""
    batch = (
        random_batch(3).full()._replace(advantages=random_batch(3).full().advantages[:, None].expand(6, 8))
    )
    found = actor_loss("grpo_kernels.opmd", "dro", batch, mode)
    leaf = batch.logits.clone().requires_grad_()
    count = {"token-mean": 300, "token-sum": 1}.get(mode, 24)
    loss = grpo_loss(
        leaf,
        batch.ids,
        batch.advantages,
        spec=LossSpec(DRO(beta=0.4, anchor="ref"), level="sequence", aggregation=mode, max_tokens=40),
        completion_mask=batch.mask,
        ref_logps=batch.ref_logps,
        token_weights=batch.weights,
        normalizer=count / 2,
        backend="torch",
    ).loss
    assert_same(found, Result(loss.detach(), torch.autograd.grad(loss, leaf)[0], {}))
    with pytest.raises(ValueError, match="ref_log_prob"):  # none is left of that batch
        ours("grpo_kernels.opmd", "dro", batch, mode)
    with pytest.raises(ValueError, match=r"grpo_kernels\.opmd.*use_kl_loss=True"):
        actor_loss("grpo_kernels.opmd", "dro", batch, mode, reference=False)


def test_losses_of_ones_own(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    register = integration.register_loss
    with pytest.raises(ValueError, match="spec must be one of"):
        register("mine", "dapoo")
    with pytest.raises(TypeError, match="spec must be a LossSpec or the name of a preset"):
        register("mine", 3)
    for name in VERLS_LOSSES:
        with pytest.raises(ValueError, match=f"'{name}' of its own"):
            register(name, LossSpec())
    for spec in (LossSpec(entropy_coef=0.1), LossSpec(kl=KL("exact"))):
        with pytest.raises(ValueError, match="entropy_coeff"):
            register("mine", spec)
    # As verl's own losses, a preset that needs max_tokens gets verl's loss_scale_factor or the padded width.
    register("mine", "dr_grpo")
    batch, mode = random_batch(1).full(), "seq-mean-token-sum-norm"
    unclamped = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e9}
    batch = batch.with_log_ratio((batch.logps() - batch.old_logps).clamp(-4, 4))
    for info in ({}, GLOBAL):
        options = {**unclamped, "global_batch_info": dict(info)}
        assert_same(theirs("mine", batch, mode, **options), theirs("vanilla", batch, mode, **options))

    batch = random_batch(2, per_token=True).full()
    for mode in MODES:
        register("wide", LossSpec(PPOClip(eps_low=0.5, eps_high=2.0)))  # once more: ours may be replaced
        plain = ours("wide", "vanilla", batch, mode)
        assert not torch.allclose(plain.grad, ours("grpo_kernels.dapo", "vanilla", batch, mode).grad)
        register("with_kl", LossSpec(PPOClip(eps_low=0.5, eps_high=2.0), kl=KL("k2", beta=KL_COEF)))
        with pytest.raises(ValueError, match="use_kl_loss=True"):
            ours("with_kl", "vanilla", batch, mode)
        # verl's penalty beside the loss, and ours within it.
        options = {"use_kl_loss": True, "kl_loss_type": "k2"}
        expected = actor_loss("wide", "vanilla", batch, mode, kl_loss_coef=KL_COEF, **options)
        assert_same(actor_loss("with_kl", "vanilla", batch, mode, kl_loss_coef=0.0, **options), expected)

    def custom(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, A: Tensor, mask: Tensor) -> Tensor:
        return -A * logps if ref_logps is None else -A * (logps - ref_logps)

    register("custom", LossSpec(custom))
    weightless = batch._replace(weights=torch.ones_like(batch.weights))
    for reference in (False, True):
        found = actor_loss("custom", "gpg", weightless, "token-mean", reference=reference)
        assert_same(found, actor_loss("log_ratio", "gpg", weightless, "token-mean", reference=reference))


# The fused kernels.


class Fused(NamedTuple):
    logps: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor

    def errors(self, exact: Fused) -> list[float]:
        """Relative, in the L2 norm."""
        pairs = zip(self, exact, strict=True)
        return [float((x.double() - y).norm() / y.norm()) for x, y in pairs]


class Head(NamedTuple):
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
        dlogps.view(-1)[:2] = dentropy.view(-1)[:2] = 0  # a prompt
        ids = torch.randint(V, shape, generator=generator)
        return cls(normal(*shape, H).to(dtype), 0.5 * normal(V, H).to(dtype), ids, dlogps, dentropy)

    def double(self) -> Head:
        return Head(*(x.double() if x.is_floating_point() else x for x in self))

    def run(self, function: Callable[..., Any], temperature: float | Tensor = 0.7) -> Fused:
        """`function(hidden, weight, ids, temperature)` and its gradient, shaped as `ids`."""
        hidden, weight = (x.clone().requires_grad_() for x in self[:2])
        logps, entropy = function(hidden, weight, self.ids, temperature)
        upstream = [x.to(y.dtype).view(y.shape) for x, y in ((self.dlogps, logps), (self.dentropy, entropy))]
        torch.autograd.backward([logps, entropy], upstream)
        assert hidden.grad is not None and weight.grad is not None
        return Fused(logps.detach(), entropy.detach(), hidden.grad, weight.grad)


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def fused(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """As verl's models call it with the backend "torch", by keyword."""
    layer = FusedLinearForPPO(impl_backend="torch")
    return layer.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=temperature)


def verls(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    return VERLS_FUNCTION.apply(hidden, weight, ids, temperature, 16)


def crossed(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """As verl's models call it with the backend "triton"."""
    return cross_entropy_module.linear_cross_entropy(hidden, weight, ids, temperature, "none")


@pytest.fixture
def calls(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of `linear_logps`: the shapes of the hidden states."""
    shapes: list[tuple[int, ...]] = []
    linear_logps = verl_logps().linear_logps

    def spy(hidden: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(hidden.shape))
        return linear_logps(hidden, *args, **options)

    monkeypatch.setattr(verl_logps(), "linear_logps", spy)
    return shapes


@pytest.mark.parametrize("shape", [(37,), (3, 13), (1, 37)], ids=str)
def test_fused_linear_for_ppo(shape: tuple[int, ...], calls: list[Any]) -> None:
    head = Head.random(*shape)
    for temperature in (1.0, 0.7, torch.tensor(0.7)):
        found, expected = (head.run(function, temperature) for function in (fused, verls))
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
        exact = head.double().run(plain, float(temperature))
        # A few roundings of fp32, 6e-8, in numbers that are sums of a hundred.
        assert max(found.errors(exact)) < 1e-6 and max(expected.errors(exact)) < 1e-6
    assert len(calls) == 3
    assert bool((found.dhidden.flatten(0, -2)[:2] == 0).all()), "a row without an upstream gradient has none"


@pytest.mark.parametrize("shape", [(37,), (3, 13), (37, 1)], ids=str)
def test_linear_cross_entropy(shape: tuple[int, ...], calls: list[Any]) -> None:
    """Against PyTorch, because verl's own needs a GPU. Flat, whatever the shape, and all of it in fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        head = Head.random(*shape, dtype=dtype)
        found, exact = head.run(crossed), head.double().run(plain)
        assert found.logps.shape == found.entropy.shape == (head.ids.numel(),)
        assert found.logps.dtype == found.entropy.dtype == torch.float32
        assert found.dhidden.dtype == found.dweight.dtype == dtype
        found = found._replace(logps=found.logps.view(shape), entropy=found.entropy.view(shape))
        errors = found.errors(exact)
        # bf16 factors give fp32 statistics, and gradients rounded once, by up to 2^-9.
        assert max(errors[:2]) < 1e-6 and max(errors[2:]) < (1e-6 if dtype == torch.float32 else 2**-9)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy_module.linear_cross_entropy(*head[:3], 1.0, "mean")


def test_bf16_errs_less_than_verl() -> None:
    """verl rounds the logits to bf16, and their gradient."""
    head = Head.random(3, 41, dtype=torch.bfloat16)
    exact = head.double().run(plain)
    found, verl_s = head.run(fused), head.run(verls)
    assert found.logps.dtype == verl_s.logps.dtype == torch.float32
    assert found.entropy.dtype == verl_s.entropy.dtype == torch.bfloat16
    mine, other = found.errors(exact), verl_s.errors(exact)
    assert all(x <= y for x, y in zip(mine, other, strict=True)), (mine, other)
    assert mine[0] < 1e-6 < 1e-4 < other[0], (mine, other)


def test_autocast() -> None:
    """fp32 parameters, which autocast multiplies in bf16; or hidden states that it made, in bf16."""
    head = Head.random(3, 41)
    for hidden in (head.hidden, head.hidden.bfloat16()):
        head = head._replace(hidden=hidden)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = head.run(fused), head.run(verls)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        # Factors rounded by 2^-9; verl rounds their sums as well.
        assert max(found.errors(head.double().run(plain))) < 2**-7 > max(found.errors(expected))


def test_liger_where_it_is_missing(calls: list[Any]) -> None:
    """There verl's backend "liger" falls back to its backend "torch"."""
    assert torch_functional._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is None
    FusedLinearForPPO(impl_backend="liger").forward(*Head.random(5)[:3])
    assert calls == [(5, 24)]


@pytest.mark.parametrize("function", [fused, crossed])
def test_edges(function: Callable[..., Any], integration: ModuleType) -> None:
    head = Head.random(9)
    # No tokens, as a rank of a sequence that is split may have.
    for shape in ((0,), (1, 0)):
        found = Head.random(*shape).run(function)
        assert found.logps.numel() == found.entropy.numel() == 0
        assert bool((found.dhidden == 0).all()) and bool((found.dweight == 0).all())
    # Only one of the two is used; a frozen head; nothing to learn.
    for chosen in (0, 1):
        hidden = head.hidden.clone().requires_grad_()
        out = function(hidden, head.weight, head.ids.int(), 0.7)
        (grad,) = torch.autograd.grad(out[chosen].sum(), hidden)
        exact = head.double().hidden.requires_grad_()
        (expected,) = torch.autograd.grad(
            plain(exact, head.weight.double(), head.ids, 0.7)[chosen].sum(), exact
        )
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logps, entropy = function(*head[:3], 0.7)
        assert not logps.requires_grad and not entropy.requires_grad
    # An ignored label, as for Liger and flash-attention, has neither value nor gradient; another one outside
    # the vocabulary is an error that shows: verl's backends gather out of bounds or return what lay there.
    ids = head.ids.clone()
    ids[4] = -100
    found = head._replace(ids=ids).run(function)
    assert float(found.logps[4]) == float(found.entropy[4]) == 0 and bool((found.dhidden[4] == 0).all())
    ids[4] = 83
    assert function(head.hidden, head.weight, ids, 0.7)[0].isnan().nonzero().tolist() == [[4]]


def test_names_that_verl_has_imported_already(
    integration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's forward imports the function by its name, at its top."""
    early = ModuleType("verl.models.mcore.early")
    early.linear_cross_entropy = VERLS_CROSS_ENTROPY  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, early.__name__, early)
    monkeypatch.setattr(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    for _ in range(2):  # a second call changes nothing
        integration.fuse_verl_logps()
        assert early.linear_cross_entropy is verl_logps().linear_cross_entropy
        assert cross_entropy_module.linear_cross_entropy is verl_logps().linear_cross_entropy


def tiny_model(*, tied: bool) -> Any:
    """Of a class of its own, whose forward verl may patch."""

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
    """Log-probabilities, entropies and the gradients of all parameters, by name."""
    model.zero_grad()
    out = model(input_ids=ids, return_dict=True, use_cache=False, temperature=0.8, **options)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, ids.numel(), generator=generator)
    (out.log_probs.flatten() @ weights[0] + 0.3 * out.entropy.flatten() @ weights[1]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    values = {"log_probs": out.log_probs, "entropy": out.entropy}
    return {name: x.detach().flatten() for name, x in values.items()} | grads


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model(backend: str, tied: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With verl's forward of each backend; verl's own kernel of "triton" does not run on a CPU."""
    model, ids = tiny_model(tied=tied), torch.randint(83, (1, 21), generator=torch.Generator().manual_seed(2))
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    runs = [{}, {"shift_labels": ids.flip(-1)}]
    found = [learn(model, ids, **options) for options in runs]
    assert calls == ([(1, 21, 32)] * 2 if backend == "torch" else [(21, 32)] * 2)

    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    for one, options in zip(found, runs, strict=True):
        expected = learn(model, ids, **options)
        assert one.keys() == expected.keys()
        for name, x in expected.items():
            assert float((one[name] - x).norm()) <= 1e-5 * float(x.norm()) > 0, name


@pytest.mark.filterwarnings("ignore:.* engine is not available")  # of those that need other packages
@pytest.mark.parametrize(
    "backend, packed",  # verl takes the flat output of "triton" in a packed batch only
    [("torch", True), ("torch", False), ("triton", True)],
    ids=["torch-packed", "torch-padded", "triton-packed"],
)
def test_the_engine(backend: str, packed: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of verl's FSDP engine: its inputs, the patched forward, our log-probabilities, our loss in its
    `ppo_loss`; against verl's own of both. The engine is verl's but for the set-up, which wants a GPU."""
    from verl.workers.engine.fsdp import transformer_impl

    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    model = tiny_model(tied=False)
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    engine = transformer_impl.FSDPEngineWithLMHead.__new__(transformer_impl.FSDPEngineWithLMHead)
    engine.module, engine._autocast_dtype = model, torch.float32
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine.engine_config = FSDPEngineConfig(strategy="fsdp", use_fused_kernels=True)
    monkeypatch.setattr(engine, "get_data_parallel_group", lambda: None)

    batch, prompt = random_batch(4).full(), 3
    lengths = [int(x.nonzero().max()) + 1 for x in batch.mask]
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(83, (len(lengths), prompt), generator=generator)

    def responses(x: Tensor) -> Tensor:
        x = x.float() if x.is_floating_point() else x
        return jagged([row[:length] for row, length in zip(x, lengths, strict=True)])

    rows = zip(prompts, batch.ids, lengths, strict=True)
    fields = {
        "input_ids": jagged([torch.cat([x, y[:length]]) for x, y, length in rows]),
        "position_ids": jagged([torch.arange(prompt + length) for length in lengths]),
        "prompts": jagged(list(prompts)),
        "responses": responses(batch.ids),
        "response_mask": responses(batch.mask.long()),
        "old_log_probs": responses(batch.old_logps),
        "advantages": responses(batch.advantages[:, None].expand(batch.mask.shape)),
    }
    options = {"use_fused_kernels": True, "use_remove_padding": packed, "calculate_entropy": True}
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(lengths)}
    data = tensordict_utils.get_tensordict(fields, {**options, **info, "temperature": 0.8})

    def step(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        model.zero_grad()
        config = actor_config(name, **{**LOSSES["vanilla"].options, "entropy_coeff": 0.2})
        loss, output = engine.forward_step(data, functools.partial(actor_losses.ppo_loss, config), False)
        loss.backward()
        metrics = {key: x.aggregate() for key, x in output["metrics"].items()}
        return metrics, {key: p.grad.clone() for key, p in model.named_parameters()}

    found, grads = step("grpo_kernels.dapo")
    assert len(calls) == 1
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    expected, other = step("vanilla")
    assert len(calls) == 1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, grad in other.items():
        assert float((grads[name] - grad).norm()) <= 1e-5 * float(grad.norm()) > 0, name


# Several ranks.

cases = Cases()


@cases.add()
def sharded_head() -> None:
    """A DTensor, as FSDP2 keeps parameters: each rank's own rows, and the mean of the ranks' gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    import_external_libs(MODULE)
    head = Head.random(2, 15)
    parts = [Head(x, head.weight, *rest) for x, *rest in zip(head.hidden, *head[2:], strict=True)]
    part = parts[dist.get_rank()]
    weight = distribute_tensor(part.weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    for function in (fused, crossed):
        hidden = part.hidden.clone().requires_grad_()
        out = function(hidden, weight, part.ids, 0.7)
        dhidden, dweight = torch.autograd.grad(out, [hidden, weight], [part.dlogps, part.dentropy])
        assert isinstance(dweight, DTensor) and dweight.placements == (Shard(0),)
        expected = [x.run(plain) for x in parts]
        torch.testing.assert_close(dhidden, expected[dist.get_rank()].dhidden, rtol=1e-4, atol=1e-6)
        mean = (expected[0].dweight + expected[1].dweight) / 2
        torch.testing.assert_close(dweight.full_tensor(), mean, rtol=1e-4, atol=1e-6)


@cases.add(wrapper=["fsdp", "fsdp2"], backend=["torch", "triton"], bias=[False, True])
def sharded_model(wrapper: str, backend: str, bias: bool) -> None:
    """verl's forward in a model that FSDP has sharded, against the two ranks' sequences one by one."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    import_external_libs(MODULE)
    sequences = torch.randint(83, (2, 1, 21), generator=torch.Generator().manual_seed(2))
    model = tiny_model(tied=False)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(83))
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    expected = [learn(model, ids) for ids in sequences]
    expected = [{name: x.clone() for name, x in one.items()} for one in expected]
    if wrapper == "fsdp":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view")
        found = learn(model, sequences[dist.get_rank()])
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):  # of "fsdp"
        found |= {name: x.grad for name, x in model.named_parameters()}
    close = functools.partial(torch.testing.assert_close, rtol=1e-4)
    for name, one in expected[0].items():
        other = expected[1][name]
        if name in ("log_probs", "entropy"):
            close(found[name], (one, other)[dist.get_rank()], atol=1e-5)
        else:
            grad, mean = found[name], (one + other) / 2
            close(grad if wrapper == "fsdp" else grad.full_tensor(), mean, atol=1e-5 * float(mean.norm()))


class Gather(torch.autograd.Function):
    """Megatron's, of the rows of sequence-parallel ranks: its backward sums over them and keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


@cases.add(sequence_parallel=[True, False])
def tensor_parallel(sequence_parallel: bool) -> None:
    """The call of verl's Megatron forward: `[s, 1, H]`, labels `[1, s]`, this rank's rows of the head."""
    import_external_libs(MODULE)
    mappings = ModuleType("megatron.core.tensor_parallel.mappings")
    mappings._GatherFromSequenceParallelRegion = Gather  # type: ignore[attr-defined]
    sys.modules[mappings.__name__] = mappings
    rank, group = dist.get_rank(), dist.group.WORLD
    head = Head.random(1, 26, V=84)
    exact = head.run(plain)
    rows = head.hidden.transpose(0, 1).contiguous()
    leaf = (rows.chunk(2)[rank] if sequence_parallel else rows).clone().requires_grad_()
    weight = head.weight.chunk(2)[rank].clone().requires_grad_()
    hidden = Gather.apply(leaf) if sequence_parallel else leaf * 1.0
    logps, entropy = cross_entropy_module.linear_cross_entropy(hidden, weight, head.ids, 0.7, "none", group)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    close(logps, exact.logps[0])
    close(entropy, exact.entropy[0])
    torch.autograd.backward([logps, entropy], [head.dlogps[0], head.dentropy[0]])
    dhidden = exact.dhidden.transpose(0, 1)
    close(leaf.grad, dhidden.chunk(2)[rank] if sequence_parallel else dhidden)
    close(weight.grad, exact.dweight.chunk(2)[rank])


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_workers(Path(__file__), 2, session_folder(tmp_path_factory))


@pytest.mark.parametrize("name", cases)
def test_ranks(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]


# The import.


def imported_anew(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, MODULE)
    return importlib.import_module(MODULE)


def test_without_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"pip install 'verl>=0\.9\.1'"):
        imported_anew(monkeypatch)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1.dev0", "0.8"])
def test_older_verl(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "__version__", version)
    with pytest.raises(ImportError, match=f"needs verl 0.9.1 or later, found {version}"):
        imported_anew(monkeypatch)


def test_newer_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported_anew(monkeypatch)
    monkeypatch.setattr(verl, "__version__", "0.10.0.dev")
    with pytest.warns(UserWarning, match="tested with verl 0.9.1; verl 0.10.0.dev is newer") as caught:
        imported_anew(monkeypatch)
    assert len(caught) == 1


def test_verl_with_other_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (f"{MODULE}.logps", f"{MODULE}.heads"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(monkey_patch, "patch_forward_with_backends")
    with pytest.raises(ImportError, match=r"other fused kernels than verl 0\.9\.1.*patch_forward"):
        imported_anew(monkeypatch)


def test_what_the_import_says(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="grpo_kernels")
    imported_anew(monkeypatch)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.message.startswith(
        "verl 0.9.1: registered log_ratio and"
    )


def test_fused_kernels_left_to_verl(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="grpo_kernels")
    monkeypatch.setenv("GRPO_KERNELS_VERL_FUSE", "0")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    monkeypatch.setattr(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    imported_anew(monkeypatch)
    assert torch_functional.FusedLinearForPPOFunction is VERLS_FUNCTION
    assert cross_entropy_module.linear_cross_entropy is VERLS_CROSS_ENTROPY
    assert "left as they are" in caplog.records[0].message


def test_external_lib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line of configuration, where verl's workers read it."""
    config = tiny_model(tied=False).config
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE)
    options = {"load_tokenizer": False, "override_config": {"attn_implementation": "eager"}}
    HFModelConfig(path=str(tmp_path), **options)
    assert MODULE not in sys.modules
    HFModelConfig(path=str(tmp_path), external_lib=MODULE, **options)
    assert MODULE in sys.modules


def test_external_modules() -> None:
    """The environment variable imports it in the middle of `import verl`; `import grpo_kernels` does not."""
    script = (
        "import sys, grpo_kernels\n"
        "assert not any(name.partition('.')[0] == 'verl' for name in sys.modules)\n"
        "import verl\n"
        f"assert '{MODULE}' in sys.modules\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction\n"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy\n"
        "from verl.workers.utils.losses import ppo_loss\n"
        "for x in (get_policy_loss_fn('log_ratio'), FusedLinearForPPOFunction, linear_cross_entropy):\n"
        f"    assert x.__module__.startswith('{MODULE}'), x\n"
        "assert ppo_loss.__wrapped__.__module__ == 'verl.workers.utils.losses'\n"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": MODULE}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


if __name__ == "__main__":
    cases.main()
