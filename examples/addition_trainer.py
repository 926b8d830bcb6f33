"""TRL's GRPOTrainer with one method replaced: the loss."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from addition_task import MAX_ANSWER_TOKENS, Sum, answer_of, exact_match, prompt_of
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels import LossOutput, LossSpec

LossFunction = Callable[..., LossOutput]


class SwappedLossTrainer(GRPOTrainer):
    """GRPOTrainer with the loss `loss_fn`. Sampling, rewards, advantages and optimizer are TRL's own.

    The reference is a frozen copy of `model` as passed to the constructor.
    """

    def __init__(
        self, model: LlamaForCausalLM, *, loss_fn: LossFunction, spec: LossSpec, **kwargs: Any
    ) -> None:
        # Copied before TRL binds a new forward to the model: a later copy would call that forward.
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(model, **kwargs)
        self.reference = reference
        self.loss_fn = loss_fn
        self.spec = spec

    def _compute_loss(self, model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        sequences = {
            "input_ids": torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            "use_cache": False,
        }
        # The logits at a position predict the next token. The slice is a view, so nothing is copied.
        predicting = slice(-completion_ids.shape[1] - 1, -1)
        logits = model(**sequences).logits[:, predicting]
        with torch.no_grad():
            ref_logits = self.reference(**sequences).logits[:, predicting]
        out = self.loss_fn(
            logits,
            completion_ids,
            inputs["advantages"],
            spec=self.spec,
            completion_mask=completion_mask,
            ref_logits=ref_logits,
            old_logps=inputs.get("old_per_token_logps"),
            temperature=self.temperature,
        )
        for name, value in out.metrics.items():
            self._metrics["train"][name].append(value.item())
        return out.loss / self.current_gradient_accumulation_steps


class Recorder(TrainerCallback):
    """Record what TRL logs at every step, and end the run after `stop_after` steps."""

    def __init__(self, on_step: Callable[[dict[str, float]], None], stop_after: int) -> None:
        self.history: list[dict[str, float]] = []
        self.on_step = on_step
        self.stop_after = stop_after

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.stop_after

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:  # the summary after the last step has no loss
            self.history.append(dict(logs))
            self.on_step(logs)


def reinforce(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sums: list[Sum],
    *,
    loss_fn: LossFunction | None,
    spec: LossSpec,
    steps: int,
    seed: int,
    on_step: Callable[[dict[str, float]], None],
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Train `policy` in place for `steps` steps and return TRL's log, one entry per step.

    `loss_fn=None` trains with stock TRL and its own "grpo" loss. `stop_after` ends the run early, with the
    learning rates of the full run.
    """
    dataset = Dataset.from_list([{"prompt": prompt_of(*s), "answer": answer_of(*s)} for s in sums])
    with tempfile.TemporaryDirectory() as output_dir:
        args = GRPOConfig(
            output_dir=output_dir,
            seed=seed,
            max_steps=steps,
            learning_rate=5e-4,
            lr_scheduler_type="linear",
            warmup_steps=10,
            per_device_train_batch_size=256,
            num_generations=4,
            # Two optimizer steps per batch of samples: in the second, ratios differ from 1 and are clipped.
            steps_per_generation=2,
            max_completion_length=MAX_ANSWER_TOKENS,
            loss_type="grpo",
            beta=0.0,
            use_cpu=policy.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        recorder = Recorder(on_step, stop_after or steps)
        common = {
            "args": args,
            "reward_funcs": exact_match,
            "train_dataset": dataset,
            "processing_class": tokenizer,
            "callbacks": [recorder],
        }
        if loss_fn is None:
            trainer = GRPOTrainer(policy, **common)
        else:
            trainer = SwappedLossTrainer(policy, loss_fn=loss_fn, spec=spec, **common)
        trainer.remove_callback(PrinterCallback)  # replaced by the progress bar
        trainer.train()
    return recorder.history
