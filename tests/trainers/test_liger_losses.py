"""Loss and gradient equal those of Liger 0.8.5: of its kernels on logits, of its loss on hidden states.

The two implementations share neither code nor author.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from liger_cases import (
    DELTA,
    KLS,
    NEEDS_LIGER,
    PPO_TYPES,
    SURROGATES,
    TWO_BLOCKS,
    Batch,
    Result,
    V,
    assert_rows,
    assert_same,
    liger,
    ours,
    random_batch,
    spec_of,
)
from liger_heads import Head, assert_same_linear, from_head, liger_chunked, ours_chunked
from torch import Tensor

from grpo_kernels import selective_logps

pytestmark = NEEDS_LIGER


class Setting(NamedTuple):
    """The options of one case. It is hashable, so that both backends share one result of Liger."""

    loss_type: str
    level: str
    kl: str
    delta: float | None
    weights: str | None
    turn: int

    def batch(self, device: str) -> Batch:
        """Make the case's batch.

        Temperature and behaviour policy are independent of the other options in the formulas, so they take
        turns.
        """
        return random_batch(
            hash_of(self),
            device,
            weights=self.weights,
            temperature=(1.0, 0.7, 1.3)[self.turn % 3],
            on_policy=hash_of(self) % 5 == 0,
        )


def hash_of(setting: Setting) -> int:
    """Return a hash that is the same in every process, unlike that of `hash`."""
    return sum(map(ord, repr(setting)))


def settings(loss_type: str, level: str, kl: str) -> list[Setting]:
    """Return combinations of weights and delta.

    The aggregations of PPO share kernels. grpo gets all combinations, the others get half.
    """
    if loss_type not in PPO_TYPES:
        # VESPO treats the weight of a sequence differently: see test_vespo_weight_of_a_sequence.
        grid = [(None, None), (None, "token")] + [(None, "sequence")] * (loss_type != "vespo")
    else:
        grid = list(itertools.product((None, DELTA), (None, "token", "sequence")))
    start = (list(SURROGATES).index(loss_type) + list(KLS).index(kl)) % 2
    chosen = grid[start::2] if loss_type in PPO_TYPES and loss_type != "grpo" else grid
    return [Setting(loss_type, level, kl, *rest, turn) for turn, rest in enumerate(chosen)]


@functools.cache
def liger_of(setting: Setting, device: str) -> Result:
    """Compute Liger's result of one case, once."""
    return liger(
        setting.batch(device),
        setting.loss_type,
        level=setting.level,
        kl=KLS[setting.kl],
        delta=setting.delta,
        reduce=setting.loss_type != "luspo",  # see test_luspo
    )


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "loss_type, level",
    [(name, "token") for name in SURROGATES] + [(name, "sequence") for name in PPO_TYPES],
)
def test_every_loss(loss_type: str, level: str, kl: str, backend: str, device: str) -> None:
    """Every loss_type x level x KL of Liger agrees, with and without weights and delta."""
    for setting in settings(loss_type, level, kl):
        spec = spec_of(loss_type, level=level, kl=KLS[kl])
        if setting.delta is not None:
            spec = spec_of(loss_type, level=level, kl=KLS[kl], delta=setting.delta)
        found = ours(setting.batch(device), spec, backend)
        assert_same(found, liger_of(setting, device), str(setting))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_global_normalizer(loss_type: str, backend: str, device: str) -> None:
    """With one process, Liger's `num_items_in_batch` is our `normalizer`."""
    batch = random_batch(1, device)
    found = ours(batch, spec_of(loss_type), backend, normalizer=37.0)
    assert_same(found, liger(batch, loss_type, num_items_in_batch=37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "loss_type, level",
    [("grpo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("sapo", "token"), ("vespo", "token")],
)
def test_several_blocks(loss_type: str, level: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """A vocabulary of several blocks agrees, with taken tokens in every block and without a mask."""
    batch = random_batch(2, device, vocab=TWO_BLOCKS)._replace(mask=None)
    batch = batch._replace(logits=batch.logits.to(dtype))
    kl = KLS["k3 corrected"]
    found = ours(batch, spec_of(loss_type, level=level, kl=kl), backend)
    expected = liger(batch, loss_type, level=level, kl=kl)
    if dtype == torch.float32:
        assert_same(found, expected)
    else:
        # Both round the gradient once. Triton's interpreter truncates instead.
        torch.testing.assert_close(found.loss, expected.loss, rtol=2e-6, atol=1e-6)
        assert_rows(found.grad.float(), expected.grad.float(), "bf16", tolerance=2**-7)


def test_selective_logps(backend: str, device: str) -> None:
    """Log-probabilities equal those of Liger's `fused_selective_log_softmax`."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    for vocab in (V, TWO_BLOCKS):
        batch = random_batch(3, device, vocab=vocab)
        expected = fused_selective_log_softmax(batch.logits, batch.ids, 0.7, batch.mask)
        found = selective_logps(
            batch.logits[:, :-1], batch.ids, temperature=0.7, mask=batch.mask, backend=backend
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


# Liger's chunked luspo is TRL's only if no term is per token: see test_luspo_from_hidden_states.
CHUNKED = [
    *((name, level) for name in PPO_TYPES if name != "luspo" for level in ("token", "sequence")),
    *((name, "token") for name in ("cispo", "sapo", "vespo")),
]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss_type, level", CHUNKED)
def test_from_hidden_states(loss_type: str, level: str, kl: str, backend: str, device: str) -> None:
    """Loss and gradients of hidden states, weight and bias agree.

    The reference is given as log-probabilities or as hidden states.
    """
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


def test_vespo_weight_of_a_sequence(backend: str, device: str) -> None:
    """With VESPO, a weight `[B, 1]` multiplies the sequence's ratio once, as in TRL, and not per token."""
    batch = random_batch(14, device, weights="sequence")
    found = ours(batch, spec_of("vespo"), backend)
    assert_same(found, liger(batch, "vespo"))
    head = Head.random(14, device)
    batch = from_head(batch, head)
    found_linear = ours_chunked(batch, head, spec_of("vespo"), None, backend)
    assert_same_linear(found_linear, liger_chunked(batch, head, "vespo"))


def test_vespo_weight_of_zero(backend: str, device: str) -> None:
    """With VESPO, the log-weight of a weight of 0 is bounded to log 1e-8 in both."""
    batch = random_batch(15, device, weights="token")
    assert batch.weights is not None
    batch.weights[batch.advantages > 1.5, 0] = 0.0
    assert_same(ours(batch, spec_of("vespo"), backend), liger(batch, "vespo"))


@pytest.mark.parametrize("loss_type", SURROGATES)
def test_everything_masked(loss_type: str, backend: str, device: str) -> None:
    """If all tokens are masked, loss and gradients are 0 in both."""
    batch = random_batch(8, device)
    assert batch.mask is not None
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    kl = KLS["k3 corrected"]
    for result in (liger(batch, loss_type, kl=kl), ours(batch, spec_of(loss_type, kl=kl), backend)):
        assert float(result.loss) == 0
        assert bool((result.grad == 0).all())


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_normalizer_of_two_ranks(
    loss_type: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger sums the tokens of all ranks inside the loss. Here the caller passes the sum as `normalizer`."""
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
