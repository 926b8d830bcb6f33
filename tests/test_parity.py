"""Loss and gradient may err from fp64 truth no more than eager PyTorch does in the inputs' own dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import (
    AGGREGATIONS,
    DTYPES,
    KLS,
    PAIRS,
    SEQUENCE_LEVEL,
    SURROGATES,
    Case,
    assert_parity,
    assert_rows_no_worse,
    every_branch,
    oracle,
    user_loss,
)
from torch import Tensor
from torch.autograd import gradcheck

from grpo_kernels import KL, ImportanceRatio, LossSpec, PPOClip, grpo_loss, selective_logps

# A full block or more and a tail. 1032 columns are a multiple of 16 bytes in every dtype and so take the
# kernels' vectorised rows; 1025 are not.
PADDED_V, PACKED_V = 1032, 1025

dtypes = pytest.mark.parametrize("dtype", DTYPES)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def branches(spec: LossSpec, dtype: str, packed: bool, device: str) -> Case:
    """The reference comes as logits or as log-probabilities, as logits where the KL is exact."""
    exact = spec.kl is not None and spec.kl.kind.startswith("exact")
    ref = None
    if spec.kl is not None or getattr(spec.surrogate, "anchor", None) == "ref":
        ref = "logits" if exact or not packed else "logps"
    return every_branch(
        spec, PACKED_V if packed else PADDED_V, DTYPES[dtype], packed=packed, ref=ref, device=device
    )


@layouts
@dtypes
@pytest.mark.parametrize("surrogate, kl", PAIRS)
def test_every_loss(surrogate: str, kl: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    """Every surrogate x KL x layout x dtype x aggregation, its gradient made in place and not.

    An aggregation is a weight per row, made before any kernel runs: in the kernels the aggregations take
    turns, and so do the two ways of the gradient in fp64 and fp16, where both have the same kernels.
    """
    aggregations, inplaces = AGGREGATIONS, (False, True)
    if backend == "triton":
        turn = list(SURROGATES).index(surrogate) + list(KLS).index(kl) + packed
        aggregations = (AGGREGATIONS[turn % len(AGGREGATIONS)],)
        inplaces = inplaces if dtype in ("fp32", "bf16") else (bool(turn % 2),)
    for aggregation in aggregations:
        spec = LossSpec(SURROGATES[surrogate], KLS[kl], aggregation=aggregation, max_tokens=5)
        expected = oracle(branches(spec, dtype, packed, device))
        for inplace in inplaces:
            assert_parity(expected, what=f"{aggregation}, {inplace = }", backend=backend, inplace=inplace)


@layouts
@dtypes
@pytest.mark.parametrize("kl", ["None", "ratio_corrected"])
@pytest.mark.parametrize("loss", SEQUENCE_LEVEL)
def test_every_level(loss: str, kl: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    """Per-token advantages too, of which each token keeps its own; aggregations take turns."""
    name, level = SEQUENCE_LEVEL[loss]
    turn = list(SEQUENCE_LEVEL).index(loss) + packed
    spec = LossSpec(
        SURROGATES[name], KLS[kl], level, aggregation=AGGREGATIONS[turn % len(AGGREGATIONS)], max_tokens=5
    )
    case = branches(spec, dtype, packed, device)
    uneven = case._replace(advantages=values(case, -1.5, 1.0)).with_options(
        token_weights=values(case, 0.5, 2.0)
    )
    for what, each in (("per sequence", case), ("per token", uneven)):
        assert_parity(oracle(each), what=what, backend=backend)


def values(case: Case, low: float, high: float) -> Tensor:
    """One value per token; NaN at masked positions, where it must not matter."""
    mask = case.options["completion_mask"]
    return torch.linspace(low, high, mask.numel(), device=mask.device).view(mask.shape).where(mask, torch.nan)


def sequences(case: Case, *numbers: float) -> Tensor:
    return torch.tensor(numbers, device=case.logits.device)


def with_spec(case: Case, **changes: Any) -> Case:
    return case._replace(spec=replace(case.spec, **changes))


def vocabulary_padded(case: Case) -> Case:
    """Columns that hold anything at all, and more of them in the reference."""
    V, ref_logits = case.logits.shape[-1], case.options["ref_logits"]

    def wider(x: Tensor, columns: int, value: float) -> Tensor:
        return torch.cat([x, x.new_full((*x.shape[:-1], columns), value)], -1)

    case = case.with_options(ref_logits=wider(ref_logits, 9, torch.inf), vocab_size=V)
    return case._replace(logits=wider(case.logits, 5, torch.nan))


def no_mask(case: Case) -> Case:
    """What was masked becomes the first token, over and over."""
    mask = case.options["completion_mask"]

    def filled(x: Tensor) -> Tensor:
        return x.where(mask if x.dim() == mask.dim() else mask[..., None], x[(0,) * mask.dim()])

    tokens = {name: filled(x) for name, x in case.options.items() if name != "seq_lens"}
    del tokens["completion_mask"]
    logits, ids = filled(case.logits), filled(case.completion_ids)
    return case._replace(logits=logits, completion_ids=ids).with_options(completion_mask=None, **tokens)


def empty_sequences(case: Case) -> Case:
    advantages = sequences(case, 5.0, 1.3, -5.0, -0.7, 0.4)
    return case._replace(advantages=advantages).with_options(seq_lens=torch.tensor([0, 3, 0, 3, 1]))


EITHER: dict[str, Callable[[Case], Case]] = {
    "temperature": lambda case: case.with_options(temperature=0.7),
    "temperature per sequence": lambda case: case.with_options(temperature=sequences(case, 0.7, 1.3, 0.9, 2)),
    "temperature per token": lambda case: case.with_options(temperature=values(case, 0.6, 1.6)),
    "scale": lambda case: case.with_options(logit_scale=0.6),
    "softcap": lambda case: case.with_options(logit_scale=0.7, logit_softcap=4.0, temperature=1.2),
    "reference scale": lambda case: case.with_options(logit_scale=0.6, ref_logit_scale=1.1),
    "reference softcap": lambda case: case.with_options(
        logit_softcap=9.0, ref_logit_scale=1.4, ref_logit_softcap=5.0, temperature=values(case, 0.6, 1.6)
    ),
    "only the reference capped": lambda case: case.with_options(ref_logit_softcap=5.0, temperature=0.9),
    "vocabulary padded": vocabulary_padded,
    "token weights": lambda case: case.with_options(token_weights=values(case, -0.5, 2.0)),
    "advantages per token": lambda case: case._replace(advantages=values(case, -1.5, 1.0)),
    "on-policy": lambda case: case.with_options(old_logps=None),
    "log-ratio clamped": lambda case: with_spec(case, log_ratio_clamp=0.4),
    "log-ratio of the KL clamped": lambda case: with_spec(
        case, log_ratio_clamp=0.4, kl=KLS["ratio_corrected"]
    ),
    "KL on-policy": lambda case: with_spec(case, kl=KLS["ratio_corrected"]).with_options(old_logps=None),
    "forward KL": lambda case: with_spec(case, kl=KLS["exact_forward"]),
    "entropy alone": lambda case: with_spec(case, kl=None).with_options(ref_logits=None),
    "callable": lambda case: with_spec(case, surrogate=user_loss).with_options(
        token_weights=values(case, 0.5, 2.0), old_logps=None
    ),
    "normalizer": lambda case: case.with_options(normalizer=7.5),
    **{
        f"normalizer, {how}": lambda case, how=how: with_spec(case, aggregation=how).with_options(
            normalizer=torch.tensor(7.5, device=case.logits.device)
        )
        for how in AGGREGATIONS
    },
    "no mask": no_mask,
}
PADDED: dict[str, Callable[[Case], Case]] = {
    "advantages [B, 1]": lambda case: case._replace(advantages=case.advantages[:, None]),
    "temperature [B, 1]": lambda case: case.with_options(
        temperature=sequences(case, 0.7, 1.3, 0.9, 2)[:, None]
    ),
    "token weights [B, 1]": lambda case: case.with_options(
        token_weights=sequences(case, 0.5, 2, 3, 4)[:, None]
    ),
}
PACKED: dict[str, Callable[[Case], Case]] = {
    "empty sequences": lambda case: with_spec(empty_sequences(case), aggregation="seq-mean-token-mean"),
    "no seq_lens": lambda case: case._replace(advantages=values(case, -1, 1)).with_options(seq_lens=None),
}


every_option = pytest.mark.parametrize(
    "packed, option",
    [(False, name) for name in EITHER | PADDED] + [(True, name) for name in EITHER | PACKED],
    ids=[f"{name}-padded" for name in EITHER | PADDED] + [f"{name}-packed" for name in EITHER | PACKED],
)


@every_option
def test_every_option(option: str, packed: bool, backend: str, device: str) -> None:
    """On a loss whose gradient has every term; in place, fp32 and bf16 take the fused kernel."""
    spec = LossSpec(ImportanceRatio(), KLS["exact"], entropy_coef=0.05, max_tokens=5)
    for dtype, inplace in (("fp64", False), ("fp32", False), ("fp32", True), ("bf16", True)):
        case = (EITHER | PADDED | PACKED)[option](branches(spec, dtype, packed, device))
        got = assert_parity(oracle(case), what=f"{dtype}, {inplace = }", backend=backend, inplace=inplace)
        padding = got.grad[..., case.options.get("vocab_size", case.logits.shape[-1]) :]
        assert bool((padding == 0).all())


@pytest.mark.parametrize(
    "V",
    [
        2,
        37,  # part of a block alone
        1024,  # one block, no tail
        2053,  # a block of 2048 and a tail, rows unaligned
        4104,  # with a reference, two blocks of 2048 and a tail
        8200,  # without, two of 4096 and a tail: the taken token's block and another
    ],
)
@pytest.mark.parametrize("kl", ["None", "exact", "exact_forward"])
def test_every_cut_of_the_vocabulary(V: int, kl: str, backend: str, device: str) -> None:
    """The taken token in the first, a middle and the last block."""
    generator = torch.Generator().manual_seed(V)
    spec = LossSpec(ImportanceRatio(), KLS[kl], aggregation="token-sum", entropy_coef=0.05 * (kl == "exact"))
    ids = torch.tensor([[0, V // 2, V - 1]], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = 2 * torch.randn(1, 3, V, generator=generator)
        ref_logits = (
            None if kl == "None" else (logits + torch.randn(logits.shape, generator=generator)).to(dtype)
        )
        options = {} if ref_logits is None else {"ref_logits": ref_logits.to(device)}
        expected = oracle(Case(spec, logits.to(dtype).to(device), ids, torch.ones(1, device=device), options))
        for inplace in (False, True):
            assert_parity(expected, what=f"{dtype}, {inplace = }", backend=backend, inplace=inplace)


@dtypes
@layouts
def test_selective_logps(dtype: str, packed: bool, backend: str, device: str) -> None:
    """Both outputs, and the gradient of each alone and of both; some upstream gradients are exactly zero."""
    case = branches(LossSpec(), dtype, packed, device)
    mask, ids = case.options["completion_mask"], case.completion_ids
    by_logps = values(case, -1, 1).nan_to_num().to(DTYPES["fp64" if dtype == "fp64" else "fp32"])
    by_entropy = by_logps.flip(-1).where(by_logps > 0, 0)

    def truth(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_p = torch.log_softmax(wide.masked_fill(~mask[..., None], 0) / 0.8, -1)
        taken = log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        return taken.where(mask, 0), -(log_p.exp() * log_p).sum(-1).where(mask, 0)

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = selective_logps(logits, ids, temperature=0.8, mask=mask, return_entropy=True, backend=backend)
        assert isinstance(out, tuple)
        return out

    for upstream in ((by_logps, None), (None, by_entropy), (by_logps, by_entropy)):
        found = []
        for function, logits in ((ours, case.logits), (truth, case.logits), (truth, case.logits.double())):
            leaf = logits.detach().clone().requires_grad_()
            out = function(leaf)
            wanted = [
                (x, grad.to(x.dtype)) for x, grad in zip(out, upstream, strict=True) if grad is not None
            ]
            torch.autograd.backward(*zip(*wanted, strict=True))
            assert leaf.grad is not None
            found.append((*out, leaf.grad))
        got, eager, exact = found
        assert_rows_no_worse(got[2], eager[2], exact[2], ids=ids, logps=exact[0], what="gradient")
        for one, other in zip(got[:2], exact[:2], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-12 if dtype == "fp64" else 1e-5)


# Whose weight is held constant: their gradient is not that of their value, by design.
DETACHED = ("CISPO", "DPPO(tv)", "DPPO(kl)", "VESPO")
GRADCHECKED = {
    **{
        f"{n}, k3": LossSpec(surrogate, KLS["k3"]) for n, surrogate in SURROGATES.items() if n not in DETACHED
    },
    **{
        f"{loss}, ratio_corrected": LossSpec(SURROGATES[name], KLS["ratio_corrected"], level)
        for loss, (name, level) in SEQUENCE_LEVEL.items()
        if name not in DETACHED and level == "sequence"
    },
    # Not straight_through, whose gradient is not that of its value by design.
    **{f"PPOClip, {name}": LossSpec(PPOClip(), kl) for name, kl in KLS.items() if name != "straight_through"},
    "Reinforce, exact, entropy": LossSpec(SURROGATES["Reinforce"], KL("exact"), entropy_coef=0.1),
}


def tiny(spec: LossSpec, device: str) -> Case:
    """Two tokens of a vocabulary of four, either side of every bound."""
    case = every_branch(spec, 4, torch.float64, device=device)
    two = (slice(1, 2), slice(1, 3))
    options = {name: value[two] for name, value in case.options.items()}
    return Case(spec, case.logits[two], case.completion_ids[two], case.advantages[1:2], options)


@pytest.mark.parametrize("spec", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradcheck(spec: LossSpec, backend: str, device: str) -> None:
    case = tiny(spec, device)
    transform = {"temperature": 0.8, "logit_scale": 1.2, "logit_softcap": 9.0}

    def loss(logits: Tensor) -> Tensor:
        return grpo_loss(
            logits,
            case.completion_ids,
            case.advantages,
            spec=spec,
            **case.options,
            **(transform if spec.entropy_coef else {}),
            backend=backend,
        ).loss

    assert gradcheck(loss, case.logits.requires_grad_())


def test_gradcheck_of_selective_logps(backend: str, device: str) -> None:
    case = tiny(LossSpec(), device)

    def both(logits: Tensor) -> Any:
        return selective_logps(
            logits,
            case.completion_ids,
            temperature=0.8,
            logit_softcap=9.0,
            return_entropy=True,
            backend=backend,
        )

    assert gradcheck(both, case.logits.requires_grad_())
