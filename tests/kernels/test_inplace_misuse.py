"""Wrong uses of `inplace=True` raise if autograd or the memory layout can reveal them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded_calls import ROWS, bare
from hard_cases import set_chunks
from parity import NEEDS_DYNAMO
from products import assert_same_products, lengths, magnitudes
from torch import Tensor

from grpo_kernels import KL, LogRatio, LossSpec, PPOClip, grpo_loss, linear_grpo_loss, selective_logps

IN_PLACE = "modified by an inplace operation"


# Views of one tensor for the policy's and the reference's logits, with rows that overlap other rows.
OVERLAPPING: dict[str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "a token ahead": ((2, 4, 37), lambda x: (x[:, :-1], x[:, 1:])),
    "a token behind": ((2, 4, 37), lambda x: (x[:, 1:], x[:, :-1])),
    "a column ahead": ((2, 3, 38), lambda x: (x[..., :-1], x[..., 1:])),
    "a column behind": ((2, 3, 38), lambda x: (x[..., 1:], x[..., :-1])),
    "transposed": ((3, 3, 37), lambda x: (x, x.transpose(0, 1))),
    "expanded": ((2, 3, 37), lambda x: (x, x[:1].expand(2, 3, 37))),
}
APART: dict[str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "the same": ((2, 3, 37), lambda x: (x, x)),
    "halves": ((4, 3, 37), lambda x: (x[:2], x[2:])),
    "by turns": ((2, 3, 2, 37), lambda x: (x[:, :, 1], x[:, :, 0])),
    "side by side": ((2, 3, 74), lambda x: (x[..., :37], x[..., 37:])),
}
both_steps = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["forward", "backward"])
"""Dtypes whose gradient is written in the forward, and in the backward."""
EXACT = LossSpec(PPOClip(), KL("exact"))


class TestMisuse:
    """Misuse that autograd can detect raises, and so does a reference that overlaps the logits."""

    @pytest.fixture(autouse=True)
    def a_chunk_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_chunks(37, monkeypatch)

    @staticmethod
    def loss(logits: Tensor, backend: str, **options: Any) -> Tensor:
        tensors = bare(tuple(logits.shape[:-1]), 37).tensors
        given = {name: x.to(logits.device) for name, x in tensors.items() if name not in ROWS}
        return grpo_loss(logits, **given, backend=backend, **options).loss

    @staticmethod
    def leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape or (2, 3, 37), generator=generator).to(device, dtype).requires_grad_()

    @both_steps
    @pytest.mark.parametrize("name", OVERLAPPING)
    def test_reference_in_the_memory_of_other_rows(
        self, backend: str, device: str, name: str, dtype: torch.dtype
    ) -> None:
        shape, views = OVERLAPPING[name]
        memory = self.leaf(device, dtype, *shape).clone()
        before = memory.detach().clone()
        logits, ref_logits = views(memory)
        with pytest.raises(ValueError, match="inplace=True would overwrite ref_logits"):
            self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT, inplace=True)
        assert torch.equal(memory, before)
        self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT).backward()

    @both_steps
    @pytest.mark.parametrize("name", APART)
    def test_reference_in_the_same_memory(
        self, backend: str, device: str, name: str, dtype: torch.dtype
    ) -> None:
        shape, views = APART[name]
        grads = []
        for inplace in (False, True):
            leaf = self.leaf(device, dtype, *shape)
            logits, ref_logits = views(leaf.clone())
            loss = self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT, inplace=inplace)
            grads += torch.autograd.grad(loss, leaf)
        assert grads[0].any() or name == "the same"
        # The two paths sum in different orders, which shows if terms cancel.
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

    @both_steps
    def test_leaf_that_is_a_view(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """The leaf is a view of a tensor that requires no gradient."""
        memory = self.leaf(device, dtype).detach()
        before = memory.clone()
        with pytest.raises(RuntimeError, match=r"inplace.*leaf"):
            self.loss(memory[:].requires_grad_(), backend, inplace=True)
        assert torch.equal(memory, before)

    def test_one_of_several_views(self, backend: str, device: str) -> None:
        """Autograd forbids in-place operations on the views that `chunk` returns."""
        logits, _ = self.leaf(device, torch.float32, 4, 3, 37).clone().chunk(2)
        with pytest.raises(RuntimeError, match="multiple views"):
            self.loss(logits, backend, inplace=True).backward()

    @both_steps
    @pytest.mark.parametrize(
        "write", [lambda x: x.zero_(), lambda x: x.detach()[0].zero_()], ids=["", "a part"]
    )
    def test_logits_written_before_the_backward(
        self, backend: str, device: str, dtype: torch.dtype, write: Callable[[Tensor], Tensor]
    ) -> None:
        logits = self.leaf(device, dtype).clone()
        loss = self.loss(logits, backend, inplace=True)
        write(logits)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()

    @both_steps
    def test_two_losses_of_the_same_logits(self, backend: str, device: str, dtype: torch.dtype) -> None:
        logits = self.leaf(device, dtype).clone()
        losses = [self.loss(logits, backend, inplace=True) for _ in range(2)]
        with pytest.raises(RuntimeError, match=IN_PLACE):
            sum(losses).backward()

    def other_use(self, logits: Tensor, backend: str) -> Tensor:
        """Return another function of the logits. Its backward reads them."""
        ids = torch.zeros(2, 3, dtype=torch.long, device=logits.device)
        logps = selective_logps(logits, ids, backend=backend)
        assert isinstance(logps, Tensor)
        return logps.sum()

    @both_steps
    def test_another_use_before(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """The backward of the other use raises once the gradient has been written."""
        logits = self.leaf(device, dtype).clone()
        other = self.other_use(logits, backend)
        loss = self.loss(logits, backend, inplace=True)
        if dtype == torch.float16:
            other.backward(retain_graph=True)
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            other.backward()

    @both_steps
    def test_another_use_after(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """A use after the loss reads unspecified values. Its backward raises if they have changed since."""
        logits = self.leaf(device, dtype).clone()
        loss = self.loss(logits, backend, inplace=True)
        other = self.other_use(logits, backend)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            other.backward()

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    @pytest.mark.parametrize("kl", [None, KL("exact")], ids=["LogRatio", "exact KL"])
    def test_reference_written_before_the_backward(
        self, backend: str, device: str, inplace: bool, kl: KL | None
    ) -> None:
        """The backward raises if it reads the reference. Otherwise the gradient is unchanged."""
        grads = []
        for write in (False, True):
            leaf, ref_logits = self.leaf(device, torch.float32), self.leaf(device, torch.float32).detach() / 2
            given = {"ref_logits": ref_logits, "spec": LossSpec(LogRatio(), kl), "inplace": inplace}
            loss = self.loss(leaf.clone(), backend, **given)
            if write:
                ref_logits.zero_()
            in_forward = inplace or (backend == "torch" and device == "cpu")
            if write and kl and not in_forward:
                with pytest.raises(RuntimeError, match=IN_PLACE):
                    loss.backward()
                return
            grads += torch.autograd.grad(loss, leaf)
        assert torch.equal(*grads)

    @pytest.mark.parametrize("name", ["hidden", "lm_head_weight"])
    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_head_written_before_the_backward(self, backend: str, device: str, name: str, level: str) -> None:
        """Like an optimizer step: either the gradient was computed before, or the backward raises."""
        call = bare((2, 3), 37, hidden=True)
        given = {each: x.to(device) for each, x in call.tensors.items()}
        leaves = [given[each].requires_grad_() for each in call.learns]
        options = {"spec": LossSpec(PPOClip(), level=level), "backend": backend}
        want, loss = (linear_grpo_loss(**given, **options).loss for _ in range(2))
        grads = torch.autograd.grad(want, leaves)
        with magnitudes():
            sizes = torch.autograd.grad(linear_grpo_loss(**given, **options).loss, leaves)
        with torch.no_grad():
            given[name].mul_(2)
        if level == "token":
            found = zip(call.learns, torch.autograd.grad(loss, leaves), grads, sizes, strict=True)
            for terms, (each, x, y, size) in zip(lengths(6, 37).values(), found, strict=True):
                assert_same_products(x, y, size, terms, each)
            return
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()


@NEEDS_DYNAMO
class TestMisuseInAGraph:
    """torch.compile takes two steps and makes its own copies."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "view",
        [lambda x: x[:, :-1], lambda x: x[:1].expand(2, 4, 37)],
        ids=["a view", "expanded"],
    )
    @pytest.mark.parametrize("inside", [True, False])
    def test_views(self, device: str, view: Callable[[Tensor], Tensor], inside: bool) -> None:
        """A view made inside or outside the graph gives the gradient of two steps, or an error."""
        leaf = TestMisuse.leaf(device, torch.float32, 2, 4, 37)
        tensors = bare(tuple(view(leaf).shape[:-1]), 37).tensors
        given = {name: x.to(device) for name, x in tensors.items() if name not in ROWS}

        def loss(x: Tensor, inplace: bool) -> Tensor:
            return grpo_loss(view(x) if inside else x, **given, backend="torch", inplace=inplace).loss

        def gradient(call: Callable[..., Tensor], inplace: bool) -> Tensor:
            x = leaf.clone()
            return torch.autograd.grad(call(x if inside else view(x), inplace), leaf)[0]

        want = gradient(loss, False)
        try:
            got = gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), True)
        except ValueError as error:
            assert "rows that do not overlap" in str(error)
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=0)
