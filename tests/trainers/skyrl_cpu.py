"""What lets SkyRL's own trainer run on a CPU. Importing this module changes the process for good.

SkyRL 0.3.0 imports flash-attn, moves tensors to "cuda", and makes meshes and process groups for NCCL. Here
are stand-ins for these calls, and for the engine that generates completions. All other code is SkyRL's.
"""

from __future__ import annotations

import importlib.machinery
import sys
import typing
import zlib
from types import ModuleType
from typing import Any

import torch
import transformers.modeling_utils  # asks whether flash-attn is installed, before there is a stand-in
import typing_extensions
from torch import Tensor
from torch.distributed import device_mesh


def pad_input(rows: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return `rows` `[N, ...]` at the positions that `unpad_input` took them from, else 0."""
    padded = rows.new_zeros(batch * seqlen, *rows.shape[1:])
    return padded.index_copy(0, indices, rows).unflatten(0, (batch, seqlen))


def unpad_input(x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    """Return the rows `[N, ...]` of `x` `[B, S, ...]` that are not padding, and their positions."""
    indices = attention_mask.flatten().nonzero().flatten()
    return x.flatten(0, 1)[indices], indices, None, None, None


def stand_in(name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module


stand_in("flash_attn")
stand_in("flash_attn.bert_padding", pad_input=pad_input, unpad_input=unpad_input)
if sys.version_info < (3, 12):  # Pydantic refuses the other one there, and SkyRL's `tinker.types` uses it
    typing.TypedDict = typing_extensions.TypedDict

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
for name in ("set_device", "synchronize", "empty_cache"):
    setattr(torch.cuda, name, lambda *_: None)  # one function each: Dynamo looks them up
torch.Tensor.cuda = lambda self: self  # type: ignore[assignment,method-assign]
real_mesh = device_mesh.init_device_mesh
device_mesh.init_device_mesh = lambda _, *args, **options: real_mesh("cpu", *args, **options)

from skyrl.backends.skyrl_train.distributed import fsdp_utils  # noqa: E402
from skyrl.backends.skyrl_train.workers.fsdp import fsdp_worker  # noqa: E402
from skyrl.train.entrypoints import main_base  # noqa: E402
from skyrl.train.generators.base import GeneratorInterface  # noqa: E402

for name in ("flash_attn", "flash_attn.bert_padding"):
    del sys.modules[name]  # transformers looks for it again when it builds a model
del transformers


def share_buffers(model: torch.nn.Module, _: Any) -> None:
    """`_sync_non_persistent_buffers` on a CPU: rank 0 sends the buffers that no checkpoint has."""
    for module in model.modules():
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[key]
            assert buffer is not None
            real = buffer if torch.distributed.get_rank() == 0 else torch.empty_like(buffer, device="cpu")
            torch.distributed.broadcast(real, src=0)
            module._buffers[key] = real


fsdp_utils._sync_non_persistent_buffers = share_buffers


async def nothing(self: Any, *_: Any, **__: Any) -> None:
    """Pause nothing, and send weights to nobody."""


class OnCPU:
    """A worker that communicates through Gloo, and sends no weights to an engine."""

    init_weight_sync_state = broadcast_to_inference_engines = nothing

    def init_worker_process_group(self) -> None:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        super().init_worker_process_group()  # type: ignore[misc]


class PolicyWorker(OnCPU, fsdp_worker.FSDPPolicyWorkerBase):
    pass


class RefWorker(OnCPU, fsdp_worker.FSDPRefWorkerBase):
    pass


class Engine:
    """The inference engine, of which training uses no more than this."""

    pause_generation = resume_generation = nothing

    def increment_weight_version(self) -> None:
        pass


class Generator(GeneratorInterface):
    """Random completions of random lengths, some of whose tokens are not trained on.

    Their log-probabilities are those of the initial policy, with noise.
    """

    def __init__(self, path: str, tokenizer: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    async def generate(self, input_batch: Any) -> Any:
        random = torch.Generator().manual_seed(input_batch["batch_metadata"].global_step)
        found: dict[str, Any] = {"rollout_metrics": None, "stop_reasons": None}
        for prompt in input_batch["prompts"]:
            ids = self.tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False)
            n = int(torch.randint(1, 8, (), generator=random))
            taken = torch.randint(2, len(self.tokenizer), (n,), generator=random)
            taken[-1] = self.tokenizer.eos_token_id
            logits = self.model(torch.cat([torch.tensor(ids), taken])[None]).logits[0, len(ids) - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, taken[:, None])[:, 0]
            logps = (logps + 0.2 * torch.randn(n, generator=random)).clamp(max=-1e-3)
            mask = (torch.rand(n, generator=random) < 0.8).int()
            row = {
                "prompt_token_ids": ids,
                "response_ids": taken.tolist(),
                "rewards": zlib.crc32(bytes(taken.tolist())) % 5 / 4,
                "loss_masks": mask.tolist(),
                "rollout_logprobs": logps.tolist(),
            }
            for key, value in row.items():
                found.setdefault(key, []).append(value)
        if input_batch["sampling_params"]["logprobs"] is None:
            found["rollout_logprobs"] = None
        return found


class Experiment(main_base.BasePPOExp):
    """SkyRL's experiment, without vLLM."""

    def get_train_dataset(self) -> Any:
        return main_base.PromptDataset(self.cfg.data.train_data, self.tokenizer, 64, num_workers=1)

    def get_inference_client(self) -> Any:
        return Engine()

    def get_generator(self, cfg: Any, tokenizer: Any, *_: Any) -> Any:
        return Generator(cfg.trainer.policy.model.path, tokenizer)
