"""Properties of the rest of the API, and of losses at the ends of the floating-point range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from parity import DTYPES, KLS, Case, run
from problems import ADVANTAGES, Problem, Random, assert_close, for_any, on, problems, shapes, specs
from torch import Tensor

from grpo_kernels import LossSpec, Reinforce, group_advantages, selective_logps
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.weights import importance_weights, off_policy_sequence_mask

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

NAN, INF = math.nan, math.inf


@for_any(problems)
def test_a_loss_of_log_probabilities(problem: Problem, backend: str) -> None:
    """`policy_loss` of `selective_logps` equals `grpo_loss`, unless the KL is over the vocabulary."""
    case = problem.case
    if case.spec.exact_kl is not None:
        case = case._replace(spec=dataclasses.replace(case.spec, kl=KLS["k1"]))
    options = dict(case.options)
    whole = {name: options.pop(name, None) for name in ("ref_logits", "ref_logit_scale", "ref_logit_softcap")}
    names = ("temperature", "logit_scale", "logit_softcap", "vocab_size")
    how = {name: options.pop(name) for name in names if name in options}
    mask = options["completion_mask"]
    if isinstance(how["temperature"], Tensor):
        how["temperature"] = how["temperature"].expand(mask.shape)
    if whole["ref_logits"] is not None:
        theirs = {
            name: how[name] if whole[f"ref_{name}"] is None else whole[f"ref_{name}"]
            for name in ("logit_scale", "logit_softcap")
        }
        options["ref_logps"] = selective_logps(
            whole["ref_logits"], case.completion_ids, mask=mask, backend=backend, **how | theirs
        )

    def loss(logits: Tensor, completion_ids: Tensor, advantages: Tensor, **_: Any) -> Any:
        logps, entropy = selective_logps(
            logits, completion_ids, mask=mask, return_entropy=True, backend=backend, **how
        )
        return policy_loss(logps, advantages, spec=case.spec, entropy=entropy, backend=backend, **options)

    got = run(loss, case, problem.view)
    assert_close(got, problem._replace(case=case).run(backend, return_entropy=True), problem)


# Rewards may be far from zero, have squares beyond the range of the dtype, and equal one another.
REWARDS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 1000.001, 1000.002, 1e30, -1e30, 1e-30]), st.floats(-8, 8, width=32)
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    rewards = draw(st.lists(REWARDS, max_size=12))
    return rewards, draw(
        st.lists(st.integers(-2, 2), min_size=len(rewards), max_size=len(rewards)), label="ids"
    )


@given(groups(), st.sampled_from(["std", "none"]), st.booleans(), st.sampled_from([1e-4, 1.0]))
def test_advantages_of_groups(
    drawn: tuple[list[float], list[int]], scale: str, leave_one_out: bool, eps: float
) -> None:
    """Advantages are as precise as the rewards. In fp32 a reward of 1e30 is rounded by 1e23."""
    ids, rewards = torch.tensor(drawn[1], dtype=torch.long), torch.tensor(drawn[0], dtype=torch.float32)
    got = group_advantages(rewards, group_ids=ids, scale=scale, leave_one_out=leave_one_out, eps=eps)
    assert got.dtype == torch.float32
    for advantage, reward, number in zip(got.tolist(), rewards.tolist(), ids.tolist(), strict=True):
        group = [r for r, other in zip(rewards.tolist(), ids.tolist(), strict=True) if other == number]
        size, mean = len(group), math.fsum(group) / len(group)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / max(1, size - 1))
        want = reward - mean
        if leave_one_out and size > 1:
            want *= size / (size - 1)
        want = want / (spread + eps) if scale == "std" else want
        if len(set(group)) == 1:
            want = 0.0
        assert advantage == pytest.approx(want, rel=1e-5, abs=1e-6 if scale == "std" else 1e-6 * spread)


LOGPS = st.one_of(st.floats(-20, 0, width=32), st.just(-300.0))


@st.composite
def samplers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draw log-probabilities of trainer and sampler (NaN if it gave none), and the mask."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(0, 4))

    def tensor(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = draw(st.lists(values, min_size=B * T, max_size=B * T))
        return torch.tensor(drawn, dtype=dtype).view(B, T)

    of_masks = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    sampler = tensor(st.one_of(LOGPS, st.just(NAN)), torch.float32)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return tensor(LOGPS, torch.float32).to(dtype), sampler, tensor(st.booleans(), of_masks)


def log_ratios(drawn: tuple[Tensor, Tensor, Tensor]) -> list[list[float]]:
    """Return log-ratios of trainer and sampler, and 0 for masked or unknown ones."""
    return [
        [x - y if m and not math.isnan(y) else 0.0 for x, y, m in zip(*rows, strict=True)]
        for rows in zip(*(x.tolist() for x in drawn), strict=True)
    ]


@given(
    samplers(),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.sampled_from(["truncate", "mask"]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 2.0]),
)
def test_importance_weights(
    drawn: tuple[Tensor, Tensor, Tensor], level: str, mode: str, low: float | None, high: float | None
) -> None:
    got = importance_weights(*drawn, level=level, mode=mode, low=low, high=high)
    assert got.dtype == drawn[0].dtype
    rows = log_ratios(drawn)
    if level != "token":
        counts = [int((m != 0).sum()) if level == "geometric" else 1 for m in drawn[2]]
        rows = [[math.fsum(row) / max(1, count)] for row, count in zip(rows, counts, strict=True)]
    floor, ceiling = 0.0 if low is None else low, INF if high is None else high
    assert list(got.shape) == [len(rows), drawn[0].shape[1] if level == "token" else 1]
    for row, weights in zip(rows, got.tolist(), strict=True):
        for x, weight in zip(row, weights, strict=True):
            ratio = math.exp(x) if x < 700 else INF
            outside = not floor <= ratio <= ceiling
            want = min(max(ratio, floor), ceiling) if mode == "truncate" else 0.0 if outside else ratio
            near = min(abs(ratio - bound) for bound in (floor, ceiling)) < 1e-4 * (1 + ratio)
            tolerance = max(1e-4, 2 * torch.finfo(got.dtype).eps)
            if want < torch.finfo(got.dtype).max and not (near and mode == "mask"):
                assert weight == pytest.approx(want, rel=tolerance, abs=1e-30)


@given(samplers(), st.sampled_from([-0.5, 0.1, 2.0]), st.booleans(), st.integers(0, 2**31))
def test_off_policy_sequence_mask(
    drawn: tuple[Tensor, Tensor, Tensor], threshold: float, per_token: bool, seed: int
) -> None:
    (logps, _, mask), random = drawn, Random(seed)
    advantages = random.pick(ADVANTAGES, *logps.shape) if per_token else random.pick(ADVANTAGES, len(logps))
    got = off_policy_sequence_mask(advantages, *drawn, threshold=threshold)
    assert got.dtype == logps.dtype and got.shape == (logps.shape if per_token else (len(logps), 1))
    for row, kept, own, m in zip(log_ratios(drawn), got.tolist(), advantages.tolist(), mask, strict=True):
        drift = -math.fsum(row) / max(1, int((m != 0).sum()))
        if abs(drift - threshold) > 1e-4:
            masked = m == 0 if per_token else [False]
            for A, keep, hidden in zip(own if per_token else [own], kept, masked, strict=True):
                assert keep == float(hidden or A >= 0 or drift <= threshold)


# Log-ratios and advantages of taken tokens: ordinary ones, and those that overflow in fp32.
EXTREME = {
    "ratios": (torch.tensor([-200.0, -30.0, -5.0, 0.1, 5.0, 30.0, 200.0]), torch.tensor([-1.0, 0.0, 1.0])),
    "advantages": (torch.tensor([-0.5, 0.1, 0.5]), torch.tensor([-1e30, -1e-30, 0.0, 1e-30, 1e30])),
}


EXTREME_ROWS = ("normal", "huge", "fp16", "shifted", "impossible", "only")


@st.composite
def extremes(draw: st.DrawFn, device: str) -> Problem:
    """Draw logits, ratios or advantages near the ends of their range."""
    shape, V = draw(shapes()), draw(st.sampled_from([2, 7, 33]), label="V")
    # TestCorrectedK3 in test_regressions.py covers the corrected k3 far from the reference.
    spec = draw(specs(callables=False))
    kinds = st.lists(st.sampled_from(EXTREME_ROWS), min_size=shape.tokens, max_size=shape.tokens)
    random = Random(draw(st.integers(0, 2**31), label="seed"))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)), label="dtype")]
    ids = random.pick(torch.arange(V), *shape.rows)
    drawn = draw(kinds, label="rows")

    def logits() -> Tensor:
        rows = [
            extreme_row(kind, random.normal(V), int(y)) for kind, y in zip(drawn, ids.view(-1), strict=True)
        ]
        return torch.stack(rows).view(*shape.rows, V).to(dtype)

    case = Case(spec, logits(), ids, torch.zeros(shape.rows), {})
    transform = {
        "temperature": draw(st.sampled_from([1.0, 0.1, 10.0])),
        "logit_softcap": draw(st.sampled_from([None, 30.0, 1e5])),
    }
    mask = draw(st.lists(st.booleans(), min_size=shape.tokens, max_size=shape.tokens), label="mask")
    options = {"completion_mask": torch.tensor(mask).view(shape.rows), **transform}
    if shape.packed:
        options["seq_lens"] = torch.tensor(shape.seq_lens)
    options["prompt_ids"] = torch.zeros(
        len(shape.seq_lens) if shape.packed else shape.rows[0], dtype=torch.int64
    )
    reinforce = LossSpec(Reinforce())
    logps = reference_loss(case.logits.double(), ids, case.advantages, spec=reinforce, **transform).logps
    # A taken token at -inf gets an ordinary old log-probability.
    logps = torch.where(logps.isfinite(), logps, -3.0)
    ratios, advantages = EXTREME[draw(st.sampled_from(list(EXTREME)))]
    options["old_logps"] = (logps - random.pick(ratios, *shape.rows)).float().clamp(max=0)
    if spec.exact_kl is not None:
        options["ref_logits"] = logits()
    else:
        options["ref_logps"] = (logps + random.pick(ratios, *shape.rows)).float().clamp(max=-1e-3)
    case = case._replace(advantages=random.pick(advantages, *shape.rows), options=options)
    return Problem(on(device, case), lambda x: x, draw(st.booleans(), label="inplace"))


def extreme_row(kind: str, noise: Tensor, target: int) -> Tensor:
    """Return logits of one token. With "impossible" it is -inf, and with "only" all others are."""
    taken = torch.arange(len(noise)) == target
    if kind in ("impossible", "only"):
        return noise.masked_fill(taken if kind == "impossible" else ~taken, -INF)
    scale = {"normal": 2.0, "huge": 1e4, "fp16": 3e4, "shifted": 1.0}[kind]
    return (scale * noise).clamp(-6e4, 6e4) + (1e4 if kind == "shifted" else 0.0)


@for_any(extremes)
def test_the_ends_of_the_range(problem: Problem, backend: str) -> None:
    """If fp32 can represent the loss, nothing is NaN and every gradient is correct."""
    truth = run(reference_loss, problem.case.wide())
    eager, got = run(reference_loss, problem.case), problem.run(backend, return_entropy=True)
    largest = torch.finfo(torch.float32).max / 100
    for name in ("logps", "ref_logps", "entropy"):
        value, exact = getattr(got.out, name), getattr(truth.out, name)
        if value is not None:
            assert bool((value.isfinite() | ~exact.isfinite()).all()), name
    if not truth.out.loss.abs() < largest:
        return
    assert got.out.loss.isfinite()
    # A softcap turns a logit of -inf into -softcap, and its token may be taken.
    logits, temperature = problem.case.logits.double(), problem.case.options["temperature"]
    size = float(torch.where(logits.isfinite(), logits, 0.0).abs().max()) / temperature
    size = max(size, float(torch.where(truth.out.logps.isfinite(), truth.out.logps, 0.0).abs().max()))
    dtype = got.grad.dtype
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (
        1000 + 80 * size
    )
    ours, theirs, exact = (x.double().flatten(0, -2) for x in (got.grad, eager.grad, truth.grad))
    # A loss of 1e30 costs the rows this many digits in fp64.
    lost = 16 * torch.finfo(torch.float64).eps * float(truth.out.loss.detach().abs())
    for row, (x, y, z) in enumerate(zip(ours, theirs, exact, strict=True)):
        if not z.abs().max() < min(largest, torch.finfo(dtype).max / 100):
            continue
        assert x.isfinite().all(), f"row {row}"
        if problem.case.options["logit_softcap"] == 30.0:
            continue  # the softcap is saturated: rounding dominates its derivative, 1 - tanh^2
        error, bar = float((x - z).norm()), float((y - z).norm().nan_to_num())
        allowed = 2 * bar + (4 * torch.finfo(dtype).eps + rounding) * (float(z.norm()) + 1e-2) + lost
        assert error <= allowed, f"row {row} errs {error:.3g} of {z.norm():.3g}, allowed {allowed:.3g}"
