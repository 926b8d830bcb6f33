"""A fixture that runs a call amid poison and checks every byte around its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import Allocations, Surrounded, bits, contiguous_copy
from guarded_calls import HEADS, ROWS, Call, assert_same, of_products, watching
from torch import Tensor

from grpo_kernels.linear.chunks import Chunks


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, device: str) -> Callable[..., None]:
    """Return a function that runs a call on plain tensors and amid poison, and compares the results."""
    chunks: list[Tensor] = []
    buffer = Chunks.buffer

    def kept(self: Chunks, dtype: torch.dtype) -> Tensor:
        chunks.append(buffer(self, dtype))
        return chunks[-1]

    def check(
        call: Call,
        backend: str | None = None,
        *,
        inplace: bool = False,
        aligned: bool | None = None,
        wrong: bool = False,
    ) -> None:
        """With `wrong`, the call has an invalid id and its loss is NaN."""
        options: dict[str, Any] = {} if backend is None else {"backend": backend}
        options |= {"inplace": True} if inplace else {}
        tensors = {name: x.to(device) for name, x in call.tensors.items()}

        def layout(name: str) -> bool | None:
            return aligned if name in ROWS else None

        given = {name: contiguous_copy(x, aligned=layout(name)) for name, x in tensors.items()}
        leaves = {}
        if inplace:
            leaves["logits"] = tensors["logits"].clone().requires_grad_()
            given["logits"] = contiguous_copy(leaves["logits"], aligned=aligned)
        wanted = call.run(given, leaves, **options)
        products = of_products(call, given, **options)

        placed = {
            name: Surrounded.of(x, dense=name in ROWS + HEADS, aligned=layout(name))
            for name, x in tensors.items()
        }
        before = {name: x.buffer.clone() for name, x in placed.items()}
        given, written = {name: x.view for name, x in placed.items()}, torch.empty(0)
        if inplace:
            leaves["logits"] = placed["logits"].buffer.requires_grad_()
            written = leaves["logits"].clone()
            given["logits"] = placed["logits"].within(written)
        versions = {name: x.buffer._version for name, x in placed.items()}
        allocations = Allocations(monkeypatch)
        monkeypatch.setattr(Chunks, "buffer", kept)
        with watching(backend or "") as seen:
            got = call.run(given, leaves, **options)

        if inplace:
            logits, grad = placed["logits"], got["gradient of logits"]
            got["gradient of logits"] = logits.within(grad)
            assert not logits.around(grad).any()
            assert torch.equal(bits(logits.within(written)), bits(logits.within(grad)))
            assert torch.equal(bits(logits.around(written)), bits(logits.around(before["logits"])))
        # On a GPU the order of PyTorch's sums depends on the alignment.
        exact = device == "cpu" or (backend == "triton" and "hidden" not in tensors)
        assert_same(got, wanted, exact=exact, equal_nan=wrong, **products)
        assert got["loss" if "loss" in got else "output 0"].isnan().any() == wrong
        for name, x in placed.items():
            assert torch.equal(bits(x.buffer), bits(before[name])), f"{name} or its surroundings have changed"
            assert x.buffer._version == versions[name], f"{name} was written by an operator"
            assert seen is None or not seen.writes(x.buffer).any(), f"{name} was written by a kernel"
        allocations.check()
        for x in chunks:
            assert x._base is not None
            assert x._base[:, x.shape[1] :].isnan().all(), "padding of a chunk was written"

    return check
