"""The inputs that break policy losses, one test per case, from hidden states.

Each with a loss whose gradient is made in the forward, and with one that couples tokens and takes two passes.
Logits are driven through the head's bias (-inf, shifts), through a head that is the identity, or through
`from_logits`. Two cases are other than for logits: hidden states and weights may have any strides, for the
logits, which alone must have stride 1 along the vocabulary, are the package's own (13; that they are never
held whole: test_linear_paths.py); and a row is the same to rounding only, for a matrix product
chooses its order of summation by the batch (20). Where bits are compared the logits are exact products, and
gradients are compared to the order of their sums: products.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import (
    LinearCase,
    LinearResult,
    assert_gradients,
    assert_same,
    assert_same_gradients,
    from_logits,
    linear_oracle,
    run_linear,
)
from parity import AGGREGATIONS, SURROGATES, Case, Oracle, oracle, run
from products import assert_same_products, lengths, magnitudes
from test_hard_cases import INF, NAN, SUM, TWO_BLOCKS, by_ratio, dtypes, not_contiguous
from test_hard_cases import random_case as logits_case
from test_linear_paths import local_and_not, random_case
from torch import Tensor

from grpo_kernels import (
    KL,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    linear_grpo_loss,
    linear_logps,
)
from grpo_kernels.reference import reference_loss
from grpo_kernels.surrogates import Surrogate
from grpo_kernels.testing import assert_no_worse_than_eager, relative_error

V, H = 128, 24

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
compacts = pytest.mark.parametrize("compact", [True, False], ids=["compact", "in place"])
# One pass, and two, of losses that are the same where a sequence is one token.
levels = pytest.mark.parametrize("level", ["token", "sequence"])


def reinforce(logps: Tensor, old: Any, ref: Any, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * logps


def nothing(logps: Tensor, old: Any, ref: Any, advantages: Tensor, mask: Tensor) -> Tensor:
    return 0 * logps


def every_term(spec: LossSpec) -> LossSpec:
    return replace(spec, kl=KL("exact"), entropy_coef=0.01)


def every_tensor(case: LinearCase, change: Callable[[Tensor], Tensor]) -> LinearCase:
    """All that is per token or per sequence."""
    options = {
        name: change(x) if isinstance(x, Tensor) and "lm_head" not in name else x
        for name, x in case.options.items()
    }
    tensors = {name: change(getattr(case, name)) for name in ("hidden", "completion_ids", "advantages")}
    return case._replace(**tensors, options=options)


def laid_out(case: LinearCase, packed: bool) -> LinearCase:
    """Packed, the same tokens end to end."""
    if not packed:
        return case
    sequences, tokens = case.completion_ids.shape
    case = every_tensor(case, lambda x: x.flatten(0, 1) if x.dim() > 1 else x)
    return case.with_options(seq_lens=torch.full((sequences,), tokens))


def every_option(spec: LossSpec, *shape: int, device: str, **how: Any) -> LinearCase:
    """With a mask, a reference and a bias, and all options that are per token."""
    return from_logits(logits_case(spec, *shape, device=device, **how))


def through_identity(case: Case, scale: float = 1.0) -> LinearCase:
    """Its logits are the hidden states times `scale`, exactly, and their gradients alike."""
    width = case.logits.shape[-1]
    weight = scale * torch.eye(width, dtype=case.logits.dtype, device=case.logits.device)
    return LinearCase(
        case.spec, case.logits, weight, None, case.completion_ids, case.advantages, case.options
    )


def one_token(log_ratio: float, advantage: float, device: str, spec: LossSpec) -> LinearCase:
    """Off the behaviour policy by `log_ratio`."""
    case = random_case(spec, shape=(1, 1), device=device)
    logps = run_linear(case._replace(spec=LossSpec(Reinforce()))).out.logps
    return case._replace(advantages=torch.full((1,), advantage, device=device)).with_options(
        old_logps=logps - log_ratio
    )


def assert_right(case: LinearCase, expected: LinearCase | None = None, **options: Any) -> LinearResult:
    """Log-probabilities, loss, entropy and gradients, against the reference, of `expected` if given."""
    wanted = linear_oracle(case if expected is None else expected)
    got, truth = run_linear(case, **options), wanted.by_logits.truth.out
    for name in ("logps", "entropy", "ref_logps"):
        if (value := getattr(got.out, name)) is not None:
            torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(got.out.loss.double(), truth.loss.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(got.grads, wanted.eager, wanted.truth, wanted.terms, wanted.lengths, "")
    return got


def assert_no_gradient(got: LinearResult) -> None:
    assert not any(x.any() for x in got.grads)


class TestCases1And2HugeRatio:
    """exp(200) is inf in fp32, and inf * 0 is NaN."""

    @layouts
    @levels
    @dtypes
    def test_case_1_positive_advantage(
        self, dtype: torch.dtype, level: str, packed: bool, backend: str, device: str
    ) -> None:
        case = one_token(200.0, 1.0, device, LossSpec(PPOClip(eps_high=0.28), level=level)).to(dtype)
        got = run_linear(laid_out(case, packed), backend=backend)
        assert got.out.loss.item() == pytest.approx(-1.28)
        assert_no_gradient(got)

    @layouts
    @levels
    @pytest.mark.parametrize(
        "surrogate, clamp, loss",
        [
            (PPOClip(), None, INF),
            (PPOClip(), 20.0, math.exp(20.0)),
            (PPOClip(dual_clip=3.0), None, 3.0),
            (PPOClip(delta=4.0), None, 4.0),
        ],
        ids=["as TRL", "clamp 20", "dual_clip", "delta"],
    )
    def test_case_2_negative_advantage(
        self,
        surrogate: PPOClip,
        clamp: float | None,
        loss: float,
        level: str,
        packed: bool,
        backend: str,
        device: str,
    ) -> None:
        spec = LossSpec(surrogate, level=level, log_ratio_clamp=clamp)
        got = run_linear(laid_out(one_token(200.0, -1.0, device, spec), packed), backend=backend)
        assert got.out.loss.item() == pytest.approx(loss)
        if math.isfinite(loss):
            assert_no_gradient(got)


RESTING = {
    **{
        name: LossSpec(surrogate)
        for name, surrogate in SURROGATES.items()
        if isinstance(surrogate, Surrogate) and surrogate.rests_at_zero
    },
    "PPOClip, sequence": LossSpec(PPOClip(), level="sequence"),
}


@compacts
class TestCase3ZeroAdvantage:
    @pytest.mark.parametrize("spec", RESTING.values(), ids=RESTING)
    def test_any_ratio(self, spec: LossSpec, compact: bool, backend: str, device: str) -> None:
        anchors = torch.tensor([[0.0, -1e4, 1e4, -INF, INF, NAN]], device=device)
        case = random_case(spec, shape=(1, 6), device=device).with_options(
            old_logps=anchors, ref_logps=anchors
        )
        case = case._replace(advantages=torch.zeros(1, device=device))
        got = run_linear(case, compact=compact, backend=backend)
        assert not got.out.loss and not got.out.metrics["active_fraction"]
        assert_no_gradient(got)

    @layouts
    @levels
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_hidden_states(
        self, value: float, level: str, packed: bool, compact: bool, backend: str, device: str
    ) -> None:
        """0 * NaN would be the gradient of the weight."""
        case = random_case(LossSpec(PPOClip(), level=level), shape=(3, 4), device=device)
        case.advantages[0] = 0
        clean = laid_out(case._replace(hidden=case.hidden.clone()), packed)
        want = run_linear(clean, compact=compact, backend=backend)
        case.hidden[0, :, 5] = value
        got = run_linear(laid_out(case, packed), compact=compact, backend=backend)
        assert torch.equal(got.out.loss, want.out.loss)
        assert_same_gradients(got, want, clean, compact=compact, backend=backend)
        assert got.grads[1].any()


@local_and_not
class TestCase4Poison:
    @compacts
    @layouts
    @dtypes
    def test_masked(
        self, spec: LossSpec, dtype: torch.dtype, packed: bool, compact: bool, backend: str, device: str
    ) -> None:
        case = every_option(every_term(spec), 3, 4, 67, dtype=dtype, seed=1, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()

        def filled(values: Tensor) -> LinearCase:
            def fill(x: Tensor) -> Tensor:
                if not x.is_floating_point():
                    return x
                there = values.to(x.dtype).expand(3, 4)
                if x.dim() == 2:
                    return torch.where(mask, x, there)
                return torch.where(mask[..., None], x, there[..., None])

            return laid_out(every_tensor(case, fill), packed)

        # One after the other along the tokens.
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)
        clean, how = filled(poison.new_zeros(4)), {"compact": compact, "backend": backend}
        got, want = (run_linear(x, **how) for x in (filled(poison.roll(1)), clean))
        assert_same(got, want, clean, **how)
        assert all(x.isfinite().all() and x.any() for x in (got.out.loss, *got.grads))
        assert not got.grads[0].view(case.hidden.shape)[~mask].any()

    @pytest.mark.parametrize(
        "name",
        [
            "hidden",
            "weight",
            "bias",
            "advantages",
            "old_logps",
            "ref_hidden",
            "ref_lm_head_weight",
            "ref_lm_head_bias",
            "token_weights",
            "temperature",
        ],
    )
    def test_unmasked_nan_surfaces(self, spec: LossSpec, name: str, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 2, 2, 37, masked=0, inactive=0, device=device)
        assert run_linear(case, backend=backend).out.loss.isfinite()
        (getattr(case, name) if name in case._fields else case.options[name]).view(-1)[3] = NAN
        assert run_linear(case, backend=backend).out.loss.isnan()


@layouts
def test_case_5_zero_beta_reads_no_reference(packed: bool, backend: str, device: str) -> None:
    case = random_case(shape=(2, 3), device=device)
    case = laid_out(case, packed)
    want = run_linear(case, backend=backend)
    for kl, ref_logps in [
        (KL("k3", beta=0.0), None),
        (KL("exact", beta=0.0), None),
        (
            KL("k3", beta=0.0, ratio_corrected=True),
            torch.full(case.completion_ids.shape, NAN, device=device),
        ),
    ]:
        without = case._replace(spec=LossSpec(PPOClip(), kl)).with_options(ref_logps=ref_logps)
        got = run_linear(without, backend=backend)
        assert_same(got._replace(out=got.out._replace(ref_logps=None)), want, case, backend=backend)


@local_and_not
@dtypes
@pytest.mark.parametrize("full", [False, True], ids=["surrogate", "every term"])
@pytest.mark.parametrize("value", [-INF, -1e4, -3e38])
# As trainers suppress words, by the bias: one, and the kernels' first block with a reference and without.
@pytest.mark.parametrize("words", [1, 2048, 4096])
def test_case_6_suppressed_words(
    spec: LossSpec, full: bool, value: float, words: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """-1e4, of which fp64 makes a probability of 0, stands in for -inf in what is expected."""
    vocab = 37 if words == 1 else 5000
    case = random_case(every_term(spec) if full else spec, shape=(2, 1), V=vocab, device=device, dtype=dtype)
    case = case._replace(completion_ids=case.completion_ids.clamp(min=words))

    def suppressed(value: float) -> LinearCase:
        bias = torch.zeros(vocab, device=device, dtype=dtype)
        bias[:words] = value
        if not full:
            return case._replace(bias=bias)
        ref = {"ref_hidden": case.hidden.roll(1, -1), "ref_lm_head_weight": case.weight}
        return case._replace(bias=bias).with_options(**ref, ref_lm_head_bias=bias)

    assert_right(suppressed(value), suppressed(-1e4), backend=backend)


class TestCase7Degenerate:
    @local_and_not
    @dtypes
    @pytest.mark.parametrize("vocab, target", [(37, 5), (TWO_BLOCKS, 0), (TWO_BLOCKS, TWO_BLOCKS - 1)])
    def test_only_the_taken_word_is_finite(
        self, spec: LossSpec, vocab: int, target: int, dtype: torch.dtype, backend: str, device: str
    ) -> None:
        spec = replace(spec, entropy_coef=0.1)
        case = random_case(spec, shape=(1, 2), V=vocab, device=device, dtype=dtype)
        bias = torch.full((vocab,), -INF, device=device, dtype=dtype)
        bias[target] = 3.0
        case = case._replace(bias=bias, completion_ids=torch.full_like(case.completion_ids, target))
        got = run_linear(case, backend=backend)
        assert got.out.loss.isfinite() and not got.out.logps.any() and not got.out.entropy.any()
        assert_no_gradient(got)

    @by_ratio
    @levels
    @pytest.mark.parametrize("on_policy", [False, True])
    def test_the_taken_word_is_impossible(
        self, surrogate: Any, level: str, on_policy: bool, backend: str, device: str
    ) -> None:
        """Off-policy its ratio is exp(-inf) = 0, its gradient too; on-policy they are 1 and -A."""
        case = one_token(0.0, 1.0, device, LossSpec(surrogate, level=level))
        bias = torch.zeros(V, device=device)
        bias[case.completion_ids] = -INF
        case = case._replace(bias=bias)
        got = run_linear(case.with_options(old_logps=None) if on_policy else case, backend=backend)
        assert got.out.loss.item() == -on_policy
        assert got.out.metrics["ratio"].item() == on_policy
        for x in got.grads:
            assert x.isfinite().all() and bool(x.any()) == on_policy


@local_and_not
@pytest.mark.parametrize("shift", [-120.0, 1e4])
@pytest.mark.parametrize("peak", [0.0, 40.0])
def test_case_8_shifted_logits(spec: LossSpec, shift: float, peak: float, backend: str, device: str) -> None:
    """With the peak an entropy of 1e-15, which rounding must not turn negative."""
    case = random_case(replace(spec, entropy_coef=0.1), shape=(2, 4), device=device)
    bias = shift + peak * (torch.arange(V, device=device) == 7)
    case = case._replace(bias=bias, completion_ids=torch.full_like(case.completion_ids, 7))
    got, want = run_linear(case, backend=backend), linear_oracle(case)
    precision = torch.finfo(torch.float32).eps * abs(shift) + 1e-5
    for name in ("logps", "entropy"):
        value, exact = (getattr(out, name) for out in (got.out, want.by_logits.truth.out))
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=precision)
    assert (got.out.entropy >= 0).all()
    if not peak:
        for x, exact in zip(got.grads, want.truth, strict=True):
            assert relative_error(x.flatten(), exact.flatten()) < precision


@pytest.mark.parametrize("surrogate", [Reinforce(), reinforce], ids=["one pass", "two passes"])
class TestCase9HalfPrecision:
    def test_large_fp16_logits(self, surrogate: Any, backend: str, device: str) -> None:
        """Hidden states up to 6e4, of which the head makes products beyond fp16."""
        case = logits_case(LossSpec(surrogate), 2, 3, 67, bare=True, device=device)
        logits = (case.logits * 1000).clamp(-6e4, 6e4)
        logits[..., 11:13] = 6e4
        case.completion_ids[0] = 12
        case = case._replace(logits=logits.half()).with_options(temperature=0.5)
        got = run_linear(through_identity(case, scale=2.0), return_entropy=True, backend=backend)
        want = run(reference_loss, case.with_options(logit_scale=2.0).wide())
        # The unlikely tokens' log-probabilities are near -1e5: fp32 has two digits after the point there.
        torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=1e-5)
        assert float(relative_error(got.grads[0], want.grad).max()) < 2 * torch.finfo(torch.float16).eps

    def test_bf16_gradient_at_a_likely_word(self, surrogate: Any, backend: str, device: str) -> None:
        """`1 - p` cancels where p is near 0.999; `-expm1(logp)` does not."""
        rows = 64  # each with its taken word's probability somewhere between 0.998 and 0.9995
        case = logits_case(LossSpec(surrogate), 1, rows, 37, dtype=torch.bfloat16, bare=True, device=device)
        column = case.completion_ids[..., None]
        rest = case.logits.float().scatter(-1, column, -INF).logsumexp(-1, keepdim=True)
        likely = rest + torch.linspace(6.2, 7.6, rows, device=device)[None, :, None]
        case.logits.scatter_(-1, column, likely.bfloat16())
        expected: Oracle = oracle(case)
        grad = run_linear(through_identity(case), backend=backend).grads[0]
        taken = [x.gather(-1, column) for x in (grad, expected.eager.grad, expected.truth.grad)]
        assert_no_worse_than_eager(*taken, factor=4, what="gradient at the taken word")


@local_and_not
@layouts
class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 67, 2**31])
    def test_masked(self, spec: LossSpec, wrong: int, packed: bool, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        got = run_linear(laid_out(case._replace(completion_ids=ids), packed), backend=backend)
        clean = laid_out(case, packed)
        assert_same(got, run_linear(clean, backend=backend), clean, backend=backend)

    @pytest.mark.parametrize("wrong", [-100, -1, 123, 125, 2**31, 2**40])
    def test_unmasked(
        self,
        spec: LossSpec,
        wrong: int,
        packed: bool,
        backend: str,
        device: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The vocabulary is 123 words of a head of 128: 123 and 125 could be read, but are no words."""
        case = random_case(spec, shape=(2, 4), device=device).with_options(vocab_size=123)
        case.completion_ids.clamp_(max=122)[1, 2] = wrong
        case = laid_out(case, packed)
        got = run_linear(case, backend=backend)
        assert got.out.loss.isnan()
        assert got.out.logps.isnan().flatten().nonzero().tolist() == [[6]]
        if not spec.uses_callable:  # which couples the token with others
            grad = got.grads[0].flatten(0, -2)
            assert grad[:6].isfinite().all() and grad[7:].isfinite().all() and grad[:6].any()
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
        place = "6" if packed else "1, 2"
        with pytest.raises(ValueError, match=rf"completion_ids\[{place}\] is {wrong}, outside \[0, 123\)"):
            run_linear(case, backend=backend)


@local_and_not
@dtypes
@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, TWO_BLOCKS, 50257, 151936])
def test_case_11_vocabularies(
    spec: LossSpec, vocab: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A lone word, odd sizes, an element off whole blocks, and what models have; first and last taken."""
    case = random_case(
        replace(spec, entropy_coef=0.1), shape=(1, 2), H=3, V=vocab, dtype=dtype, device=device
    )
    case.completion_ids[:] = torch.tensor([0, vocab - 1])
    got = assert_right(case, backend=backend)
    if vocab == 1:
        assert_no_gradient(got)
        assert not got.out.logps.any() and not got.out.entropy.any()


@local_and_not
class TestCase12Large:
    @pytest.mark.parametrize("shape", [(65537, 1), (1, 65537)], ids=["sequences", "tokens"])
    def test_more_rows_than_a_grid_is_wide(self, spec: LossSpec, device: str, shape: tuple[int, int]) -> None:
        """65535 limits a launch grid's second dimension. (To interpret so many programs takes minutes.)"""
        case = random_case(spec, shape=shape, H=2, V=3, device=device)
        assert_right(case, chunk_tokens=65537, backend="triton" if device == "cuda" else "torch")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_more_than_2_31_elements(self, spec: LossSpec) -> None:
        """In one chunk of logits."""
        rows, vocab = 16400, 131072
        assert rows * vocab > 2**31
        needed = (4 + 2 + 4) * rows * vocab  # bytes: logits in fp32, gradient in bf16, and room
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
        spec = replace(spec, aggregation=SUM)
        last = random_case(spec, shape=(1, 1), H=16, V=vocab, dtype=torch.bfloat16, device="cuda")
        hidden = torch.zeros(rows, 1, 16, dtype=torch.bfloat16, device="cuda")
        hidden[-1:] = last.hidden
        ids = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
        ids[-1:] = last.completion_ids
        case = last._replace(hidden=hidden, completion_ids=ids, advantages=last.advantages.expand(rows))
        got, want = run_linear(case, chunk_tokens=rows), linear_oracle(last)
        assert got.out.logps[-2].item() == pytest.approx(-math.log(vocab), abs=1e-5)
        truth = want.by_logits.truth.out.logps
        torch.testing.assert_close(got.out.logps[-1:].double(), truth, rtol=0, atol=1e-5)
        assert_gradients(
            (got.grads[0][-1:],), want.eager[:1], want.truth[:1], want.terms[:1], want.lengths, "last row"
        )


def beside(x: Tensor, dim: int, *, first: bool = False) -> Tensor:
    """`x`, and NaN on one side of it."""
    outside = torch.full_like(x, NAN)
    return torch.cat([outside, x] if first else [x, outside], dim)


# What allocates the hidden states, and the view of it that is them.
STRIDES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "x[:, :-P]": (lambda x: beside(x, 1), lambda x: x[:, :4]),
    "x[:, P:]": (lambda x: beside(x, 1, first=True), lambda x: x[:, 4:]),
    "x[..., :H]": (lambda x: beside(x, 2), lambda x: x[..., :H]),
    "x[..., H:]": (lambda x: beside(x, 2, first=True), lambda x: x[..., H:]),
    "every other number": (lambda x: x.repeat_interleave(2, -1), lambda x: x[..., ::2]),
    "batch transposed": (lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
    "tokens innermost": (lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2)),
    "packed": (lambda x: beside(x.flatten(0, 1), 0, first=True), lambda x: x[12:]),
}
WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "transposed": (lambda x: x.t().contiguous(), Tensor.t),
    "x[:V]": (lambda x: beside(x, 0), lambda x: x[:V]),
    "x[:, H:]": (lambda x: beside(x, 1, first=True), lambda x: x[:, H:]),
}


@local_and_not
@pytest.mark.parametrize(
    "strides, weights",
    [*((strides, "transposed") for strides in STRIDES), *(("x[:, P:]", weights) for weights in WEIGHTS)],
)
def test_case_13_strides(spec: LossSpec, strides: str, weights: str, backend: str, device: str) -> None:
    """The right gradients within what was allocated, and none outside. A weight `[H, V]`: case 16."""
    case = random_case(spec, shape=(3, 4), device=device)
    memory, views = [], []
    for x, (allocate, view) in ((case.hidden, STRIDES[strides]), (case.weight, WEIGHTS[weights])):
        memory.append(allocate(x).requires_grad_())
        views.append(view)
    plain = laid_out(case, strides == "packed")
    out = linear_grpo_loss(
        *(view(x) for view, x in zip(views, memory, strict=True)),
        plain.completion_ids,
        plain.advantages,
        spec=spec,
        backend=backend,
        **plain.options,
    )
    grads = torch.autograd.grad(out.loss, memory)
    want = run_linear(plain, backend=backend)
    torch.testing.assert_close(out.logps, want.out.logps, rtol=1e-5, atol=1e-5)
    for grad, view, expected in zip(grads, views, want.grads, strict=True):
        assert relative_error(view(grad).flatten(), expected.flatten()) < 1e-5
        outside = torch.ones_like(grad)
        view(outside).zero_()
        assert not grad[outside == 1].any()


@local_and_not
class TestCase14Layouts:
    """The results are those of contiguous fp32 and int64."""

    @not_contiguous
    def test_layouts(
        self, spec: LossSpec, layout: Callable[[Tensor], Tensor], backend: str, device: str
    ) -> None:
        case = every_option(every_term(spec), 3, 4, 37, device=device)
        got = run_linear(every_tensor(case, lambda x: layout(x) if x.dim() == 2 else x), backend=backend)
        assert_same(got, run_linear(case, backend=backend), case, backend=backend)

    def test_expanded(self, spec: LossSpec, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 3, 4, 37, inactive=0, device=device)
        case = every_tensor(case, lambda x: x[:1].expand(3, *x.shape[1:]))
        repeated = every_tensor(case, Tensor.contiguous)
        got, want = (run_linear(x, backend=backend) for x in (case, repeated))
        assert_same(got, want, repeated, backend=backend)

    @layouts
    @pytest.mark.parametrize(
        "ids, mask",
        [
            (torch.int32, torch.bool),
            (torch.int64, torch.uint8),
            (torch.int32, torch.int32),
            (torch.int64, torch.int64),
            (torch.int32, torch.float32),
            (torch.int64, torch.bfloat16),
        ],
    )
    def test_ids_and_masks(
        self, spec: LossSpec, ids: torch.dtype, mask: torch.dtype, packed: bool, backend: str, device: str
    ) -> None:
        case = laid_out(every_option(spec, 3, 4, 37, device=device), packed)
        got = case.with_options(completion_mask=case.options["completion_mask"].to(mask))
        got = got._replace(completion_ids=case.completion_ids.to(ids))
        assert_same(*(run_linear(x, backend=backend) for x in (got, case)), case, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_values(self, spec: LossSpec, dtype: torch.dtype, backend: str, device: str) -> None:
        """Of advantages, log-probabilities, weights and temperatures that all these dtypes have."""

        def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
            return lambda x: x.to(dtype) if x.dim() == 2 and x.is_floating_point() else x

        case = every_option(every_term(spec), 3, 4, 37, device=device)
        for rounding in (torch.bfloat16, torch.float16, torch.float32):
            case = every_tensor(case, to(rounding))
        got = run_linear(every_tensor(case, to(dtype)), backend=backend)
        assert_same(got, run_linear(case, backend=backend), case, backend=backend)


@compacts
@local_and_not
class TestCase15Empty:
    @staticmethod
    def assert_nothing(got: LinearResult) -> None:
        assert not got.out.loss
        assert_no_gradient(got)
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @pytest.mark.parametrize(
        "shape", [(0, 4), (3, 0), (2, 3)], ids=["no sequences", "no tokens", "all masked"]
    )
    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_nothing(
        self,
        spec: LossSpec,
        shape: tuple[int, int],
        aggregation: str,
        compact: bool,
        backend: str,
        device: str,
    ) -> None:
        spec = replace(every_term(spec), aggregation=aggregation, max_tokens=4)
        case = random_case(spec, shape=shape, device=device).with_options(
            completion_mask=torch.zeros(shape, device=device)
        )
        case = case.with_options(ref_hidden=case.hidden, ref_lm_head_weight=case.weight)
        got = run_linear(case, compact=compact, backend=backend)
        self.assert_nothing(got)
        assert got.out.logps.shape == got.out.entropy.shape == shape

    @pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
    def test_nothing_packed(
        self, spec: LossSpec, lengths: list[int], compact: bool, backend: str, device: str
    ) -> None:
        case = random_case(spec, shape=(len(lengths), 0), device=device)
        case = every_tensor(case, lambda x: x.flatten(0, 1) if x.dim() > 1 else x)
        case = case.with_options(seq_lens=torch.tensor(lengths, dtype=torch.long))
        self.assert_nothing(run_linear(case, compact=compact, backend=backend))

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(
        self, spec: LossSpec, aggregation: str, compact: bool, backend: str, device: str
    ) -> None:
        """It counts in B, as in TRL, and is not divided by its 0 tokens. Packed, it has no rows at all."""
        spec = replace(spec, aggregation=aggregation, max_tokens=4)
        case = every_option(spec, 3, 4, 37, masked=0, inactive=0, device=device)
        mask = case.options["completion_mask"]
        mask[1] = False
        padded = assert_right(case, compact=compact, backend=backend)
        if spec.uses_callable:  # it couples along the last dimension, which packed is another
            return
        packed = every_tensor(case, lambda x: x[mask]).with_options(seq_lens=torch.tensor([4, 0, 4]))
        got = run_linear(packed, compact=compact, backend=backend)
        torch.testing.assert_close(got.out.loss, padded.out.loss)
        torch.testing.assert_close(got.grads[0], padded.grads[0][mask])
        torch.testing.assert_close(got.grads[1:], padded.grads[1:])


def with_reference(**more: Any) -> dict[str, Any]:
    return {"ref_hidden": torch.randn(4, 16, H), "ref_lm_head_weight": torch.randn(V, H), **more}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of one dimension": ({"hidden": torch.randn(H)}, r"hidden must be \[B, T, H\].*\(24,\)"),
    "hidden of integers": ({"hidden": torch.ones(4, 16, H).int()}, "hidden must be fp16.*int32"),
    "weight transposed": (
        {"lm_head_weight": torch.randn(H, V)},
        r"lm_head_weight must be \[V, H\].*\(24, 128\)",
    ),
    "weight of another dtype": (
        {"lm_head_weight": torch.randn(V, H).bfloat16()},
        "lm_head_weight is torch.bfloat16, hidden torch.float32",
    ),
    "weight in fp64": ({"lm_head_weight": torch.randn(V, H).double()}, "fp64 goes with fp64 only"),
    "weight elsewhere": ({"lm_head_weight": torch.empty(V, H, device="meta")}, "lm_head_weight is on meta"),
    "bias of another length": ({"lm_head_bias": torch.randn(H)}, r"lm_head_bias must be \[V\] = \(128,\)"),
    "ids of another shape": ({"completion_ids": torch.zeros(4, 15).long()}, r"completion_ids.*as hidden"),
    "vocab_size": ({"vocab_size": V + 1}, "vocab_size must be between 1 and the 128 rows of lm_head_weight"),
    "both references": (
        with_reference(ref_logps=torch.zeros(4, 16)),
        "ref_hidden and ref_logps are both given",
    ),
    "no reference": ({"spec": LossSpec(LogRatio())}, "needs a reference: give ref_hidden or ref_logps"),
    "no reference for the exact KL": (
        {"spec": LossSpec(PPOClip(), KL("exact")), "ref_logps": torch.zeros(4, 16)},
        "it needs ref_hidden",
    ),
    "no reference weight": (
        {"ref_hidden": torch.randn(4, 16, H)},
        "ref_hidden is given without ref_lm_head_weight",
    ),
    "no reference hidden": ({"ref_lm_head_weight": torch.randn(V, H)}, "without ref_hidden"),
    "reference of another length": (
        with_reference(ref_hidden=torch.randn(4, 15, H)),
        r"ref_hidden must have the leading shape of hidden \(4, 16, 24\)",
    ),
    "reference of another vocabulary": (
        with_reference(ref_lm_head_weight=torch.randn(V + 1, H)),
        "ref_lm_head_weight has 129 rows, lm_head_weight 128: give vocab_size",
    ),
    "reference of too small a vocabulary": (
        with_reference(ref_lm_head_weight=torch.randn(V - 9, H), vocab_size=V - 8),
        "ref_lm_head_weight has 119 rows, fewer than the 120 of the vocabulary",
    ),
    "logits_dtype": ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float32 or torch.bfloat16"),
    "bf16 logits of fp32 factors": ({"logits_dtype": torch.bfloat16}, "is for factors of bf16"),
    "chunk_tokens": ({"chunk_tokens": 0}, "chunk_tokens must be >= 1"),
    "skip without compact": (
        {"skip_inactive": True, "compact": False},
        "skip_inactive=True needs compact=True",
    ),
    "packed without seq_lens": (
        {"hidden": torch.randn(64, H), "completion_ids": torch.zeros(64).long()},
        "seq_lens",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_case_16_refused(changes: dict[str, Any], message: str) -> None:
    case = random_case()
    arguments: dict[str, Any] = {
        "hidden": case.hidden,
        "lm_head_weight": case.weight,
        "completion_ids": case.completion_ids,
        "advantages": case.advantages,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**arguments)


@pytest.mark.parametrize(
    "options", [{"chunk_tokens": 2.5}, {"compact": 1}, {"skip_inactive": None}, {"lm_head_bias": [0.0] * V}]
)
def test_case_16_refused_types(options: dict[str, Any]) -> None:
    case = random_case()
    arguments = (case.hidden, case.weight, case.completion_ids, case.advantages)
    with pytest.raises(TypeError, match=next(iter(options))):
        linear_grpo_loss(*arguments, **options)


def test_case_16_logps_refuses_as_the_loss_does() -> None:
    case = random_case()
    with pytest.raises(ValueError, match=r"lm_head_weight must be \[V, H\]"):
        linear_logps(case.hidden, case.weight.t(), case.completion_ids)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 16\)"):
        linear_logps(case.hidden, case.weight, case.completion_ids, mask=torch.ones(4))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF])
def test_case_16_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"^temperature must be finite and > 0, got {temperature}$"):
        run_linear(random_case().with_options(temperature=temperature))


@local_and_not
@layouts
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_case_17_uneven_micro_batches(
    spec: LossSpec, aggregation: str, packed: bool, backend: str, device: str
) -> None:
    """With a common normalizer, losses and gradients of uneven parts add up to those of the batch."""
    spec = replace(every_term(spec), aggregation=aggregation, max_tokens=4)
    if packed and spec.uses_callable:  # it couples all tokens of a packed batch
        spec = replace(spec, surrogate=PPOClip(), level="sequence")
    case = every_option(spec, 4, 3, 37, seed=1, device=device).with_options(normalizer=4.0)

    def part(rows: slice) -> LinearResult:
        return run_linear(laid_out(every_tensor(case, lambda x: x[rows]), packed), backend=backend)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    by_hidden, *by_head = zip(*(x.grads for x in parts), strict=True)
    found = [torch.cat(by_hidden), *(torch.stack(grads).sum(0) for grads in by_head)]
    for x, y in zip(found, whole.grads, strict=True):
        assert relative_error(x.flatten(), y.flatten()) < 1e-5


@local_and_not
def test_case_18_inputs_are_never_written(spec: LossSpec, backend: str, device: str) -> None:
    """Leaf hidden states, the output of a tanh, whose backward reads it, and both with another use after."""
    case = every_option(every_term(spec), 2, 3, 37, device=device)
    leaf, weight, bias = (x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    hidden = torch.tanh(leaf)
    tensors = [leaf, hidden, weight, bias, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, hidden):
        out = linear_grpo_loss(
            *(x, weight, case.completion_ids, case.advantages),
            lm_head_bias=bias,
            spec=case.spec,
            backend=backend,
            **case.options,
        )
        (out.loss + x.square().sum() + weight.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


@local_and_not
@layouts
@dtypes
def test_case_19_loss_times_1024(
    spec: LossSpec, dtype: torch.dtype, packed: bool, backend: str, device: str
) -> None:
    """Exact but for the order of sums, for it is a power of two. Other factors: test_linear_paths.py."""
    case = laid_out(every_option(every_term(spec), 2, 3, 37, dtype=dtype, device=device), packed)
    once, many = (run_linear(case, upstream=factor, backend=backend) for factor in (1.0, 1024.0))
    assert all(x.any() for x in once.grads)
    scaled = once._replace(grads=tuple(1024 * x for x in once.grads))
    assert_same_gradients(many, scaled, case, upstream=1024.0, backend=backend)


@local_and_not
class TestCase20SameResults:
    def test_a_hundred_times(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, shape=(1, 1), V=37, device=device)
        first, *others = (run_linear(case, backend=backend) for _ in range(100))
        for other in others[:: len(others) // 9]:
            assert_same(other, first, case, backend=backend)

    def test_neighbours(self, spec: LossSpec, backend: str, device: str) -> None:
        """Alone, in a batch, permuted, and among masked neighbours."""
        rows, row = 7, 4
        spec = replace(every_term(spec), aggregation=SUM)
        case = every_option(spec, rows, 1, 37, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)

        def call(index: list[int], masked: bool = False) -> list[Tensor]:
            chosen = every_tensor(case, lambda x: x[index] if x.dim() else x)
            if masked:
                chosen.options["completion_mask"][:row] = chosen.options["completion_mask"][row + 1 :] = False
            got = run_linear(chosen, chunk_tokens=3, backend=backend)
            with magnitudes():
                size = run_linear(chosen, chunk_tokens=3, backend=backend).grads[0]
            return [x[index.index(row)] for x in (got.grads[0], got.out.logps, got.out.entropy, size)]

        want = call(list(range(rows)))
        for index, masked in [
            (list(range(rows)), True),
            ([row], False),
            ([0, row], False),
            ([6, 0, 1, 5, 3, 2, row], False),
            ([row] * 5, False),
        ]:
            what = f"{index}, {masked = }"
            grad, logps, entropy, size = call(index, masked)
            assert torch.equal(logps, want[1]) and torch.equal(entropy, want[2]), what
            assert_same_products(grad, want[0], size, lengths(rows, 37)["hidden"], what)


@pytest.mark.parametrize("surrogate", [None, nothing], ids=["one pass", "two passes"])
@pytest.mark.parametrize("x", [1e-4, -1e-4])
def test_case_21_k3_near_zero(surrogate: Any, x: float, backend: str, device: str) -> None:
    """In fp32 `exp(x) - x - 1` is noise at x = 1e-4; `expm1(x) - x` is 5e-9 to a percent."""
    case = random_case(LossSpec(Reinforce()), shape=(1, 8), device=device)
    logps = run_linear(case, backend=backend).out.logps
    ref_logps = logps + x
    exact = ref_logps.double() - logps.double()
    spec = LossSpec(surrogate, KL("k3", beta=1.0), aggregation=SUM)
    got = run_linear(case._replace(spec=spec).with_options(ref_logps=ref_logps), backend=backend)
    assert got.out.loss.item() == pytest.approx((torch.expm1(exact) - exact).sum().item(), rel=1e-2)
    # dk3/dlogp = -expm1(x), and Reinforce's -A is a gradient like it.
    linear = case._replace(spec=LossSpec(Reinforce(), aggregation=SUM), advantages=torch.expm1(exact))
    for grad, truth in zip(got.grads, linear_oracle(linear).truth, strict=True):
        assert float(relative_error(grad.flatten(), truth.flatten())) < 1e-2


@local_and_not
class TestCase22:
    """Checkpointing and autocast: test_linear_paths.py."""

    def test_no_grad_saves_nothing(self, spec: LossSpec, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 2, 3, 37, device=device)
        want = run_linear(case, backend=backend)
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        saved: list[Tensor] = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            out = linear_grpo_loss(
                *(hidden, weight, case.completion_ids, case.advantages),
                lm_head_bias=case.bias,
                spec=case.spec,
                backend=backend,
                **case.options,
            )
        assert not saved and out.loss.grad_fn is None
        torch.testing.assert_close(out.loss, want.out.loss)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self, spec: LossSpec) -> None:
        """Triton launches on the current device."""
        case = every_option(every_term(spec), 2, 3, 37, device="cuda:1")
        with torch.cuda.device(0):
            assert_right(case, backend="triton")
