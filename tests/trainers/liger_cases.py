"""A batch in the shapes of both libraries, both losses of its logits, and their comparison."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import CISPO, KL, SAPO, VESPO, LossSpec, PPOClip, grpo_loss
from grpo_kernels.reference import reference_logps

NEEDS_LIGER = [
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is missing"),
    pytest.mark.usefixtures("needs_triton"),
]


B, T, V = 5, 5, 70
TWO_BLOCKS = 4103  # Liger's forward takes three blocks of 2048, its backward two of 4096
EPS_LOW, EPS_HIGH = 0.2, 0.4
DELTA = 2.0
RATIO_MAX = 2.5  # Liger's eps_high if loss_type is "cispo"
MAX_TOKENS = 8  # of dr_grpo; differs from T, so that neither side can use T instead
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
    """One batch in the shapes of both libraries. Liger's logits have a last position without a token."""

    logits: Tensor  # [B, T + 1, V]
    ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    mask: Tensor | None  # [B, T]
    old_logps: Tensor | None  # [B, T]
    ref_logps: Tensor | None  # [B, T]
    weights: Tensor | None = None  # [B, T] or [B, 1]
    temperature: float = 1.0


class Result(NamedTuple):
    """A loss, its gradient and its metrics."""

    loss: Tensor
    grad: Tensor  # of the loss with respect to Batch.logits
    kl: Tensor | None = None  # mean over the unmasked tokens
    clip_fraction: Tensor | None = None
    factor: float = 1.0  # the largest number that multiplies a token's weight in the loss


def random_batch(
    seed: int,
    device: str,
    *,
    vocab: int = V,
    temperature: float = 1.0,
    weights: str | None = None,
    on_policy: bool = False,
) -> Batch:
    """Make sequences of several lengths.

    One has a masked position in the middle, one has no token, one has no advantage. Some ratios are near 1,
    others far from it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(T) < torch.tensor([5, 3, 4, 0, 2])[:, None]
    mask[0, 1 + seed % 3] = False
    order = torch.randperm(B, generator=generator)
    logits, ids = 2 * normal(B, T + 1, vocab), torch.randint(vocab, (B, T), generator=generator)
    logps = reference_logps(logits[:, :-1], ids, temperature=temperature)
    # Each sequence has an offset, so that some mean log-ratios are outside the clip range. Some tokens have a
    # large offset.
    log_ratio = 0.4 * normal(B, 1) + 0.3 * normal(B, T) + 2 * normal(B, T) * (normal(B, T) > 1)
    token_weights = 1.5 * torch.rand(B, T if weights == "token" else 1, generator=generator)
    batch = Batch(
        logits,
        ids,
        torch.tensor([1.3, -0.7, 0.0, 2.0, -1.1]),
        # Both libraries accept either dtype.
        mask[order] if seed % 2 else mask[order].long(),
        None if on_policy else logps - log_ratio,
        logps + 0.3 * normal(B, T),
        # With VESPO, Liger also counts the weights at masked positions, so they are 1.
        {None: None, "sequence": token_weights, "token": token_weights.where(mask[order], 1.0)}[weights],
        temperature,
    )
    return batch._replace(
        **{name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    )


def lone_token(device: str, *, log_ratio: float = 0.0, advantage: float = 1.0, **options: Any) -> Batch:
    """Make a batch of one token with a probability of about 1/2."""
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
    """Return our spec for a `loss_type` of Liger. `surrogate` replaces options of PPOClip."""
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
    """Compute our loss and its gradient."""
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
    """Return the options that both losses of Liger share. Their names for the clip range differ."""
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
    """Compute the loss of Liger's kernels.

    With `reduce=False`, aggregate it here as luspo in TRL 1.16 does.
    """
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
    clips = loss_type in PPO_TYPES or loss_type == "cispo"  # for the other losses, Liger returns a constant 0
    return Result(
        loss.detach(),
        leaf.grad,
        kl_mean[0].detach() if kl_mean else None,
        clip_fraction.detach() if clips else None,
    )


def assert_same(found: Result, expected: Result, what: str = "") -> None:
    """Assert that two results agree to a few fp32 roundings of each log-probability.

    The gradient gives the scale of the loss, because the loss may be a small sum of large terms of both
    signs.
    """
    size = float(expected.loss.abs() + found.factor * expected.grad.abs().sum())
    assert abs(float(found.loss - expected.loss)) <= 5e-6 * size, f"{what}: {found.loss} {expected.loss}"
    assert_rows(found.grad, expected.grad, what)
    assert (found.kl is None) == (expected.kl is None), what
    for name in ("kl", "clip_fraction"):
        got, wanted = getattr(found, name), getattr(expected, name)
        if wanted is not None:
            # Liger's k3 cancels, and its error is a rounding of 1.
            assert abs(float(got - wanted)) <= 4e-6 * (1 + float(wanted)), f"{what}: {name}"


def assert_rows(found: Tensor, expected: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Assert that each row errs at most `tolerance` of its largest entry plus a twentieth of the batch's.

    The surrogate and the KL term of a row may cancel. Then the error is relative to the terms.
    """
    assert not bool(expected.isnan().any()), f"{what}: Liger's gradient is NaN"
    rows = expected.abs().amax(-1)
    error = (found - expected).abs().amax(-1)
    excess = (error - tolerance * (rows + rows.max() / 20)).nan_to_num(nan=math.inf)
    row = int(excess.argmax())
    assert float(excess.max()) <= 0, f"{what}: row {row} errs {error.flatten()[row]} of {rows.flatten()[row]}"
    # The same rows have a gradient of exactly 0: masked and clipped ones, and the last position.
    assert bool(((rows == 0) == (found == 0).all(-1)).all()), f"{what}: rows of exact zeros"


def masked_to(batch: Batch, value: float, *names: str) -> Batch:
    """Return `batch` with `value` at the masked positions of the named fields."""
    assert batch.mask is not None
    fields = {name: getattr(batch, name).masked_fill(batch.mask == 0, value) for name in names}
    return batch._replace(**fields)
