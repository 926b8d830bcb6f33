"""What NeMo-RL needs and a CPU without services lacks, replaced so that NeMo-RL's own code around it runs.

* Modules that it imports and that these runs never call: `UNUSED`, and TensorBoard's writer.
* CUDA: tensors stay on the CPU, NCCL is gloo.
* Ray: actors are objects in this process. What a call passes to them is pickled with Ray's pickler.
* flash-attn: `packed_attention`, in PyTorch.
* vLLM: `Sampler`, on the weights of the trained model.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import typing
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

UNUSED = ("absl", "matplotlib", "mlflow", "scipy", "soundfile", "swanlab", "wandb")


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `UNUSED` that are not installed. Their attributes are mocks."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        known = name.split(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return mock.MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def make_importable() -> None:
    """Let `nemo_rl` be imported without the packages of `UNUSED`, also on Python 3.11."""
    sys.meta_path.append(Unused())
    if importlib.util.find_spec("tensorboard") is None:
        spec = importlib.machinery.ModuleSpec("torch.utils.tensorboard", None)
        sys.modules["torch.utils.tensorboard"] = mock.MagicMock(__spec__=spec)
    if sys.version_info < (3, 12):  # pydantic refuses the older one; NeMo-RL runs on Python 3.13
        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]


if importlib.util.find_spec("nemo_rl") is not None:
    make_importable()


def on_cpu(x: Any) -> Any:
    if isinstance(x, str) and x.startswith("cuda"):
        return "cpu"
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


class NoCuda(TorchFunctionMode):
    """Creates on the CPU, and leaves there, what the code puts on CUDA. No memory is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch._C._nn._parse_to and args and isinstance(args[0], int):  # the index of a GPU
            args = ("cpu", *args[1:])
        kwargs = {name: on_cpu(x) for name, x in (kwargs or {}).items()}
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        return func(*map(on_cpu, args), **kwargs)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend within each sequence of a packed row, `[1, heads, tokens, size]`, causally."""
    assert attention_mask is None and len(query) == 1
    sequence = (options["position_ids"][0] == 0).cumsum(0)
    mask = (sequence[:, None] == sequence).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=options["scaling"]
    )
    return out.transpose(1, 2), None


class Ref:
    """A result of an actor that has run."""

    def __init__(self, value: Any) -> None:
        self.value = value


def get(refs: Any, timeout: float | None = None) -> Any:
    return [get(ref) for ref in refs] if isinstance(refs, list) else refs.value


def sent(x: Any) -> Any:
    """Return what arrives if `x` is sent to an actor."""
    from ray import cloudpickle

    return cloudpickle.loads(cloudpickle.dumps(x))


class Actor:
    """An object in this process that is called as a Ray actor: `actor.method.remote(...)`.

    Attributes:
        trained: the keyword arguments of each call of `train`, and its results.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.trained: list[tuple[dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **options: Any) -> Ref:
            args, options = sent((args, options))
            options = {key: x.value if isinstance(x, Ref) else x for key, x in options.items()}
            kept = sent(options) if name == "train" else None
            result = getattr(self.target, name)(*args, **options)
            if kept is not None:
                self.trained.append((kept, sent(result)))
            return Ref(result)

        return SimpleNamespace(remote=remote)


class RemoteWorker:
    """NeMo-RL's worker in a process of Ray."""

    def train(self, builder: Any, given: Any) -> Any:
        """Create the worker and return what its `train` returns for the keyword arguments `given`."""
        torch.set_num_threads(1)
        args, options = builder
        with pytest.MonkeyPatch.context() as patch, without_gpus(patch):
            return worker(*args, **options).train(**given)


def worker(name: str, *args: Any, **options: Any) -> Any:
    """Create the worker whose Ray actor is the class `name`."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), f"{kind}Impl")(*args, **options)


class Environment:
    """Gives a random reward of 0 or 1, which depends only on the completion."""

    def step(self, logs: list[Any], infos: list[Any]) -> Any:
        from nemo_rl.environments.interfaces import EnvironmentReturn

        texts = [log[-1]["content"] for log in logs]
        rewards = torch.tensor([float(zlib.crc32(text.encode()) % 2) for text in texts])
        observations = [{"role": "environment", "content": ""} for _ in texts]
        none = [None] * len(texts)
        return EnvironmentReturn(observations, infos, none, rewards, torch.ones(len(texts)), none)

    def shutdown(self) -> None:
        pass


class Sampler:
    """Samples tokens with seeded random numbers, at a temperature that the trained model does not have."""

    temperature = 1.2
    tokens = 6
    is_stale = True
    workers: Any  # those of the policy; set when they exist

    def __init__(self, cluster: Any, config: Any) -> None:
        self.eos, self.pad = config["stop_token_ids"][0], config["_pad_token_id"]
        self.generator = torch.Generator().manual_seed(5)
        self.weight_synchronizer = self

    def sync_weights(self, **_: Any) -> None:
        """Read the weights of the policy, as they are at this time, in the next `generate`."""

    @torch.no_grad()
    def generate(self, data: Any, greedy: bool) -> Any:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        model, start = self.workers[0].target.model, data["input_lengths"]
        ids = torch.nn.functional.pad(data["input_ids"], (0, self.tokens), value=self.pad)
        ends, rows = start.clone(), torch.arange(len(ids))
        logps = torch.zeros(ids.shape)
        training, implementation = model.training, model.config._attn_implementation
        model.eval()
        model.config._attn_implementation = "sdpa"
        for i in range(self.tokens):
            runs = (ends == start + i) & ((i == 0) | (ids[rows, ends - 1] != self.eos))
            # Nothing masks the padding: it is on the right, where no earlier token looks.
            logits = model(input_ids=ids, use_cache=False).logits[rows, ends - 1] / self.temperature
            point = torch.rand(len(ids), 1, generator=self.generator)
            token = (logits.softmax(-1).cumsum(-1) < point).sum(-1).clamp(max=logits.shape[-1] - 1)
            ids[rows[runs], ends[runs]] = token[runs]
            logps[rows[runs], ends[runs]] = logits.log_softmax(-1)[rows, token][runs]
            ends = ends + runs
        model.train(training)
        model.config._attn_implementation = implementation
        found = {"output_ids": ids, "logprobs": logps, "unpadded_sequence_lengths": ends}
        return BatchedDataDict({**found, "generation_lengths": ends - start})

    def __getattr__(self, name: str) -> Any:
        """Return a function that does nothing: vLLM's preparation, memory, metrics and end."""
        if name in ("prepare_for_generation", "finish_generation", "shutdown"):
            return lambda *_, **__: True
        if name in ("clear_logger_metrics", "get_logger_metrics"):
            return lambda: {}
        raise AttributeError(name)


@contextmanager
def without_gpus(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let NeMo-RL's DTensor worker and its driver run in this process, with the stand-ins of this module."""
    import nemo_automodel.components.distributed.mesh_utils as meshes
    import ray
    import torch.distributed as dist
    from nemo_rl.algorithms import grpo
    from nemo_rl.data import utils as data
    from nemo_rl.models.policy import lm_policy, utils
    from nemo_rl.utils import memory_tracker
    from transformers import modeling_utils

    for name, value in {"current_device": 0, "get_device_name": "CPU", "synchronize": None}.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    patch.setattr(gc, "collect", lambda: 0)  # NeMo-RL frees GPU memory so; it takes most of a run's time
    for name in ("range_push", "range_pop"):
        patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
    init_device_mesh = meshes.init_device_mesh
    for module in (meshes, dist.device_mesh):
        patch.setattr(
            module, "init_device_mesh", lambda device_type, *a, **k: init_device_mesh("cpu", *a, **k)
        )
    patch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    patch.setattr(dist, "init_process_group", lambda *_, **__: None)

    patch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    patch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_: None)
    # The folder tests/kernels looks like that package.
    patch.setattr(modeling_utils, "is_kernels_available", lambda *_: False)
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping
    patch.setitem(functions, "flash_attention_2", packed_attention)

    patch.setattr(ray, "get", get)
    patch.setattr(ray, "put", Ref)
    patch.setattr(ray, "get_gpu_ids", lambda: [0])
    cluster = SimpleNamespace(world_size=lambda: 1, _sorted_bundle_indices=None)
    patch.setattr(grpo, "RayVirtualCluster", lambda **_: cluster)
    patch.setattr(lm_policy, "RayQueue", lambda: None)
    patch.setattr(lm_policy, "RayWorkerBuilder", lambda *args, **options: sent((args, options)))

    class Workers(lm_policy.RayWorkerGroup):
        """One worker, in this process."""

        def __init__(self, cluster: Any, builder: Any, sharding_annotations: Any, **_: Any) -> None:
            # The environment of the older worker lacks nemo_automodel.
            patch.setattr(utils, "NEMO_AUTOMODEL_AVAILABLE", builder[0][0].endswith("V2"))
            args, options = sent(builder)
            self.cluster, self.sharding_annotations, self.builder = cluster, sharding_annotations, builder
            self._workers = Sampler.workers = [Actor(worker(*args, **options))]

        def shutdown(self, **_: Any) -> bool:
            return True

    patch.setattr(lm_policy, "RayWorkerGroup", Workers)
    patch.setattr(lm_policy.Policy, "print_node_ip_and_gpu_id", lambda self: None)
    patch.setattr(grpo, "VllmGeneration", Sampler)
    patch.setattr(memory_tracker, "memory_summary", lambda **_: "")
    patch.setattr(data, "create_env", lambda **_: Actor(Environment()))
    try:
        with NoCuda():
            yield
    finally:
        dist.destroy_process_group()
