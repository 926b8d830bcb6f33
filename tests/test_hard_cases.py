"""The inputs that break policy losses, one test per case, at the token level and from logits.

Truth is the fp64 reference, unless the case states a rule ("the gradient is exactly 0"). They run on both
backends and both paths: the gradient made in the backward, and over the logits in the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import AGGREGATIONS, SURROGATES, Case, Result, oracle, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    CISPO,
    DPPO,
    GMPO,
    KL,
    ImportanceRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    selective_logps,
)
from grpo_kernels.batch import sequences_within
from grpo_kernels.reference import reference_loss
from grpo_kernels.surrogates import Surrogate
from grpo_kernels.testing import assert_no_worse_than_eager, make_batch, relative_error

Options = dict[str, Any]  # of grpo_loss
View = Callable[[Tensor], Tensor]

NAN, INF = math.nan, math.inf
TWO_BLOCKS = 2053  # for the kernels a full block of 2048 and a partial one
SUM = "token-sum"  # the loss of a lone token is then that token's

SPECS = {
    **{name: LossSpec(surrogate) for name, surrogate in SURROGATES.items() if surrogate is not None},
    "k3": LossSpec(PPOClip(), KL("k3", ratio_corrected=True), aggregation="seq-mean-token-mean"),
    "exact KL": LossSpec(PPOClip(), KL("exact"), entropy_coef=0.01),
    "entropy": LossSpec(Reinforce(), entropy_coef=0.1),
    "forward KL": LossSpec(None, KL("exact_forward")),
}
by_ratio = pytest.mark.parametrize("surrogate", [PPOClip(), ImportanceRatio()], ids=["PPO", "ratio"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# What holds the loss of a negative advantage, and at how much.
bounded = pytest.mark.parametrize(
    "surrogate, clamp, bound",
    [
        (PPOClip(), None, INF),
        (PPOClip(), 20.0, INF),
        (PPOClip(), 2.0, INF),
        (PPOClip(dual_clip=3.0), None, 3.0),
        (PPOClip(delta=4.0), None, 4.0),
    ],
    ids=["as TRL", "clamp 20", "clamp 2", "dual_clip", "delta"],
)
# Tensors per token `[B, 4]` that are not contiguous.
not_contiguous = pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.cat([x, x], 1)[:, :4],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.t().contiguous().t(),
    ],
    ids=["sliced", "every other", "transposed"],
)


def specs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", [SPECS[name] for name in names or SPECS], ids=names or SPECS)


@pytest.fixture(params=[False, True], ids=["two steps", "in place"])
def path(request: pytest.FixtureRequest, backend: str) -> Options:
    """Options of `grpo_loss`: who computes it, and when the gradient is made."""
    return {"backend": backend, "inplace": request.param}


def random_case(spec: LossSpec, *shape: int, device: str, bare: bool = False, **how: Any) -> Case:
    """A random batch with all options that are per token; `bare`: none, and nothing masked or inactive."""
    if bare:
        how = {"masked": 0, "inactive": 0, **how}
    batch = make_batch(*shape, **how)
    options = {
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        "ref_logits": batch.ref_logits,
        "token_weights": torch.linspace(0.5, 1.5, shape[0] * shape[1]).view(shape[:2]),
        "temperature": torch.linspace(0.8, 1.2, shape[0] * shape[1]).view(shape[:2]),
    }
    advantages = batch.advantages[:, None].repeat(1, shape[1])
    case = Case(spec, batch.logits, batch.completion_ids, advantages, {} if bare else options)
    return every_tensor(case, lambda _, x: x.to(device))


def every_tensor(case: Case, change: Callable[[str, Tensor], Tensor]) -> Case:
    options = {name: change(name, x) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    tensors = {name: change(name, getattr(case, name)) for name in ("logits", "completion_ids", "advantages")}
    return case._replace(**tensors, options=options)


def with_ratio(log_ratio: float, surrogate: Any, advantage: float, *, device: str, **spec: Any) -> Case:
    """One token off the behaviour policy by `log_ratio`."""
    case = random_case(LossSpec(surrogate, **spec), 1, 1, 37, bare=True, device=device)
    logps = run(reference_loss, case._replace(spec=LossSpec(Reinforce()))).out.logps
    return case._replace(advantages=torch.full_like(logps, advantage)).with_options(
        old_logps=logps - log_ratio
    )


def assert_right(case: Case, view: View = lambda x: x, **options: Any) -> Result:
    """Everything that comes out, against the reference; a bar for extreme inputs.

    fp32 has few digits of `1 - p` where p is nearly 1, and eager may be lucky there: hence the leeway.
    """
    expected = oracle(case, view)
    got = run(grpo_loss, case, view, **options)
    torch.testing.assert_close(got.out.loss.double(), expected.truth.out.loss.detach(), rtol=1e-5, atol=1e-5)
    for name in ("logps", "ref_logps", "entropy"):
        value, exact = getattr(got.out, name), getattr(expected.truth.out, name)
        if value is not None:
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5, msg=name)
    for name in got.out.metrics.keys() & expected.truth.out.metrics.keys():
        exact = expected.truth.out.metrics[name]
        torch.testing.assert_close(got.out.metrics[name].double(), exact, rtol=1e-4, atol=1e-5, msg=name)
    assert_no_worse_than_eager(
        *(got.grad, expected.eager.grad, expected.truth.grad),
        factor=4,
        epsilon=2 * torch.finfo(got.grad.dtype).eps + 1e-5,
        what="gradient",
    )
    return got


def assert_same_bits(got: Result, want: Result) -> None:
    """Equal bits in everything that comes out; NaN equals NaN, and -0 equals 0."""

    def same(a: Any, b: Any) -> bool:
        if a is None or b is None:
            return a is b
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())

    for name in ("loss", "logps", "ref_logps", "entropy"):
        assert same(getattr(got.out, name), getattr(want.out, name)), name
    assert same(got.grad, want.grad), "gradient"
    assert got.out.metrics.keys() == want.out.metrics.keys()
    for key, value in got.out.metrics.items():
        assert same(value, want.out.metrics[key]), key


class TestCases1And2HugeRatio:
    """Log-ratio +200: exp(200) is inf in fp32, and inf * 0 is NaN."""

    @dtypes
    @pytest.mark.parametrize(
        "surrogate, loss",
        [(PPOClip(eps_high=0.28), -1.28), (ImportanceRatio(max_ratio=5.0), -5.0)],
        ids=["PPO", "ratio"],
    )
    def test_case_1_positive_advantage(
        self, path: Options, device: str, dtype: torch.dtype, surrogate: Any, loss: float
    ) -> None:
        case = with_ratio(200.0, surrogate, 1.0, device=device)
        got = run(grpo_loss, case._replace(logits=case.logits.to(dtype)), **path)
        assert got.out.loss.item() == pytest.approx(loss, rel=1e-6)
        assert not got.grad.any()

    @pytest.mark.parametrize("log_ratio", [200.0, 3.0])
    @bounded
    def test_case_2_negative_advantage(
        self,
        path: Options,
        device: str,
        surrogate: PPOClip,
        clamp: float | None,
        bound: float,
        log_ratio: float,
    ) -> None:
        case = with_ratio(log_ratio, surrogate, -1.0, device=device, log_ratio_clamp=clamp)
        got = run(grpo_loss, case, **path)
        clamped = INF if clamp is None else clamp
        ratio = INF if min(log_ratio, clamped) > 100 else math.exp(min(log_ratio, clamped))
        assert got.out.loss.item() == pytest.approx(min(ratio, bound), rel=1e-5)
        flat = ratio > bound or log_ratio > clamped
        assert got.out.loss.isinf() or bool(got.grad.any()) != flat

    @pytest.mark.parametrize("log_ratio", [1.0, -1.0])
    @pytest.mark.parametrize("clamp", [0.5, 1.5])
    def test_the_clamp_bites_beyond_itself_only(
        self, path: Options, device: str, log_ratio: float, clamp: float
    ) -> None:
        case = with_ratio(log_ratio, ImportanceRatio(), 1.0, device=device, log_ratio_clamp=clamp)
        got = run(grpo_loss, case, **path)
        assert got.out.loss.item() == pytest.approx(
            -math.exp(math.copysign(min(1.0, clamp), log_ratio)), rel=1e-5
        )
        assert bool(got.grad.any()) == (clamp > 1)


class TestCase3ZeroAdvantage:
    """A = 0: loss 0 and gradient 0, whatever stands beside it. But DRO's square is no matter of advantage."""

    @specs(
        *(
            name
            for name, surrogate in SURROGATES.items()
            if isinstance(surrogate, Surrogate) and surrogate.rests_at_zero
        )
    )
    def test_any_ratio(self, path: Options, device: str, spec: LossSpec) -> None:
        anchors = torch.tensor([[0.0, -1e4, 1e4, -INF, INF, NAN]], device=device)
        case = random_case(spec, 1, 6, 37, bare=True, device=device).with_options(
            old_logps=anchors, ref_logps=anchors
        )
        got = run(grpo_loss, case._replace(advantages=torch.zeros(1, device=device)), **path)
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert got.out.metrics["active_fraction"].item() == 0

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_logits(self, path: Options, device: str, value: float) -> None:
        case = random_case(LossSpec(Reinforce()), 2, 3, 37, bare=True, device=device)
        case.advantages[0] = 0
        want = run(grpo_loss, case, **path)
        case.logits[0, :, 5] = value
        got = run(grpo_loss, case, **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        assert got.grad.any() and not got.grad[0].any()


class TestCase4Poison:
    """What a masked position holds never matters; what an unmasked one holds does."""

    @dtypes
    @specs()
    def test_masked(self, path: Options, device: str, spec: LossSpec, dtype: torch.dtype) -> None:
        case = random_case(spec, 3, 4, 67, dtype=dtype, seed=1, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)  # one after the other along the tokens

        def fill(name: str, x: Tensor, values: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            values = values.to(x.dtype).expand(3, 4)
            return (
                torch.where(mask, x, values)
                if x.dim() == 2
                else torch.where(mask[..., None], x, values[..., None])
            )

        got = run(grpo_loss, every_tensor(case, lambda name, x: fill(name, x, poison.roll(1))), **path)
        want = run(grpo_loss, every_tensor(case, lambda name, x: fill(name, x, poison.new_zeros(4))), **path)
        assert_same_bits(got, want)
        assert got.grad[mask].any() and not got.grad[~mask].any()
        assert got.out.loss.isfinite()

    @specs()
    def test_nan_logits_surface(self, path: Options, device: str, spec: LossSpec) -> None:
        case = random_case(spec, 2, 2, 37, masked=0, inactive=0, device=device)
        case.logits[0, 0, 3] = NAN
        got = run(grpo_loss, case, **path)
        assert got.out.loss.isnan()
        assert got.grad[0, 0].isnan().any() and not got.grad[1].isnan().any()

    @by_ratio
    def test_nan_logits_surface_on_policy(self, path: Options, device: str, surrogate: Any) -> None:
        """There the ratio is 1 for any log-probability, but NaN is none."""
        case = random_case(LossSpec(surrogate), 1, 1, 37, bare=True, device=device)
        case.logits[..., 3] = NAN
        assert run(grpo_loss, case, **path).out.loss.isnan()

    @pytest.mark.parametrize(
        "name", ["advantages", "old_logps", "ref_logits", "token_weights", "temperature"]
    )
    def test_nan_elsewhere_surfaces(self, path: Options, device: str, name: str) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 2, 2, 37, masked=0, inactive=0, device=device)
        (case.advantages if name == "advantages" else case.options[name])[0, 0] = NAN
        assert run(grpo_loss, case, **path).out.loss.isnan()


def test_case_5_zero_beta_reads_no_reference(path: Options, device: str) -> None:
    case = random_case(LossSpec(PPOClip()), 2, 3, 37, device=device).with_options(ref_logits=None)
    want = run(grpo_loss, case, **path)
    for kl, ref_logps in [
        (KL("k3", beta=0.0), None),
        (KL("exact", beta=0.0), None),
        (KL("k3", beta=0.0, ratio_corrected=True), torch.full((2, 3), NAN, device=device)),
    ]:
        got = run(
            grpo_loss, case._replace(spec=LossSpec(PPOClip(), kl)).with_options(ref_logps=ref_logps), **path
        )
        assert_same_bits(Result(got.out._replace(ref_logps=None), got.grad), want)


@dtypes
# As trainers suppress tokens; one token, and the kernels' first block with a reference and without.
@pytest.mark.parametrize("value", [-INF, -1e4, -3e38])
@pytest.mark.parametrize("blocked", [1, 2048, 4096])
@specs("Reinforce", "entropy", "exact KL", "forward KL")
def test_case_6_suppressed_tokens(
    path: Options, device: str, spec: LossSpec, blocked: int, value: float, dtype: torch.dtype
) -> None:
    """A running maximum that starts at -inf makes -inf - -inf, one at -3e38 overflows when it is scaled."""
    vocab = 37 if blocked == 1 else 5000
    case = random_case(spec, 1, 2, vocab, dtype=dtype, bare=True, device=device)
    if spec.kl is not None:
        case = case.with_options(
            ref_logits=case.logits + torch.linspace(-1, 1, vocab, device=device).to(dtype)
        )
        case.options["ref_logits"][..., :blocked] = value
    case.logits[..., :blocked] = value
    assert_right(case._replace(completion_ids=case.completion_ids.clamp(min=blocked)), **path)


class TestCase7Degenerate:
    @dtypes
    @specs("Reinforce", "entropy")
    @pytest.mark.parametrize("vocab, target", [(37, 5), (TWO_BLOCKS, 0), (TWO_BLOCKS, TWO_BLOCKS - 1)])
    def test_only_the_taken_token_is_finite(
        self, path: Options, device: str, spec: LossSpec, vocab: int, target: int, dtype: torch.dtype
    ) -> None:
        case = random_case(spec, 1, 1, vocab, bare=True, dtype=dtype, device=device)
        case.logits.fill_(-INF)[..., target] = 3.0
        out, grad = run(
            grpo_loss, case._replace(completion_ids=torch.full_like(case.completion_ids, target)), **path
        )
        assert out.loss.item() == out.logps.item() == 0
        assert out.entropy is None or out.entropy.item() == 0
        assert not grad.any()

    @by_ratio
    @pytest.mark.parametrize("on_policy", [False, True])
    def test_the_taken_token_is_impossible(
        self, path: Options, device: str, surrogate: Any, on_policy: bool
    ) -> None:
        """Off-policy its ratio is exp(-inf) = 0, its gradient too; on-policy they are 1 and -A."""
        case = with_ratio(0.0, surrogate, 1.0, device=device)
        case.logits.scatter_(-1, case.completion_ids[..., None], -INF)
        out, grad = run(grpo_loss, case.with_options(old_logps=None) if on_policy else case, **path)
        assert out.loss.item() == -on_policy
        assert out.metrics["ratio"].item() == on_policy
        assert grad.isfinite().all()
        assert bool(grad.any()) == on_policy


@pytest.mark.parametrize("shift", [-120.0, 1e4])
@pytest.mark.parametrize("vocab", [37, TWO_BLOCKS])
@specs("Reinforce", "entropy")
def test_case_8_shifted_logits(path: Options, device: str, spec: LossSpec, shift: float, vocab: int) -> None:
    """It costs the digits that fp32 loses in the logits; a difference of two large logarithms costs more."""
    case = random_case(spec, 2, 2, vocab, bare=True, device=device)
    case.logits.add_(shift)
    # An entropy of 1e-14, which rounding must not turn negative.
    case.logits[1] = shift + 40.0 * (torch.arange(vocab, device=device) == 7)
    case.completion_ids[1] = 7
    got, want = run(grpo_loss, case, **path), run(reference_loss, case.wide())
    precision = torch.finfo(torch.float32).eps * abs(shift) + 1e-5
    torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=0, atol=precision)
    if spec.entropy_coef:
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=precision)
        assert (got.out.entropy >= 0).all()
    assert float(relative_error(got.grad[0], want.grad[0]).max()) < precision


class TestCase9HalfPrecision:
    def test_large_fp16_logits(self, path: Options, device: str) -> None:
        """Times the scale, or over the temperature, they are beyond fp16."""
        case = random_case(LossSpec(Reinforce()), 2, 3, 67, bare=True, device=device)
        logits = (case.logits * 1000).clamp(-6e4, 6e4)
        logits[..., 11:13] = 6e4
        case.completion_ids[0] = 12
        case = case._replace(logits=logits.half()).with_options(temperature=0.5, logit_scale=2.0)
        got, want = run(grpo_loss, case, return_entropy=True, **path), run(reference_loss, case.wide())
        # The unlikely tokens' log-probabilities are near -1e5: fp32 has two digits after the point there.
        torch.testing.assert_close(got.out.logps.double(), want.out.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.out.entropy.double(), want.out.entropy, rtol=0, atol=1e-5)
        assert float(relative_error(got.grad, want.grad).max()) < 2 * torch.finfo(torch.float16).eps

    def test_bf16_gradient_at_a_likely_token(self, path: Options, device: str) -> None:
        """`1 - p` cancels where p is near 0.999; `-expm1(logp)` does not."""
        rows = 64  # each with its taken token's probability somewhere between 0.998 and 0.9995
        case = random_case(LossSpec(Reinforce()), 1, rows, 37, dtype=torch.bfloat16, bare=True, device=device)
        column = case.completion_ids[..., None]
        rest = case.logits.float().scatter(-1, column, -INF).logsumexp(-1, keepdim=True)
        likely = rest + torch.linspace(6.2, 7.6, rows, device=device)[None, :, None]
        case.logits.scatter_(-1, column, likely.bfloat16())
        expected = oracle(case)
        taken = [
            x.gather(-1, column)
            for x in (run(grpo_loss, case, **path).grad, expected.eager.grad, expected.truth.grad)
        ]
        assert_no_worse_than_eager(*taken, factor=4, what="gradient at the taken token")


class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 67, 2**31])
    @specs("PPOClip", "exact KL")
    def test_masked(self, path: Options, device: str, spec: LossSpec, wrong: int) -> None:
        case = random_case(spec, 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        assert_same_bits(
            run(grpo_loss, case._replace(completion_ids=ids), **path), run(grpo_loss, case, **path)
        )

    @pytest.mark.parametrize("wrong", [-100, -1, 67, 70, 2**31, 2**40])
    @specs("PPOClip", "Reinforce")
    def test_unmasked(self, path: Options, device: str, spec: LossSpec, wrong: int) -> None:
        """The vocabulary is 67 columns of 72: 67 and 70 could be read, but are no tokens."""
        case = random_case(spec, 2, 2, 72, bare=True, device=device).with_options(vocab_size=67)
        ids = case.completion_ids.clamp(max=66)
        ids[1, 0] = wrong
        out, grad = run(grpo_loss, case._replace(completion_ids=ids), **path)
        assert out.loss.isnan()
        assert out.logps.isnan().nonzero().tolist() == [[1, 0]]
        assert grad[0].isfinite().all() and grad[0].any()


@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, TWO_BLOCKS, 50257, 151936])
@pytest.mark.parametrize(
    "name, dtype", [("PPOClip", torch.float32), ("PPOClip", torch.bfloat16), ("entropy", torch.float32)]
)
def test_case_11_vocabularies(path: Options, device: str, vocab: int, name: str, dtype: torch.dtype) -> None:
    """A lone token, odd sizes, an element off whole blocks, and what models have; first and last taken."""
    case = random_case(SPECS[name], 1, 2, vocab, bare=True, dtype=dtype, device=device)
    case.completion_ids[:] = torch.tensor([0, vocab - 1])
    out, grad = assert_right(case.with_options(old_logps=None), **path)
    if vocab == 1:
        assert not grad.any() and not out.logps.any()
        assert out.entropy is None or not out.entropy.any()


class TestCase12Large:
    @pytest.mark.parametrize("shape", [(65537, 1), (1, 65537)], ids=["sequences", "tokens"])
    def test_more_rows_than_a_grid_is_wide(self, device: str, shape: tuple[int, int]) -> None:
        """65535 limits a launch grid's second dimension. (To interpret so many programs takes minutes.)"""
        case = random_case(LossSpec(PPOClip(), aggregation=SUM), *shape, 3, device=device, bare=True)
        case.logits.div_(3)  # less peaked: of so many rows one would have no digits of 1 - p left
        got = run(grpo_loss, case, backend="triton" if device == "cuda" else "torch")
        want = run(reference_loss, case.wide())
        assert float(relative_error(got.grad, want.grad).max()) < 1e-4

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_more_than_2_31_elements(self) -> None:
        rows, vocab = 16400, 131072
        assert rows * vocab > 2**31
        needed = 3 * 2 * rows * vocab  # bytes: logits and gradient in bf16, and as much again as room
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
        last = random_case(
            LossSpec(Reinforce(), aggregation=SUM),
            1,
            1,
            vocab,
            bare=True,
            dtype=torch.bfloat16,
            device="cuda",
        )
        leaf = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
        leaf[:, -1:] = last.logits
        leaf.requires_grad_()
        ids = torch.zeros(1, rows, dtype=torch.long, device="cuda")
        ids[:, -1:] = last.completion_ids
        out = grpo_loss(leaf, ids, last.advantages.expand(1, rows), spec=last.spec)
        out.loss.backward()
        want = run(reference_loss, last.wide())
        torch.testing.assert_close(out.logps[:, -1:].double(), want.out.logps, rtol=0, atol=1e-5)
        assert out.logps[0, -2].item() == pytest.approx(-math.log(vocab), abs=1e-5)
        assert float(relative_error(leaf.grad[:, -1:], want.grad).max()) < 2 * torch.finfo(torch.bfloat16).eps


def set_chunks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much the torch backend computes at a time, on the CPU and elsewhere."""
    for name in ("CPU_CHUNK_ELEMENTS", "CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"grpo_kernels.row_chunks.{name}", elements)


class Allocations(TorchDispatchMode):
    """Records how many elements every new storage has room for."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.known.add(x.untyped_storage().data_ptr())
                self.sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return result


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "x[:, :-1]": lambda x: x[:, :-1],
    "x[:, P:]": lambda x: x[:, 2:],
    "x[..., :V]": lambda x: x[..., :67],
    "x[:, 1:-1, 1:V]": lambda x: x[:, 1:-1, 1:67],  # rows that are not aligned for 16-byte loads
    "every other row": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "one token": lambda x: x[:, -1:],
    "packed": lambda x: x[1, 1:],
}
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


class TestCase13Strides:
    @staticmethod
    def case(view: View, dtype: torch.dtype, device: str) -> Case:
        """`[3, 4, 256]` logits, of which the loss is given a view, and the other arguments for that view."""
        wide = random_case(LossSpec(PPOClip(), KL("exact")), 3, 4, 256, dtype=dtype, seed=1, device=device)
        ids = view(wide.completion_ids[..., None].expand(3, 4, 256))[..., 0].clamp(max=65)
        options = {
            "old_logps": torch.full(ids.shape, -3.0, device=device),
            "ref_logits": view(wide.options["ref_logits"]),
        }
        advantages = torch.linspace(-1, 1, ids.numel(), device=device).view(ids.shape)
        return Case(wide.spec, wide.logits, ids, advantages, options)

    @dtypes
    @views
    def test_values(self, path: Options, device: str, view: View, dtype: torch.dtype) -> None:
        assert_right(self.case(view, dtype, device), view, **path)

    @views
    def test_no_hidden_copy(
        self,
        path: Options,
        device: str,
        view: View,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        case = self.case(view, torch.float32, device)
        leaf = view(case.logits).detach().requires_grad_()
        logits = torch.empty_strided(leaf.shape, leaf.stride(), device=device).copy_(leaf)
        # Besides numbers per token, the torch backend allocates chunks of rows; here a row makes a chunk.
        set_chunks(256, monkeypatch)
        with Allocations(logits, *case.options.values()) as forward:
            out = grpo_loss(
                logits, case.completion_ids, case.advantages, spec=case.spec, **case.options, **path
            )
        with Allocations(logits, *case.options.values()) as backward:
            torch.autograd.grad(out.loss, logits)
        assert 0 < max(forward.sizes) <= 256
        assert [size for size in backward.sizes if size > 256] == (
            [] if path["inplace"] else [logits.numel()]
        )

    def test_vocabulary_stride(self, path: Options, device: str) -> None:
        logits = torch.zeros(2, 5, 3, device=device).transpose(1, 2)
        ids = torch.zeros(2, 3, dtype=torch.long, device=device)
        with pytest.raises(
            ValueError, match=r"^logits must have stride 1 along the vocabulary.*\(15, 1, 3\)"
        ):
            grpo_loss(logits, ids, torch.ones(2, device=device), **path)


class TestCase14Layouts:
    """Whatever layout and dtype the tensors per token have, the bits are those of contiguous fp32, int64."""

    @not_contiguous
    def test_layouts(self, path: Options, device: str, layout: Callable[[Tensor], Tensor]) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 3, 4, 37, device=device)
        case = case.with_options(ref_logits=None, ref_logps=case.options["old_logps"] - 0.1)
        got = run(grpo_loss, every_tensor(case, lambda _, x: layout(x) if x.dim() == 2 else x), **path)
        assert_same_bits(got, run(grpo_loss, case, **path))

    def test_expanded(self, path: Options, device: str) -> None:
        case = random_case(LossSpec(PPOClip()), 3, 4, 37, device=device)
        case = every_tensor(case, lambda _, x: x[:1].expand(3, 4) if x.dim() == 2 else x)
        repeated = every_tensor(case, lambda _, x: x.contiguous())
        assert_same_bits(run(grpo_loss, case, **path), run(grpo_loss, repeated, **path))

    @pytest.mark.parametrize("ids", [torch.int32, torch.int64])
    @pytest.mark.parametrize(
        "mask", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16]
    )
    def test_ids_and_masks(self, path: Options, device: str, ids: torch.dtype, mask: torch.dtype) -> None:
        case = random_case(SPECS["PPOClip"], 3, 4, 37, device=device)
        got = case.with_options(completion_mask=case.options["completion_mask"].to(mask))
        got = got._replace(completion_ids=case.completion_ids.to(ids))
        assert_same_bits(run(grpo_loss, got, **path), run(grpo_loss, case, **path))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_values(self, path: Options, device: str, dtype: torch.dtype) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 3, 4, 37, device=device)
        case = case.with_options(ref_logits=None, ref_logps=case.options["old_logps"] - 0.1)

        def rounded(x: Tensor) -> Tensor:
            """To numbers that all these dtypes have."""
            return x.bfloat16().half().float() if x.dim() == 2 and x.is_floating_point() else x

        case = every_tensor(case, lambda _, x: rounded(x))
        narrow = every_tensor(case, lambda _, x: x.to(dtype) if x.dim() == 2 and x.is_floating_point() else x)
        assert_same_bits(run(grpo_loss, narrow, **path), run(grpo_loss, case, **path))

    def test_advantages(self, path: Options, device: str) -> None:
        case = random_case(SPECS["k3"], 3, 4, 37, inactive=0, device=device)
        want = run(grpo_loss, case, **path)
        per_sequence = case.advantages[:, 0]
        for advantages in (per_sequence, per_sequence[:, None]):
            assert_same_bits(run(grpo_loss, case._replace(advantages=advantages), **path), want)
        packed = every_tensor(case, lambda _, x: x.flatten(0, 1)).with_options(
            seq_lens=torch.tensor([4, 4, 4])
        )
        for advantages in (per_sequence, per_sequence.repeat_interleave(4)):
            out, grad = run(grpo_loss, packed._replace(advantages=advantages), **path)
            padded = out._replace(logps=out.logps.view(3, 4), ref_logps=out.ref_logps.view(3, 4))
            assert_same_bits(Result(padded, grad.view(3, 4, 37)), want)


class TestCase15Empty:
    @staticmethod
    def assert_nothing(got: Result) -> None:
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize(
        "shape", [(0, 4), (3, 0), (2, 3)], ids=["no sequences", "no tokens", "all masked"]
    )
    def test_nothing(self, path: Options, device: str, shape: tuple[int, int], aggregation: str) -> None:
        spec = LossSpec(PPOClip(), KL("exact"), aggregation=aggregation, entropy_coef=0.1, max_tokens=4)
        logits = torch.zeros(*shape, 37, device=device)
        options = {"ref_logits": logits, "completion_mask": torch.zeros(shape, device=device)}
        case = Case(
            spec,
            logits,
            torch.zeros_like(logits[..., 0], dtype=torch.long),
            torch.ones(shape[0], device=device),
            options,
        )
        got = run(grpo_loss, case, **path)
        self.assert_nothing(got)
        assert got.out.logps.shape == got.out.entropy.shape == shape

    @specs()
    def test_all_masked(self, path: Options, device: str, spec: LossSpec) -> None:
        case = random_case(spec, 2, 3, 37, device=device)
        self.assert_nothing(
            run(grpo_loss, case.with_options(completion_mask=torch.zeros(2, 3, device=device)), **path)
        )

    @pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
    def test_nothing_packed(self, path: Options, device: str, lengths: list[int]) -> None:
        seq_lens = torch.tensor(lengths, dtype=torch.long)
        ids = torch.zeros(0, dtype=torch.long, device=device)
        advantages = torch.zeros(len(lengths), device=device)
        case = Case(SPECS["k3"], torch.zeros(0, 37, device=device), ids, advantages, {"seq_lens": seq_lens})
        self.assert_nothing(
            run(grpo_loss, case.with_options(ref_logps=torch.zeros(0, device=device)), **path)
        )

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(self, path: Options, device: str, aggregation: str) -> None:
        """It counts in B, as in TRL, and is not divided by its 0 tokens. Packed, it has no rows at all."""
        spec = LossSpec(PPOClip(), aggregation=aggregation, max_tokens=4)
        case = random_case(spec, 3, 4, 37, masked=0, inactive=0, device=device).with_options(ref_logits=None)
        mask = case.options["completion_mask"]
        mask[1] = False
        out, grad = assert_right(case, **path)
        packed = every_tensor(case, lambda _, x: x[mask]).with_options(seq_lens=torch.tensor([4, 0, 4]))
        got = run(grpo_loss, packed._replace(advantages=case.advantages[:, 0]), **path)
        torch.testing.assert_close(got.out.loss, out.loss)
        torch.testing.assert_close(got.grad, grad[mask])


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF])
def test_case_16_temperature(path: Options, device: str, temperature: float) -> None:
    """The other wrong inputs: test_errors.py."""
    case = random_case(LossSpec(), 1, 2, 5, bare=True, device=device).with_options(temperature=temperature)
    with pytest.raises(ValueError, match=f"^temperature must be finite and > 0, got {temperature}$"):
        run(grpo_loss, case, **path)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_case_17_uneven_micro_batches(path: Options, device: str, aggregation: str) -> None:
    """Under a common normalizer, losses and gradients of the parts add up to those of the whole."""
    spec = LossSpec(PPOClip(), KL("k3"), aggregation=aggregation, entropy_coef=0.1, max_tokens=4)
    case = random_case(spec, 6, 4, 37, seed=1, device=device)
    defaults = {"token-mean": case.options["completion_mask"].sum(), "token-sum": 1.0}
    case = case.with_options(normalizer=defaults.get(aggregation, 6.0))

    def part(rows: slice) -> Result:
        return run(grpo_loss, every_tensor(case, lambda _, x: x[rows] if x.dim() else x), **path)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-6, atol=0)
    # The number that is its default changes nothing but the entropy bonus, which else is a mean over tokens.
    plain = case._replace(spec=replace(spec, entropy_coef=0.0))
    assert_same_bits(
        run(grpo_loss, plain, **path), run(grpo_loss, plain.with_options(normalizer=None), **path)
    )


def test_case_18_inputs_are_never_written(device: str, backend: str) -> None:
    """Leaf logits, the output of a tanh, whose backward reads it, and logits with another use after."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device=device)
    leaf = case.logits.requires_grad_()
    logits = torch.tanh(leaf)
    tensors = [leaf, logits, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, logits):
        out = grpo_loss(
            x, case.completion_ids, case.advantages, spec=case.spec, backend=backend, **case.options
        )
        (out.loss + x.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


def test_case_19_loss_times_1024(device: str, backend: str) -> None:
    """Exact, for it is a power of two. Other factors, and second backwards: test_autograd.py."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device=device)

    def scaled(*args: Any, **options: Any) -> Any:
        out = grpo_loss(*args, **options)
        return out._replace(loss=1024 * out.loss)

    once, many = (run(loss, case, backend=backend).grad for loss in (grpo_loss, scaled))
    assert torch.equal(1024 * once, many) and once.any()


class TestCase20SameBits:
    """The bits of a row depend on that row alone."""

    @pytest.fixture(autouse=True)
    def two_threads(self) -> Iterator[None]:
        """PyTorch splits a long row over its threads where it has no other row to give them."""
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("vocab", [37, 64, TWO_BLOCKS, 33001])
    def test_neighbours(
        self, path: Options, device: str, vocab: int, plain: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if vocab > 32768 and path["backend"] == "triton" and device == "cpu":
            pytest.skip("PyTorch calls 32768 long; to the kernels it is some more blocks, slow to interpret")
        # Three rows make a chunk, so that a row changes its place, and the last row is alone.
        set_chunks(3 * vocab, monkeypatch)
        rows, row = 7, 4
        spec = replace(SPECS["Reinforce" if plain else "exact KL"], aggregation=SUM)
        case = random_case(spec, rows, 1, vocab, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)
        if plain:
            case = case.with_options(ref_logits=None, temperature=1.0)

        def call(index: list[int], masked: bool = False) -> list[Tensor]:
            chosen = every_tensor(case, lambda _, x: x[index])
            if masked:
                chosen.options["completion_mask"][:row] = chosen.options["completion_mask"][row + 1 :] = False
            out, grad = run(grpo_loss, chosen, **path)
            return [grad, out.logps] + ([] if plain else [out.ref_logps, out.entropy])

        everything = list(range(rows))
        want = call(everything)
        for index, masked in [
            (everything, False),
            (everything, True),
            ([row], False),
            ([0, row], False),
            ([6, 0, 1, 5, 3, 2, row], False),
            ([row] * 5, False),
        ]:
            names = ("grad", "logps", "ref_logps", "entropy")
            for name, got, whole in zip(names, call(index, masked), want, strict=False):
                for place in (place for place, source in enumerate(index) if source == row):
                    assert torch.equal(got[place], whole[row]), (
                        f"{name} of row {row} at {place} of {index}, {masked = }"
                    )

    def test_a_hundred_times(self, device: str, backend: str) -> None:
        batch = make_batch(1, 2, 37, device=device)
        first, *others = (selective_logps(*batch[:2], backend=backend) for _ in range(100))
        assert all(torch.equal(first, x) for x in others)


@pytest.mark.parametrize("x", [1e-4, -1e-4])
def test_case_21_k3_near_zero(path: Options, device: str, x: float) -> None:
    """In fp32 `exp(x) - x - 1` is noise at x = 1e-4; `expm1(x) - x` is 5e-9 to a percent."""
    case = random_case(LossSpec(Reinforce()), 1, 8, 37, bare=True, device=device)
    logps = run(grpo_loss, case, **path).out.logps
    ref_logps = logps + x
    exact = ref_logps.double() - logps.double()
    spec = LossSpec(None, KL("k3", beta=1.0), aggregation=SUM)
    got = run(grpo_loss, case._replace(spec=spec).with_options(ref_logps=ref_logps), **path)
    assert got.out.loss.item() == pytest.approx((torch.expm1(exact) - exact).sum().item(), rel=1e-2)
    # dk3/dlogp = -expm1(x), and Reinforce's -A is a gradient like it.
    linear = case._replace(spec=LossSpec(Reinforce(), aggregation=SUM), advantages=torch.expm1(exact))
    assert float(relative_error(got.grad, run(reference_loss, linear.wide()).grad).max()) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_case_22_a_device_that_is_not_the_current_one() -> None:
    """Triton launches on the current device. Checkpointing, no_grad and autocast: test_autograd.py."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device="cuda:1")
    with torch.cuda.device(0):
        assert_right(case, backend="triton")


class TestSequences:
    """Where tokens are coupled, one token's infinity is its sequence's, and no other's."""

    @staticmethod
    def two_sequences(spec: LossSpec, device: str, *, tail: int = 0) -> Case:
        """The first sequence's first token was impossible to its sampler; `tail` masked tokens follow."""
        case = random_case(spec, 2, 3 + tail, 37, bare=True, device=device)
        mask = torch.arange(3 + tail, device=device).expand(2, -1) < 3
        old_logps = torch.full((2, 3 + tail), -3.0, device=device)
        old_logps[0, 0] = -INF
        return case.with_options(completion_mask=mask, old_logps=old_logps, ref_logps=old_logps.clamp(min=-4))

    @pytest.mark.parametrize(
        "surrogate", [GMPO(), PPOClip(), ImportanceRatio()], ids=["GMPO", "PPO", "ratio"]
    )
    @pytest.mark.parametrize("tail", [0, 2])
    def test_infinite_ratio(self, path: Options, device: str, surrogate: Any, tail: int) -> None:
        """Masked tokens of the sequence change nothing: 0 * inf there is not the 0 that is meant."""
        level = "token" if isinstance(surrogate, GMPO) else "sequence"
        spec = LossSpec(surrogate, KL("k3", ratio_corrected=True), level, aggregation=SUM)
        case = self.two_sequences(spec, device, tail=tail)
        got = run(grpo_loss, case._replace(advantages=-torch.ones_like(case.advantages)), **path)
        assert got.out.loss == INF
        assert got.grad[1].isfinite().all() and got.grad[1, :3].any()
        assert not got.grad[:, 3:].any()

    def test_a_token_without_part_in_it(self, path: Options, device: str) -> None:
        """GMPO's tokens without advantage, or beyond their bound, have no gradient: not inf * 0."""
        case = self.two_sequences(LossSpec(GMPO(), aggregation=SUM), device)
        advantages = torch.tensor([[0.0, -1.0, -1.0], [1.0, 1.0, 1.0]], device=device)
        old_logps = case.options["old_logps"].clone()
        old_logps[0, :2] = torch.tensor([-3.0, -INF])
        got = run(grpo_loss, case._replace(advantages=advantages).with_options(old_logps=old_logps), **path)
        assert not got.grad[0, 0].any() and got.grad[1].isfinite().all()

    @pytest.mark.parametrize("name", ["CISPO", "DRO", "DPPO(tv)", "DPPO(kl)"])
    def test_impossible_token(self, path: Options, device: str, name: str) -> None:
        """A weight of 0 beside a log-probability of -inf."""
        case = random_case(LossSpec(SURROGATES[name]), 1, 2, 37, bare=True, device=device)
        case.logits[0, 0, case.completion_ids[0, 0]] = -INF
        advantages = torch.tensor([[0.0 if name == "DRO" else 1.0, 1.0]], device=device)
        old_logps = torch.full((1, 2), -3.0, device=device)
        if name == "CISPO":
            case = case._replace(spec=LossSpec(CISPO(ratio_max=5.0)))
        got = run(grpo_loss, case._replace(advantages=advantages).with_options(old_logps=old_logps), **path)
        assert not got.out.loss.isnan()

    @pytest.mark.parametrize("old_logp", [-INF, -200.0, 1e-7])
    def test_region_of_certain_and_impossible_tokens(
        self, path: Options, device: str, old_logp: float
    ) -> None:
        """An old probability of 0, or by a rounding above 1, makes no NaN of the divergence."""
        case = random_case(LossSpec(DPPO("kl", low=10.0, high=10.0)), 1, 1, 37, bare=True, device=device)
        case = case.with_options(old_logps=torch.full((1, 1), old_logp, device=device))
        for advantage in (1.0, -1.0):
            got = run(grpo_loss, case._replace(advantages=torch.full((1,), advantage, device=device)), **path)
            assert got.out.metrics["clip_fraction"] == 0 and got.grad.any()

    @pytest.mark.parametrize("lengths", [[2, 300], [3, -2, 4], [-1, 6], [0, 0], [5], []], ids=str)
    def test_lengths_that_nobody_checked(self, lengths: list[int]) -> None:
        """On a GPU, and in a graph: what sums over sequences must stay within the batch."""
        held, ids = sequences_within(torch.tensor(lengths, dtype=torch.long), 5)
        assert (held >= 0).all() and held.sum() <= 5 and ids.shape == (5,) and (ids >= 0).all()
        assert len(lengths) == 0 or (ids < len(lengths)).all()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
    def test_lengths_of_any_dtype(self, path: Options, device: str, dtype: torch.dtype) -> None:
        case = random_case(LossSpec(PPOClip(), level="sequence"), 2, 3, 37, bare=True, device=device)
        case = case._replace(
            logits=case.logits.flatten(0, 1),
            completion_ids=case.completion_ids.flatten(),
            advantages=case.advantages.flatten(),
        ).with_options(old_logps=torch.full((6,), -3.0, device=device))
        want, got = (
            run(grpo_loss, case.with_options(seq_lens=torch.tensor([2, 4], dtype=each)), **path)
            for each in (torch.int64, dtype)
        )
        assert_same_bits(got, want)
