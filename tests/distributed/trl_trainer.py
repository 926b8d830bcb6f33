"""Worker: FusedGRPOTrainer on two ranks under DDP and FSDP2, compared with TRL's trainer.

Each rank has its own batch. TRL's trainer runs without a wrapper, and its gradients are averaged by hand.
FSDP2 gathers parameters in a module's forward, and again for the gradient of its outputs. A loss that used
the parameters outside the module would get shards.
"""

from __future__ import annotations

import functools
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distributed.worker import Cases
from grpo_kernels.integrations.trl import FusedGRPOTrainer

cases = Cases()

V, B, T, P = 23, 4, 6, 3
# The fp32 sums run in another order.
TOLERANCE = 1e-5


def trainer(trainer_class: Any, tied: bool, **config: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=tied,
        )
    )
    words = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(V - 2))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    args = trl.GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=B,
        num_generations=2,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **config,
    )
    made = trainer_class(
        model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "1 2"}] * B),
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def batch() -> dict[str, Tensor]:
    """Return the batch of this rank."""
    generator = torch.Generator().manual_seed(5 + dist.get_rank())
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths).long()
    return {
        "prompt_ids": torch.randint(2, V, (B, P), generator=generator),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": torch.randint(2, V, (B, T), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(B, generator=generator),
        "num_items_in_batch": torch.tensor(29),
        "old_per_token_logps": -3 + 0.3 * torch.randn(B, T, generator=generator),
    }


@functools.cache
def averaged_gradients(tied: bool, **config: Any) -> dict[str, Tensor]:
    """Return the gradients of TRL's trainer, averaged over the ranks."""
    stock = trainer(trl.GRPOTrainer, tied, **config)
    stock._compute_loss(stock.model, batch()).backward()
    for p in stock.model.parameters():
        dist.all_reduce(p.grad)
    return {name: p.grad / dist.get_world_size() for name, p in stock.model.named_parameters()}


@cases.add(wrapper=["ddp", "fsdp2"], tied=[False, True], quantile=[1.0, 0.5])
def same_gradients(wrapper: str, tied: bool, quantile: float) -> None:
    config = {"loss_type": "dapo", "top_entropy_quantile": quantile}
    fused = trainer(FusedGRPOTrainer, tied, **config)
    model = fused.model
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)
    fused._compute_loss(model, batch()).backward()
    assert not fused._handed_over
    for name, wanted in averaged_gradients(tied, **config).items():
        got = fused.model.get_parameter(name).grad
        got = got.full_tensor() if wrapper == "fsdp2" else got
        error = float((got - wanted).abs().max() / wanted.abs().max())
        assert error < TOLERANCE, f"{name}: {error}"


if __name__ == "__main__":
    cases.main()
