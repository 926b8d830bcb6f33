"""Our functions replace verl's fused kernels: alone, in a model, and in a step of verl's FSDP engine."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_cases import LOSSES, actor_config, random_batch
from verl_head import Head, crossed, fused, learn, plain, tiny_model, verls
from verl_imported import VERLS_CROSS_ENTROPY, VERLS_FUNCTION, jagged, verl_logps

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils
from verl.utils.experimental import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module
from verl.workers.config import FSDPEngineConfig
from verl.workers.utils import losses as actor_losses

pytestmark = pytest.mark.usefixtures("integration")


@pytest.mark.parametrize("shape", [(37,), (3, 13), (1, 37)], ids=str)
def test_fused_linear_for_ppo(shape: tuple[int, ...], calls: list[Any]) -> None:
    """verl's backend "torch" calls our function, which has the shapes and dtypes of verl's."""
    head = Head.random(*shape)
    for temperature in (1.0, 0.7, torch.tensor(0.7)):
        found, expected = (head.run(function, temperature) for function in (fused, verls))
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
        exact = head.double().run(plain, float(temperature))
        # A few fp32 roundings of 6e-8 in sums of about a hundred terms.
        assert max(found.errors(exact)) < 1e-6 and max(expected.errors(exact)) < 1e-6
    assert len(calls) == 3
    assert bool((found.dhidden.flatten(0, -2)[:2] == 0).all()), (
        "a row without an upstream gradient has a gradient"
    )


@pytest.mark.parametrize("shape", [(37,), (3, 13), (37, 1)], ids=str)
def test_linear_cross_entropy(shape: tuple[int, ...], calls: list[Any]) -> None:
    """verl's backend "triton" calls our function, which returns flat fp32 results.

    It is compared with PyTorch, because verl's own kernel needs a GPU.
    """
    for dtype in (torch.float32, torch.bfloat16):
        head = Head.random(*shape, dtype=dtype)
        found, exact = head.run(crossed), head.double().run(plain)
        assert found.logps.shape == found.entropy.shape == (head.ids.numel(),)
        assert found.logps.dtype == found.entropy.dtype == torch.float32
        assert found.dhidden.dtype == found.dweight.dtype == dtype
        found = found._replace(logps=found.logps.view(shape), entropy=found.entropy.view(shape))
        errors = found.errors(exact)
        # bf16 operands give fp32 statistics, and gradients that are rounded once, by up to 2^-9.
        assert max(errors[:2]) < 1e-6 and max(errors[2:]) < (1e-6 if dtype == torch.float32 else 2**-9)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy_module.linear_cross_entropy(*head[:3], 1.0, "mean")


def test_bf16_errs_less_than_verl() -> None:
    """In bf16 our errors are smaller, because verl rounds the logits and their gradient to bf16."""
    head = Head.random(3, 41, dtype=torch.bfloat16)
    exact = head.double().run(plain)
    found, verl_s = head.run(fused), head.run(verls)
    assert found.logps.dtype == verl_s.logps.dtype == torch.float32
    assert found.entropy.dtype == verl_s.entropy.dtype == torch.bfloat16
    mine, other = found.errors(exact), verl_s.errors(exact)
    assert all(x <= y for x, y in zip(mine, other, strict=True)), (mine, other)
    assert mine[0] < 1e-6 < 1e-4 < other[0], (mine, other)


def test_autocast() -> None:
    """Under autocast, dtypes are verl's, for fp32 parameters and for bf16 hidden states."""
    head = Head.random(3, 41)
    for hidden in (head.hidden, head.hidden.bfloat16()):
        head = head._replace(hidden=hidden)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = head.run(fused), head.run(verls)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        # The operands are rounded by 2^-9. verl also rounds their sums.
        assert max(found.errors(head.double().run(plain))) < 2**-7 > max(found.errors(expected))


def test_liger_backend_without_liger(calls: list[Any]) -> None:
    """Without Liger, verl's backend "liger" uses its backend "torch"."""
    assert torch_functional._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is None
    FusedLinearForPPO(impl_backend="liger").forward(*Head.random(5)[:3])
    assert calls == [(5, 24)]


@pytest.mark.parametrize("function", [fused, crossed])
def test_edges(function: Callable[..., Any], integration: ModuleType) -> None:
    """Empty inputs, one unused output, no gradients and labels outside the vocabulary."""
    head = Head.random(9)
    # No tokens, as on a rank that has no part of a sequence.
    for shape in ((0,), (1, 0)):
        found = Head.random(*shape).run(function)
        assert found.logps.numel() == found.entropy.numel() == 0
        assert bool((found.dhidden == 0).all()) and bool((found.dweight == 0).all())
    # Only one of the two outputs is used, the head is frozen, or there are no gradients.
    for chosen in (0, 1):
        hidden = head.hidden.clone().requires_grad_()
        out = function(hidden, head.weight, head.ids.int(), 0.7)
        (grad,) = torch.autograd.grad(out[chosen].sum(), hidden)
        exact = head.double().hidden.requires_grad_()
        (expected,) = torch.autograd.grad(
            plain(exact, head.weight.double(), head.ids, 0.7)[chosen].sum(), exact
        )
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logps, entropy = function(*head[:3], 0.7)
        assert not logps.requires_grad and not entropy.requires_grad
    # The label -100 is ignored, as in Liger and flash-attention: value and gradient are 0. Any other label
    # outside the vocabulary gives NaN. verl's backends read out of bounds or return arbitrary memory.
    ids = head.ids.clone()
    ids[4] = -100
    found = head._replace(ids=ids).run(function)
    assert float(found.logps[4]) == float(found.entropy[4]) == 0 and bool((found.dhidden[4] == 0).all())
    ids[4] = 83
    assert function(head.hidden, head.weight, ids, 0.7)[0].isnan().nonzero().tolist() == [[4]]


def test_names_that_verl_has_imported_already(
    integration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of verl that has already imported the function gets ours.

    Megatron's forward imports it by name, at its top.
    """
    early = ModuleType("verl.models.mcore.early")
    early.linear_cross_entropy = VERLS_CROSS_ENTROPY  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, early.__name__, early)
    monkeypatch.setattr(cross_entropy_module, "linear_cross_entropy", VERLS_CROSS_ENTROPY)
    for _ in range(2):  # a second call changes nothing
        integration.fuse_verl_logps()
        assert early.linear_cross_entropy is verl_logps().linear_cross_entropy
        assert cross_entropy_module.linear_cross_entropy is verl_logps().linear_cross_entropy


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_model(backend: str, tied: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model gets verl's results with verl's forward of each backend.

    verl's own "triton" kernel does not run on a CPU.
    """
    model, ids = tiny_model(tied=tied), torch.randint(83, (1, 21), generator=torch.Generator().manual_seed(2))
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    runs = [{}, {"shift_labels": ids.flip(-1)}]
    found = [learn(model, ids, **options) for options in runs]
    assert calls == ([(1, 21, 32)] * 2 if backend == "torch" else [(21, 32)] * 2)

    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    for one, options in zip(found, runs, strict=True):
        expected = learn(model, ids, **options)
        assert one.keys() == expected.keys()
        for name, x in expected.items():
            assert float((one[name] - x).norm()) <= 1e-5 * float(x.norm()) > 0, name


@pytest.mark.filterwarnings("ignore:.* engine is not available")  # engines that need other packages
@pytest.mark.parametrize(
    "backend, packed",  # verl accepts the flat output of "triton" only in a packed batch
    [("torch", True), ("torch", False), ("triton", True)],
    ids=["torch-packed", "torch-padded", "triton-packed"],
)
def test_engine_step(backend: str, packed: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of verl's FSDP engine with our log-probabilities and our loss has verl's results.

    Inputs, patched forward and `ppo_loss` are the engine's. Only its set-up, which needs a GPU, is replaced.
    """
    from verl.workers.engine.fsdp import transformer_impl

    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    model = tiny_model(tied=False)
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    engine = transformer_impl.FSDPEngineWithLMHead.__new__(transformer_impl.FSDPEngineWithLMHead)
    engine.module, engine._autocast_dtype = model, torch.float32
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine.engine_config = FSDPEngineConfig(strategy="fsdp", use_fused_kernels=True)
    monkeypatch.setattr(engine, "get_data_parallel_group", lambda: None)

    batch, prompt = random_batch(4).full(), 3
    lengths = [int(x.nonzero().max()) + 1 for x in batch.mask]
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(83, (len(lengths), prompt), generator=generator)

    def responses(x: Tensor) -> Tensor:
        x = x.float() if x.is_floating_point() else x
        return jagged([row[:length] for row, length in zip(x, lengths, strict=True)])

    rows = zip(prompts, batch.ids, lengths, strict=True)
    fields = {
        "input_ids": jagged([torch.cat([x, y[:length]]) for x, y, length in rows]),
        "position_ids": jagged([torch.arange(prompt + length) for length in lengths]),
        "prompts": jagged(list(prompts)),
        "responses": responses(batch.ids),
        "response_mask": responses(batch.mask.long()),
        "old_log_probs": responses(batch.old_logps),
        "advantages": responses(batch.advantages[:, None].expand(batch.mask.shape)),
    }
    options = {"use_fused_kernels": True, "use_remove_padding": packed, "calculate_entropy": True}
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(lengths)}
    data = tensordict_utils.get_tensordict(fields, {**options, **info, "temperature": 0.8})

    def step(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        model.zero_grad()
        config = actor_config(name, **{**LOSSES["vanilla"].options, "entropy_coeff": 0.2})
        loss, output = engine.forward_step(data, functools.partial(actor_losses.ppo_loss, config), False)
        loss.backward()
        metrics = {key: x.aggregate() for key, x in output["metrics"].items()}
        return metrics, {key: p.grad.clone() for key, p in model.named_parameters()}

    found, grads = step("grpo_kernels.dapo")
    assert len(calls) == 1
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPOFunction", VERLS_FUNCTION)
    expected, other = step("vanilla")
    assert len(calls) == 1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, grad in other.items():
        assert float((grads[name] - grad).norm()) <= 1e-5 * float(grad.norm()) > 0, name
