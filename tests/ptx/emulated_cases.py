"""Calls of the public functions that together reach every variant of the kernels, and their comparisons.

Each case can also run without its comparison. So a test collects the variants without compiling them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from linear_cases import LinearCase, assert_gradients, from_logits, linear_oracle, run_linear
from option_cases import EITHER, branches
from parity import (
    DTYPES,
    EVERYTHING,
    KLS,
    SURROGATES,
    Case,
    Oracle,
    Result,
    assert_outputs,
    assert_parity,
    assert_rows_no_worse,
    oracle,
    run,
)
from sampling_masks import Masked, assert_masked_parity, spread
from torch import Tensor

from benchmarks.machine_code.cases import mixed_products
from grpo_kernels import ImportanceRatio, LossOutput, LossSpec, PPOClip, Reinforce, grpo_loss, selective_logps
from grpo_kernels.logps import linear_token_stats
from grpo_kernels.reference import reference_loss
from grpo_kernels.spec.surrogates.base import Clip
from grpo_kernels.testing import assert_no_worse_than_eager, make_batch

V = 1032  # a block and a tail; option_cases.py has the same for padded cases


class EmulatedCase(Protocol):
    def run(self) -> Any:
        """Call a public function with the backend "triton", and return its outputs and gradients."""

    def check(self, *, approximate: bool) -> None:
        """Run, and compare with fp64 and eager PyTorch.

        `approximate`: whether instructions such as `ex2.approx` err as much as the ISA allows.
        """


# --- Losses from logits ---


class LossCase:
    """A loss from logits. Its errors are at most twice those of eager PyTorch, plus some roundings."""

    inplace: bool
    upstream: float = 1.0
    return_entropy: bool = False

    def case(self) -> Case:
        raise NotImplementedError

    def view(self, logits: Tensor) -> Tensor:
        """Return the part of the logits that is given to the loss."""
        return logits

    @property
    def options(self) -> dict[str, Any]:
        names = ("inplace", "upstream", "return_entropy")
        return {"backend": "triton"} | {name: getattr(self, name) for name in names}

    def run(self) -> Result:
        return run(grpo_loss, self.case(), self.view, **self.options)

    def check(self, *, approximate: bool) -> None:
        case = self.case()
        truth, eager = (
            run(reference_loss, x, self.view, upstream=self.upstream) for x in (case.wide(), case)
        )
        expected = Oracle(case, truth, eager)
        if approximate and case.logits.dtype != torch.float64:
            got = self.run()
            assert isinstance(got.out, LossOutput)
            assert_outputs(expected, got.out, what="", return_entropy=self.return_entropy)
            rows = (self.view(result.grad) for result in (got, eager, truth))
            assert_approximate_rows(*rows, case=case, logps=truth.out.logps)
        else:
            assert_parity(expected, view=self.view, **self.options)


def assert_approximate_rows(got: Tensor, eager: Tensor, truth: Tensor, *, case: Case, logps: Tensor) -> None:
    """Compare gradient rows if approximations err as the ISA allows.

    As in `assert_rows_no_worse`, a row may be as small as 1 - p, which has the absolute error of the
    log-probability. There that is one rounding. Here it is, in nats, the sum of

    * 2^-22: 2 ulp of `ex2.approx`, for each exponential and so for their sum;
    * 2^-22 log(V): the relative error of `lg2.approx` of that sum, which is at most V;
    * with a softcap S and a temperature T, 2 S / T (2^-22 + 2^-23), for the taken logit and the normalizer.
      `(1 - t) / (1 + t)` is at most 1 and its division errs 2 ulp, 2^-22. `t` errs 2^-22, which changes the
      quotient by at most half as much.
    """
    error = torch.full_like(logps, 2.0**-22 * (1 + math.log(got.shape[-1])))
    caps = [case.options.get(name) or 0.0 for name in ("logit_softcap", "ref_logit_softcap")]
    temperature = torch.as_tensor(case.options.get("temperature", 1.0)).nan_to_num(1.0)
    error = error + 2 * max(caps) / temperature * (2.0**-22 + 2.0**-23)
    others = -torch.expm1(logps.double())
    eps = torch.finfo(got.dtype).eps
    epsilon = (32 * eps if got.dtype == torch.float32 else 1.25 * eps) + (error / others).where(others > 0, 0)
    assert got.dtype == eager.dtype
    assert_no_worse_than_eager(got, eager, truth, epsilon=epsilon)


@dataclass(frozen=True)
class FromLogits(LossCase):
    """A case of option_cases.py that takes every branch of the loss.

    Attributes:
        spec: The loss.
        dtype: A name in `DTYPES`.
        packed: Whether the batch is packed. Its rows are then not aligned, and those of others are.
        option: A name in `EITHER`.
        inplace, return_entropy: Options of `grpo_loss`.
        upstream: Gradient of the loss.
        margins: Columns of NaN on both sides of the logits, and of the reference's.
    """

    spec: LossSpec
    dtype: str = "fp32"
    packed: bool = False
    option: str | None = None
    inplace: bool = False
    return_entropy: bool = False
    upstream: float = 1.0
    margins: tuple[int, int] = (0, 0)

    def case(self) -> Case:
        case = option_case(self.spec, self.dtype, self.packed, self.option)
        if not any(self.margins):
            return case
        logits, ref_logits = (
            torch.nn.functional.pad(x, self.margins, value=torch.nan)
            for x in (case.logits, case.options["ref_logits"])
        )
        return case._replace(logits=logits).with_options(ref_logits=self.view(ref_logits))

    def view(self, logits: Tensor) -> Tensor:
        left, right = self.margins
        return logits[..., left : logits.shape[-1] - right]


def option_case(spec: LossSpec, dtype: str, packed: bool, option: str | None) -> Case:
    case = branches(spec, dtype, packed, "cpu")
    return case if option is None else EITHER[option](case)


@dataclass(frozen=True)
class FewRows(LossCase):
    """Two tokens, the first and the last one of a vocabulary of any size."""

    spec: LossSpec
    dtype: str
    inplace: bool
    V: int

    def case(self) -> Case:
        generator = torch.Generator().manual_seed(self.V)
        logits = 2 * torch.randn(2, 1, self.V, generator=generator)
        ids = torch.tensor([[0], [self.V - 1]])
        old_logps = log_softmax_of(logits, ids)[0] + torch.tensor([[0.1], [-0.1]])
        options: dict[str, Any] = {"old_logps": old_logps}
        if self.spec.kl is not None:
            near = logits + 0.5 * torch.randn(logits.shape, generator=generator)
            options["ref_logits"] = near.to(DTYPES[self.dtype])
        return Case(self.spec, logits.to(DTYPES[self.dtype]), ids, torch.tensor([1.0, -0.7]), options)


@dataclass(frozen=True)
class ManyTokens(LossCase):
    """Tokens for two programs of the kernels over tokens, and for each of their warps. No two are alike."""

    inplace: bool
    return_entropy: bool = True

    def case(self) -> Case:
        batch = make_batch(7, 30, 31)
        options = {
            "completion_mask": batch.completion_mask,
            "ref_logits": batch.ref_logits,
            "old_logps": batch.old_logps,
        }
        return Case(EVERYTHING, batch.logits, batch.completion_ids, batch.advantages, options)


@dataclass(frozen=True)
class OneEntry(FewRows):
    """A vocabulary of one entry. Every statistic and the gradient are exactly 0."""

    V: int = 1

    def check(self, *, approximate: bool) -> None:
        case, (out, grad) = self.case(), self.run()
        for x in (out.logps, out.ref_logps, out.entropy, out.metrics["kl"], grad):
            assert torch.equal(x, torch.zeros_like(x))
        torch.testing.assert_close(out.loss.double(), run(reference_loss, case.wide()).out.loss)


class Banded(Reinforce):
    """`-A * logp`, whose clip fraction counts log-ratios beyond a band. The package has no such surrogate."""

    uses_ratio = True

    @property
    def clip(self) -> Clip:
        return Clip("log band", -0.4, 0.3)


@dataclass(frozen=True)
class LogBand:
    """The clip fraction of a user's surrogate."""

    def case(self) -> Case:
        return branches(LossSpec(Banded()), "fp32", False, "cpu")

    def run(self) -> Result:
        return run(grpo_loss, self.case(), backend="triton")

    def check(self, *, approximate: bool) -> None:
        case, (out, _) = self.case(), self.run()
        mask, advantages = case.options["completion_mask"], case.advantages[:, None]
        log_ratio = (out.logps - case.options["old_logps"]).where(mask, 0)
        clipped = ((log_ratio < -0.4) & (advantages < 0)) | ((log_ratio > 0.3) & (advantages > 0))
        share = clipped.sum() / mask.sum()
        assert 0 < share < 1
        torch.testing.assert_close(out.metrics["clip_fraction"], share)


@dataclass(frozen=True)
class SamplingMask:
    """A case of option_cases.py whose columns are spread among others, which a sampling mask drops.

    The dropped columns hold NaN, infinities and large numbers.
    """

    spec: LossSpec
    dtype: str = "fp32"
    packed: bool = False
    option: str | None = None
    inplace: bool = False

    def masked(self) -> tuple[Case, Masked]:
        """Return the case of the kept columns, and that of all: several blocks and a tail."""
        case = option_case(self.spec, self.dtype, self.packed, self.option)
        return case, spread(case, 2 * V + (265 if self.packed else 264))

    @property
    def options(self) -> dict[str, Any]:
        return {"backend": "triton", "inplace": self.inplace, "return_entropy": True}

    def run(self) -> Result:
        return run(grpo_loss, self.masked()[1].case, **self.options)

    def check(self, *, approximate: bool) -> None:
        case, masked = self.masked()
        expected = oracle(case)
        if not approximate or case.logits.dtype == torch.float64:
            assert_masked_parity(expected, masked, **self.options)
            return
        got = self.run()
        assert isinstance(got.out, LossOutput)
        assert_outputs(expected, got.out, what="", return_entropy=True)
        assert_approximate_rows(*masked.rows_of(got, expected), case=case, logps=expected.truth.out.logps)
        assert not got.grad[masked.dropped].any()


# --- Losses from hidden states ---


@dataclass(frozen=True)
class FromHidden:
    """A loss from hidden states. Operands of 16 bits are multiplied as on a GPU, into `logits_dtype`."""

    spec: LossSpec
    dtype: str
    packed: bool = False
    option: str | None = None
    logits_dtype: torch.dtype = torch.float32

    def case(self) -> LinearCase:
        return from_logits(option_case(self.spec, self.dtype, self.packed, self.option))

    def run(self) -> Any:
        with mixed_products if DTYPES[self.dtype].itemsize == 2 else nullcontext():
            return run_linear(self.case(), backend="triton", chunk_tokens=5, logits_dtype=self.logits_dtype)

    def check(self, *, approximate: bool) -> None:
        expected, got = linear_oracle(self.case()), self.run()
        truth, eager = expected.by_logits.truth.out.logps, expected.by_logits.eager.out.logps
        if self.logits_dtype == torch.bfloat16:
            # One row's logits may be rounded more luckily than another's, so whole tensors are compared.
            pairs = zip(
                (got.out.logps, *got.grads), (eager, *expected.eager), (truth, *expected.truth), strict=True
            )
            for x, y, exact in pairs:
                flat = (z.detach().flatten() for z in (x, y, exact))
                assert_no_worse_than_eager(*flat, epsilon=2 * torch.finfo(torch.bfloat16).eps)
            return
        if DTYPES[self.dtype].itemsize > 2:
            assert_outputs(expected.by_logits, got.out, what="")
        else:  # eager PyTorch has 16-bit logits, so its metrics are no bar
            torch.testing.assert_close(got.out.logps.double(), truth.detach(), rtol=0, atol=1e-5)
        sizes = expected.truth, expected.terms, expected.lengths
        assert_gradients(got.grads, expected.eager, *sizes, what="")


# --- Statistics without a loss ---


def log_softmax_of(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the taken tokens, and the entropies, at least in fp32."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True)
class Statistics:
    """`selective_logps`, and the gradient of the statistics `of`."""

    of: tuple[str, ...]  # "logps", "entropy"

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(V)
        return 2 * torch.randn(2, 3, V, generator=generator), torch.randint(V, (2, 3), generator=generator)

    def outputs(self, logits: Tensor, ids: Tensor, backend: str | None) -> list[Tensor]:
        """Return the gradient, log-probabilities, and entropies. Without a backend, eager PyTorch is run."""
        leaf = logits.detach().clone().requires_grad_()
        if backend is None:
            out = log_softmax_of(leaf, ids)
        elif "entropy" in self.of:
            out = selective_logps(leaf, ids, return_entropy=True, backend=backend)
        else:
            out = (selective_logps(leaf, ids, backend=backend),)
        weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
        named = dict(zip(("logps", "entropy"), out, strict=False))
        torch.autograd.backward([(named[name] * weights.to(leaf.dtype)).sum() for name in self.of])
        assert leaf.grad is not None
        return [leaf.grad, *(x.detach() for x in out)]

    def run(self) -> list[Tensor]:
        return self.outputs(*self.tensors(), "triton")

    def check(self, *, approximate: bool) -> None:
        logits, ids = self.tensors()
        (grad, *got), (truth, *exact) = self.run(), self.outputs(logits.double(), ids, None)
        eager = self.outputs(logits, ids, None)[0]
        assert_rows_no_worse(grad, eager, truth, ids=ids, logps=exact[0], what="gradient")
        for one, other in zip(got, exact, strict=False):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class HiddenStatistics:
    """`linear_token_stats` with entropies and top-1 flags. Every other token is the likeliest one."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 16, generator=generator) for n in (6, V))
        ids = torch.randint(V, (6,), generator=generator)
        return hidden, weight, ids.where(torch.arange(6) % 2 == 0, (hidden @ weight.t()).argmax(-1))

    def run(self) -> Any:
        given = {"entropy": True, "top1": True, "chunk_tokens": 4}
        return linear_token_stats(*self.tensors(), **given, backend="triton")

    def check(self, *, approximate: bool) -> None:
        hidden, weight, ids = self.tensors()
        logits = hidden.double() @ weight.double().t()
        got = self.run()
        for one, other in zip(got[:2], log_softmax_of(logits, ids), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)
        assert torch.equal(got.top1, logits.argmax(-1) == ids)
        assert 0 < int(got.top1.sum()) < len(ids)


# --- The cases ---


class Loss(NamedTuple):
    """A loss, and options of its fused case, which cost nothing: each loss compiles a kernel anyway."""

    surrogate: str
    kl: str
    dtype: str = "bf16"
    packed: bool = False
    option: str | None = None  # in EITHER


# Each surrogate and each KL at least once. The reference has logits, or log-probabilities if the case is
# packed and the KL is estimated.
LOSSES = (
    Loss("LogRatio", "k1", packed=True),
    Loss("ImportanceRatio", "k2", option="token weights"),
    Loss("ImportanceRatio(ref)", "k3"),
    Loss("ImportanceRatio(max_ratio)", "abs", "fp32", option="temperature per token"),
    Loss("PPOClip", "ratio_corrected", packed=True, option="KL on-policy"),
    Loss("PPOClip(delta)", "straight_through", option="softcap"),
    Loss("PPOClip(dual_clip)", "clamp", "fp32", option="on-policy"),
    Loss("Reinforce", "exact", option="reference softcap"),
    Loss("CISPO", "exact_forward", "fp32", packed=True, option="only the reference capped"),
    Loss("SAPO", "output_clamp", option="advantages per token"),
    Loss("DRO", "None", "fp32", packed=True, option="temperature"),
    Loss("DRO(ref)", "k1", packed=True, option="log-ratio clamped"),
    Loss("DPPO(tv)", "k3", packed=True, option="token weights"),
    Loss("DPPO(kl)", "None"),
    Loss("None", "exact", option="on-policy"),
    Loss("None", "straight_through", "fp32", packed=True),
)
# These take the two kernels over rows, and PyTorch computes the loss.
COUPLED = (
    ("PPOClip", "None", "sequence"),
    ("ImportanceRatio", "k2", "sequence-token"),
    ("CISPO", "exact_forward", "sequence"),
    ("SAPO", "None", "sequence-token"),
    ("DRO", "None", "sequence"),
    ("VESPO", "None", "token"),
    ("GMPO", "exact", "token"),
    ("callable", "ratio_corrected", "token"),
)
# Options of the two kernels, with all terms in the gradient.
OPTIONS = (
    *("scale", "temperature per token", "softcap", "only the reference capped", "vocabulary padded"),
    *("token weights", "advantages per token", "on-policy", "log-ratio clamped", "entropy alone", "no mask"),
)
FULL = LossSpec(ImportanceRatio(), KLS["exact"], entropy_coef=0.05)


def losses() -> Iterator[tuple[str, EmulatedCase]]:
    for loss in LOSSES:
        spec = LossSpec(SURROGATES[loss.surrogate], KLS[loss.kl])
        name = f"{loss.surrogate}, {loss.kl}"
        yield f"{name}, two kernels", FromLogits(spec)
        fused = FromLogits(spec, loss.dtype, packed=loss.packed, option=loss.option, inplace=True)
        yield f"{name}, {loss.option or loss.dtype}, in place", fused
    for surrogate, kl, level in COUPLED:
        spec = LossSpec(SURROGATES[surrogate], KLS[kl], level)
        yield f"{surrogate}, {kl}, {level} level", FromLogits(spec)
    yield "log band", LogBand()


def options() -> Iterator[tuple[str, EmulatedCase]]:
    for option in OPTIONS:
        yield f"{option}, two kernels", FromLogits(FULL, option=option)
    for option in ("vocabulary padded", "forward KL"):
        yield f"{option}, in place", FromLogits(FULL, "bf16", option=option, inplace=True)
    yield "entropy returned", FromLogits(LossSpec(PPOClip()), return_entropy=True)


def dtypes() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield aligned and unaligned rows, and slices of wider tensors, with a full block and a tail."""
    for dtype in DTYPES:
        for packed, rows in ((False, "aligned"), (True, "not aligned")):
            option = "softcap" if dtype == "fp64" and packed else None
            yield f"{dtype}, rows {rows}, two kernels", FromLogits(FULL, dtype, packed, option)
            # The upstream gradient is known in the backward only, and another kernel multiplies by it.
            fused = FromLogits(FULL, dtype, packed, option, inplace=True, upstream=-3.5)
            yield f"{dtype}, rows {rows}, in place, upstream gradient", fused
        inplace = dtype in ("fp32", "fp16")
        yield f"{dtype}, slice, aligned", FromLogits(FULL, dtype, inplace=inplace, margins=(8, 8))
    yield "fp32, slice, not aligned", FromLogits(FULL, margins=(1, 7))


def sizes() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield vocabularies from one entry, below a block, to those of real models."""
    yield "V = 1, two kernels", OneEntry(FULL, dtype="fp32", inplace=False)
    yield "V = 1, in place", OneEntry(FULL, dtype="bf16", inplace=True)
    plain = LossSpec(ImportanceRatio())
    for size in (31, 4113, 8192, 151936):
        for how, dtype, inplace in (("two kernels", "fp32", False), ("in place", "bf16", True)):
            yield f"V = {size}, {how}", FewRows(FULL, dtype, inplace, size)
        if size > 4113:
            yield f"V = {size}, policy only", FewRows(plain, "fp32", False, size)


def hidden_states() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield one pass (the loss does not couple tokens) and two. 16-bit operands are multiplied into fp32."""
    ways = (("one pass", "ImportanceRatio", "bf16", None), ("two passes", "callable", "fp16", "softcap"))
    for where, surrogate, dtype, option in ways:
        spec = LossSpec(SURROGATES[surrogate], KLS["exact"], entropy_coef=0.05)
        yield f"hidden states, {where}, fp32", FromHidden(spec, "fp32")
        yield f"hidden states, {where}, {dtype}", FromHidden(spec, dtype, option=option)
    yield "hidden states, policy only", FromHidden(LossSpec(ImportanceRatio()), "fp32", packed=True)
    yield "hidden states, bf16 logits", FromHidden(FULL, "bf16", logits_dtype=torch.bfloat16)
    yield "token statistics", HiddenStatistics()


def many_tokens() -> Iterator[tuple[str, EmulatedCase]]:
    yield "many tokens, two kernels", ManyTokens(False)
    yield "many tokens, in place", ManyTokens(True)


def sampling_masks() -> Iterator[tuple[str, EmulatedCase]]:
    forward = LossSpec(ImportanceRatio(), KLS["exact_forward"], entropy_coef=0.05)
    for inplace, where in ((False, "two kernels"), (True, "in place")):
        yield f"sampling mask, {where}", SamplingMask(FULL, inplace=inplace)
        yield f"sampling mask, bf16, {where}", SamplingMask(forward, "bf16", inplace=inplace)
        odd = SamplingMask(FULL, "bf16", packed=True, option="softcap", inplace=inplace)
        yield f"sampling mask, rows not aligned, {where}", odd
        plain = SamplingMask(LossSpec(ImportanceRatio()), option="temperature per token", inplace=inplace)
        yield f"sampling mask, policy only, {where}", plain
        padded = SamplingMask(FULL, option="vocabulary padded", inplace=inplace)
        yield f"sampling mask, vocabulary padded, {where}", padded
    yield "sampling mask, fp64", SamplingMask(FULL, "fp64")


def log_probabilities() -> Iterator[tuple[str, EmulatedCase]]:
    for of in (("logps",), ("entropy",), ("logps", "entropy")):
        yield f"selective_logps, gradient of {' and '.join(of)}", Statistics(of)


CASES: dict[str, EmulatedCase] = {
    name: case
    for group in (
        *(losses, options, dtypes, sizes, hidden_states, log_probabilities, many_tokens),
        sampling_masks,
    )
    for name, case in group()
}
