"""The demo's task, integer addition with a verifiable reward: sums, tokenizer, model, warm-up, evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OPERANDS = 100  # both operands lie in 0..99, so 10,000 different sums exist
MAX_ANSWER_TOKENS = 4  # up to three digits and the end token
PAD, EOS = "<pad>", "<eos>"
IGNORED_LABEL = -100
MAX_WARMUP_STEPS = 1000

Sum = tuple[int, int]


def prompt_of(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}="


def answer_of(a: int, b: int) -> str:
    """The answer with its last digit first: each digit depends only on two operand digits and a carry."""
    return str(a + b)[::-1]


def split_sums(seed: int) -> tuple[list[Sum], list[Sum], list[Sum]]:
    """Shuffle all sums and split them: 1,000 held out, 600 for the warm-up, the rest for GRPO."""
    sums = [(a, b) for a in range(OPERANDS) for b in range(OPERANDS)]
    random.Random(seed).shuffle(sums)
    return sums[:1000], sums[1000:1600], sums[1600:]


def exact_match(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """The reward: 1 if the completion equals the answer, else 0."""
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character."""
    tokens = [PAD, EOS, *"0123456789+="]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with 190 thousand parameters and random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def labelled_batch(tokenizer: PreTrainedTokenizerFast, sums: list[Sum]) -> tuple[Tensor, Tensor]:
    """Input ids and labels, both [len(sums), length]; only the answer and its end token carry a label."""
    texts = [prompt_of(*s) + answer_of(*s) + EOS for s in sums]
    input_ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, IGNORED_LABEL)
    labels[:, : len(prompt_of(0, 0))] = IGNORED_LABEL  # a token is a character, and all prompts have six
    return input_ids, labels


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum]) -> float:
    """The share of sums that greedy decoding answers exactly."""
    was_training = model.training
    model.eval()
    prompt_ids = tokenizer([prompt_of(*s) for s in sums], return_tensors="pt")["input_ids"].to(model.device)
    output = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    completions = tokenizer.batch_decode(output[:, prompt_ids.shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return sum(exact_match(completions, [answer_of(*s) for s in sums])) / len(sums)


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sums: list[Sum],
    *,
    probe: list[Sum],
    on_step: Callable[[float], None] = lambda reached: None,
    target_accuracy: float = 0.5,
    max_steps: int = MAX_WARMUP_STEPS,
    batch_size: int = 64,
    probe_every: int = 10,
) -> None:
    """Train on `sums` with labels until greedy accuracy on `probe` reaches the target."""
    input_ids, labels = (x.to(model.device) for x in labelled_batch(tokenizer, sums))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    reached = 0.0
    for step in range(1, max_steps + 1):
        rows = torch.randint(len(sums), (batch_size,))
        loss = model(input_ids=input_ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % probe_every == 0:
            reached = accuracy(model, tokenizer, probe)
        on_step(reached)
        if reached >= target_accuracy:
            return
