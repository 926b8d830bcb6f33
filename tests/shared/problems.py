"""Random batches for property tests: layouts, strides, masks, dtypes, values and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from parity import AGGREGATIONS, DTYPES, KLS, SEQUENCE_LEVEL, SURROGATES, Case, Result, per_token, run
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import DRO, LossSpec, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.spec import PRESETS

# Memory layouts of logits or hidden states: the shape to allocate, and the view of it that holds them.
VIEWS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda *rows, V: (*rows, V), lambda x: x),
    "of wider rows": (lambda *rows, V: (*rows, V + 3), lambda x: x[..., :-3]),
    "every other": (lambda first, *rest, V: (2 * first, *rest, V), lambda x: x[::2]),
    "all but the first two": (lambda first, *rest, V: (first + 2, *rest, V), lambda x: x[2:]),
    "all but the last token": (lambda B, T, V: (B, T + 1, V), lambda x: x[:, :-1]),
    "after the prompt": (lambda B, T, V: (B, T + 2, V), lambda x: x[:, 2:]),
    "time first": (lambda B, T, V: (T, B, V), lambda x: x.transpose(0, 1)),
}
OF_PACKED = ("contiguous", "of wider rows", "every other", "all but the first two")
# These values and the means of up to three of them are far from every bound of SURROGATES and KLS, so that
# rounding cannot change a branch.
LOG_RATIOS = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.6])
ADVANTAGES = torch.tensor([-1.5, 0.0, 0.7, 1.0])
KINDS = ("normal", "wide", "flat", "tiny", "peaked", "shifted", "holes")


class Shape(NamedTuple):
    packed: bool
    seq_lens: list[int]

    @property
    def rows(self) -> tuple[int, ...]:
        """`[N]` or `[B, T]`."""
        return (sum(self.seq_lens),) if self.packed else (len(self.seq_lens), max(self.seq_lens))

    @property
    def tokens(self) -> int:
        return sum(self.seq_lens) if self.packed else len(self.seq_lens) * max(self.seq_lens)


class Random:
    """Random numbers from one seed. Hypothesis does not shrink them one by one."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator)

    def pick(self, choices: Tensor, *size: int) -> Tensor:
        return choices[torch.randint(len(choices), size, generator=self.generator)]


class Problem(NamedTuple):
    case: Case  # its logits are the whole allocation
    view: Callable[[Tensor], Tensor]  # the part that is passed to the loss
    inplace: bool

    def run(self, backend: str, **how: Any) -> Result:
        return run(grpo_loss, self.case, self.view, **{"backend": backend, "inplace": self.inplace, **how})

    @property
    def mask(self) -> Tensor:
        return self.case.options["completion_mask"] != 0

    @property
    def sequences(self) -> list[Tensor]:
        return sequences_of(self.case.completion_ids, self.case.options)

    def select(self, sequences: list[int], **options: Any) -> Problem:
        """Return a contiguous batch of only these sequences, in this order."""
        case, index = self.case, torch.cat([self.sequences[number] for number in sequences])
        picked = options_of(sequences, index, case.options) | options
        # Advantages are per token, because [S] means [N] if there are as many sequences as tokens.
        advantages = rows_at(index, per_token(case, case.advantages))
        logits, ids = rows_at(index, self.view(case.logits)), rows_at(index, case.completion_ids)
        return Problem(Case(case.spec, logits, ids, advantages, picked), lambda x: x, self.inplace)


def sequences_of(completion_ids: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Return indices into the first dimension: the tokens of each packed sequence, or its row."""
    numbers = torch.arange(len(completion_ids))
    lengths = options.get("seq_lens", torch.ones_like(numbers))
    return list(numbers.split(lengths.tolist()))


def rows_at(index: Tensor, x: Any) -> Any:
    return x[index.to(x.device)] if isinstance(x, Tensor) and x.dim() else x


# Arguments that are not per token.
OF_SEQUENCES = ("seq_lens", "prompt_ids")
HEADS = ("ref_lm_head_weight", "ref_lm_head_bias")


def options_of(sequences: list[int], index: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of these sequences, whose rows are `index`."""

    def picked(name: str, x: Any) -> Any:
        if name in OF_SEQUENCES:
            return x[sequences]
        return x if name in HEADS else rows_at(index, x)

    return {name: picked(name, x) for name, x in options.items()}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    packed = draw(st.booleans(), label="packed")
    return Shape(
        packed, draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), label="seq_lens")
    )


@st.composite
def specs(draw: st.DrawFn, *, callables: bool = True) -> LossSpec:
    """Draw a preset, or a surrogate at one of its levels, with any KL and aggregation."""
    names = [name for name in SURROGATES if callables or name != "callable"]
    name = draw(st.sampled_from([*names, *SEQUENCE_LEVEL, *PRESETS]), label="loss")
    kl = draw(st.sampled_from(list(KLS)), label="KL")
    surrogate, level = SURROGATES.get(name), "token"
    if name in SEQUENCE_LEVEL:
        surrogate, level = SURROGATES[SEQUENCE_LEVEL[name][0]], SEQUENCE_LEVEL[name][1]
    elif name in PRESETS:
        surrogate, level = PRESETS[name]["surrogate"], PRESETS[name].get("level", "token")
    sums_log_ratios = isinstance(surrogate, DRO) and level == "sequence"
    return LossSpec(
        surrogate,
        KLS["k3" if name == kl == "None" else kl],
        level,
        draw(st.sampled_from(AGGREGATIONS), label="aggregation"),
        max_tokens=5,
        entropy_coef=draw(st.sampled_from([0.0, 0.05]), label="entropy_coef"),
        log_ratio_clamp=None if sums_log_ratios else draw(st.sampled_from([None, 20.0]), label="clamp"),
    )


@st.composite
def token_options(draw: st.DrawFn, shape: Shape, random: Random) -> dict[str, Any]:
    """Draw the options that do not depend on logits."""
    rows, count = shape.rows, len(shape.seq_lens)
    mask = draw(st.lists(st.booleans(), min_size=shape.tokens, max_size=shape.tokens), label="mask")
    mask_dtype = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]), label="mask dtype")
    options: dict[str, Any] = {
        "completion_mask": torch.tensor(mask).view(rows).to(mask_dtype),
        "temperature": draw(st.sampled_from([1.0, 0.7, 0.5 + random.uniform(*rows)]), label="temperature"),
        "logit_scale": draw(st.sampled_from([1.0, 0.7]), label="scale"),
        "logit_softcap": draw(st.sampled_from([None, 20.0]), label="softcap"),
        "token_weights": draw(st.sampled_from([None, random.uniform(*rows)]), label="token weights"),
        "normalizer": draw(st.sampled_from([None, 6.5, torch.tensor(3)]), label="normalizer"),
        # No prompt has completions in both halves of the batch.
        "prompt_ids": random.pick(torch.tensor([-9, 2**50]), count) + (torch.arange(count) >= count // 2),
    }
    if shape.packed:
        options["seq_lens"] = torch.tensor(shape.seq_lens)
    elif draw(st.booleans(), label="temperature per sequence"):
        options["temperature"] = 0.5 + random.uniform(count, 1)
    return options


@st.composite
def policies(draw: st.DrawFn, logps: Tensor, random: Random, *, whole_reference: bool) -> dict[str, Tensor]:
    """Draw `old_logps` and `ref_logps` near these `logps`, or omit them."""
    found = {}
    if draw(st.booleans(), label="off-policy"):
        found["old_logps"] = (logps - random.pick(LOG_RATIOS, *logps.shape)).float()
    if not whole_reference:
        # Avoid the kink of "abs" at 0.
        distances = LOG_RATIOS[LOG_RATIOS != 0]
        found["ref_logps"] = (logps + random.pick(distances, *logps.shape)).float()
    return found


@st.composite
def whole_references(draw: st.DrawFn, spec: LossSpec) -> bool:
    """Draw whether the reference comes as logits. Its distances may then equal a bound of the KL."""
    if spec.kl is not None and spec.kl.kind.startswith("exact"):
        return True
    bounded = spec.kl is not None and (spec.kl.clamp or spec.kl.output_clamp)
    return not bounded and draw(st.booleans(), label="whole reference")


@st.composite
def problems(draw: st.DrawFn, device: str, *, callables: bool = True) -> Problem:
    shape, spec = draw(shapes()), draw(specs(callables=callables))
    rows, tokens = shape.rows, shape.tokens
    V = draw(st.one_of(st.integers(2, 40), st.sampled_from([128, 513, 1032])), label="V")
    dtype = draw(st.sampled_from(list(DTYPES)), label="dtype")
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=tokens, max_size=tokens), label="rows")
    random = Random(draw(st.integers(0, 2**31), label="seed"))
    options = draw(token_options(shape, random))

    ids = random.pick(torch.arange(V), *rows)
    logits = torch.stack(
        [row_of(kind, random.normal(V), int(y)) for kind, y in zip(kinds, ids.view(-1), strict=True)]
    )
    views = st.sampled_from(OF_PACKED if shape.packed else list(VIEWS))
    padding = draw(st.sampled_from([None, 0, 5]), label="padding columns")

    def allocated(logits: Tensor, padding: int, dtype: torch.dtype, where: str) -> Tensor:
        """Return logits in this layout. Padding columns and the memory between rows hold NaN."""
        extent, view = VIEWS[where]
        new = torch.full(extent(*rows, V=V + padding), torch.nan, dtype=dtype)
        view(new)[..., :V] = logits.view(*rows, V)
        return new

    where = draw(views, label="strides")
    memory, view = allocated(logits, padding or 0, DTYPES[dtype], where), VIEWS[where][1]
    if padding is not None:
        options["vocab_size"] = V
    names = ("temperature", "logit_scale", "logit_softcap", "vocab_size")
    transform = {name: options[name] for name in names if name in options}
    logps = reference_loss(
        view(memory).double(), ids, torch.zeros(rows), spec=LossSpec(Reinforce()), **transform
    ).logps
    whole_reference = draw(whole_references(spec))
    options |= draw(policies(logps, random, whole_reference=whole_reference))
    if whole_reference:
        other = DTYPES[
            dtype if dtype == "fp64" else draw(st.sampled_from(["fp32", "bf16", "fp16"]), label="ref dtype")
        ]
        there = draw(views, label="strides of the reference")
        wider = 0 if padding is None else draw(st.sampled_from([0, 3]), label="its padding")
        noise = 0.5 * random.normal(tokens, V)
        options["ref_logits"] = VIEWS[there][1](allocated(logits + noise, wider, other, there))
        options["ref_logit_scale"] = draw(st.sampled_from([None, 0.9]), label="ref scale")
        if options["logit_softcap"] is not None:  # else exp(60) may cancel in a k3
            options["ref_logit_softcap"] = draw(st.sampled_from([None, 15.0]), label="ref softcap")
    advantages = random.pick(ADVANTAGES, len(shape.seq_lens))
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64]), label="ids"))
    case = Case(spec, memory, ids, advantages, options)
    if draw(st.booleans(), label="advantages per token"):
        case = case._replace(advantages=random.pick(ADVANTAGES, *rows))
    return Problem(on(device, case), view, draw(st.booleans(), label="inplace"))


def row_of(kind: str, noise: Tensor, target: int) -> Tensor:
    """Return logits of one token. With "holes", any but the taken one may be -inf."""
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
    check: Callable[[Any, str], None], drawn: st.SearchStrategy[Any], backend: str, device: str
) -> None:
    """Run `check(problem, backend)` on drawn problems, a tenth as many if the kernels are interpreted."""
    interpreted = backend == "triton" and device == "cpu"
    examples = settings().max_examples // (10 if interpreted else 1)
    settings(max_examples=examples)(given(problem=drawn, backend=st.just(backend))(check))()


def for_any(drawn: Callable[..., st.SearchStrategy[Any]], **how: Any) -> Callable[[Any], Any]:
    """Turn `check(problem, backend)` into a test of problems that `drawn(device, **how)` draws."""

    def decorate(check: Callable[[Any, str], None]) -> Any:
        def test(backend: str, device: str) -> None:
            explore(check, drawn(device, **how), backend, device)

        test.__doc__, test.__name__ = check.__doc__, check.__name__
        return test

    return decorate


def flat(out: Any) -> dict[str, Tensor]:
    """Return all outputs of a loss by name, in fp64."""
    tensors = {"loss": out.loss, "logps": out.logps, "ref_logps": out.ref_logps, "entropy": out.entropy}
    tensors |= {f"metrics[{name!r}]": value for name, value in out.metrics.items()}
    return {name: x.detach().double() for name, x in tensors.items() if x is not None}


def assert_outputs_close(got: Any, expected: Any, rounding: float, scale: float) -> None:
    """Compare the outputs that both have. The loss is a sum of terms of size `scale`."""
    values, wanted = flat(got), flat(expected)
    for name in values.keys() & wanted.keys():
        x, y = values[name], wanted[name]
        wrong = (x - y).abs() / (1 + y.abs() + (scale if name == "loss" else 0))
        wrong = torch.where(x == y, 0.0, wrong)  # infinities may be equal
        assert bool((wrong <= rounding).all()), f"{name} errs {wrong.max():.3g}, allowed {rounding:.3g}"


def assert_close(got: Result, expected: Result, problem: Problem, *, slack: Tensor | float = 0.0) -> None:
    """Compare to the precision of the logits, which depends on the largest one of each row."""
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
    assert_outputs_close(got.out, expected.out, rounding, float(expected.grad.double().abs().sum()))


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert bool(same.all()), f"{what} differs at {(~same).nonzero()[0].tolist()}"


def assert_scaled(more: Tensor, once: Tensor, factor: float, what: str) -> None:
    """Assert that a power of two scales exactly, except subnormal numbers or those with subnormal terms."""
    smallest = max(torch.finfo(once.dtype).smallest_normal, 2.0**-100)
    large = once.abs() > smallest  # smaller ones may have lost digits
    assert_same_bits(more[large], factor * once[large], what)
    assert bool((more[~large].abs() <= factor * smallest).all()), what


def spoilt(x: Any, mask: Tensor) -> Any:
    """Return `x` with garbage at masked positions, if it has an entry or a row for each position."""
    if not isinstance(x, Tensor) or x.shape[: mask.dim()] != mask.shape:
        return x
    where = ~mask.view(mask.shape + (1,) * (x.dim() - mask.dim()))
    if not x.is_floating_point():
        return x.masked_fill(where, -100)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], device=x.device).to(x.dtype)
    return torch.where(where, garbage[torch.arange(x.numel(), device=x.device).view(x.shape) % 3], x)


def spoilt_options(options: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    kept = ("completion_mask", *OF_SEQUENCES, *HEADS)
    return {name: x if name in kept else spoilt(x, mask) for name, x in options.items()}
