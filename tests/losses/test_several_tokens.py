"""`selective_logps` and `linear_logps` of several tokens per position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import NEEDS_DYNAMO
from several_tokens import TokenCase, assert_tokens, eager, loss_of, token_case
from torch import Tensor

from grpo_kernels import linear_logps, pack_sampling_mask, selective_logps

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def run(case: TokenCase, leaf: Tensor, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy, and the gradient of `leaf`, from which `logits` are computed."""
    logps, entropy = selective_logps(logits, case.ids, mask=case.mask, return_entropy=True, **options)
    (grad,) = torch.autograd.grad(loss_of(case, logps, entropy), leaf)
    return logps.detach(), entropy.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("vocab", [1, 33, 1000])
def test_values_and_gradients(backend: str, device: str, dtype: str, tokens: int, vocab: int) -> None:
    case = TokenCase(*(x.to(device) for x in token_case(vocab=vocab, tokens=tokens, dtype=DTYPES[dtype])))
    leaf = case.logits.clone().requires_grad_()
    assert_tokens(case, *run(case, leaf, leaf, backend=backend))


@pytest.mark.parametrize("tokens", [3, 16])
def test_packed_rows_with_temperatures(backend: str, device: str, tokens: int) -> None:
    case = TokenCase(*(x.to(device) for x in token_case(tokens=tokens)))
    temperature = torch.linspace(0.5, 2, 10, device=device).view(2, 5)
    flat = TokenCase(*(x.flatten(0, 1) for x in case))
    leaf = flat.logits.clone().requires_grad_()
    logps, entropy, grad = run(flat, leaf, leaf, temperature=temperature.view(-1), backend=backend)
    got = (x.view(2, 5, *x.shape[1:]) for x in (logps, entropy, grad))
    assert_tokens(case, *got, temperature=temperature.double()[..., None])


def test_transform_of_the_logits(backend: str, device: str) -> None:
    case = TokenCase(*(x.to(device) for x in token_case(vocab=60)))
    wide = torch.nn.functional.pad(case.logits, (0, 7), value=torch.nan)
    options = {"vocab_size": 60, "logit_scale": 1.5, "logit_softcap": 4.0, "temperature": 0.9}
    leaf = wide.clone().requires_grad_()
    logps, entropy, grad = run(case, leaf, leaf, backend=backend, **options)
    truth = case.logits.double().clone().requires_grad_()
    wanted = eager(case, 4 * torch.tanh(truth * 1.5 / 4), 0.9)
    loss_of(case, *wanted).backward()
    torch.testing.assert_close(logps.double(), wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(grad[..., :60].double(), truth.grad, rtol=1e-4, atol=1e-6)
    assert not grad[..., 60:].any()


def test_one_token_of_several_is_as_one_token(backend: str, device: str) -> None:
    """K = 1 gives the log-probability and gradient of `[B, T]` ids."""
    case = TokenCase(*(x.to(device) for x in token_case(tokens=1)))
    ids = torch.where(case.ids < 0, 3, case.ids)
    leaf = case.logits.clone().requires_grad_()
    several = selective_logps(leaf, ids, backend=backend)
    (got,) = torch.autograd.grad((case.upstream * several).sum(), leaf)
    one = selective_logps(leaf, ids[..., 0], backend=backend)
    (wanted,) = torch.autograd.grad((case.upstream[..., 0] * one).sum(), leaf)
    torch.testing.assert_close(several[..., 0], one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gap", [12.0, 20.0, 30.0])
def test_a_sure_token_keeps_its_digits(backend: str, device: str, gap: float) -> None:
    logits = torch.randn(1, 3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        device
    )
    logits[..., 17] = logits.amax(-1) + gap
    ids = torch.tensor([3, 17, 40, 17], device=device).expand(1, 3, 4)
    weights = torch.tensor([0.0, 1.0, 0.0, 0.5], device=device)
    leaf, truth = logits.float().requires_grad_(), logits.float().double().requires_grad_()
    logps = selective_logps(leaf, ids, backend=backend)
    wanted = torch.log_softmax(truth, -1)
    others = torch.logsumexp(truth.detach().index_fill(-1, torch.tensor(17, device=device), -torch.inf), -1)
    exact = -torch.log1p((others - truth.detach()[..., 17]).exp())
    torch.testing.assert_close(logps[..., 1].double(), exact, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad((weights * logps).sum(), leaf)
    (grad,) = torch.autograd.grad((weights.double() * wanted.gather(-1, ids)).sum(), truth)
    torch.testing.assert_close(got[..., 17].double(), -1.5 * torch.expm1(exact), rtol=1e-4, atol=0)
    others_of = torch.arange(100, device=device) != 17
    torch.testing.assert_close(got[..., others_of].double(), grad[..., others_of], rtol=1e-4, atol=0)


def test_bits_do_not_depend_on_the_batch(backend: str, device: str) -> None:
    """The same row gives the same bits alone and in a batch, and at every call."""
    case = TokenCase(*(x.to(device) for x in token_case(2, 8, 128, 16)))
    leaf = case.logits.clone().requires_grad_()
    whole = run(case, leaf, leaf, backend=backend)
    again = run(case, leaf, leaf, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    for row in range(8):
        alone = TokenCase(*(x[:1, row : row + 1] for x in case))
        part = alone.logits.clone().requires_grad_()
        for mine, theirs in zip(run(alone, part, part, backend=backend), whole, strict=True):
            assert torch.equal(mine, theirs[:1, row : row + 1])


def test_padding_has_no_gradient(backend: str, device: str) -> None:
    """An upstream gradient at padding, even NaN, changes nothing. A row of padding alone is not read."""
    case = TokenCase(*(x.to(device) for x in token_case()))
    logits = case.logits.clone()
    logits[-1, -1] = torch.nan  # its ids are all padding
    leaf = logits.requires_grad_()
    logps = selective_logps(leaf, case.ids, mask=case.mask, backend=backend)
    given = (case.ids >= 0) & case.mask[..., None]
    assert not logps[~given].any() and logps[given].isfinite().all()
    upstream = torch.where(given, case.upstream, torch.nan)
    (got,) = torch.autograd.grad(logps, leaf, upstream)
    (wanted,) = torch.autograd.grad(
        selective_logps(leaf, case.ids, mask=case.mask, backend=backend),
        leaf,
        torch.where(given, case.upstream, 0.0),
    )
    assert torch.equal(got, wanted) and got.isfinite().all()
    assert not got[-1, -1].any() and not got[~case.mask].any()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_sampling_mask(backend: str, device: str, dtype: str) -> None:
    case = TokenCase(*(x.to(device) for x in token_case(vocab=70, tokens=6, dtype=DTYPES[dtype])))
    keep = torch.rand(2, 5, 70, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    keep[..., 0] = True
    masked = case._replace(logits=case.logits.masked_fill(~keep, -torch.inf))
    leaf = case.logits.masked_fill(~keep, torch.nan).requires_grad_()
    logps, entropy, grad = run(case, leaf, leaf, sampling_mask=pack_sampling_mask(keep), backend=backend)
    plain = masked.logits.clone().requires_grad_()
    wanted = run(masked, plain, plain, backend=backend)
    assert torch.equal(logps == -torch.inf, wanted[0] == -torch.inf)
    for mine, theirs in zip((logps, entropy, grad), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert not grad[~keep].any()


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("compact", [True, False])
def test_from_hidden_states(backend: str, device: str, chunk_tokens: int | None, compact: bool) -> None:
    """The same as from the logits, whatever the chunks. Weight and bias get their gradients."""
    case = TokenCase(*(x.to(device) for x in token_case(vocab=50, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(3)
    parts = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 8), (50, 8), (50,))
    ]
    hidden, weight, bias = (x.to(device).requires_grad_() for x in parts)
    options = {"chunk_tokens": chunk_tokens, "compact": compact, "backend": backend}
    found = linear_logps(
        hidden, weight, case.ids, lm_head_bias=bias, mask=case.mask, return_entropy=True, **options
    )
    got = torch.autograd.grad(loss_of(case, *found), (hidden, weight, bias))
    logits = hidden @ weight.t() + bias
    wanted = eager(case, logits)
    expected = torch.autograd.grad(loss_of(case, *wanted), (hidden, weight, bias))
    for mine, theirs in zip((*found, *got), (*wanted, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradcheck(backend: str, device: str) -> None:
    case = TokenCase(*(x.to(device) for x in token_case(1, 3, 7, 3, dtype=torch.float64)))

    def call(logits: Tensor) -> tuple[Tensor, ...]:
        return selective_logps(
            logits, case.ids, mask=case.mask, logit_softcap=3.0, return_entropy=True, backend=backend
        )

    assert torch.autograd.gradcheck(call, case.logits.clone().requires_grad_())


@NEEDS_DYNAMO
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_in_one_compiled_graph(device: str, form: str) -> None:
    case = TokenCase(*(x.to(device) for x in token_case()))
    weight = torch.randn(67, 67, generator=torch.Generator().manual_seed(0)).to(device)

    def step(x: Tensor, ids: Tensor) -> Tensor:
        logps = selective_logps(x, ids) if form == "logits" else linear_logps(x, weight, ids)
        return (logps * case.upstream).sum()

    leaf = case.logits.clone().requires_grad_()
    wanted = step(leaf, case.ids)
    (expected,) = torch.autograd.grad(wanted, leaf)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, case.ids)
    (grad,) = torch.autograd.grad(got, leaf)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 5, 0, dtype=torch.int64), r"ids must have shape \(2, 5, 'K'\), K at least 1"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), r"ids must have shape \(2, 5, 'K'\), K at least 1"),
        (torch.zeros(2, 5, 3, 1, dtype=torch.int64), r"ids must have shape \(2, 5, 'K'\), K at least 1"),
        (torch.zeros(2, 5, 3), "ids must be int32 or int64, got torch.float32"),
    ],
)
def test_wrong_ids(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_logps(torch.randn(2, 5, 7), ids)
    with pytest.raises(ValueError, match=message):
        linear_logps(torch.randn(2, 5, 4), torch.randn(7, 4), ids)


def test_an_id_outside_the_vocabulary(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[[1, 7, -5]]], device=device)
    logits = torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(0)).to(device)
    logps = selective_logps(logits, ids, backend=backend)
    assert logps[0, 0].isnan().tolist() == [False, True, False] and logps[0, 0, 2] == 0
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"ids\[0, 0, 1\] is 7, outside \[0, 7\)"):
        selective_logps(logits, ids, backend=backend)


def test_a_repeated_sure_token_has_one_log_probability(backend: str, device: str) -> None:
    """Also with a softcap, whose tanh is not the kernel's to the bit in PyTorch."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 64, 33, generator=generator)
    logits[..., 5] += 60
    ids = torch.tensor([5, 5, 7], device=device).expand(1, 64, 3)
    temperature = (0.1 + torch.rand(1, 64, generator=generator)).to(device)
    logps = selective_logps(
        logits.to(device), ids, logit_softcap=30.0, temperature=temperature, backend=backend
    )
    assert torch.equal(logps[..., 0], logps[..., 1]) and float(logps.max()) <= 0
