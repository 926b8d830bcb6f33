"""Loss and gradient against Liger 0.8.5: its Triton kernels on logits, its chunked loss on hidden states.

Two implementations that share neither code nor author. Where they differ, by design or because one of them is
wrong, a test of its own states what each does.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from products import assert_same_products, lengths, magnitudes, on_a_grid
from torch import Tensor

from grpo_kernels import (
    CISPO,
    KL,
    SAPO,
    VESPO,
    LossSpec,
    PPOClip,
    grpo_loss,
    linear_grpo_loss,
    selective_logps,
)
from grpo_kernels.reference import reference_logps

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is missing"),
    pytest.mark.usefixtures("needs_triton"),
]

B, T, V = 5, 5, 70
TWO_BLOCKS = 4103  # Liger's forward takes three blocks of 2048, its backward two of 4096
EPS_LOW, EPS_HIGH = 0.2, 0.4
DELTA = 2.0
RATIO_MAX = 2.5  # Liger's eps_high where loss_type is "cispo"
MAX_TOKENS = 8  # of dr_grpo; not T, lest either took that
BETA = 0.04
TAU_POS, TAU_NEG = 0.8, 1.3
GAMMA = {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.0, "lambda_neg": 1.2}

PPO_TYPES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "luspo": "seq-mean-token-sum",
}
SURROGATES = {
    **{name: PPOClip(EPS_LOW, EPS_HIGH) for name in PPO_TYPES},
    "cispo": CISPO(RATIO_MAX),
    "sapo": SAPO(TAU_POS, TAU_NEG),
    "vespo": VESPO(**GAMMA),
}
AGGREGATIONS = {**PPO_TYPES, "cispo": "token-mean", "sapo": "seq-mean-token-mean", "vespo": "token-mean"}
KLS = {
    "no KL": None,
    "k3": KL("k3", beta=BETA),
    "k3 corrected": KL("k3", beta=BETA, ratio_corrected=True),
}


class Batch(NamedTuple):
    """One batch in both libraries' shapes. Liger's logits have a last position that belongs to no token."""

    logits: Tensor  # [B, T + 1, V]
    ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    mask: Tensor | None  # [B, T]
    old_logps: Tensor | None  # [B, T]
    ref_logps: Tensor | None  # [B, T]
    weights: Tensor | None = None  # [B, T] or [B, 1]
    temperature: float = 1.0


class Result(NamedTuple):
    loss: Tensor
    grad: Tensor  # of the loss by Batch.logits
    kl: Tensor | None = None  # mean over the unmasked tokens
    clip_fraction: Tensor | None = None
    factor: float = 1.0  # the largest that a token's weight is multiplied by in the loss


def random_batch(
    seed: int,
    device: str,
    *,
    vocab: int = V,
    temperature: float = 1.0,
    weights: str | None = None,
    on_policy: bool = False,
) -> Batch:
    """Uneven sequences, one with a hole, one with no token, one without advantage; ratios near 1 and far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(T) < torch.tensor([5, 3, 4, 0, 2])[:, None]
    mask[0, 1 + seed % 3] = False
    order = torch.randperm(B, generator=generator)
    logits, ids = 2 * normal(B, T + 1, vocab), torch.randint(vocab, (B, T), generator=generator)
    logps = reference_logps(logits[:, :-1], ids, temperature=temperature)
    # Sequences drift as a whole, or all mean log-ratios would lie within the clip range. Some tokens are far
    # off.
    log_ratio = 0.4 * normal(B, 1) + 0.3 * normal(B, T) + 2 * normal(B, T) * (normal(B, T) > 1)
    token_weights = 1.5 * torch.rand(B, T if weights == "token" else 1, generator=generator)
    batch = Batch(
        logits,
        ids,
        torch.tensor([1.3, -0.7, 0.0, 2.0, -1.1]),
        # Both take either.
        mask[order] if seed % 2 else mask[order].long(),
        None if on_policy else logps - log_ratio,
        logps + 0.3 * normal(B, T),
        # A weight of VESPO's counts in Liger even where it is masked.
        {None: None, "sequence": token_weights, "token": token_weights.where(mask[order], 1.0)}[weights],
        temperature,
    )
    return batch._replace(
        **{name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    )


def lone_token(device: str, *, log_ratio: float = 0.0, advantage: float = 1.0, **options: Any) -> Batch:
    """One token of probability about 1/2, whose loss is the whole batch's."""
    logits = torch.linspace(-1, 1, 7).repeat(1, 2, 1)
    logits[..., 3] = 2.0
    ids = torch.tensor([[3]])
    old = reference_logps(logits[:, :-1], ids) - log_ratio
    batch = Batch(logits, ids, torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.long), old, old)
    batch = batch._replace(**options)
    return batch._replace(
        **{name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    )


def spec_of(loss_type: str, *, level: str = "token", kl: KL | None = None, **surrogate: Any) -> LossSpec:
    """Ours of Liger's loss_type. `surrogate`: options of PPOClip in place of the test's own."""
    return LossSpec(
        PPOClip(**{"eps_low": EPS_LOW, "eps_high": EPS_HIGH, **surrogate})
        if loss_type in PPO_TYPES
        else SURROGATES[loss_type],
        kl,
        level=level,
        aggregation=AGGREGATIONS[loss_type],
        max_tokens=MAX_TOKENS,
    )


def ours(batch: Batch, spec: LossSpec, backend: str, **options: Any) -> Result:
    leaf = batch.logits.detach().clone().requires_grad_()
    out = grpo_loss(
        leaf[:, :-1],
        batch.ids,
        batch.advantages,
        spec=spec,
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logps=None if spec.kl is None else batch.ref_logps,
        token_weights=batch.weights,
        temperature=batch.temperature,
        backend=backend,
        **options,
    )
    out.loss.backward()
    assert leaf.grad is not None
    # CISPO and VESPO multiply their weight by the log-probability.
    times_logp = isinstance(spec.surrogate, (CISPO, VESPO))
    return Result(
        out.loss.detach(),
        leaf.grad,
        out.metrics.get("kl"),
        out.metrics.get("clip_fraction"),
        factor=float(out.logps.abs().max()) if times_logp else 1.0,
    )


def liger_options(loss_type: str, *, level: str = "token", kl: KL | None = None) -> dict[str, Any]:
    """Of either of Liger's losses; their names for the clip range differ."""
    return {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.0 if kl is None else kl.beta,
        "use_bias_correction_kl": kl is not None and kl.ratio_corrected,
        "max_completion_length": MAX_TOKENS,
        "sapo_temperature_pos": TAU_POS,
        "sapo_temperature_neg": TAU_NEG,
        **{f"vespo_{name}": value for name, value in GAMMA.items()},
    }


def liger(batch: Batch, loss_type: str, *, reduce: bool = True, **options: Any) -> Result:
    """Liger's kernels. `reduce=False`: the losses of the tokens, aggregated here as in TRL 1.16's luspo."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    level, kl = options.pop("level", "token"), options.pop("kl", None)
    leaf = batch.logits.detach().clone().requires_grad_()
    out = triton_grpo_loss(
        leaf,
        batch.old_logps,
        batch.ref_logps,
        batch.ids,
        batch.advantages,
        batch.mask,
        batch.temperature,
        eps_low=EPS_LOW,
        eps_high=RATIO_MAX if loss_type == "cispo" else EPS_HIGH,
        vllm_is_ratio=batch.weights,
        reduce=reduce,
        **{"inplace": False, **liger_options(loss_type, level=level, kl=kl), **options},
    )
    if reduce:
        loss, (*kl_mean, clip_fraction) = out
    else:
        assert batch.mask is not None
        per_token, kl_tokens, clipped = out
        loss = per_token.sum(-1).mean()
        kl_mean = [] if kl is None else [kl_tokens.sum() / batch.mask.sum()]
        clip_fraction = clipped.sum() / batch.mask.sum()
    loss.backward()
    assert leaf.grad is not None
    clips = loss_type in PPO_TYPES or loss_type == "cispo"  # else a constant 0
    return Result(
        loss.detach(),
        leaf.grad,
        kl_mean[0].detach() if kl_mean else None,
        clip_fraction.detach() if clips else None,
    )


def assert_same(found: Result, expected: Result, what: str = "") -> None:
    """To a few roundings of fp32 in every log-probability, and those times the ratio's exponent.

    The gradient has the weights of the tokens; the loss may be the small sum of large terms of both signs.
    """
    size = float(expected.loss.abs() + found.factor * expected.grad.abs().sum())
    assert abs(float(found.loss - expected.loss)) <= 5e-6 * size, f"{what}: {found.loss} {expected.loss}"
    assert_rows(found.grad, expected.grad, what)
    assert (found.kl is None) == (expected.kl is None), what
    for name in ("kl", "clip_fraction"):
        got, wanted = getattr(found, name), getattr(expected, name)
        if wanted is not None:
            # k3 as Liger sums it cancels to a rounding of 1.
            assert abs(float(got - wanted)) <= 4e-6 * (1 + float(wanted)), f"{what}: {name}"


def assert_rows(found: Tensor, expected: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Each row within `tolerance` of its largest entry, and of a twentieth of the batch's.

    A row's surrogate and KL term may cancel, and neither is more exact than their sum is small.
    """
    assert not bool(expected.isnan().any()), f"{what}: Liger's gradient is NaN"
    rows = expected.abs().amax(-1)
    error = (found - expected).abs().amax(-1)
    excess = (error - tolerance * (rows + rows.max() / 20)).nan_to_num(nan=math.inf)
    row = int(excess.argmax())
    assert float(excess.max()) <= 0, f"{what}: row {row} errs {error.flatten()[row]} of {rows.flatten()[row]}"
    # Which rows have a gradient at all: masked ones do not, nor do clipped ones, nor the last position.
    assert bool(((rows == 0) == (found == 0).all(-1)).all()), f"{what}: rows of exact zeros"


class Setting(NamedTuple):
    """Hashable, so that one result of Liger's serves both backends."""

    loss_type: str
    level: str
    kl: str
    delta: float | None
    weights: str | None
    turn: int

    def batch(self, device: str) -> Batch:
        """What does not couple to the rest in the formulas, temperature and behaviour policy, takes turns."""
        return random_batch(
            hash_of(self),
            device,
            weights=self.weights,
            temperature=(1.0, 0.7, 1.3)[self.turn % 3],
            on_policy=hash_of(self) % 5 == 0,
        )


def hash_of(setting: Setting) -> int:
    """The same in every process, unlike `hash`."""
    return sum(map(ord, repr(setting)))


def settings(loss_type: str, level: str, kl: str) -> list[Setting]:
    """Weights x delta. PPO's aggregations share kernels, which see all with grpo; the others take half."""
    if loss_type not in PPO_TYPES:
        # A sequence's weight counts otherwise in vespo: test_vespo_weight_of_a_sequence.
        grid = [(None, None), (None, "token")] + [(None, "sequence")] * (loss_type != "vespo")
    else:
        grid = list(itertools.product((None, DELTA), (None, "token", "sequence")))
    start = (list(SURROGATES).index(loss_type) + list(KLS).index(kl)) % 2
    chosen = grid[start::2] if loss_type in PPO_TYPES and loss_type != "grpo" else grid
    return [Setting(loss_type, level, kl, *rest, turn) for turn, rest in enumerate(chosen)]


@functools.cache
def liger_of(setting: Setting, device: str) -> Result:
    return liger(
        setting.batch(device),
        setting.loss_type,
        level=setting.level,
        kl=KLS[setting.kl],
        delta=setting.delta,
        reduce=setting.loss_type != "luspo",  # test_luspo
    )


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "loss_type, level",
    [(name, "token") for name in SURROGATES] + [(name, "sequence") for name in PPO_TYPES],
)
def test_every_loss(loss_type: str, level: str, kl: str, backend: str, device: str) -> None:
    """Every loss_type x level x KL that Liger has, under weights and delta."""
    for setting in settings(loss_type, level, kl):
        spec = spec_of(loss_type, level=level, kl=KLS[kl])
        if setting.delta is not None:
            spec = spec_of(loss_type, level=level, kl=KLS[kl], delta=setting.delta)
        found = ours(setting.batch(device), spec, backend)
        assert_same(found, liger_of(setting, device), str(setting))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_global_normalizer(loss_type: str, backend: str, device: str) -> None:
    """Liger's `num_items_in_batch` is our `normalizer` where there is one process."""
    batch = random_batch(1, device)
    found = ours(batch, spec_of(loss_type), backend, normalizer=37.0)
    assert_same(found, liger(batch, loss_type, num_items_in_batch=37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "loss_type, level",
    [("grpo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("sapo", "token"), ("vespo", "token")],
)
def test_several_blocks(loss_type: str, level: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Taken tokens in every block, and no mask."""
    batch = random_batch(2, device, vocab=TWO_BLOCKS)._replace(mask=None)
    batch = batch._replace(logits=batch.logits.to(dtype))
    kl = KLS["k3 corrected"]
    found = ours(batch, spec_of(loss_type, level=level, kl=kl), backend)
    expected = liger(batch, loss_type, level=level, kl=kl)
    if dtype == torch.float32:
        assert_same(found, expected)
    else:
        # Both round the gradient once; Triton's interpreter truncates it.
        torch.testing.assert_close(found.loss, expected.loss, rtol=2e-6, atol=1e-6)
        assert_rows(found.grad.float(), expected.grad.float(), "bf16", tolerance=2**-7)


def test_selective_logps(backend: str, device: str) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    for vocab in (V, TWO_BLOCKS):
        batch = random_batch(3, device, vocab=vocab)
        expected = fused_selective_log_softmax(batch.logits, batch.ids, 0.7, batch.mask)
        found = selective_logps(
            batch.logits[:, :-1], batch.ids, temperature=0.7, mask=batch.mask, backend=backend
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


class Head(NamedTuple):
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    @staticmethod
    def random(seed: int, device: str, *, bias: bool = True, vocab: int = V, H: int = 12) -> Head:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((B, T, H), (vocab, H), (vocab,))
        # Exact logits, whatever the order of their sums: products.py.
        tensors = [on_a_grid(0.7 * torch.randn(*shape, generator=generator)).to(device) for shape in shapes]
        return Head(tensors[0], tensors[1], tensors[2] if bias else None)

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(*self)

    def leaves(self) -> Head:
        return Head(*(None if x is None else x.detach().clone().requires_grad_() for x in self))

    def grads(self) -> list[Tensor]:
        grads = [x.grad for x in self if x is not None]
        assert all(grad is not None for grad in grads)
        return grads  # type: ignore[return-value]


class LinearResult(NamedTuple):
    loss: Tensor
    grads: list[Tensor]  # by hidden states, weight and bias, where there is one


def from_head(batch: Batch, head: Head) -> Batch:
    """`batch` with its log-ratios, on the log-probabilities of the head's logits."""
    before = reference_logps(batch.logits[:, :-1], batch.ids, temperature=batch.temperature)
    after = reference_logps(head.logits(), batch.ids, temperature=batch.temperature)
    moved = {
        name: None if x is None else x - before + after
        for name, x in (("old_logps", batch.old_logps), ("ref_logps", batch.ref_logps))
    }
    return batch._replace(**moved)


def ours_chunked(batch: Batch, head: Head, spec: LossSpec, ref: Head | None, backend: str) -> LinearResult:
    head = head.leaves()
    if spec.kl is None:
        reference = {}
    elif ref is None:
        reference = {"ref_logps": batch.ref_logps}
    else:
        names = ("ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias")
        reference = dict(zip(names, ref, strict=True))
    out = linear_grpo_loss(
        head.hidden,
        head.weight,
        batch.ids,
        batch.advantages,
        spec=spec,
        lm_head_bias=head.bias,
        completion_mask=batch.mask,
        old_logps=batch.old_logps,
        token_weights=batch.weights,
        temperature=batch.temperature,
        chunk_tokens=7,
        backend=backend,
        **reference,
    )
    out.loss.backward()
    return LinearResult(out.loss.detach(), head.grads())


def liger_chunked(
    batch: Batch, head: Head, loss_type: str, *, ref: Head | None = None, **options: Any
) -> LinearResult:
    """Liger's loss from hidden states: PyTorch, the losses' derivatives by autograd. Not compiled here."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    level, kl = options.pop("level", "token"), options.pop("kl", None)
    loss_fn = LigerFusedLinearGRPOLoss(
        compiled=False,
        use_ref_model=kl is not None,
        chunk_size=2,
        epsilon_low=EPS_LOW,
        epsilon_high=RATIO_MAX if loss_type == "cispo" else EPS_HIGH,
        temperature=batch.temperature,
        **liger_options(loss_type, level=level, kl=kl),
        **options,
    )
    head = head.leaves()
    reference = {"ref_per_token_logps": batch.ref_logps}
    if ref is not None:
        reference = dict(zip(("ref_input", "ref_weight", "ref_bias"), ref, strict=True))
    loss, _ = loss_fn(
        head.hidden,
        head.weight,
        batch.ids,
        batch.mask,
        batch.advantages,
        head.bias,
        old_per_token_logps=batch.old_logps,
        vllm_is_ratio=batch.weights,
        **(reference if kl is not None else {}),
    )
    loss.backward()
    return LinearResult(loss.detach(), head.grads())


# Liger's chunked luspo is TRL's only where no term is per token: test_luspo_from_hidden_states.
CHUNKED = [
    *((name, level) for name in PPO_TYPES if name != "luspo" for level in ("token", "sequence")),
    *((name, "token") for name in ("cispo", "sapo", "vespo")),
]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss_type, level", CHUNKED)
def test_from_hidden_states(loss_type: str, level: str, kl: str, backend: str, device: str) -> None:
    """Loss and gradients by hidden states, weight and bias; the reference as logps or hidden states."""
    for turn, weights in enumerate((None, "token", None if loss_type == "vespo" else "sequence")):
        seed = turn + sum(map(ord, loss_type + level + kl))
        head = Head.random(seed, device, bias=turn != 1)
        ref = Head.random(seed, device, bias=turn != 1) if turn == 2 else None
        if ref is not None:
            ref = ref._replace(hidden=ref.hidden + 0.1 * Head.random(seed + 1, device).hidden)
        batch = random_batch(seed, device, weights=weights, temperature=(1.0, 0.7, 1.3)[turn])
        batch = from_head(batch, head)
        delta = DELTA if turn and loss_type in PPO_TYPES else None
        options = {} if delta is None else {"delta": delta}
        spec = spec_of(loss_type, level=level, kl=KLS[kl], **options)
        found = ours_chunked(batch, head, spec, ref, backend)
        expected = liger_chunked(batch, head, loss_type, level=level, kl=KLS[kl], ref=ref, delta=delta)
        assert_same_linear(found, expected, str((weights, delta)))


def assert_same_linear(found: LinearResult, expected: LinearResult, what: str = "") -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=3e-5, atol=1e-5)
    for name, got, wanted in zip(("hidden", "weight", "bias"), found.grads, expected.grads, strict=False):
        # Rows of the weight's gradient are sums over the tokens that may cancel.
        error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
        assert error <= 1e-5 * size, f"{what}: gradient by {name} errs {error} of {size}"


# From here on: where the two differ. Liger is quoted as it is, so that a release that mends it is noticed.

HUGE = 200.0  # nats: its exponential is infinite in fp32
ratio_losses = pytest.mark.parametrize(
    "loss_type, level", [("grpo", "token"), ("grpo", "sequence"), ("sapo", "token")]
)


def token_gradient(result: Result) -> Tensor:
    """Of the lone token's logits `[V]`."""
    return result.grad[0, 0]


@ratio_losses
def test_infinite_ratio_that_is_clipped(loss_type: str, level: str, backend: str, device: str) -> None:
    """The value is right in both. Liger multiplies the infinite ratio by a zero: its gradient is NaN."""
    batch = lone_token(device, log_ratio=HUGE)
    theirs = liger(batch, loss_type, level=level)
    found = ours(batch, spec_of(loss_type, level=level), backend)
    torch.testing.assert_close(found.loss, theirs.loss)
    assert bool(token_gradient(theirs).isnan().all())
    assert bool((found.grad == 0).all())


@ratio_losses
def test_infinite_ratio_without_advantage(loss_type: str, level: str, backend: str, device: str) -> None:
    batch = lone_token(device, log_ratio=HUGE, advantage=0.0)
    theirs = liger(batch, loss_type, level=level)
    found = ours(batch, spec_of(loss_type, level=level), backend)
    assert bool(token_gradient(theirs).isnan().all())
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_infinite_ratio_of_weight_zero(level: str, backend: str, device: str) -> None:
    """A weight of 0 takes the token out, as an off-policy mask does. Liger has inf * 0."""
    batch = lone_token(device, log_ratio=HUGE, advantage=-1.0, weights=torch.zeros(1, 1))
    theirs = liger(batch, "grpo", level=level)
    found = ours(batch, spec_of("grpo", level=level), backend)
    assert bool(theirs.loss.isnan())
    assert bool(token_gradient(theirs).isnan().all())
    assert float(found.loss) == 0
    assert bool((found.grad == 0).all())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_infinite_ratio_that_is_not_clipped(level: str, backend: str, device: str) -> None:
    """No difference: a negative advantage has no upper clip, and both say inf. We offer two bounds."""
    batch = lone_token(device, log_ratio=HUGE, advantage=-1.0)
    spec = spec_of("grpo", level=level)
    for result in (liger(batch, "grpo", level=level), ours(batch, spec, backend)):
        assert float(result.loss) == math.inf
        assert not bool(token_gradient(result).isfinite().any())
    for bounded in (
        spec_of("grpo", level=level, dual_clip=3.0),
        LossSpec(spec.surrogate, level=level, log_ratio_clamp=20.0),
    ):
        found = ours(batch, bounded, backend)
        assert math.isfinite(float(found.loss))
        assert bool((found.grad == 0).all())


def test_infinite_ratio_from_hidden_states(backend: str, device: str) -> None:
    """As above, in Liger's chunked loss by autograd, and it spreads: the weight's gradient is all NaN."""
    head = Head.random(0, device)
    batch = from_head(random_batch(0, device), head)
    assert batch.old_logps is not None and batch.mask is not None
    huge = batch.old_logps - HUGE * (batch.advantages > 0)[:, None] * (torch.arange(T, device=device) == 0)
    theirs = liger_chunked(batch._replace(old_logps=huge), head, "grpo")
    found = ours_chunked(batch._replace(old_logps=huge), head, spec_of("grpo"), None, backend)
    assert bool(theirs.grads[1].isnan().all())
    torch.testing.assert_close(found.loss, theirs.loss)
    assert all(bool(grad.isfinite().all()) for grad in found.grads)


def test_sapo_far_out(backend: str, device: str) -> None:
    """Liger has 1 - sigmoid(x) in its gradient; at x = 14 fp32 keeps two digits of it, of sigmoid(-x) all."""
    batch = lone_token(device, log_ratio=2.9)
    truth = ours(batch._replace(logits=batch.logits.double()), spec_of("sapo"), "torch").grad
    theirs, found = liger(batch, "sapo").grad, ours(batch, spec_of("sapo"), backend).grad
    assert float((theirs - truth).abs().max() / truth.abs().max()) > 3e-3
    assert float((found - truth).abs().max() / truth.abs().max()) < 1e-4


def test_delta_within_the_clip_range(backend: str, device: str) -> None:
    """min(min(r, delta) * A, clip(r) * A) is r * A for A < 0 and delta < r < 1 + eps_high: it has a gradient.

    Liger takes the clipped branch for flat, as it is outside the range.
    """
    batch = lone_token(device, log_ratio=0.2, advantage=-1.0)
    leaf = batch.logits.clone().requires_grad_()
    ratio = torch.exp(reference_logps(leaf[:, :-1], batch.ids) - batch.old_logps)
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    loss = -torch.min(ratio.clamp(max=1.1) * -1.0, clipped * -1.0)
    (truth,) = torch.autograd.grad(loss.sum(), leaf)
    for level in ("token", "sequence"):
        theirs = liger(batch, "grpo", level=level, delta=1.1)
        found = ours(batch, spec_of("grpo", level=level, delta=1.1), backend)
        torch.testing.assert_close(theirs.loss, loss.sum().detach())
        assert bool((theirs.grad == 0).all())
        torch.testing.assert_close(found.loss, loss.sum().detach())
        torch.testing.assert_close(found.grad, truth)


def test_first_block_at_minus_infinity(backend: str, device: str) -> None:
    """Liger's running maximum starts at -inf, and so stays after a block of -inf: -inf - -inf."""
    batch = random_batch(4, device, vocab=2100)
    logits, ids = batch.logits.clone(), batch.ids % 52
    logits[..., :2048] = -math.inf
    theirs = liger(batch._replace(logits=logits, ids=ids + 2048), "grpo")
    found = ours(batch._replace(logits=logits, ids=ids + 2048), spec_of("grpo"), backend)
    expected = liger(batch._replace(logits=logits[..., 2048:].contiguous(), ids=ids), "grpo")
    assert bool(theirs.loss.isnan())
    assert bool((found.grad[..., :2048] == 0).all())
    assert_same(found._replace(grad=found.grad[..., 2048:]), expected)


def test_taken_token_at_minus_infinity(backend: str, device: str) -> None:
    """On-policy the ratio is 1 by definition; Liger computes logp - logp of -inf."""
    batch = lone_token(device, old_logps=None)
    batch.logits[..., 3] = -math.inf
    theirs, found = liger(batch, "grpo"), ours(batch, spec_of("grpo"), backend)
    assert bool(theirs.loss.isnan())
    assert float(found.loss) == -1
    assert bool(found.grad.isfinite().all())


def test_logits_far_from_zero(backend: str, device: str) -> None:
    """Liger keeps a row's logsumexp in fp32, which has few digits left next to 1e4.

    The shifted logits are exact. Our kernels' powers of two cost 1e-4, the torch backend's shift nothing.
    """
    batch = random_batch(13, device, on_policy=True)._replace(mask=None)
    batch = batch._replace(logits=torch.round(batch.logits * 64) / 64)
    shifted = batch._replace(logits=batch.logits + 1e4)
    assert torch.equal(shifted.logits - 1e4, batch.logits)
    truth = ours(batch._replace(logits=batch.logits.double()), spec_of("grpo"), "torch").grad

    def error(result: Result) -> float:
        return float(((result.grad - truth).abs().amax(-1) / truth.abs().amax(-1)).nan_to_num(0.0).max())

    assert error(liger(batch, "grpo")) < 1e-5
    assert error(liger(shifted, "grpo")) > 3e-4
    assert error(ours(shifted, spec_of("grpo"), backend)) < (2e-4 if backend == "triton" else 1e-6)


def test_small_kl(backend: str, device: str) -> None:
    """1e-4 nats from the reference k3 is 5e-9, which exp(x) - x - 1 in fp32 rounds to a multiple of 6e-8."""
    batch = lone_token(device, advantage=0.0)
    assert batch.old_logps is not None
    batch = batch._replace(ref_logps=batch.old_logps + 1e-4)
    logps = reference_logps(batch.logits[:, :-1].double(), batch.ids)
    x = batch.ref_logps.double() - logps
    truth = float(torch.expm1(x) - x)
    kl = KL("k3", beta=1.0)
    theirs, found = liger(batch, "grpo", kl=kl), ours(batch, spec_of("grpo", kl=kl), backend)
    assert abs(float(theirs.loss) / truth - 1) > 0.9
    assert abs(float(found.loss) / truth - 1) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_double_precision(dtype: torch.dtype, backend: str, device: str) -> None:
    """fp64 logits are computed in fp64 here, in fp32 by Liger."""
    batch = random_batch(5, device)
    batch = batch._replace(logits=batch.logits.to(dtype))
    theirs, found = liger(batch, "grpo"), ours(batch, spec_of("grpo"), backend)
    assert theirs.loss.dtype == torch.float32
    assert found.loss.dtype == dtype
    torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    if dtype == torch.float64:
        truth = ours(batch, spec_of("grpo"), "torch").grad
        assert float((theirs.grad - truth).abs().max()) > 1e-10
        assert float((found.grad - truth).abs().max()) < 1e-14


def masked_to(batch: Batch, value: float, *names: str) -> Batch:
    """`batch` with `value` at the masked positions of the named fields."""
    assert batch.mask is not None
    fields = {name: getattr(batch, name).masked_fill(batch.mask == 0, value) for name in names}
    return batch._replace(**fields)


def test_nan_at_masked_positions(backend: str, device: str) -> None:
    """Liger's kernels skip masked positions at token level. At sequence level its PyTorch part multiplies."""
    batch = random_batch(6, device, weights="token")
    kl = KLS["k3"]
    for level, names in (
        ("token", ("old_logps", "ref_logps", "weights")),
        ("sequence", ("ref_logps",)),
        ("sequence", ("old_logps",)),
        ("sequence", ("weights",)),
    ):
        holed = masked_to(batch, math.nan, *names)
        spec = spec_of("grpo", level=level, kl=kl)
        found, expected = ours(holed, spec, backend), ours(masked_to(batch, 0.0, *names), spec, backend)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad, expected.grad)
        theirs = liger(holed, "grpo", level=level, kl=kl)
        spoilt = level == "sequence" and names != ("ref_logps",)
        assert bool(theirs.grad.isnan().any()) == spoilt, names


def test_nan_at_masked_positions_of_hidden_states(backend: str, device: str) -> None:
    """Liger's chunked loss multiplies by the mask at token level, too."""
    head = Head.random(6, device)
    batch = from_head(random_batch(6, device), head)
    holed = masked_to(batch, math.nan, "old_logps")
    clean = masked_to(batch, 0.0, "old_logps")
    found, expected = (ours_chunked(x, head, spec_of("grpo"), None, backend) for x in (holed, clean))
    with magnitudes():
        sizes = ours_chunked(clean, head, spec_of("grpo"), None, backend).grads
    theirs = liger_chunked(holed, head, "grpo")
    assert bool(theirs.loss.isnan())
    assert torch.equal(found.loss, expected.loss)
    grads = zip(found.grads, expected.grads, sizes, strict=True)
    for (name, terms), (got, wanted, size) in zip(lengths(B * T, V).items(), grads, strict=True):
        assert_same_products(got, wanted, size, terms, f"gradient of {name}")


def test_vespo_weight_of_a_sequence(backend: str, device: str) -> None:
    """No difference: a weight `[B, 1]` is a factor of the sequence's ratio once, as in TRL, not per token."""
    batch = random_batch(14, device, weights="sequence")
    found = ours(batch, spec_of("vespo"), backend)
    assert_same(found, liger(batch, "vespo"))
    head = Head.random(14, device)
    batch = from_head(batch, head)
    found_linear = ours_chunked(batch, head, spec_of("vespo"), None, backend)
    assert_same_linear(found_linear, liger_chunked(batch, head, "vespo"))


def test_vespo_weight_of_zero(backend: str, device: str) -> None:
    """No difference: its logarithm is held at log 1e-8, and the sequence's weight is next to nothing."""
    batch = random_batch(15, device, weights="token")
    assert batch.weights is not None
    batch.weights[batch.advantages > 1.5, 0] = 0.0
    assert_same(ours(batch, spec_of("vespo"), backend), liger(batch, "vespo"))


def test_vespo_weights_at_masked_positions(backend: str, device: str) -> None:
    """Liger sums the log-weights of masked tokens, too, and a NaN there becomes phi = 0, in silence.

    So does TRL, but it makes the weights itself, and makes them 1 where masked.
    """
    batch = random_batch(7, device, weights="token")
    spec = spec_of("vespo")
    expected = ours(batch, spec, backend)
    assert_same(expected, liger(batch, "vespo"))
    for value in (0.5, math.nan):
        holed = masked_to(batch, value, "weights")
        found, theirs = ours(holed, spec, backend), liger(holed, "vespo")
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad, expected.grad)
        assert float((theirs.loss - expected.loss).abs() / expected.loss.abs()) > 1e-2
    # The last was NaN: sequences with a masked token have no gradient any more, the others theirs.
    assert batch.mask is not None
    whole = (batch.mask != 0).all(-1)
    assert bool((theirs.grad[~whole] == 0).all())


@pytest.mark.parametrize("loss_type", SURROGATES)
def test_everything_masked(loss_type: str, backend: str, device: str) -> None:
    """No difference: loss and gradients are 0."""
    batch = random_batch(8, device)
    assert batch.mask is not None
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    kl = KLS["k3 corrected"]
    for result in (liger(batch, loss_type, kl=kl), ours(batch, spec_of(loss_type, kl=kl), backend)):
        assert float(result.loss) == 0
        assert bool((result.grad == 0).all())


def test_luspo(backend: str, device: str) -> None:
    """TRL 1.16, and we: mean over sequences of sums over tokens. Liger's kernels weigh each by length / T."""
    spec = spec_of("luspo", level="sequence")
    batch = random_batch(9, device)
    assert batch.mask is not None
    found, theirs = ours(batch, spec, backend), liger(batch, "luspo", level="sequence")
    assert float((theirs.loss - found.loss).abs()) > 0.1 * float(found.loss.abs())
    lengths = (batch.mask != 0).sum(-1, keepdim=True)
    assert_same(ours(batch._replace(weights=lengths / T), spec, backend), theirs)
    # Of equal lengths they are one.
    full = batch._replace(mask=torch.ones_like(batch.mask))
    assert_same(ours(full, spec, backend), liger(full, "luspo", level="sequence"))


def test_luspo_at_token_level(backend: str, device: str) -> None:
    """Besides, Liger's gradient is not that of its loss: token t of sequence b gets the length of b + t.

    Its lengths `[B, 1]` have the strides (1, 1), and the backward kernel steps through them by token. Here no
    token has b + t >= B, where it reads what lies behind them.
    """
    batch = random_batch(9, device)
    b, t = torch.arange(B, device=device)[:, None], torch.arange(T + 1, device=device)
    batch = batch._replace(mask=(b + t < B)[:, :T].contiguous())
    lengths = B - b
    found = ours(batch._replace(weights=lengths / T), spec_of("luspo"), backend)
    theirs = liger(batch, "luspo")
    torch.testing.assert_close(found.loss, theirs.loss)
    strayed = found.grad * ((lengths - t).clamp(min=0) / lengths)[..., None]
    assert_rows(strayed, theirs.grad, "strayed")
    assert float((found.grad - theirs.grad).abs().max()) > 0.1 * float(found.grad.abs().max())


def test_luspo_from_hidden_states(backend: str, device: str) -> None:
    """Liger's chunked loss is TRL's, unlike its kernels, but forgets the mask where a term is per token."""
    head = Head.random(10, device)
    batch = from_head(random_batch(11, device), head)
    assert batch.mask is not None
    masked = batch.mask == 0
    found = ours_chunked(batch, head, spec_of("luspo", level="sequence"), None, backend)
    assert_same_linear(found, liger_chunked(batch, head, "luspo", level="sequence"))
    for level, kl in (("sequence", "k3"), ("token", "no KL")):
        theirs = liger_chunked(batch, head, "luspo", level=level, kl=KLS[kl])
        spec = spec_of("luspo", level=level, kl=KLS[kl])
        found = ours_chunked(batch, head, spec, None, backend)
        assert bool((theirs.grads[0][masked] != 0).any())
        assert bool((found.grads[0][masked] == 0).all())


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_normalizer_of_two_ranks(
    loss_type: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger adds up the ranks' tokens inside the loss; here that is the caller's: `normalizer`."""
    batch = random_batch(11, device)
    assert batch.mask is not None
    alone, elsewhere, calls = liger(batch, loss_type), 30, []

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> None:
        calls.append(x.add_(elsewhere))

    for name, stub in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_world_size": lambda *args: 2,
        "all_reduce": all_reduce,
    }.items():
        monkeypatch.setattr(torch.distributed, name, stub)
    theirs = liger(batch, loss_type)
    assert calls
    calls.clear()
    found = ours(batch, spec_of(loss_type), backend)
    assert not calls
    assert_same(found, alone)
    tokens = float((batch.mask != 0).sum())
    assert_same(ours(batch, spec_of(loss_type), backend, normalizer=(tokens + elsewhere) / 2), theirs)


def test_logits_overwritten(backend: str, device: str) -> None:
    """Liger's `inplace=True`, its default, writes past autograd: what needed the logits finds the gradient.

    Here autograd knows, and raises.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch = random_batch(12, device)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = batch.logits.clone().requires_grad_()
        loss(torch.tanh(leaf)).backward()  # tanh keeps its output for its derivative
        assert leaf.grad is not None
        return leaf.grad

    def theirs(logits: Tensor, inplace: bool) -> Tensor:
        args = (logits, batch.old_logps, None, batch.ids, batch.advantages, batch.mask, 1.0, 0.0)
        return triton_grpo_loss(*args, inplace=inplace, loss_type="grpo", reduce=True)[0]

    def found(logits: Tensor, inplace: bool) -> Tensor:
        return grpo_loss(
            logits[:, :-1],
            batch.ids,
            batch.advantages,
            spec=spec_of("grpo"),
            completion_mask=batch.mask,
            old_logps=batch.old_logps,
            inplace=inplace,
            backend=backend,
        ).loss

    right = gradient(lambda logits: theirs(logits, False))
    assert_rows(gradient(lambda logits: found(logits, False)), right, "two buffers")
    wrong = gradient(lambda logits: theirs(logits, True))
    assert float((wrong - right).abs().max()) > 0.1 * float(right.abs().max())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda logits: found(logits, True))
