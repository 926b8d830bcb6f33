"""No function accesses memory outside its tensors, and no input changes.

Every tensor argument is part of a buffer of poison, and so is every tensor that the package allocates. A
stray read finds NaN, and a stray write changes the poison. Triton's interpreter checks every address as well:
benchmarks/traffic/addresses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded_calls import (
    DIVERGENCES,
    INTERPRETED,
    SPECS,
    Call,
    arguments,
    dropping,
    of_distillation,
    of_hidden,
    of_hidden_distillation,
    of_hidden_logps,
    of_log_probabilities,
    of_logps,
    of_rewards,
    watching,
)
from torch import Tensor

from grpo_kernels import selective_logps

both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
specs = pytest.mark.parametrize("name", SPECS)
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)


class TestPoisonAroundEveryTensor:
    """Results equal those of contiguous tensors. Inputs and the memory around them keep their bits."""

    @both_layouts
    @specs
    def test_from_logits(self, check: Any, backend: str, name: str, packed: bool) -> None:
        check(arguments(name, packed=packed), backend)

    @both_layouts
    @specs
    def test_in_place(self, check: Any, backend: str, name: str, packed: bool) -> None:
        check(arguments(name, packed=packed), backend, inplace=True)

    @both_layouts
    @pytest.mark.parametrize("inplace", [False, True])
    def test_sampling_mask(self, check: Any, backend: str, inplace: bool, packed: bool) -> None:
        """Its words are not contiguous. Columns beyond the vocabulary have none."""
        check(dropping(arguments("exact KL, entropy", packed=packed)), backend, inplace=inplace)

    @both_layouts
    def test_sampling_mask_from_hidden_states(self, check: Any, backend: str, packed: bool) -> None:
        check(dropping(of_hidden("exact KL, entropy", packed=packed)), backend)

    @both_layouts
    def test_log_ratio_loss(self, check: Any, backend: str, packed: bool) -> None:
        check(of_rewards(packed=packed), backend)

    @specs
    @pytest.mark.parametrize("packed, compact", [(False, True), (False, False), (True, True)])
    def test_from_hidden_states(
        self, check: Any, backend: str, name: str, packed: bool, compact: bool
    ) -> None:
        check(of_hidden(name, packed=packed, compact=compact), backend)

    @both_layouts
    def test_skip_inactive(self, check: Any, backend: str, packed: bool) -> None:
        check(of_hidden("PPO", packed=packed, skip_inactive=True), backend)

    @pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
    def test_selective_logps(self, check: Any, backend: str, entropy: bool) -> None:
        check(of_logps(return_entropy=entropy), backend)

    @pytest.mark.parametrize("compact", [True, False])
    def test_linear_logps(self, check: Any, backend: str, compact: bool) -> None:
        check(of_hidden_logps(return_entropy=True, compact=compact), backend)
        check(of_hidden_logps(entropy=True, top1=True, compact=compact), backend)

    @both_layouts
    @divergences
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("dropped", [False, True], ids=["", "sampling mask"])
    def test_distillation(
        self, check: Any, backend: str, divergence: str, inplace: bool, dropped: bool, packed: bool
    ) -> None:
        call = of_distillation(divergence, packed=packed)
        check(dropping(call) if dropped else call, backend, inplace=inplace)

    @both_layouts
    @divergences
    @pytest.mark.parametrize("compact", [True, False])
    def test_distillation_from_hidden_states(
        self, check: Any, backend: str, divergence: str, compact: bool, packed: bool
    ) -> None:
        check(of_hidden_distillation(divergence, packed=packed, compact=compact), backend)

    @both_layouts
    @pytest.mark.parametrize(
        "name", [name for name in SPECS if name not in ("exact KL, entropy", "forward KL")]
    )
    def test_policy_loss(self, check: Any, name: str, packed: bool) -> None:
        check(of_log_probabilities(name, packed=packed))


KERNELS = {
    "row_stats": of_logps,
    "row_stats, entropy": lambda *size, **how: of_logps(*size, return_entropy=True, **how),
    "row_stats, top1": lambda *size, **how: of_hidden_logps(*size, entropy=True, top1=True, **how),
    "row_stats, dlogits, reference": lambda *size, **how: arguments("exact KL, entropy", *size, **how),
    "row_stats, dlogits, forward KL": lambda *size, **how: arguments("forward KL", *size, **how),
    "sampling mask": lambda *size, **how: dropping(arguments("exact KL, entropy", *size, **how)),
    **{
        f"divergence, {kind}": lambda *size, kind=kind, **how: of_distillation(kind, *size, **how)
        for kind in DIVERGENCES
    },
    "divergence, sampling mask": lambda *size, **how: dropping(of_distillation("jsd", *size, **how)),
}
sizes = pytest.mark.parametrize(
    "V, aligned",
    [(37, False), (128, False), (300, False), (512, True), (516, True)],
    ids=["below a block", "a block", "a block and more", "a block, aligned", "a block and more, aligned"],
)


@pytest.mark.usefixtures("needs_triton")
class TestEveryKernel:
    """Cover every kernel at sizes around a block. Aligned rows have blocks of 512 or more, others of 128."""

    @sizes
    @pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
    def test_two_steps(self, check: Any, make: Callable[..., Call], V: int, aligned: bool) -> None:
        check(make(V), "triton", aligned=aligned)

    @sizes
    @pytest.mark.parametrize("name", ["exact KL, entropy", "forward KL", "k3"])
    def test_fused_and_scale_rows(self, check: Any, name: str, V: int, aligned: bool) -> None:
        check(arguments(name, V), "triton", aligned=aligned, inplace=True)

    @sizes
    def test_fused_with_a_sampling_mask(self, check: Any, V: int, aligned: bool) -> None:
        check(dropping(arguments("forward KL", V)), "triton", aligned=aligned, inplace=True)

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    @pytest.mark.parametrize(
        "V, dtype",
        [(1024 + 40, torch.bfloat16), (2 * 256 + 88, torch.float64)],
        ids=["bf16", "fp64"],
    )
    @pytest.mark.parametrize("kind", ["a loss", *DIVERGENCES])
    def test_blocks_and_a_rest_under_a_softcap(
        self, check: Any, kind: str, V: int, dtype: torch.dtype, inplace: bool
    ) -> None:
        if kind == "a loss":
            call = arguments("exact KL, entropy", V, dtype=dtype)
        else:
            call = dropping(of_distillation(kind, V, dtype=dtype))
        call.options["logit_softcap"] = 20.0
        check(call, "triton", aligned=True, inplace=inplace)


class TestTheseTestsCanFail:
    @staticmethod
    def stray(which: str) -> Callable[..., Any]:
        """Return a function that computes log-probabilities and accesses memory behind the first row."""

        def function(logits: Tensor, **options: Any) -> Any:
            if which == "allocation":
                new = torch.empty(4)
                new.as_strided((1,), (1,), new.storage_offset() + 4).zero_()
            found = selective_logps(logits, **options)
            beyond = logits.data.as_strided((1,), (1,), logits.storage_offset() + logits.shape[-1])
            if which == "read":
                return found + 0 * beyond
            if which == "write" and not logits.is_contiguous():
                beyond.data.zero_()
            return found

        return function

    @pytest.mark.parametrize(
        "which, message",
        [
            ("read", "output 0"),
            ("write", "logits or its surroundings have changed"),
            ("allocation", "written behind an allocation of 4 elements"),
        ],
    )
    def test_on_stray_accesses(self, check: Any, which: str, message: str) -> None:
        call = of_logps()
        check(call._replace(function=self.stray("nowhere")), "torch")
        with pytest.raises(AssertionError, match=message):
            check(call._replace(function=self.stray(which)), "torch")

    @pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter shows addresses")
    def test_on_an_address_beyond_a_row(self) -> None:
        """The kernel is told that rows have 37 columns, but they have 36."""
        from grpo_kernels.kernels.fused import scale_rows_kernel

        x = torch.randn(1, 2, 40)[..., :36]
        with watching("triton"), pytest.raises(Exception, match="1 reads outside the elements of a tensor"):
            scale_rows_kernel[(2,)](x, 80, 40, torch.tensor(2.0), 2, 37, BLOCK=128, GROUP=1)
