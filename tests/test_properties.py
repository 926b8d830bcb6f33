"""What holds for any batch: hypothesis draws layouts, strides, masks, dtypes, values and losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from parity import AGGREGATIONS, DTYPES, KLS, SURROGATES, Case, Result, per_token, run
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import LossSpec, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss

# Where the logits lie in memory: the shape to allocate, and which part of it is the logits.
VIEWS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda *rows, V: (*rows, V), lambda x: x),
    "of a wider vocabulary": (lambda *rows, V: (*rows, V + 3), lambda x: x[..., :-3]),
    "every other": (lambda first, *rest, V: (2 * first, *rest, V), lambda x: x[::2]),
    "all but the first two": (lambda first, *rest, V: (first + 2, *rest, V), lambda x: x[2:]),
    "all but the last token": (lambda B, T, V: (B, T + 1, V), lambda x: x[:, :-1]),
    "after the prompt": (lambda B, T, V: (B, T + 2, V), lambda x: x[:, 2:]),
    "time first": (lambda B, T, V: (T, B, V), lambda x: x.transpose(0, 1)),
}
OF_PACKED = ("contiguous", "of a wider vocabulary", "every other", "all but the first two")
# Far from every bound of SURROGATES, lest a rounding decide for a branch.
LOG_RATIOS = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.6])
ADVANTAGES = torch.tensor([-1.5, 0.0, 0.7, 1.0])
KINDS = ("normal", "wide", "flat", "tiny", "peaked", "shifted", "holes")


class Problem(NamedTuple):
    case: Case  # its logits are what was allocated
    view: Callable[[Tensor], Tensor]  # and this is the part that the loss is given
    inplace: bool

    def run(self, backend: str, **how: Any) -> Result:
        return run(grpo_loss, self.case, self.view, backend=backend, inplace=self.inplace, **how)

    @property
    def mask(self) -> Tensor:
        return self.case.options["completion_mask"] != 0

    @property
    def sequences(self) -> list[Tensor]:
        """Indices into the first dimension: each sequence's tokens if packed, else its row of the batch."""
        numbers = torch.arange(len(self.case.completion_ids))
        lengths = self.case.options.get("seq_lens", torch.ones_like(numbers))
        return list(numbers.split(lengths.tolist()))

    def select(self, sequences: list[int], **options: Any) -> Problem:
        """The batch of these sequences alone, in this order and contiguous."""
        case, index = self.case, torch.cat([self.sequences[number] for number in sequences])

        def pick(x: Any) -> Any:
            return x[index.to(x.device)] if isinstance(x, Tensor) else x

        picked = {name: pick(value) for name, value in case.options.items() if name != "seq_lens"} | options
        if "seq_lens" in case.options:
            picked["seq_lens"] = case.options["seq_lens"][sequences]
        # Per token: the chosen may have as many sequences as tokens, and [S] would be read as [N].
        advantages = pick(per_token(case, case.advantages))
        logits, ids = pick(self.view(case.logits)), pick(case.completion_ids)
        return Problem(Case(case.spec, logits, ids, advantages, picked), lambda x: x, self.inplace)


@st.composite
def specs(draw: st.DrawFn, callables: bool) -> LossSpec:
    surrogate = draw(st.sampled_from([name for name in SURROGATES if callables or name != "callable"]))
    kl = draw(st.sampled_from([name for name in KLS if not name.endswith("clamp")]))
    if surrogate == kl == "None":
        kl = "k3"
    return LossSpec(
        SURROGATES[surrogate],
        KLS[kl],
        aggregation=draw(st.sampled_from(AGGREGATIONS)),
        max_tokens=5,
        entropy_coef=draw(st.sampled_from([0.0, 0.05])),
        log_ratio_clamp=draw(st.sampled_from([None, 20.0])),
    )


@st.composite
def problems(draw: st.DrawFn, device: str, *, callables: bool = True) -> Problem:
    packed = draw(st.booleans(), label="packed")
    seq_lens = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), label="seq_lens")
    shape = (sum(seq_lens),) if packed else (len(seq_lens), max(seq_lens))
    tokens = sum(seq_lens) if packed else shape[0] * shape[1]
    V = draw(st.one_of(st.integers(2, 40), st.sampled_from([128, 513, 1032])), label="V")
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)), label="dtype")]
    spec = draw(specs(callables), label="spec")
    rows = draw(st.lists(st.sampled_from(KINDS), min_size=tokens, max_size=tokens), label="rows")
    mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens), label="mask")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def pick(choices: Tensor, *size: int) -> Tensor:
        return choices[torch.randint(len(choices), size, generator=generator)]

    ids = torch.randint(V, shape, generator=generator)
    logits = torch.stack(
        [row_of(kind, normal(V), int(y)) for kind, y in zip(rows, ids.view(-1), strict=True)]
    )
    ref_logits = (logits + 0.5 * normal(tokens, V)).view(*shape, V).to(dtype)
    extent, view = VIEWS[draw(st.sampled_from(OF_PACKED if packed else list(VIEWS)), label="strides")]
    allocated = torch.full(extent(*shape, V=V), 7.0, dtype=dtype)
    view(allocated).copy_(logits.view(*shape, V))

    options: dict[str, Any] = {
        "completion_mask": torch.tensor(mask)
        .view(shape)
        .to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32]), label="mask dtype")),
        "temperature": draw(st.sampled_from([1.0, 0.7, 0.5 + torch.rand(shape, generator=generator)])),
        "logit_softcap": draw(st.sampled_from([None, 20.0]), label="softcap"),
        "token_weights": draw(st.sampled_from([None, torch.rand(shape, generator=generator)])),
    }
    if packed:
        options["seq_lens"] = torch.tensor(seq_lens)
    transform = {name: options[name] for name in ("temperature", "logit_softcap")}
    advantages = pick(ADVANTAGES, len(seq_lens))
    logps = reference_loss(
        view(allocated).double(), ids, torch.zeros(shape), spec=LossSpec(Reinforce()), **transform
    ).logps
    if draw(st.booleans(), label="off-policy"):
        options["old_logps"] = (logps - pick(LOG_RATIOS, *shape)).float()
    exact = spec.kl is not None and spec.kl.kind.startswith("exact")
    if exact or draw(st.booleans(), label="reference logits"):
        options["ref_logits"] = ref_logits
    else:
        options["ref_logps"] = (logps + pick(LOG_RATIOS, *shape)).float()
    case = Case(
        spec,
        allocated,
        ids.to(draw(st.sampled_from([torch.int32, torch.int64]), label="ids")),
        advantages,
        options,
    )
    if draw(st.booleans(), label="advantages per token"):
        case = case._replace(advantages=per_token(case, advantages).clone())
    return Problem(on(device, case), view, draw(st.booleans(), label="inplace"))


def row_of(kind: str, noise: Tensor, target: int) -> Tensor:
    """Logits of one token. "holes": all but the taken token may be at -inf."""
    if kind == "peaked":
        return 2 * noise + 60.0 * (noise == noise.max())
    if kind == "holes":
        taken = torch.arange(len(noise)) == target
        return torch.where((noise > 0) | taken, noise, -torch.inf)
    scale = {"normal": 2.0, "wide": 30.0, "flat": 0.0, "tiny": 1e-3, "shifted": 1.0}[kind]
    return scale * noise + (2000.0 if kind == "shifted" else 0.0)


def on(device: str, case: Case) -> Case:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    ids, advantages = case.completion_ids.to(device), case.advantages.to(device)
    return Case(case.spec, case.logits.to(device), ids, advantages, options)


def explore(
    check: Callable[[Problem, str], None], drawn: st.SearchStrategy[Problem], backend: str, device: str
) -> None:
    """`check(problem, backend)` for what is drawn, a tenth as often where the kernels are interpreted."""
    interpreted = backend == "triton" and device == "cpu"
    examples = settings().max_examples // (10 if interpreted else 1)
    settings(max_examples=examples)(given(problem=drawn, backend=st.just(backend))(check))()


def for_any_problem(check: Callable[[Problem, str], None] | None = None, **how: Any) -> Any:
    """Makes a test of `check(problem, backend)`; `how` goes to `problems`."""
    if check is None:
        return functools.partial(for_any_problem, **how)

    def test(backend: str, device: str) -> None:
        explore(check, problems(device, **how), backend, device)

    test.__doc__, test.__name__ = check.__doc__, check.__name__
    return test


def flat(result: Result) -> dict[str, Tensor]:
    out = result.out
    tensors = {"loss": out.loss, "logps": out.logps, "ref_logps": out.ref_logps, "entropy": out.entropy}
    tensors |= {f"metrics[{name!r}]": value for name, value in out.metrics.items()}
    return {name: x.detach().double() for name, x in tensors.items() if x is not None}


def assert_close(got: Result, expected: Result, problem: Problem, *, slack: Tensor | float = 0.0) -> None:
    """To the precision of the logits, which for a row far from zero is that of its largest."""
    dtype = got.grad.dtype
    finite = problem.view(problem.case.logits).double()
    largest = float(torch.where(finite.isfinite(), finite, 0).abs().max())
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (
        100 + 8 * largest
    )
    norm = expected.grad.double().norm()
    bound = slack + (rounding + 2 * torch.finfo(dtype).eps) * (norm + 1e-2)
    error = (got.grad.double() - expected.grad.double()).norm()
    assert error <= bound, f"gradient errs {error:.3g} of {norm:.3g}, allowed {bound:.3g}"
    values, wanted = flat(got), flat(expected)
    for name in values.keys() & wanted.keys():
        x, y = values[name], wanted[name]
        scale = 1 + y.abs() + (float(expected.grad.double().abs().sum()) if name == "loss" else 0)
        wrong = (x - y).abs() / scale
        assert bool((wrong <= rounding).all()), f"{name} errs {wrong.max():.3g}, allowed {rounding:.3g}"


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert bool(same.all()), f"{what} differs at {(~same).nonzero()[0].tolist()}"


@for_any_problem
def test_equals_the_reference(problem: Problem, backend: str) -> None:
    truth = run(reference_loss, problem.case.wide(), problem.view)
    eager = run(reference_loss, problem.case, problem.view)
    slack = 2 * (eager.grad.double() - truth.grad).norm()
    assert_close(problem.run(backend), truth, problem, slack=slack)


@pytest.mark.usefixtures("needs_triton")
def test_backends_agree(device: str) -> None:
    def agree(problem: Problem, backend: str) -> None:
        assert_close(problem.run(backend), problem.run("torch"), problem)

    explore(agree, problems(device), "triton", device)


@for_any_problem
def test_what_is_masked_never_matters(problem: Problem, backend: str) -> None:
    """To the bit, whatever stands there: NaN, infinities, ids outside of the vocabulary."""
    case, masked = problem.case, ~problem.mask

    def spoilt(x: Any) -> Any:
        if (
            not isinstance(x, Tensor)
            or x.shape[: masked.dim()] != masked.shape
            or x is case.options["completion_mask"]
        ):
            return x
        where = masked.view(masked.shape + (1,) * (x.dim() - masked.dim()))
        if not x.is_floating_point():
            return x.masked_fill(where, -100)
        garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], device=x.device).to(x.dtype)
        return torch.where(where, garbage[torch.arange(x.numel(), device=x.device).view(x.shape) % 3], x)

    logits = case.logits.clone()
    problem.view(logits).copy_(spoilt(problem.view(case.logits)))
    options = {name: x if name == "seq_lens" else spoilt(x) for name, x in case.options.items()}
    per_sequence = case.advantages.shape != masked.shape
    advantages = case.advantages if per_sequence else spoilt(case.advantages)
    bad = Case(case.spec, logits, spoilt(case.completion_ids), advantages, options)
    expected, got = problem.run(backend), problem._replace(case=bad).run(backend)
    assert_same_bits(got.grad, expected.grad, "gradient")
    assert bool((problem.view(got.grad)[masked] == 0).all())
    wanted = flat(expected)
    for name, value in flat(got).items():
        assert_same_bits(value, wanted[name], name)


@for_any_problem(callables=False)
def test_permuting_sequences_permutes_results(problem: Problem, backend: str) -> None:
    """Bit for bit, but for sums over tokens."""
    count = len(problem.sequences)
    order = list(reversed(range(count)))
    straight, permuted = problem.select(list(range(count))), problem.select(order)
    index = torch.cat([problem.sequences[number] for number in order])
    expected, got = straight.run(backend), permuted.run(backend)
    assert_same_bits(got.grad, expected.grad[index], "gradient")
    for name in ("logps", "ref_logps", "entropy"):
        value, wanted = getattr(got.out, name), getattr(expected.out, name)
        if value is not None:
            assert_same_bits(value, wanted[index], name)
    torch.testing.assert_close(got.out.loss, expected.out.loss, rtol=1e-4, atol=1e-4)


@for_any_problem(callables=False)
def test_a_split_batch_adds_up(problem: Problem, backend: str) -> None:
    """Parts with a common normalizer: losses and gradients of the whole."""
    count = len(problem.sequences)
    halves = [part for part in (range(count // 2), range(count // 2, count)) if part]
    whole = problem.select(list(range(count)), normalizer=6.5).run(backend)
    results = [problem.select(list(part), normalizer=6.5).run(backend) for part in halves]
    joined = torch.cat([result.grad for result in results])
    if backend == "torch" and joined.device.type != "cpu":
        torch.testing.assert_close(joined, whole.grad)  # PyTorch's sums there depend on the number of rows
    else:
        assert_same_bits(joined, whole.grad, "gradient")
    total = sum(result.out.loss for result in results)
    torch.testing.assert_close(total, whole.out.loss, rtol=1e-4, atol=1e-4)


@for_any_problem
def test_a_scaled_loss_scales_the_gradient(problem: Problem, backend: str) -> None:
    once, more = problem.run(backend).grad, problem.run(backend, upstream=64.0).grad
    # A power of two scales exactly, except what was too small for the dtype before.
    normal = once.abs() >= torch.finfo(once.dtype).smallest_normal
    assert_same_bits(more[normal], 64 * once[normal], "gradient")
    assert bool((more[~normal].abs() <= 64 * torch.finfo(once.dtype).smallest_normal).all())


@for_any_problem
def test_inputs_stay_as_they_are(problem: Problem, backend: str) -> None:
    """To the bit; with inplace=True all but the logits themselves, and what lies between them too."""
    case = problem.case
    before = {name: x.clone() for name, x in case.options.items() if isinstance(x, Tensor)}
    ids, advantages = case.completion_ids.clone(), case.advantages.clone()
    allocated = case.logits.clone().requires_grad_().clone()
    logits = problem.view(allocated)
    out = grpo_loss(
        logits, case.completion_ids, case.advantages, spec=case.spec, **case.options,
        backend=backend, inplace=problem.inplace,
    )  # fmt: skip
    out.loss.backward()
    after = allocated.detach()
    if problem.inplace:
        problem.view(after).copy_(problem.view(case.logits))
    assert_same_bits(after, case.logits, "logits")
    assert_same_bits(case.completion_ids, ids, "completion_ids")
    assert_same_bits(case.advantages, advantages, "advantages")
    for name, value in before.items():
        assert_same_bits(case.options[name], value, name)
