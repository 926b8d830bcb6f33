"""The integration on two ranks: sharded heads, sharded models, tensor parallelism."""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed.worker import Cases
from torch import Tensor
from torch import distributed as dist
from verl_head import Head, crossed, fused, learn, plain, tiny_model
from verl_imported import MODULE

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.models.transformers import monkey_patch
from verl.utils.import_utils import import_external_libs
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module

cases = Cases()


@cases.add()
def sharded_head() -> None:
    """A head that is a DTensor, as with FSDP2: each rank's own rows, and the mean of the ranks' gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    import_external_libs(MODULE)
    head = Head.random(2, 15)
    parts = [Head(x, head.weight, *rest) for x, *rest in zip(head.hidden, *head[2:], strict=True)]
    part = parts[dist.get_rank()]
    weight = distribute_tensor(part.weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    for function in (fused, crossed):
        hidden = part.hidden.clone().requires_grad_()
        out = function(hidden, weight, part.ids, 0.7)
        dhidden, dweight = torch.autograd.grad(out, [hidden, weight], [part.dlogps, part.dentropy])
        assert isinstance(dweight, DTensor) and dweight.placements == (Shard(0),)
        expected = [x.run(plain) for x in parts]
        torch.testing.assert_close(dhidden, expected[dist.get_rank()].dhidden, rtol=1e-4, atol=1e-6)
        mean = (expected[0].dweight + expected[1].dweight) / 2
        torch.testing.assert_close(dweight.full_tensor(), mean, rtol=1e-4, atol=1e-6)


@cases.add(wrapper=["fsdp", "fsdp2"], backend=["torch", "triton"], bias=[False, True])
def sharded_model(wrapper: str, backend: str, bias: bool) -> None:
    """verl's forward of a model that FSDP has sharded equals the unsharded model on each rank's sequence."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    import_external_libs(MODULE)
    sequences = torch.randint(83, (2, 1, 21), generator=torch.Generator().manual_seed(2))
    model = tiny_model(tied=False)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(83))
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    expected = [learn(model, ids) for ids in sequences]
    expected = [{name: x.clone() for name, x in one.items()} for one in expected]
    if wrapper == "fsdp":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view")
        found = learn(model, sequences[dist.get_rank()])
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):  # needed for "fsdp"
        found |= {name: x.grad for name, x in model.named_parameters()}
    close = functools.partial(torch.testing.assert_close, rtol=1e-4)
    for name, one in expected[0].items():
        other = expected[1][name]
        if name in ("log_probs", "entropy"):
            close(found[name], (one, other)[dist.get_rank()], atol=1e-5)
        else:
            grad, mean = found[name], (one + other) / 2
            close(grad if wrapper == "fsdp" else grad.full_tensor(), mean, atol=1e-5 * float(mean.norm()))


class Gather(torch.autograd.Function):
    """Gathers the rows of sequence-parallel ranks, as Megatron does.

    Its backward sums the gradient over ranks and keeps the rank's own rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


@cases.add(sequence_parallel=[True, False])
def tensor_parallel(sequence_parallel: bool) -> None:
    """The call of verl's Megatron forward: `[s, 1, H]`, labels `[1, s]`, the rank's own rows of the head."""
    import_external_libs(MODULE)
    mappings = ModuleType("megatron.core.tensor_parallel.mappings")
    mappings._GatherFromSequenceParallelRegion = Gather  # type: ignore[attr-defined]
    sys.modules[mappings.__name__] = mappings
    rank, group = dist.get_rank(), dist.group.WORLD
    head = Head.random(1, 26, V=84)
    exact = head.run(plain)
    rows = head.hidden.transpose(0, 1).contiguous()
    leaf = (rows.chunk(2)[rank] if sequence_parallel else rows).clone().requires_grad_()
    weight = head.weight.chunk(2)[rank].clone().requires_grad_()
    hidden = Gather.apply(leaf) if sequence_parallel else leaf * 1.0
    logps, entropy = cross_entropy_module.linear_cross_entropy(hidden, weight, head.ids, 0.7, "none", group)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    close(logps, exact.logps[0])
    close(entropy, exact.entropy[0])
    torch.autograd.backward([logps, entropy], [head.dlogps[0], head.dentropy[0]])
    dhidden = exact.dhidden.transpose(0, 1)
    close(leaf.grad, dhidden.chunk(2)[rank] if sequence_parallel else dhidden)
    close(weight.grad, exact.dweight.chunk(2)[rank])


if __name__ == "__main__":
    cases.main()
