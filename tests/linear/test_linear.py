"""The loss from hidden states is as accurate as the eager product and loss, and equals `grpo_loss`."""

from __future__ import annotations

import pytest
import torch
from linear_cases import (
    LinearCase,
    LinearOracle,
    LinearResult,
    assert_gradients,
    assert_same,
    assert_same_gradients,
    from_logits,
    linear_oracle,
    logits_of,
    run_linear,
)
from option_cases import EITHER, PACKED, PADDED, branches, every_option, tiny
from parity import AGGREGATIONS, DTYPES, KLS, PAIRS, SEQUENCE_LEVEL, SURROGATES, assert_outputs, user_loss
from products import lengths
from torch import Tensor
from torch.autograd import gradcheck

from grpo_kernels import (
    KL,
    ImportanceRatio,
    LinearGRPOLoss,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
)
from grpo_kernels.testing import relative_error

GRADIENTS = ("hidden", "weight", "bias")

dtypes = pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
V = 1025  # a block and a tail; only the pitch of the chunk buffer aligns its rows


def assert_linear_parity(expected: LinearOracle, *, what: str = "", **options: object) -> LinearResult:
    """Compare all outputs, and the gradients row by row."""
    got = run_linear(expected.case, **options)
    assert_outputs(expected.by_logits, got.out, what=what)
    assert_gradients(got.grads, expected.eager, expected.truth, expected.terms, expected.lengths, what)
    return got


@layouts
@dtypes
@pytest.mark.parametrize("surrogate, kl", PAIRS)
def test_every_loss(surrogate: str, kl: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    """Chunks have 4 of 12 tokens (8 if packed). Aggregations take turns, and with Triton `compact` too."""
    turn = list(SURROGATES).index(surrogate) + list(KLS).index(kl) + packed
    spec = LossSpec(
        SURROGATES[surrogate], KLS[kl], aggregation=AGGREGATIONS[turn % len(AGGREGATIONS)], max_tokens=5
    )
    case = from_logits(branches(spec, dtype, packed, device), bias=bool(turn % 2))
    expected = linear_oracle(case)
    for compact in (True, False) if backend == "torch" else (bool(turn // 2 % 2),):
        assert_linear_parity(expected, what=f"{compact = }", backend=backend, chunk_tokens=4, compact=compact)


@layouts
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("loss", SEQUENCE_LEVEL)
def test_every_level(loss: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    name, level = SEQUENCE_LEVEL[loss]
    case = from_logits(branches(LossSpec(SURROGATES[name], level=level), dtype, packed, device))
    for compact in (True, False):
        assert_linear_parity(
            linear_oracle(case), what=f"{compact = }", backend=backend, chunk_tokens=4, compact=compact
        )


@every_option
def test_every_option(option: str, packed: bool, backend: str, device: str) -> None:
    """The loss has every term in its gradient."""
    spec = LossSpec(ImportanceRatio(), KLS["exact"], entropy_coef=0.05, max_tokens=5)
    for dtype in ("fp64", "fp32", "bf16"):
        case = (EITHER | PADDED | PACKED)[option](branches(spec, dtype, packed, device))
        linear = from_logits(case)
        got = assert_linear_parity(linear_oracle(linear), what=dtype, backend=backend, chunk_tokens=5)
        for grad in got.grads[1:]:
            assert not grad[case.options.get("vocab_size", len(grad)) :].any()


@dtypes
@pytest.mark.parametrize("kl", ["None", "k3", "exact"])
@pytest.mark.parametrize("surrogate", ["PPOClip", "callable"])
def test_chunks_and_the_logits_form(surrogate: str, kl: str, dtype: str, backend: str, device: str) -> None:
    """Results for every chunk length equal those of `grpo_loss` up to rounding."""
    case = from_logits(branches(LossSpec(SURROGATES[surrogate], KLS[kl]), dtype, False, device))
    case = case._replace(hidden=case.hidden.nan_to_num())
    # The linear form sums logits in fp32 for all dtypes of the operands but fp64.
    wide = case.to(torch.promote_types(DTYPES[dtype], torch.float32))
    inputs = [x.requires_grad_() for x in (wide.hidden, wide.weight, wide.bias)]
    logits = logits_of(wide, *inputs)
    want = grpo_loss(
        logits.logits, case.completion_ids, case.advantages, spec=case.spec, backend=backend, **logits.options
    )
    grads = torch.autograd.grad(want.loss, inputs)
    tolerance = 1e-12 if dtype == "fp64" else 5e-6
    for chunk_tokens in (1, 7, 64, case.completion_ids.numel(), None):
        got = run_linear(case, backend=backend, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got.out.loss, want.loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.out.logps, want.logps, rtol=tolerance, atol=tolerance)
        for name, ours, theirs in zip(GRADIENTS, got.grads, grads, strict=True):
            error = float(relative_error(ours.flatten(), theirs.flatten()))
            # In bf16 the gradient of the logits is rounded before the products, and the products are rounded.
            assert error < (8e-3 if dtype == "bf16" else tolerance), (name, chunk_tokens, error)


@pytest.mark.parametrize("compact", [True, False])
@dtypes
def test_linear_logps(dtype: str, compact: bool, backend: str, device: str) -> None:
    """Test both outputs, and gradients of each and of both. Some upstream gradients are 0."""
    case = from_logits(branches(LossSpec(), dtype, False, device))
    mask, ids = case.options["completion_mask"], case.completion_ids
    by_logps = torch.linspace(-1, 1, mask.numel(), device=device).view(mask.shape)
    by_logps[1, 1] = 0
    by_entropy = by_logps.flip(-1).where(by_logps > 0, 0)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logps(
            *(hidden, weight, ids),
            lm_head_bias=bias,
            mask=mask,
            temperature=0.8,
            return_entropy=True,
            chunk_tokens=4,
            compact=compact,
            backend=backend,
        )
        assert isinstance(out, tuple)
        return out

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / 0.8, -1)
        taken = log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        return taken.where(mask, 0), -(log_p.exp() * log_p).sum(-1).where(mask, 0)

    for upstream in ((by_logps, None), (None, by_entropy), (by_logps, by_entropy)):
        found = []
        for function, numbers in ((ours, case), (eager, case), (eager, case.to(torch.float64))):
            inputs = [x.requires_grad_() for x in (numbers.hidden, numbers.weight, numbers.bias)]
            if function is eager:
                inputs[0] = numbers.hidden.detach().nan_to_num().requires_grad_()
            out = function(*inputs)
            wanted = [(x, g.to(x.dtype)) for x, g in zip(out, upstream, strict=True) if g is not None]
            loss = sum((x * g).sum() for x, g in wanted)
            found.append((out, torch.autograd.grad(loss, inputs)))
        (got, grads), (_, by_eager), (exact, truth) = found
        for x, y in zip(got, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-11 if dtype == "fp64" else 1e-5)
        # An entry has few terms, which do not cancel much: their magnitudes sum to at most 8 times it.
        terms = tuple(8 * x.abs() for x in truth)
        assert_gradients(grads, by_eager, truth, terms, lengths(mask.numel(), case.weight.shape[0]), "")


GRADCHECKED = {
    "token-local": LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1),
    "callable": LossSpec(user_loss, KL("exact_forward")),
}


@pytest.mark.parametrize("spec", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradcheck(spec: LossSpec, backend: str, device: str) -> None:
    case = from_logits(tiny(spec, device))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_grpo_loss(
            *(hidden, weight, case.completion_ids, case.advantages),
            lm_head_bias=bias,
            spec=spec,
            temperature=0.8,
            logit_softcap=9.0,
            chunk_tokens=1,
            backend=backend,
            **case.options,
        ).loss

    assert gradcheck(loss, [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("H", [1, 7])
@pytest.mark.parametrize("vocab", [2, 151, 1025])
def test_sizes(shape: tuple[int, int], H: int, vocab: int, backend: str, device: str) -> None:
    """Test no token, one token, hidden states of odd length and odd vocabularies."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(device) for size in ((*shape, H), (vocab, H)))
    ids = torch.randint(vocab, shape, generator=generator).to(device)
    case = LinearCase(
        LossSpec(PPOClip()),
        hidden,
        weight,
        None,
        ids,
        torch.ones(shape[0], device=device),
        {},
    )
    got = assert_linear_parity(linear_oracle(case), backend=backend)
    assert got.out.logps.shape == shape


def test_one_vocabulary_entry(backend: str, device: str) -> None:
    hidden, weight = torch.randn(2, 3, 7, device=device), torch.randn(1, 7, device=device)
    ids, ones = torch.zeros(2, 3, dtype=torch.long, device=device), torch.ones(2, device=device)
    got = run_linear(LinearCase(LossSpec(Reinforce()), hidden, weight, None, ids, ones, {}), backend=backend)
    assert not got.out.loss and not got.out.logps.any() and not any(x.any() for x in got.grads)


@pytest.mark.parametrize("surrogate", ["PPOClip", "callable"])
def test_masked_and_idle_tokens_never_matter(surrogate: str, backend: str, device: str) -> None:
    """Values at masked positions, and hidden states of tokens without advantage, affect no gradient."""
    spec = LossSpec(SURROGATES[surrogate])
    clean = from_logits(branches(spec, "fp32", False, device))
    mask = clean.options["completion_mask"]
    clean = clean._replace(hidden=clean.hidden.nan_to_num())
    options = {
        name: x.where(mask, torch.inf) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in clean.options.items()
    }
    wrong = clean._replace(
        hidden=clean.hidden.where(mask[..., None], torch.nan),
        completion_ids=clean.completion_ids.where(mask, 2**31),
        options=options,
    )
    for compact in (True, False):
        want, got = (run_linear(case, compact=compact, backend=backend) for case in (clean, wrong))
        assert_same(got, want, clean, compact=compact, backend=backend)
        if surrogate == "callable":
            continue
        idle = clean.hidden.clone()
        idle[clean.advantages == 0] = torch.nan
        got = run_linear(clean._replace(hidden=idle), compact=compact, backend=backend)
        assert got.out.loss == want.out.loss
        assert_same_gradients(got, want, clean, compact=compact, backend=backend)


def test_skip_inactive(backend: str, device: str) -> None:
    """Rows without an advantage do not run. Loss and gradient are unchanged, their log-probability is 0."""
    case = from_logits(branches(LossSpec(PPOClip()), "fp32", False, device))
    want, got = (run_linear(case, skip_inactive=skip, backend=backend) for skip in (False, True))
    mask, idle = case.options["completion_mask"], case.advantages == 0
    assert got.out.loss == want.out.loss
    assert want.out.logps[idle].any() and not got.out.logps[idle].any()
    assert torch.equal(got.out.logps[~idle], want.out.logps[~idle])
    assert_same_gradients(got, want, case, backend=backend)
    given = run_linear(
        case.with_options(ref_logps=torch.full_like(want.out.logps, -3.0)),
        skip_inactive=True,
        backend=backend,
    )
    assert given.out.ref_logps is not None and torch.equal(given.out.ref_logps != 0, mask & ~idle[:, None])
    # Metrics are means over tokens that ran. The active fraction is relative to all tokens.
    ran = mask & ~idle[:, None]
    log_ratio = (want.out.logps - case.options["old_logps"])[ran].mean()
    torch.testing.assert_close(got.out.metrics["log_ratio"], log_ratio)
    assert got.out.metrics["active_fraction"] == want.out.metrics["active_fraction"]


def test_skip_inactive_with_a_kl_skips_nothing(backend: str, device: str) -> None:
    """A KL term and an entropy bonus give every row a gradient."""
    for spec in (LossSpec(PPOClip(), KL("k3")), LossSpec(PPOClip(), entropy_coef=0.1), LossSpec(user_loss)):
        case = from_logits(branches(spec, "fp32", False, device))
        want, got = (run_linear(case, skip_inactive=skip, backend=backend) for skip in (False, True))
        assert_same(got, want, case, backend=backend)


def test_bf16_logits(backend: str, device: str) -> None:
    """bf16 logits err like those of eager PyTorch. fp32 logits, the default, err by fp32 rounding."""
    case = from_logits(branches(LossSpec(PPOClip(), KL("exact")), "bf16", False, device))
    expected = linear_oracle(case)
    exact = expected.by_logits.truth.out.logps

    def error(**options: torch.dtype) -> float:
        return float((run_linear(case, backend=backend, **options).out.logps - exact).abs().max())

    eager = float((expected.by_logits.eager.out.logps - exact).abs().max())
    assert error() < 1e-5 and 1e-3 < error(logits_dtype=torch.bfloat16) < 2 * eager


def test_modules(backend: str, device: str) -> None:
    case = from_logits(branches(LossSpec(PPOClip()), "fp32", False, device), bias=True)
    tensors = (case.hidden, case.weight, case.completion_ids, case.advantages)
    options = {**case.options, "lm_head_bias": case.bias, "backend": backend}
    module = LinearGRPOLoss("grpo", temperature=0.7, chunk_tokens=3)
    assert "chunk_tokens=3" in repr(module) and not list(module.parameters())
    want = linear_grpo_loss(*tensors, spec="grpo", temperature=0.9, chunk_tokens=3, **options)
    assert torch.equal(module(*tensors, temperature=0.9, **options).loss, want.loss)
    with pytest.raises(TypeError, match="LinearGRPOLoss has no option inplace"):
        LinearGRPOLoss(inplace=True)
