"""Memory safety at extreme sizes, chunks, ids, strides and offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import Surrounded
from guarded_calls import (
    DIVERGENCES,
    ROWS,
    Call,
    arguments,
    assert_same,
    bare,
    bare_distillation,
    of_hidden,
    of_hidden_distillation,
    of_products,
    watching,
)
from torch import Tensor


class TestExtremes:
    @pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3), (1,), (0,), (3, 2)], ids=str)
    @pytest.mark.parametrize("V", [1, 37])
    @pytest.mark.parametrize("form", ["two steps", "in place", "hidden states"])
    def test_sizes(self, check: Any, backend: str, shape: tuple[int, ...], V: int, form: str) -> None:
        check(bare(shape, V, hidden=form == "hidden states"), backend, inplace=form == "in place")

    @pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3), (1,), (0,), (3, 2)], ids=str)
    @pytest.mark.parametrize("V", [1, 37])
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("inplace", [False, True], ids=["new gradient", "in place"])
    def test_sizes_of_a_distillation(
        self, check: Any, backend: str, shape: tuple[int, ...], V: int, divergence: str, inplace: bool
    ) -> None:
        check(bare_distillation(shape, V, divergence), backend, inplace=inplace)

    @pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
    @pytest.mark.parametrize("compact", [True, False])
    def test_chunks(self, check: Any, backend: str, chunk_tokens: int, compact: bool) -> None:
        """The batch has 12 tokens."""
        check(of_hidden("exact KL, entropy", chunk_tokens=chunk_tokens, compact=compact), backend)
        check(of_hidden_distillation("jsd", chunk_tokens=chunk_tokens, compact=compact), backend)

    @pytest.mark.parametrize("wrong", [-1, 40, 2**63 - 1])
    @pytest.mark.parametrize("form", ["two steps", "in place", "compact", "in their places"])
    def test_wrong_ids(self, check: Any, backend: str, wrong: int, form: str) -> None:
        """Only 37 of the 45 columns are tokens. Id 40 points to memory that could be read."""
        if form in ("two steps", "in place"):
            call = arguments("exact KL, entropy")
        else:
            call = of_hidden("exact KL, entropy", compact=form == "compact")
        call.tensors["completion_ids"][1, 0] = wrong
        check(call, backend, inplace=form == "in place", wrong=True)

    @pytest.mark.parametrize("of", ["batch", "time", "both"])
    @pytest.mark.parametrize("make", [bare, bare_distillation], ids=["a loss", "a distillation"])
    def test_expanded_logits(self, make: Callable[..., Call], backend: str, device: str, of: str) -> None:
        """Rows that share memory give the results of separate rows."""
        # Rows at one address count as aligned. Aligned rows are summed in another order than others.
        vocab = 40 if of == "both" else 37
        call = make((2, 3), vocab)
        call = call._replace(tensors={name: x.to(device) for name, x in call.tensors.items()})
        cut = {"batch": (slice(1), slice(3)), "time": (slice(2), slice(1)), "both": (slice(1), slice(1))}[of]
        expanded = {name: x[cut].expand(2, 3, vocab) for name, x in call.tensors.items() if name in ROWS}
        alone = {name: x.contiguous() for name, x in expanded.items()}
        with watching(backend):
            got = call.run({**call.tensors, **expanded}, backend=backend)
        want = call.run({**call.tensors, **alone}, backend=backend)
        assert_same(got, want, exact=device == "cpu" or backend == "triton")

    @pytest.mark.parametrize(
        "name, layout",
        [
            ("hidden", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
            ("hidden", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
            ("hidden", lambda x: x[:1].expand(2, 3, 6)),
            ("hidden", lambda x: x[..., :1].expand(2, 3, 6)),
            ("hidden", lambda x: Surrounded.of(x, dense=False).view),
            ("lm_head_weight", lambda x: x.t().contiguous().t()),
            ("lm_head_weight", lambda x: x[:, :1].expand(37, 6)),
            ("lm_head_weight", lambda x: Surrounded.of(x, dense=False).view),
            ("lm_head_bias", lambda x: x[:1].expand(37)),
        ],
    )
    def test_layouts_of_heads(
        self, backend: str, device: str, name: str, layout: Callable[[Tensor], Tensor]
    ) -> None:
        """Gradients agree up to rounding, because a product may sum in another order for each layout."""
        call = bare((2, 3), 37, hidden=True)
        call = call._replace(tensors={each: x.to(device) for each, x in call.tensors.items()})
        view = layout(call.tensors[name])
        with watching(backend):
            got = call.run({**call.tensors, name: view}, backend=backend)
        given = {**call.tensors, name: view.detach().contiguous()}
        want, products = call.run(given, backend=backend), of_products(call, given, backend=backend)
        assert_same(got, want, exact=device == "cpu", **products)

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    @pytest.mark.parametrize("make", [bare, bare_distillation], ids=["a loss", "a distillation"])
    def test_offsets_beyond_2_31(
        self,
        make: Callable[..., Call],
        backend: str,
        device: str,
        inplace: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Sequences lie 2^31 elements apart, in memory that is reserved but never touched."""
        if device != "cpu":
            pytest.skip("a GPU cannot reserve memory without using it: losses/test_hard_shapes.py fills it")
        if backend == "triton":
            from triton.runtime.interpreter import GridExecutor

            # This method would copy the storages of all arguments onto themselves.
            monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        call, apart = make((2, 3), 40), 2**31 + 64
        rows = [name for name in ROWS if name in call.tensors]
        try:
            storage = torch.UntypedStorage(2 * (apart + 1024))
        except RuntimeError as error:
            pytest.skip(str(error))
        near = {**call.tensors, **{name: call.tensors[name].bfloat16() for name in rows}}
        far = {
            name: near[name].new_empty(0).set_(storage, offset, (2, 3, 40), (apart, 48, 1)).copy_(near[name])
            for name, offset in zip(rows, (64, 512), strict=True)
        }
        outcomes = []
        for given in near, {**near, **far}:
            leaves = {}
            if inplace:
                # Adding a leaf makes the logits a result of autograd and keeps their memory.
                leaves["logits"] = torch.zeros((), requires_grad=True)
                given["logits"].add_(leaves["logits"])
            outcomes.append(call.run(given, leaves, backend=backend, inplace=inplace))
            if inplace:
                outcomes[-1]["gradient of logits"] = given["logits"].detach().contiguous()
        assert outcomes[0]["gradient of logits"].any()
        assert_same(*outcomes)
