"""Models whose logits are not `hidden @ weight.T`, under verl's `use_fused_kernels`; entropies on demand.

Run by `make test-verl` in verl's environment. Results are compared with the models' own logits. verl's fused
forwards leave out their scale, softcap and bias.
"""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_kernels import log

pytest.importorskip("verl.trainer.ppo.core_algos")

import transformers as hf
from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy_module
from verl_imported import VERLS_PATCH, jagged

pytestmark = pytest.mark.usefixtures("integration")

V, T, TEMPERATURE = 83, 21, 0.8
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
# The options change logits of this size.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3-uncapped": ("Gemma3", {"final_logit_softcapping": None}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2", {"logit_scale": 2.0}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "granitemoe": ("GraniteMoe", {"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 0.25}),
    "phi": ("Phi", {}),
}
PLAIN = {"llama", "qwen2-tied", "gemma3-uncapped"}
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def tiny(name: str) -> Any:
    """A model with its own class, because verl patches the class. The bias of its head is not 0."""
    family, options = MODELS[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    base = getattr(hf, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = type(f"Tiny{family}", (base,), {})(getattr(hf, config_name)(**SIZES, **options)).eval()
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model


def ids_of_tokens() -> Tensor:
    return torch.randint(3, V, (2, T), generator=torch.Generator().manual_seed(2))


def learn(model: nn.Module, logps: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """The values `[2 * T]`, and the gradients of all parameters for a loss that is computed from them."""
    model.zero_grad()
    weights = torch.randn(2, 2 * T, generator=torch.Generator().manual_seed(1))
    (logps.flatten() @ weights[0] + 0.3 * entropy.flatten() @ weights[1]).backward()
    found = {"log_probs": logps.detach().flatten(), "entropy": entropy.detach().flatten()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """`learn` from the model's own logits."""
    log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float() / TEMPERATURE, -1)
    logps = log_p.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    return learn(model, logps, -(log_p.exp() * log_p).sum(-1))


def fused(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """`learn` from the forward that verl has patched."""
    out = model(input_ids=ids, return_dict=True, use_cache=False, temperature=TEMPERATURE)
    return learn(model, out.log_probs, out.entropy)


def patch(model: nn.Module, backend: str, function: Callable[..., None] | None = None) -> None:
    """Patch the model's forward as verl does, or with `function`."""
    function = function or monkey_patch.patch_forward_with_backends
    function(model, use_fused_kernels=True, fused_kernels_backend=backend)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error in the L2 norm, relative to the norm of its kind."""
    assert found.keys() == expected.keys()
    # Gradients are relative to the largest one, because a single gradient may be zero except for rounding.
    grads = [x.norm() for name, x in expected.items() if name not in ("log_probs", "entropy")]
    scale = dict.fromkeys(expected, max(float(x) for x in grads))
    scale |= {name: float(expected[name].norm()) for name in ("log_probs", "entropy")}
    return max(float((found[name] - x).norm()) / scale[name] for name, x in expected.items())


@BACKENDS
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, backend: str) -> None:
    """Values and gradients are those of the model's own logits."""
    model, ids = tiny(name), ids_of_tokens()
    expected = own(model, ids)
    patch(model, backend)
    # With these weights, logits are fp32 sums of 32 products and have a size of about 10.
    assert worst(fused(model, ids), expected) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_transforms_matter(name: str) -> None:
    """verl's own patch does not pass us the model. Then only plain heads are right."""
    model, ids = tiny(name), ids_of_tokens()
    expected = own(model, ids)["log_probs"]
    patch(model, "torch", VERLS_PATCH)
    error = float((fused(model, ids)["log_probs"] - expected).abs().max())
    assert error < 1e-4 if name in PLAIN else error > 1


def test_each_model_keeps_its_transform() -> None:
    """Each model keeps its own transform, although verl patches the class, which models share.

    The models are one with another config, a copy, and one on "meta".
    """
    first, ids = tiny("granite"), ids_of_tokens()
    second = copy.deepcopy(first)
    second.config.logits_scaling = 0.5
    third = copy.deepcopy(second)
    expected = [own(x, ids) for x in (first, second, third)]
    for model in (first, second, copy.deepcopy(first).to("meta")):
        patch(model, "torch")
    assert worst(expected[0], expected[1]) > 0.1
    for model, x in zip((first, second, third), expected, strict=True):
        assert worst(fused(model, ids), x) < 1e-4
    with pytest.raises(RuntimeError, match="stop"):
        first.register_forward_pre_hook(stop)
        fused(first, ids)
    assert verl_heads().current_model.get() is None


def stop(*args: Any) -> None:
    """Raise an error, as a hook."""
    raise RuntimeError("stop")


def verl_heads() -> Any:
    return sys.modules["grpo_kernels.integrations.verl.heads"]


# Models whose logits cannot be computed from a config.


class Masking(hf.LlamaForCausalLM):
    """Gives some tokens no probability, as Chameleon does."""

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        out.logits[..., :3] = torch.finfo(out.logits.dtype).min
        return out


class Unusual(hf.LlamaForCausalLM):
    """Its forward needs an argument that the check does not pass."""

    def forward(self, input_ids: Tensor, adapter: str, **options: Any) -> Any:
        return super().forward(input_ids, **options)


class Scaling(nn.Linear):
    """A head that is more than linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def llama(cls: type[hf.LlamaForCausalLM] = hf.LlamaForCausalLM, **options: Any) -> Any:
    """Make a small Llama of a class of its own, or a subclass."""
    torch.manual_seed(0)
    return type("Tiny", (cls,), {})(hf.LlamaConfig(**SIZES, **options))


@BACKENDS
def test_logits_that_the_config_does_not_describe(backend: str) -> None:
    """The patch refuses a model whose logits differ from what its config describes.

    The model's forward runs once on made-up products, so the error comes before the first step.
    """
    for model in (llama(Masking), llama(logit_scale=0.5), llama(final_logit_softcapping=5.0)):
        stock = type(model).forward
        with pytest.raises(ValueError, match=r"would be wrong for Tiny.*use_fused_kernels=False"):
            patch(model, backend)
        assert type(model).forward is stock


def test_a_forward_that_cannot_be_checked(caplog: pytest.LogCaptureFixture) -> None:
    """If the forward cannot be checked, the config is applied, with one warning."""
    log.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="grpo_kernels")
    model, ids = llama(Unusual, dim_model_base=8), ids_of_tokens()
    log_p = torch.log_softmax(model(ids, "none").logits * 8 / 32 / TEMPERATURE, -1)
    for _ in range(2):
        patch(model, "torch")
    (record,) = caplog.records
    assert "could not check" in record.message and "a factor of 0.25 after it" in record.message
    expected = log_p.gather(-1, ids.roll(-1, -1)[..., None]).flatten().detach()
    torch.testing.assert_close(fused(model, ids)["log_probs"], expected, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_a_head_that_is_more_than_linear(backend: str) -> None:
    """A head with its own forward, or with an adapter, is refused."""
    from peft import LoraConfig, get_peft_model

    ids = ids_of_tokens()
    scaling, adapted = llama(), llama()
    scaling.lm_head = Scaling(32, V, bias=False)
    for model in (scaling, adapted):
        patch(model, backend)
    adapted = get_peft_model(adapted, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    for model in (scaling, adapted):
        with pytest.raises(ValueError, match=r"lm_head of Tiny is of .*, whose forward is not that"):
            fused(model, ids)


def test_a_head_that_peft_saves() -> None:
    """`modules_to_save=["lm_head"]` is a linear layer in a wrapper, and is right."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    ids, model = ids_of_tokens(), get_peft_model(tiny("phi"), config)
    model.base_model.model.lm_head.modules_to_save["default"].bias.data[:9] = 3.0
    expected = own(model, ids)
    patch(model.base_model.model, "torch")
    assert worst(fused(model, ids), expected) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi"])
def test_liger_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "liger" is right if Liger is missing, and refused for all but plain heads otherwise.

    Liger's kernel takes neither scale, softcap nor bias. Without Liger, verl uses its backend "torch".
    """
    ids = ids_of_tokens()
    expected = own(tiny(name), ids)
    model = tiny(name)
    patch(model, "liger")
    assert worst(fused(model, ids), expected) < 1e-4
    monkeypatch.setattr(torch_functional, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", object())
    if name in PLAIN:
        patch(tiny(name), "liger")
    else:
        with pytest.raises(ValueError, match=r"backend 'liger' .*impl_backend=torch or triton"):
            patch(tiny(name), "liger")


# The engine.


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's FSDP engine without its set-up, which needs a GPU, and with one micro-batch per batch."""
    from verl.workers.config import FSDPEngineConfig
    from verl.workers.engine.fsdp import transformer_impl

    class Engine(transformer_impl.FSDPEngineWithLMHead):
        def __init__(self) -> None:
            self.use_ulysses_sp = self.pad_to_length = False
            self.engine_config = FSDPEngineConfig(strategy="fsdp", use_fused_kernels=True)
            self._autocast_dtype = torch.float32

        def get_data_parallel_group(self) -> None:
            return None

        def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
            return self.forward_step(data, loss_function, forward_only)[1]["model_output"]

    for name in ("get_device_id", "get_device_name"):
        monkeypatch.setattr(transformer_impl, name, lambda: "cpu")
    return Engine()


def batch_of(ids: Tensor, **options: Any) -> Any:
    """Make one of verl's batches without padding."""
    rows = [row[: len(row) - i] for i, row in enumerate(ids)]
    fields = {"input_ids": jagged(rows), "position_ids": jagged([torch.arange(len(x)) for x in rows])}
    return tensordict_utils.get_tensordict(
        fields, {"use_fused_kernels": True, "temperature": TEMPERATURE, **options}
    )


@pytest.mark.filterwarnings("ignore:.* engine is not available")  # engines that need other packages
@pytest.mark.parametrize(
    "backend, packed",  # verl accepts the flat output of "triton" only in a packed batch
    [("torch", True), ("torch", False), ("triton", True)],
    ids=["torch-packed", "torch-padded", "triton-packed"],
)
def test_entropy_on_demand(backend: str, packed: bool, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's `calculate_entropy` decides whether `linear_logps` computes entropies.

    Other callers get both.
    """
    module = sys.modules["grpo_kernels.integrations.verl.logps"]
    asked, linear_logps = [], module.linear_logps

    def spy(*args: Any, return_entropy: bool, **options: Any) -> Any:
        asked.append(return_entropy)
        return linear_logps(*args, return_entropy=return_entropy, **options)

    monkeypatch.setattr(module, "linear_logps", spy)
    model, ids = tiny("cohere"), ids_of_tokens()
    engine.module = model
    patch(model, backend)
    options = {"use_remove_padding": packed}
    with_entropy = engine.infer_batch(batch_of(ids, calculate_entropy=True, **options))
    for data in (batch_of(ids, calculate_entropy=False, **options), batch_of(ids, **options)):
        without = engine.infer_batch(data)
        assert without.keys() == {"log_probs"}
        torch.testing.assert_close(without["log_probs"].values(), with_entropy["log_probs"].values())
    assert with_entropy["entropy"].values().shape == with_entropy["log_probs"].values().shape
    assert bool((with_entropy["entropy"].values() > 0).all())
    assert asked == [True, False, False]
    fused(model, ids)
    assert asked == [True, False, False, True]


class Group:
    """A tensor-parallel group of one rank. verl's Megatron forward always passes a group."""

    def size(self) -> int:
        return 1


@pytest.mark.filterwarnings("ignore:.* engine is not available")
def test_megatron() -> None:
    """Megatron's forward does not pass us the model. Its engine does, from the second batch at the latest."""
    from verl.workers.engine import BaseEngine

    class Engine(BaseEngine):
        def __init__(self, config: Any) -> None:
            self.model_config = types.SimpleNamespace(hf_config=config)

        def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
            generator = torch.Generator().manual_seed(0)
            hidden, weight = (torch.randn(n, 32, generator=generator) for n in (T, V))
            labels = ids_of_tokens()[0]
            return cross_entropy_module.linear_cross_entropy(hidden, weight, labels, 1.0, "none", Group())

    Engine(tiny("llama").config).infer_batch(batch_of(ids_of_tokens()))
    logps, entropy = Engine(tiny("llama").config).infer_batch(batch_of(ids_of_tokens()))
    assert logps.shape == (T,) and entropy is None
    for name in ("gemma2", "granite", "cohere"):
        with pytest.raises(ValueError, match=r"under Megatron: .*use_fused_kernels=False"):
            Engine(tiny(name).config).infer_batch(batch_of(ids_of_tokens()))
