"""Losses from logits in the emulator, and their comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from option_cases import EITHER, branches
from parity import DTYPES, EVERYTHING, Case, Oracle, Result, assert_outputs, assert_parity, oracle, run
from sampling_masks import Masked, assert_masked_parity, spread
from torch import Tensor

from grpo_kernels import LossOutput, LossSpec, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.spec.surrogates.base import Clip
from grpo_kernels.testing import assert_no_worse_than_eager, make_batch

V = 1032  # a block and a tail; option_cases.py has the same for padded cases


def log_softmax_of(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the taken tokens, and the entropies, at least in fp32."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


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
