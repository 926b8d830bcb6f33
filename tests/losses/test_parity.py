"""Loss and gradient are as close to fp64 as those of eager PyTorch in the dtype of the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_cases import EITHER, PACKED, PADDED, branches, every_option, tiny, values
from parity import (
    AGGREGATIONS,
    DTYPES,
    KLS,
    PAIRS,
    SEQUENCE_LEVEL,
    SURROGATES,
    Case,
    assert_parity,
    assert_rows_no_worse,
    oracle,
)
from torch import Tensor
from torch.autograd import gradcheck

from grpo_kernels import KL, ImportanceRatio, LossSpec, PPOClip, grpo_loss, selective_logps

dtypes = pytest.mark.parametrize("dtype", DTYPES)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@layouts
@dtypes
@pytest.mark.parametrize("surrogate, kl", PAIRS)
def test_every_loss(surrogate: str, kl: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    """Test every surrogate x KL x layout x dtype x aggregation, with the gradient in place and not.

    An aggregation is a weight per row, which is computed before any kernel runs. So with Triton the
    aggregations take turns. In fp64 and fp16 `inplace` takes turns as well, because the kernels are the same.
    """
    aggregations, inplaces = AGGREGATIONS, (False, True)
    if backend == "triton":
        turn = list(SURROGATES).index(surrogate) + list(KLS).index(kl) + packed
        aggregations = (AGGREGATIONS[turn % len(AGGREGATIONS)],)
        inplaces = inplaces if dtype in ("fp32", "bf16") else (bool(turn % 2),)
    for aggregation in aggregations:
        spec = LossSpec(SURROGATES[surrogate], KLS[kl], aggregation=aggregation, max_tokens=5)
        expected = oracle(branches(spec, dtype, packed, device))
        for inplace in inplaces:
            assert_parity(expected, what=f"{aggregation}, {inplace = }", backend=backend, inplace=inplace)


@layouts
@dtypes
@pytest.mark.parametrize("kl", ["None", "ratio_corrected"])
@pytest.mark.parametrize("loss", SEQUENCE_LEVEL)
def test_every_level(loss: str, kl: str, dtype: str, packed: bool, backend: str, device: str) -> None:
    """Test advantages per sequence and per token. Aggregations take turns."""
    name, level = SEQUENCE_LEVEL[loss]
    turn = list(SEQUENCE_LEVEL).index(loss) + packed
    spec = LossSpec(
        SURROGATES[name], KLS[kl], level, aggregation=AGGREGATIONS[turn % len(AGGREGATIONS)], max_tokens=5
    )
    case = branches(spec, dtype, packed, device)
    uneven = case._replace(advantages=values(case, -1.5, 1.0)).with_options(
        token_weights=values(case, 0.5, 2.0)
    )
    for what, each in (("per sequence", case), ("per token", uneven)):
        assert_parity(oracle(each), what=what, backend=backend)


@every_option
def test_every_option(option: str, packed: bool, backend: str, device: str) -> None:
    """The loss has every term in its gradient. In place, fp32 and bf16 take the fused kernel."""
    spec = LossSpec(ImportanceRatio(), KLS["exact"], entropy_coef=0.05, max_tokens=5)
    for dtype, inplace in (("fp64", False), ("fp32", False), ("fp32", True), ("bf16", True)):
        case = (EITHER | PADDED | PACKED)[option](branches(spec, dtype, packed, device))
        got = assert_parity(oracle(case), what=f"{dtype}, {inplace = }", backend=backend, inplace=inplace)
        padding = got.grad[..., case.options.get("vocab_size", case.logits.shape[-1]) :]
        assert bool((padding == 0).all())


@pytest.mark.parametrize(
    "V",
    [
        2,
        37,  # less than a block
        1024,  # one block, no tail
        2053,  # a block of 2048 and a tail, rows unaligned
        4104,  # with a reference, two blocks of 2048 and a tail
        8200,  # without a reference, two blocks of 4096 and a tail
    ],
)
@pytest.mark.parametrize("kl", ["None", "exact", "exact_forward"])
def test_every_partition_of_the_vocabulary(V: int, kl: str, backend: str, device: str) -> None:
    """The taken token is in the first, a middle or the last block."""
    generator = torch.Generator().manual_seed(V)
    spec = LossSpec(ImportanceRatio(), KLS[kl], aggregation="token-sum", entropy_coef=0.05 * (kl == "exact"))
    ids = torch.tensor([[0, V // 2, V - 1]], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = 2 * torch.randn(1, 3, V, generator=generator)
        ref_logits = (
            None if kl == "None" else (logits + torch.randn(logits.shape, generator=generator)).to(dtype)
        )
        options = {} if ref_logits is None else {"ref_logits": ref_logits.to(device)}
        expected = oracle(Case(spec, logits.to(dtype).to(device), ids, torch.ones(1, device=device), options))
        for inplace in (False, True):
            assert_parity(expected, what=f"{dtype}, {inplace = }", backend=backend, inplace=inplace)


@dtypes
@layouts
def test_selective_logps(dtype: str, packed: bool, backend: str, device: str) -> None:
    """Test both outputs, and gradients of each and of both. Some upstream gradients are 0."""
    case = branches(LossSpec(), dtype, packed, device)
    mask, ids = case.options["completion_mask"], case.completion_ids
    by_logps = values(case, -1, 1).nan_to_num().to(DTYPES["fp64" if dtype == "fp64" else "fp32"])
    by_entropy = by_logps.flip(-1).where(by_logps > 0, 0)

    def truth(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_p = torch.log_softmax(wide.masked_fill(~mask[..., None], 0) / 0.8, -1)
        taken = log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        return taken.where(mask, 0), -(log_p.exp() * log_p).sum(-1).where(mask, 0)

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = selective_logps(logits, ids, temperature=0.8, mask=mask, return_entropy=True, backend=backend)
        assert isinstance(out, tuple)
        return out

    for upstream in ((by_logps, None), (None, by_entropy), (by_logps, by_entropy)):
        found = []
        for function, logits in ((ours, case.logits), (truth, case.logits), (truth, case.logits.double())):
            leaf = logits.detach().clone().requires_grad_()
            out = function(leaf)
            wanted = [
                (x, grad.to(x.dtype)) for x, grad in zip(out, upstream, strict=True) if grad is not None
            ]
            torch.autograd.backward(*zip(*wanted, strict=True))
            assert leaf.grad is not None
            found.append((*out, leaf.grad))
        got, eager, exact = found
        assert_rows_no_worse(got[2], eager[2], exact[2], ids=ids, logps=exact[0], what="gradient")
        for one, other in zip(got[:2], exact[:2], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-12 if dtype == "fp64" else 1e-5)


# These surrogates detach their weight, so their gradient is not the derivative of their value.
DETACHED = ("CISPO", "DPPO(tv)", "DPPO(kl)", "DPPO(no cap)", "VESPO")
GRADCHECKED = {
    **{
        f"{n}, k3": LossSpec(surrogate, KLS["k3"]) for n, surrogate in SURROGATES.items() if n not in DETACHED
    },
    **{
        f"{loss}, ratio_corrected": LossSpec(SURROGATES[name], KLS["ratio_corrected"], level)
        for loss, (name, level) in SEQUENCE_LEVEL.items()
        if name not in DETACHED and level == "sequence"
    },
    # The gradient of straight_through is not the derivative of its value.
    **{f"PPOClip, {name}": LossSpec(PPOClip(), kl) for name, kl in KLS.items() if name != "straight_through"},
    "Reinforce, exact, entropy": LossSpec(SURROGATES["Reinforce"], KL("exact"), entropy_coef=0.1),
}


@pytest.mark.parametrize("spec", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradcheck(spec: LossSpec, backend: str, device: str) -> None:
    case = tiny(spec, device)
    transform = {"temperature": 0.8, "logit_scale": 1.2, "logit_softcap": 9.0}

    def loss(logits: Tensor) -> Tensor:
        return grpo_loss(
            logits,
            case.completion_ids,
            case.advantages,
            spec=spec,
            **case.options,
            **(transform if spec.entropy_coef else {}),
            backend=backend,
        ).loss

    assert gradcheck(loss, case.logits.requires_grad_())


def test_gradcheck_of_selective_logps(backend: str, device: str) -> None:
    case = tiny(LossSpec(), device)

    def both(logits: Tensor) -> Any:
        return selective_logps(
            logits,
            case.completion_ids,
            temperature=0.8,
            logit_softcap=9.0,
            return_entropy=True,
            backend=backend,
        )

    assert gradcheck(both, case.logits.requires_grad_())
