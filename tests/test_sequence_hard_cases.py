"""The inputs that break policy losses, where the ratio is a sequence's, from logits.

What a token's infinity does to its sequence and to no other, and lengths: test_hard_cases.py::TestSequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_hard_cases
import torch
from parity import AGGREGATIONS, SEQUENCE_LEVEL, SURROGATES, Case, Result, run
from test_hard_cases import (
    INF,
    NAN,
    SUM,
    Options,
    assert_right,
    assert_same_bits,
    bounded,
    dtypes,
    every_tensor,
)
from test_hard_cases import random_case as padded_case
from torch import Tensor

from grpo_kernels import DRO, KL, ImportanceRatio, LossSpec, PPOClip, grpo_loss
from grpo_kernels.reference import reference_loss

path = test_hard_cases.path
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
levels = pytest.mark.parametrize("level", ["sequence", "sequence-token"])
LOSSES = {
    name: LossSpec(SURROGATES[surrogate], level=level)
    for name, (surrogate, level) in SEQUENCE_LEVEL.items()
    if "(" not in name  # one of each surrogate
}
losses = pytest.mark.parametrize("spec", LOSSES.values(), ids=LOSSES)


def every_term(spec: LossSpec) -> LossSpec:
    return replace(spec, kl=KL("k3", ratio_corrected=True), entropy_coef=0.01)


def random_case(spec: LossSpec, *shape: int, **how: Any) -> Case:
    """A ratio of a sequence has one advantage: that of its first token, for all of them."""
    case = padded_case(spec, *shape, **how)
    return case._replace(advantages=case.advantages[:, 0].contiguous())


def laid_out(case: Case, packed: bool) -> Case:
    """Packed, the same tokens end to end, masked ones as well."""
    if not packed:
        return case
    sequences, tokens = case.completion_ids.shape
    case = every_tensor(case, lambda _, x: x.flatten(0, 1) if x.dim() > 1 else x)
    return case.with_options(seq_lens=torch.full((sequences,), tokens))


def with_ratio(log_ratio: float, advantage: float, spec: LossSpec, device: str) -> Case:
    """Three tokens off the behaviour policy by half, once and one and a half times `log_ratio`, and a fourth
    that is masked; beside them a sequence on policy and without advantage."""
    case = random_case(spec, 2, 4, 37, bare=True, device=device)
    logps = run(reference_loss, case._replace(spec=LossSpec(PPOClip()))).out.logps
    off = log_ratio * torch.tensor([[0.5, 1.0, 1.5, -9.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    mask = torch.tensor([[True, True, True, False], [True] * 4], device=device)
    advantages = torch.tensor([advantage, 0.0], device=device)
    return case._replace(advantages=advantages).with_options(old_logps=logps - off, completion_mask=mask)


@levels
@layouts
class TestCases1And2HugeRatio:
    """A mean log-ratio of +200: exp(200) is inf in fp32, and inf * 0 is NaN."""

    @dtypes
    @pytest.mark.parametrize(
        "surrogate, loss",
        [(PPOClip(eps_high=0.28), -1.28), (ImportanceRatio(max_ratio=5.0), -5.0)],
        ids=["PPO", "ratio"],
    )
    def test_case_1_positive_advantage(
        self,
        path: Options,
        device: str,
        dtype: torch.dtype,
        surrogate: Any,
        loss: float,
        packed: bool,
        level: str,
    ) -> None:
        spec = LossSpec(surrogate, level=level, aggregation="seq-mean-token-mean")
        case = with_ratio(200.0, 1.0, spec, device)
        got = run(grpo_loss, laid_out(case._replace(logits=case.logits.to(dtype)), packed), **path)
        assert got.out.loss.item() == pytest.approx(loss / 2, rel=1e-6)
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
        packed: bool,
        level: str,
    ) -> None:
        """The clamp is one of the sequence's log-ratio."""
        spec = LossSpec(surrogate, level=level, aggregation="seq-mean-token-mean", log_ratio_clamp=clamp)
        got = run(grpo_loss, laid_out(with_ratio(log_ratio, -1.0, spec, device), packed), **path)
        clamped = INF if clamp is None else clamp
        ratio = INF if min(log_ratio, clamped) > 100 else math.exp(min(log_ratio, clamped))
        assert got.out.loss.item() == pytest.approx(min(ratio, bound) / 2, rel=1e-5)
        flat = ratio > bound or log_ratio > clamped
        assert got.out.loss.isinf() or bool(got.grad.any()) != flat


@layouts
class TestCase3ZeroAdvantage:
    """DRO's square is no matter of advantage."""

    @pytest.mark.parametrize("anchor", [1e4, -INF, NAN])
    @pytest.mark.parametrize(
        "spec",
        [spec for spec in LOSSES.values() if not isinstance(spec.surrogate, DRO)],
        ids=[name for name, spec in LOSSES.items() if not isinstance(spec.surrogate, DRO)],
    )
    def test_any_ratio(self, path: Options, device: str, spec: LossSpec, anchor: float, packed: bool) -> None:
        """Nor does it reach the sequence beside."""
        anchors = torch.full((2, 3), -3.0, device=device)
        case = random_case(spec, 2, 3, 37, bare=True, device=device)
        case = case._replace(advantages=torch.tensor([0.0, 1.0], device=device))
        case = case.with_options(old_logps=anchors, ref_logps=anchors)
        want = run(grpo_loss, laid_out(case, packed), **path)
        anchors[0, 1] = anchor
        got = run(grpo_loss, laid_out(case, packed), **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        grad = got.grad.view(2, 3, 37)
        assert not grad[0].any() and got.out.loss.isfinite()
        assert got.out.metrics["active_fraction"].item() == (grad[1] != 0).any(-1).sum().item() / 6

    @levels
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_any_logits(self, path: Options, device: str, value: float, level: str, packed: bool) -> None:
        case = random_case(LossSpec(PPOClip(), level=level), 2, 3, 37, bare=True, device=device)
        case.advantages[0] = 0
        want = run(grpo_loss, laid_out(case, packed), **path)
        case.logits[0, 1, 5] = value
        got = run(grpo_loss, laid_out(case, packed), **path)
        assert torch.equal(got.out.loss, want.out.loss) and torch.equal(got.grad, want.grad)
        assert got.grad.any() and not got.grad.view(2, 3, 37)[0].any()


@layouts
class TestCase4Poison:
    @dtypes
    @losses
    def test_masked(
        self, backend: str, device: str, spec: LossSpec, dtype: torch.dtype, packed: bool
    ) -> None:
        case = random_case(every_term(spec), 3, 4, 67, dtype=dtype, seed=1, inactive=0, device=device)
        mask = case.options["completion_mask"]
        assert 3 <= (~mask).sum() < mask.numel()

        def filled(values: Tensor) -> Result:
            def fill(name: str, x: Tensor) -> Tensor:
                if not x.is_floating_point() or x.dim() == 1:
                    return x
                there = values.to(x.dtype).expand(3, 4)
                if x.dim() == 2:
                    return torch.where(mask, x, there)
                return torch.where(mask[..., None], x, there[..., None])

            return run(grpo_loss, laid_out(every_tensor(case, fill), packed), backend=backend)

        # One after the other along the tokens.
        poison = torch.tensor([NAN, INF, -INF, 0.0], device=device)
        got = filled(poison.roll(1))
        assert_same_bits(got, filled(poison.new_zeros(4)))
        grad = got.grad.view(case.logits.shape)
        assert grad[mask].any() and not grad[~mask].any() and got.out.loss.isfinite()

    @levels
    @pytest.mark.parametrize(
        "name", ["logits", "advantages", "old_logps", "ref_logits", "token_weights", "temperature"]
    )
    def test_unmasked_nan_surfaces(
        self, backend: str, device: str, name: str, level: str, packed: bool
    ) -> None:
        """In its sequence's gradient, and in no other's."""
        spec = every_term(LossSpec(ImportanceRatio(), level=level))
        case = random_case(spec, 2, 3, 37, masked=0, inactive=0, device=device)
        (getattr(case, name) if name in case._fields else case.options[name])[0] = NAN
        got = run(grpo_loss, laid_out(case, packed), backend=backend)
        grad = got.grad.view(2, 3, 37)
        assert got.out.loss.isnan()
        assert grad[0].isnan().any() and grad[1].isfinite().all() and grad[1].any()


@levels
@layouts
def test_case_5_zero_beta_reads_no_reference(backend: str, device: str, level: str, packed: bool) -> None:
    case = random_case(LossSpec(PPOClip(), level=level), 2, 3, 37, device=device)
    case = case.with_options(ref_logits=None)
    want = run(grpo_loss, laid_out(case, packed), backend=backend)
    kl = KL("k3", beta=0.0, ratio_corrected=True)
    ref_logps = torch.full((2, 3), NAN, device=device)
    got = case._replace(spec=replace(case.spec, kl=kl)).with_options(ref_logps=ref_logps)
    got = run(grpo_loss, laid_out(got, packed), backend=backend)
    assert_same_bits(Result(got.out._replace(ref_logps=None), got.grad), want)


@levels
@layouts
@pytest.mark.parametrize("on_policy", [False, True])
def test_case_7_a_taken_token_is_impossible(
    backend: str, device: str, on_policy: bool, level: str, packed: bool
) -> None:
    """Off-policy its sequence's ratio is exp(-inf) = 0, its gradient too; on-policy they are 1 and -A."""
    spec = LossSpec(PPOClip(), level=level, aggregation="seq-mean-token-mean")
    case = random_case(spec, 1, 3, 37, bare=True, device=device)
    case = case._replace(advantages=torch.ones(1, device=device))
    case.logits[0, 1, case.completion_ids[0, 1]] = -INF
    if not on_policy:
        case = case.with_options(old_logps=torch.full((1, 3), -3.0, device=device))
    out, grad = run(grpo_loss, laid_out(case, packed), backend=backend)
    assert out.loss.item() == -on_policy
    assert out.metrics["ratio"].item() == on_policy
    assert grad.isfinite().all() and bool(grad.any()) == on_policy


@layouts
class TestCase10WrongIds:
    @pytest.mark.parametrize("wrong", [-100, 2**31])
    @losses
    def test_masked(self, backend: str, device: str, spec: LossSpec, wrong: int, packed: bool) -> None:
        case = random_case(every_term(spec), 3, 4, 67, seed=1, device=device)
        ids = torch.where(case.options["completion_mask"], case.completion_ids, wrong)
        assert (ids == wrong).any()
        got = run(grpo_loss, laid_out(case._replace(completion_ids=ids), packed), backend=backend)
        assert_same_bits(got, run(grpo_loss, laid_out(case, packed), backend=backend))

    @levels
    @pytest.mark.parametrize("wrong", [-100, -1, 67, 70, 2**31, 2**40])
    def test_unmasked(
        self,
        backend: str,
        device: str,
        wrong: int,
        level: str,
        packed: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The vocabulary is 67 columns of 72: 67 and 70 could be read, but are no tokens."""
        case = random_case(LossSpec(PPOClip(), level=level), 2, 2, 72, bare=True, device=device)
        case = case.with_options(vocab_size=67)
        case.completion_ids.clamp_(max=66)[1, 0] = wrong
        case = laid_out(case, packed)
        out, grad = run(grpo_loss, case, backend=backend)
        grad = grad.view(2, 2, 72)
        assert out.loss.isnan()
        assert out.logps.isnan().flatten().nonzero().tolist() == [[2]]
        assert grad[0].isfinite().all() and grad[0].any()
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
        place = "2" if packed else "1, 0"
        with pytest.raises(ValueError, match=rf"completion_ids\[{place}\] is {wrong}, outside \[0, 67\)"):
            run(grpo_loss, case, backend=backend)


@layouts
class TestCase14Layouts:
    """The bits are those of contiguous fp32 and int64."""

    @levels
    def test_layouts_and_dtypes(self, backend: str, device: str, level: str, packed: bool) -> None:
        case = laid_out(random_case(LossSpec(PPOClip(), level=level), 3, 4, 37, device=device), packed)

        def other(name: str, x: Tensor) -> Tensor:
            x = x.int() if name == "completion_ids" else x.bfloat16() if name == "completion_mask" else x
            return x if name in ("logits", "ref_logits") else torch.stack([x, x], -1)[..., 0]

        got = run(grpo_loss, every_tensor(case, other), backend=backend)
        assert_same_bits(got, run(grpo_loss, case, backend=backend))

    @levels
    def test_advantages_per_token(self, backend: str, device: str, level: str, packed: bool) -> None:
        case = random_case(LossSpec(PPOClip(), level=level), 3, 4, 37, device=device)
        per_token = case._replace(advantages=case.advantages[:, None].expand(3, 4))
        want = run(grpo_loss, laid_out(case, packed), backend=backend)
        assert_same_bits(run(grpo_loss, laid_out(per_token, packed), backend=backend), want)


class TestCase15Empty:
    @losses
    @layouts
    def test_all_masked(self, backend: str, device: str, spec: LossSpec, packed: bool) -> None:
        case = random_case(every_term(spec), 2, 3, 37, device=device)
        case = case.with_options(completion_mask=torch.zeros(2, 3, device=device))
        self.assert_nothing(run(grpo_loss, laid_out(case, packed), backend=backend))

    @losses
    @pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
    @layouts
    def test_nothing(
        self, backend: str, device: str, spec: LossSpec, shape: tuple[int, int], packed: bool
    ) -> None:
        """Packed, `[3, 0]` is three sequences of no tokens."""
        logits = torch.zeros(*shape, 37, device=device)
        logps = torch.zeros(shape, device=device)
        ids, advantages = logps.long(), torch.ones(shape[0], device=device)
        case = Case(spec, logits, ids, advantages, {"old_logps": logps, "ref_logps": logps})
        self.assert_nothing(run(grpo_loss, laid_out(case, packed), backend=backend))

    @staticmethod
    def assert_nothing(got: Result) -> None:
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @levels
    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(
        self, backend: str, device: str, aggregation: str, level: str
    ) -> None:
        """It counts in B, as in TRL, and is not divided by its 0 tokens. Packed, it has no rows at all."""
        spec = LossSpec(PPOClip(), level=level, aggregation=aggregation, max_tokens=4)
        case = random_case(spec, 3, 4, 37, masked=0, inactive=0, device=device).with_options(ref_logits=None)
        mask = case.options["completion_mask"]
        mask[1] = False
        out, grad = assert_right(case, backend=backend)
        packed = every_tensor(case, lambda _, x: x[mask] if x.dim() > 1 else x)
        packed = packed.with_options(seq_lens=torch.tensor([4, 0, 4]))
        got = run(grpo_loss, packed, backend=backend)
        torch.testing.assert_close(got.out.loss, out.loss)
        torch.testing.assert_close(got.grad, grad[mask])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"advantages": torch.ones(3)}, "advantages"),
        ({"seq_lens": torch.tensor([2, 3])}, "seq_lens"),
        ({"seq_lens": torch.tensor([2.0, 4.0])}, "seq_lens"),
        ({"seq_lens": torch.tensor([[2, 4]])}, "seq_lens"),
        ({"seq_lens": None}, "seq_lens"),
        ({"old_logps": torch.zeros(2)}, "old_logps"),
    ],
    ids=str,
)
def test_case_16_refused(backend: str, device: str, change: dict[str, Any], message: str) -> None:
    """Of a packed batch of 2 + 4 tokens; the rest: test_errors.py."""
    spec = LossSpec(PPOClip(), level="sequence")
    logits, ids = torch.randn(6, 37, device=device), torch.zeros(6, dtype=torch.long, device=device)
    options = {"advantages": torch.ones(2), "seq_lens": torch.tensor([2, 4]), **change}
    options = {name: None if x is None else x.to(device) for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        grpo_loss(logits, ids, spec=spec, **options, backend=backend)


@layouts
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@levels
def test_case_17_uneven_micro_batches(
    device: str, backend: str, level: str, aggregation: str, packed: bool
) -> None:
    """Under a common normalizer, losses and gradients of the parts add up to those of the whole."""
    spec = LossSpec(ImportanceRatio(), level=level, aggregation=aggregation, max_tokens=3)
    case = random_case(every_term(spec), 4, 3, 37, seed=1, device=device).with_options(normalizer=4.0)

    def part(rows: slice) -> Result:
        chosen = every_tensor(case, lambda _, x: x[rows])
        return run(grpo_loss, laid_out(chosen, packed), backend=backend)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-6, atol=0)


@levels
def test_case_18_inputs_are_never_written(device: str, backend: str, level: str) -> None:
    """Leaf logits, the output of a tanh, whose backward reads it, and logits with another use after."""
    spec = every_term(LossSpec(PPOClip(), level=level))
    case = random_case(spec, 2, 3, 37, device=device)
    leaf = case.logits.requires_grad_()
    logits = torch.tanh(leaf)
    tensors = [leaf, logits, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, logits):
        out = grpo_loss(x, case.completion_ids, case.advantages, spec=spec, backend=backend, **case.options)
        (out.loss + x.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


@levels
@layouts
class TestCase19Backwards:
    @staticmethod
    def loss(case: Case, backend: str) -> Tensor:
        return grpo_loss(
            case.logits,
            case.completion_ids,
            case.advantages,
            spec=case.spec,
            backend=backend,
            **case.options,
        ).loss

    @pytest.fixture
    def case(self, level: str, packed: bool, device: str) -> Case:
        spec = every_term(LossSpec(ImportanceRatio(), level=level))
        case = laid_out(random_case(spec, 2, 3, 37, inactive=0, device=device), packed)
        return case._replace(logits=case.logits.clone().requires_grad_())

    def test_twice_and_times_1024(self, case: Case, backend: str) -> None:
        """Exact, for it is a power of two."""
        loss = self.loss(case, backend)
        once, again, many = (
            torch.autograd.grad(x, case.logits, retain_graph=True)[0] for x in (loss, loss, 1024 * loss)
        )
        assert once.any() and torch.equal(once, again) and torch.equal(1024 * once, many)

    def test_double_backward_raises(self, case: Case, backend: str) -> None:
        (grad,) = torch.autograd.grad(self.loss(case, backend), case.logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


@layouts
class TestCase20SameBits:
    """Of a sequence, which alone its ratio depends on; sums over it are made in fp64, in one order."""

    @losses
    def test_neighbours(self, backend: str, device: str, spec: LossSpec, packed: bool) -> None:
        sequences, one = 5, 3
        spec = replace(every_term(spec), aggregation=SUM)
        case = random_case(spec, sequences, 3, 37, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)

        def call(index: list[int], change: Callable[[Tensor], Any] = lambda mask: None) -> list[Tensor]:
            chosen = every_tensor(case, lambda _, x: x[index])
            change(chosen.options["completion_mask"])
            out, grad = run(grpo_loss, laid_out(chosen, packed), backend=backend)
            per_token = (x.view(len(index), 3, -1) for x in (grad, out.logps, out.ref_logps, out.entropy))
            return [x[[place for place, which in enumerate(index) if which == one]] for x in per_token]

        def mask_others(mask: Tensor) -> None:
            mask[:one] = mask[one + 1 :] = False

        want = call([0, 1, 2, one, 4])
        for index, change in [
            ([0, 1, 2, one, 4], mask_others),
            ([one], lambda mask: None),
            ([0, one], lambda mask: None),
            ([4, one, 0, 2, 1], lambda mask: None),
            ([one] * 3, lambda mask: None),
        ]:
            for got, whole in zip(call(index, change), want, strict=True):
                assert torch.equal(got, whole.expand_as(got)), index

    @levels
    def test_a_hundred_times(self, device: str, backend: str, level: str, packed: bool) -> None:
        case = laid_out(random_case(LossSpec(PPOClip(), level=level), 1, 1, 37, device=device), packed)
        first, *others = (run(grpo_loss, case, backend=backend) for _ in range(100))
        for other in others:
            assert_same_bits(other, first)
