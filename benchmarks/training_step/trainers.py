"""TRL's GRPOTrainer on given samples: it downloads, generates and scores nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from ..work.workload import CLIP


def grpo_trainer(trainer_class: Any, model: Any, folder: Path, sequences: int, **settings: Any) -> Any:
    """A trainer whose loss is a clipped ratio, averaged over tokens. `settings` go to GRPOConfig."""
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    # The fingerprint is given because datasets 5.2 would pickle the table to compute one, and that fails with
    # pyarrow 26 on Python 3.12.
    prompts = datasets.table.InMemoryTable.from_pylist([{"prompt": "<eos>"}] * sequences)
    vocabulary = models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return trainer_class(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(folder),
            num_generations=sequences,
            loss_type="bnpo",
            epsilon=CLIP,
            report_to=[],
            **settings,
        ),
        train_dataset=datasets.Dataset(prompts, fingerprint="prompts"),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="<eos>"
        ),
    )


def grpo_inputs(
    ids: Tensor,  # [B, P + T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
) -> dict[str, Tensor]:
    """The inputs of the loss, which the trainer otherwise gets by generating and scoring."""
    prompts, completions = ids.tensor_split((ids.shape[1] - old_logps.shape[1],), dim=1)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "num_items_in_batch": torch.tensor(completions.numel(), device=ids.device),
    }


def fused_logps() -> AbstractContextManager[None]:
    """Applies `fuse_trl_logps()` inside the context."""
    from grpo_kernels.integrations.trl.head import FusedLogProbs, head_function

    return head_function(FusedLogProbs())


class Watch(Protocol):
    """Is called at several points of each training step."""

    def begin(self) -> None: ...

    def after_backward(self, loss: Tensor) -> None:
        """`loss` is that of a micro-batch, divided by the number of micro-batches."""

    def end(self) -> None: ...


class OnSamples:
    """A mixin for GRPOTrainer, which takes every step on the same `inputs` (from `grpo_inputs`)."""

    inputs: dict[str, Tensor]
    watch: Watch

    def train_on(self: Any, inputs: dict[str, Tensor], watch: Watch) -> None:
        self.inputs, self.watch = inputs, watch
        self.add_callback(StepCallback(watch))
        self.remove_callback(transformers.PrinterCallback)
        self.train()

    def _generate_and_score_completions(self: Any, prompts: object) -> dict[str, Tensor]:
        return self.inputs if self.ref_model is None else self.inputs | self.of_reference(*self.sequences())

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, `[B, P + T]` each."""
        ids, mask = ((f"prompt_{x}", f"completion_{x}") for x in ("ids", "mask"))
        return torch.cat([self.inputs[x] for x in ids], 1), torch.cat([self.inputs[x] for x in mask], 1)

    @torch.no_grad()
    def of_reference(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The reference's log-probabilities, computed as TRL does after generation."""
        logps, *_ = self._get_per_token_logps_and_entropies(
            self.ref_model,
            *(ids, mask, self.inputs["completion_ids"].shape[1]),
            batch_size=self.args.per_device_train_batch_size,
        )
        return {"ref_per_token_logps": logps}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watch.after_backward(loss)
        return loss


class WithoutLoss(OnSamples):
    """Replaces the loss by a mean of hidden states: backbones, backward and optimizer remain."""

    @torch.no_grad()
    def of_reference(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.ref_model.model(ids, attention_mask=mask, use_cache=False)
        return {}

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = self.sequences()
        return self.model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state.float().mean()


class StepCallback(transformers.TrainerCallback):
    """Tells a `Watch` when a step begins and ends."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.end()
