"""GRPO in plain PyTorch: a whole training loop around `linear_grpo_loss`, to copy into your own code.

    python examples/plain_torch.py
    torchrun --nproc_per_node=2 examples/plain_torch.py     # data parallel: the same losses, up to rounding

Task: given a digit, count up to nine and stop: "6" -> "7 8 9 <end>". The model starts from random weights and
learns from the reward alone, in less than a minute on one core. The script needs torch and transformers,
downloads nothing, and uses GPUs if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import KL, LossOutput, LossSpec, global_normalizer, group_advantages, linear_grpo_loss

END, PAD, VOCAB = 10, 11, 12  # the digits are their own ids
PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 1, 12
GROUP_SIZE = 8  # completions per prompt
PROMPTS = 8  # per micro-batch
MICRO_BATCHES = 4  # per batch of samples, divided among the processes
UPDATES = 2  # optimizer steps per batch of samples
TEMPERATURE = 1.0
SPEC = LossSpec.preset("dapo", kl=KL("k3", beta=0.005))


@dataclass
class Samples:
    """A micro-batch of `B` completions of at most `T` tokens: `GROUP_SIZE` consecutive ones per prompt."""

    input_ids: Tensor  # [B, PROMPT_TOKENS + T]
    completion_mask: Tensor  # [B, T]: up to and including the end token
    rewards: Tensor  # [B]
    ref_hidden: Tensor  # [B, T, H], of the reference: takes H / V of the memory of its logits
    old_logps: Tensor | None = None  # [B, T], of the policy that drew the samples

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, PROMPT_TOKENS:]


def hidden_states(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """The input of the head, `[B, T, H]`, at the positions that predict the completion.

    All prompts have the same length here. If they differ, pad them on the left and also pass `attention_mask`
    and `position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)`.
    """
    return model.model(input_ids, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]


class Policy(nn.Module):
    """Model and loss in one forward, because DDP and FSDP act when the module that they wrap is called."""

    def __init__(self, model: LlamaForCausalLM, reference: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.ref_lm_head_weight = reference.lm_head.weight.detach()  # a constant, not a parameter here

    def forward(self, samples: Samples, normalizer: Tensor) -> LossOutput:
        return linear_grpo_loss(
            hidden_states(self.model, samples.input_ids),
            self.model.lm_head.weight,
            samples.completion_ids,
            group_advantages(samples.rewards, group_size=GROUP_SIZE),
            spec=SPEC,
            completion_mask=samples.completion_mask,
            old_logps=samples.old_logps,
            ref_hidden=samples.ref_hidden,
            ref_lm_head_weight=self.ref_lm_head_weight,
            temperature=TEMPERATURE,
            normalizer=normalizer,
        )


def reward(prompt: list[int], completion: list[int]) -> float:
    """The share of the answer before the first mistake. It is 1 for the whole answer with the end token."""
    answer = [*range(prompt[0] + 1, 10), END]
    right = takewhile(lambda pair: pair[0] == pair[1], zip(answer, completion, strict=False))
    return len(list(right)) / len(answer)


@torch.no_grad()
def draw(model: LlamaForCausalLM, reference: LlamaForCausalLM, seed: int) -> Samples:
    """Sample completions of random prompts and compute their rewards."""
    torch.manual_seed(seed)
    prompts = torch.randint(10, (PROMPTS, PROMPT_TOKENS)).to(model.device)
    input_ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_return_sequences=GROUP_SIZE,
        max_new_tokens=MAX_COMPLETION_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,  # the loss uses probabilities over the whole vocabulary
    )
    completion_ids = input_ids[:, PROMPT_TOKENS:]
    is_end = completion_ids == END
    mask = is_end.cumsum(1) - is_end.long() == 0
    pairs = zip(input_ids[:, :PROMPT_TOKENS].tolist(), completion_ids.tolist(), strict=True)
    rewards = torch.tensor([reward(*pair) for pair in pairs], device=model.device)
    return Samples(input_ids, mask, rewards, hidden_states(reference, input_ids))


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Samples], normalizer: Tensor
) -> list[LossOutput]:
    """Take one optimizer step over all micro-batches."""
    optimizer.zero_grad()
    outputs = []
    for samples in micro_batches:
        accumulates = samples is not micro_batches[-1] and isinstance(policy, DistributedDataParallel)
        with policy.no_sync() if accumulates else contextlib.nullcontext():
            out = policy(samples, normalizer)
            out.loss.backward()
        if samples.old_logps is None:  # the first update runs the policy that drew the samples
            samples.old_logps = out.logps
        outputs.append(out)
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return outputs


def train(steps: int, device: torch.device, rank: int, ranks: int) -> None:
    torch.manual_seed(0)  # the same weights in every process
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).to(device)
    reference = copy.deepcopy(model).requires_grad_(False)
    policy: nn.Module = Policy(model, reference)
    if ranks > 1:
        policy = DistributedDataParallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)

    for step in range(steps):
        # One seed per micro-batch, not per process: the number of processes makes no difference.
        mine = range(rank, MICRO_BATCHES, ranks)
        micro_batches = [draw(model, reference, seed=step * MICRO_BATCHES + i) for i in mine]
        # All micro-batches of all processes share a denominator, so their losses add up to the batch's loss.
        masks = [samples.completion_mask for samples in micro_batches]
        normalizer = global_normalizer(masks, aggregation=SPEC.aggregation)
        for _ in range(UPDATES):
            outputs = update(policy, optimizer, micro_batches, normalizer)

        rewards = torch.cat([samples.rewards for samples in micro_batches])
        logs = {
            "reward": rewards.mean(),
            "solved": (rewards == 1).float().mean(),
            "loss": torch.stack([out.loss.detach() for out in outputs]).sum(),
        }
        for name in ("kl", "kl_exact", "clip_fraction"):
            logs[name] = torch.stack([out.metrics[name] for out in outputs]).mean()
        values = torch.stack(list(logs.values())) / ranks
        if ranks > 1:
            dist.all_reduce(values)
        if rank == 0:
            shown = (f"{name} {x:.5f}" for name, x in zip(logs, values.tolist(), strict=True))
            print(f"step {step:2d}", *shown, sep="  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60, help="batches of samples (default: %(default)s)")
    steps = parser.parse_args().steps
    # torchrun sets these.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.set_num_threads(1)  # the model is too small for more
    if MICRO_BATCHES % ranks:
        raise SystemExit(f"{MICRO_BATCHES} micro-batches cannot be divided evenly among {ranks} processes")
    if ranks > 1:
        dist.init_process_group()
    train(steps, device, rank, ranks)
    if ranks > 1:
        # gloo's threads still hold tensors of the last collective: a process that exits first would abort.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
