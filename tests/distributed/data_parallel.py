"""Ragged micro-batches over several ranks give the loss and the gradients of one process with all sequences.

Each rank accumulates three micro-batches with a common normalizer. Every rank computes the policy, the batch
and the expected result itself. Only the data-parallel wrapper and the normalizer communicate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distributed.worker import Cases
from grpo_kernels import KL, LossOutput, LossSpec, PPOClip, grpo_loss, linear_grpo_loss
from grpo_kernels.checks.choices import AGGREGATIONS
from grpo_kernels.normalizers import global_normalizer

cases = Cases()

INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
# Relative tolerance in the L2 norm of each gradient, whose terms are summed in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MICRO_BATCHES = 3
V, H, T = 23, 7, 9  # no dimension divides by the number of ranks: the shards are uneven
MAX_TOKENS = 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 13), nn.Linear(13, H)

    def forward(self, x: Tensor) -> Tensor:
        """Add a function of the mean over all positions so far."""
        seen = torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.down(torch.tanh(self.up(x.cumsum(1) / seen)))


class Policy(nn.Module):
    """A causal language model that returns hidden states, or a loss of hidden states and head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(V, H), Block(), Block())
        self.lm_head = nn.Linear(H, V)

    def forward(self, input_ids: Tensor, loss: Callable[..., LossOutput] | None = None) -> Any:
        hidden = self.backbone(input_ids)
        return hidden if loss is None else loss(hidden, self.lm_head)


class Batch(NamedTuple):
    ids: Tensor  # [B, T + 1]
    mask: Tensor  # [B, T] bool: a prefix of each sequence, which may be empty
    advantages: Tensor  # [B]
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]
    prompt_ids: Tensor  # [B]: all completions of a prompt are in one micro-batch

    def of(self, rows: Tensor) -> Batch:
        """Return these sequences, cut to the longest of them."""
        part = Batch(*(x[rows] for x in self))
        width = max(1, int(part.mask.sum(1).max()))
        narrow = {name: getattr(part, name)[:, :width] for name in ("mask", "old_logps", "ref_logps")}
        return part._replace(ids=part.ids[:, : width + 1], **narrow)


def padded(batch: Batch) -> dict[str, Tensor]:
    names = ("old_logps", "ref_logps", "prompt_ids")
    return {"completion_mask": batch.mask, **{name: getattr(batch, name) for name in names}}


def from_logits(hidden: Tensor, lm_head: nn.Linear, *, batch: Batch, **options: Any) -> LossOutput:
    return grpo_loss(lm_head(hidden), batch.ids[:, 1:], batch.advantages, **padded(batch), **options)


def from_hidden(hidden: Tensor, lm_head: nn.Linear, *, batch: Batch, **options: Any) -> LossOutput:
    head = {"lm_head_bias": lm_head.bias, "chunk_tokens": 4}
    return linear_grpo_loss(
        hidden, lm_head.weight, batch.ids[:, 1:], batch.advantages, **head, **padded(batch), **options
    )


def from_packed(hidden: Tensor, lm_head: nn.Linear, *, batch: Batch, **options: Any) -> LossOutput:
    """Compute the loss of the packed batch without masked tokens."""
    mask = batch.mask
    per_token = {"old_logps": batch.old_logps[mask], "ref_logps": batch.ref_logps[mask]}
    head = {"lm_head_bias": lm_head.bias, "seq_lens": mask.sum(1), "prompt_ids": batch.prompt_ids}
    ids = batch.ids[:, 1:][mask]
    return linear_grpo_loss(
        hidden[mask], lm_head.weight, ids, batch.advantages, **head, **per_token, **options
    )


def from_accumulated(hidden: Tensor, lm_head: nn.Linear, **how: Any) -> LossOutput:
    """Add the gradient of the head's weight to its `grad` in the backward, outside autograd."""
    return from_hidden(hidden, lm_head, accumulate_into=lm_head.weight.grad, **how)


FORMS = {"logits": from_logits, "hidden": from_hidden, "packed": from_packed}


class Task(NamedTuple):
    policy: Policy
    batch: Batch  # the batch of all ranks
    micro_batches: list[Batch]  # the micro-batches of this rank
    spec: LossSpec


def make_task(aggregation: str, dtype: torch.dtype, lengths: str) -> Task:
    """Return the task. With `lengths="idle"` all tokens of the last rank are masked, else ("ragged") some."""
    torch.manual_seed(0)
    policy = Policy().to(dtype)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = torch.randint(1, 4, (ranks * MICRO_BATCHES,))
    rows = torch.arange(int(sizes.sum())).split(sizes.tolist())
    tokens = torch.randint(T + 1, (int(sizes.sum()),))
    if lengths == "idle":
        tokens[torch.cat(rows[-MICRO_BATCHES:])] = 0
    ids = torch.randint(V, (len(tokens), T + 1))
    with torch.no_grad():
        log_probs = policy.lm_head(policy.backbone(ids[:, :-1])).log_softmax(-1)
    logps = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    old_logps, ref_logps = (logps + 0.3 * torch.randn_like(logps) for _ in range(2))
    advantages = torch.randn(len(tokens), dtype=dtype)
    # The first two completions of a micro-batch answer one prompt, a third one another.
    prompt_ids = torch.cat([int(part[0]) + torch.arange(len(part)) // 2 for part in rows])
    batch = Batch(ids, torch.arange(T) < tokens[:, None], advantages, old_logps, ref_logps, prompt_ids)
    mine = rows[rank * MICRO_BATCHES : (rank + 1) * MICRO_BATCHES]
    # None would mean the width of each micro-batch.
    max_tokens = MAX_TOKENS if aggregation == "seq-mean-token-sum-norm" else None
    spec = LossSpec(PPOClip(), KL("k3", beta=0.1), aggregation=aggregation, max_tokens=max_tokens)
    return Task(policy, batch, [batch.of(x) for x in mine], spec)


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def wrap(wrapper: str, policy: Policy) -> nn.Module:
    """Wrap the policy. FSDP2 turns the parameters of the module itself into DTensors."""
    if wrapper == "ddp":
        return DistributedDataParallel(policy)
    for module in (*policy.backbone[1:], policy.backbone, policy):
        fully_shard(module, mesh=mesh())
    return policy


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Communicate gradients in the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else model.no_sync()


Result = dict[str, Tensor]  # the loss, and the gradient of every parameter by its name


def result(policy: Policy, loss: Tensor) -> Result:
    grads = {name: p.grad for name, p in policy.named_parameters()}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}
    return {"loss": loss.detach(), **whole}


def alone(task: Task) -> Result:
    """Return loss and gradients of all sequences in one process, with the default denominator."""
    policy = copy.deepcopy(task.policy)
    loss = functools.partial(from_logits, batch=task.batch, spec=task.spec)
    out = policy(task.batch.ids[:, :-1], loss)
    out.loss.backward()
    return result(policy, out.loss)


def together(
    task: Task, wrapper: str, route: str, form: str, normalizer: Tensor, backend: str = "auto"
) -> Result:
    """Return loss and gradients of all ranks, each with its own micro-batches."""
    policy = task.policy
    model = wrap(wrapper, policy)
    total = torch.zeros((), dtype=task.batch.advantages.dtype)
    for batch in task.micro_batches:
        ids = batch.ids[:, :-1]
        loss = functools.partial(
            {**FORMS, "accumulated": from_accumulated}[form],
            **{"batch": batch, "spec": task.spec, "normalizer": normalizer, "backend": backend},
        )
        with accumulating(model, last=batch is task.micro_batches[-1]):
            if route == "inside":
                out = model(ids, loss)
            elif route == "after":
                out = loss(model(ids), policy.lm_head)
            else:
                hidden = policy.backbone(ids)
                assert isinstance(policy.lm_head.weight, DTensor)
                out = loss(hidden, policy.lm_head)
            out.loss.backward()
        total += out.loss.detach()
    dist.all_reduce(total)
    return result(policy, total / dist.get_world_size())


def errors(got: Result, want: Result) -> dict[str, float]:
    """Return relative errors of the loss and of each gradient."""
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


INSIDE: dict[str, Any] = {"wrapper": ["ddp", "fsdp2"], "route": ["inside"]}
OUTSIDE: dict[str, Any] = {"wrapper": ["fsdp2"], "route": ["backbone", "after"]}


@cases.add(**INSIDE, form=FORMS, aggregation=AGGREGATIONS, dtype=[torch.float64], lengths=["ragged"])
@cases.add(**INSIDE, form=FORMS, aggregation=AGGREGATIONS, dtype=[torch.float32], lengths=["idle"])
@cases.add(
    **OUTSIDE,
    form=["hidden", "packed"],
    aggregation=["token-mean", "seq-mean-token-mean"],
    dtype=[torch.float32],
    lengths=["idle"],
)
@cases.add(
    **INSIDE,
    form=["logits", "hidden"],
    aggregation=["token-mean"],
    dtype=[torch.float32],
    lengths=["ragged"],
    backend=INTERPRETED,
)
def as_one_process(
    wrapper: str, route: str, form: str, aggregation: str, dtype: torch.dtype, lengths: str, **backend: str
) -> None:
    task = make_task(aggregation, dtype, lengths)
    want = alone(task)
    normalizer = global_normalizer(
        (x.mask for x in task.micro_batches),
        aggregation=aggregation,
        prompt_ids=(x.prompt_ids for x in task.micro_batches),
    )
    found = errors(together(task, wrapper, route, form, normalizer, **backend), want)
    assert max(found.values()) < TOLERANCE[dtype], found


@cases.add(dtype=[torch.float64, torch.float32], lengths=["ragged", "idle"])
def accumulated_into_the_gradient(dtype: torch.dtype, lengths: str) -> None:
    """DDP averages `accumulate_into=weight.grad` over the ranks, as it does other gradients."""
    task = make_task("token-mean", dtype, lengths)
    want = alone(task)
    normalizer = global_normalizer(x.mask for x in task.micro_batches)
    weight = task.policy.lm_head.weight
    weight.grad = torch.zeros_like(weight)
    found = errors(together(task, "ddp", "inside", "accumulated", normalizer), want)
    assert max(found.values()) < TOLERANCE[dtype], found


@cases.add()
def accumulated_from_a_sharded_head() -> None:
    """FSDP2 has to scatter the gradient of a gathered head, which a buffer would miss."""
    task = make_task("token-mean", torch.float32, "ragged")
    model = wrap("fsdp2", task.policy)
    batch = task.micro_batches[0]
    loss = functools.partial(from_hidden, batch=batch, accumulate_into=torch.zeros(V, H))
    hidden = model.backbone(batch.ids[:, :-1])
    try:
        loss(hidden, task.policy.lm_head)
    except ValueError as error:
        assert "lm_head_weight that is no DTensor" in str(error), error
    else:
        raise AssertionError("accepted")


@cases.add(wrapper=["ddp", "fsdp2"], aggregation=["token-mean", "seq-mean-token-mean"])
def unlike_own_normalizer(wrapper: str, aggregation: str) -> None:
    """The case above can fail: it would if each rank divided by its own count."""
    task = make_task(aggregation, torch.float64, "ragged")
    want = alone(task)
    masks = (x.mask for x in task.micro_batches)
    normalizer = global_normalizer(masks, aggregation=aggregation, group=only_this_rank())
    found = errors(together(task, wrapper, "inside", "hidden", normalizer), want)
    assert min(found.values()) > 1e-2, found


@functools.cache
def only_this_rank() -> dist.ProcessGroup:
    return dist.new_subgroups(group_size=1)[0]


@cases.add(dtype=[torch.bool, torch.int64, torch.float32])
def counts(dtype: torch.dtype) -> None:
    """The normalizer counts all ranks and micro-batches, padded or packed, over the number of ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    padded, packed = torch.zeros(rank + 1, 5, dtype=dtype), torch.ones(7, dtype=dtype)
    padded[:, :2] = 1
    masks, seq_lens = [padded, packed], torch.tensor([4, 0, 3])
    tokens = sum(2 * (r + 1) + 7 for r in range(ranks))
    sequences = sum(r + 1 + 3 for r in range(ranks))
    assert global_normalizer(masks) == tokens / ranks
    for aggregation in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        got = global_normalizer(masks, aggregation=aggregation, seq_lens=seq_lens)
        assert got == sequences / ranks, got
    prompt_ids = [torch.arange(rank + 1), torch.tensor([2, 9, 2])]  # the ranks use the same ids
    prompts = sum(r + 1 + 2 for r in range(ranks))
    assert global_normalizer(masks, aggregation="prompt-mean", prompt_ids=prompt_ids) == prompts / ranks
    assert global_normalizer(masks, aggregation="token-sum") == 1 / ranks
    assert global_normalizer(torch.zeros_like(padded)) == 0


@cases.add()
def as_trl() -> None:
    """The normalizer of all masks of a generation equals TRL's for `dapo`, `cispo` and `vespo`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    steps, accumulation = 2, 3
    generator = torch.Generator().manual_seed(rank)
    masks = torch.rand(steps, accumulation, 4, 9, generator=generator) < 0.6
    num_items_in_batch = masks.sum()  # gathered from all processes, and summed
    dist.all_reduce(num_items_in_batch)
    steps_per_generation = steps * accumulation
    trl = num_items_in_batch / ranks * accumulation / steps_per_generation
    of_steps = torch.stack([global_normalizer(step) for step in masks.flatten(2, 3)])
    torch.testing.assert_close(of_steps.mean(), trl)
    assert of_steps[0] != of_steps[1]
    # There is one step per generation.
    torch.testing.assert_close(global_normalizer(masks.flatten(0, 2)), num_items_in_batch / ranks)


if __name__ == "__main__":
    cases.main()
