"""Stand-ins for what OpenRLHF imports and a CPU lacks: Ray, vLLM and its communicator, flash-attn, CUDA.

Everything of OpenRLHF itself runs unchanged on top of them, and DeepSpeed with its accelerator for CPUs.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Handle:
    """An actor of Ray that lives in this process. Its methods run when they are called."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *args, **options: called(method, args, options))

    def __deepcopy__(self, memo: Any) -> Handle:
        return self


class ActorClass:
    """A class under `ray.remote`."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def options(self, **_: Any) -> ActorClass:
        return self

    def remote(self, *args: Any, **options: Any) -> Handle:
        actor = self.kind.__new__(self.kind)
        called(lambda *args, **options: self.kind.__init__(actor, *args, **options), args, options)
        return Handle(actor)

    def __deepcopy__(self, memo: Any) -> ActorClass:
        return self


def called(function: Callable[..., Any], args: Any, options: Any) -> Any:
    """Call with copies of the arguments, because Ray would send them to another process."""
    found = function(*copy.deepcopy(args), **copy.deepcopy(options))
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def remote(*args: Any, **_: Any) -> Any:
    return ActorClass(args[0]) if args else ActorClass


class Engine:
    """vLLM's engine: a model that samples. Its weights stay those of the file.

    A fixed bias of its logits makes its log-probabilities differ from those of the trained model.
    """

    def __init__(self, model: str, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.generator = torch.Generator().manual_seed(seed)
        self.bias = 0.2 * torch.randn(self.model.config.vocab_size, generator=self.generator)
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    @classmethod
    def from_engine_args(cls, args: SimpleNamespace) -> Engine:
        return cls(args.model, args.seed)

    async def is_sleeping(self) -> bool:
        return False

    async def collective_rpc(self, *_: Any, **__: Any) -> None:
        """Ignore the group and the weights."""

    @torch.no_grad()
    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        ids, logprobs = list(prompt["prompt_token_ids"]), []
        eos, start = self.model.config.eos_token_id, len(ids)
        while len(ids) - start < params.max_tokens and ids[-1] != eos:
            logits = self.model(torch.tensor([ids])).logits[0, -1] + self.bias
            logps = (logits / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(logps.exp(), 1, generator=self.generator))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logps[token]))})
        reason = "stop" if ids[-1] == eos else "length"
        given = logprobs if params.logprobs is not None else None
        yield SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=ids[start:], text="", finish_reason=reason, logprobs=given)]
        )


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Any, ...]:
    """Return the unmasked rows of `[B, T, ...]`, their places, and lengths of the sequences."""
    indices, lengths = mask.flatten().nonzero().flatten(), mask.sum(-1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return x.flatten(0, 1)[indices], indices, ends, int(lengths.max()), lengths


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """Put the rows of `x` back to their places in `[B, T, ...]`."""
    padded = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x)
    return padded.unflatten(0, (batch, length))


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a function without effect on a CPU."""


def modules() -> dict[str, dict[str, Any]]:
    """The contents of the modules that take the places of Ray, vLLM and flash-attn."""
    from einops import rearrange

    ray = {
        "remote": remote,
        "get": lambda found: found,
        "put": lambda value: value,
        "wait": lambda refs, **_: (refs[:1], refs[1:]),
        "is_initialized": lambda: True,
    }
    engine = {
        "__version__": "0.29.0",
        "AsyncEngineArgs": SimpleNamespace,
        "AsyncLLMEngine": Engine,
        "SamplingParams": SimpleNamespace,
    }
    communicator = SimpleNamespace(broadcast=nothing)
    return {
        "ray": ray,
        "ray._private": {},
        "ray._private.services": {"get_node_ip_address": lambda: "127.0.0.1"},
        "ray.util": {},
        "ray.util.placement_group": {
            "PlacementGroup": object,
            "placement_group": lambda *_, **__: SimpleNamespace(ready=nothing),
        },
        "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": nothing},
        "vllm": engine,
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.utils": {"random_uuid": lambda: "0"},
        "vllm.distributed": {},
        "vllm.distributed.utils": {"StatelessProcessGroup": SimpleNamespace(create=nothing)},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": lambda *_, **__: communicator},
        "flash_attn": {},
        "flash_attn.bert_padding": {
            "index_first_axis": lambda x, indices: x[indices],
            "pad_input": pad_input,
            "rearrange": rearrange,
            "unpad_input": unpad_input,
        },
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": nothing},
    }


@contextmanager
def installed() -> Iterator[None]:
    """Import the stand-ins in place of Ray, vLLM and flash-attn, also if these are installed."""
    tops = ("ray", "vllm", "flash_attn")
    before = {name: x for name, x in sys.modules.items() if name.split(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    contents = modules()
    try:
        for name, attributes in contents.items():
            module = ModuleType(name)
            module.__path__ = []
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            vars(module).update(attributes)
            sys.modules[name] = module
            above, _, last = name.rpartition(".")
            if above:
                setattr(sys.modules[above], last, module)
        yield
    finally:
        for name in contents:
            del sys.modules[name]
        sys.modules.update(before)


class Cpu(str):
    """The device "cpu", whose number is 0: OpenRLHF also writes `f"cuda:{current_device()}"`."""

    def __format__(self, spec: str) -> str:
        return "0"


def without_cuda(patch: Any) -> None:
    """Let OpenRLHF's calls of `torch.cuda` and its device mesh mean the CPU."""
    from openrlhf.utils.deepspeed import deepspeed as strategy

    patch.setattr(torch.cuda, "current_device", lambda: Cpu("cpu"))
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        patch.setattr(torch.cuda, name, nothing)
    mesh = strategy.init_device_mesh
    patch.setattr(strategy, "init_device_mesh", lambda _, *args, **options: mesh("cpu", *args, **options))
