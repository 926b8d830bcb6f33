"""ms-swift's log-probabilities and its GRPO loss from hidden states, called as its trainers call them.

Where ms-swift is installed, its own GRPOTrainer computes both losses, with a model that is a table of hidden
states. Elsewhere a stand-in with the methods of ms-swift 4.6.0 that ours replace or call. They are in
`swift/rlhf_trainers/grpo_trainer.py`: `compute_loss`, `_compute_loss_and_metrics`, `compute_liger_loss`,
`_get_logps_via_local_forward` and `_get_last_hidden_state`, lines 845 to 862, 934 to 1226, 1564 to 1608 and
1742 to 1815.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers import Batch, T, Trainer, batch, gradient, trainer
from torch import Tensor

V, H, PROMPT = 13, 6, 2
TEMPERATURE = 0.9
ADAPTER = "grpo_kernels.integrations.swift"


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's function, in plain PyTorch."""
    return torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0]


class GRPOTrainer:
    """ms-swift's GRPOTrainer, as far as it computes its loss from logits or from hidden states."""

    def _prepare_liger_loss(self) -> None:
        self.use_liger_loss = self.args.use_liger_kernel

    def _has_teacher_explicit(self) -> bool:
        return self._teacher_model is not None

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs, given = inputs["model_inputs"], inputs["grpo_batch"]
        if not self.use_liger_loss:
            loss, means = self._compute_loss_and_metrics(model, inputs, given)
            for name, mean in means.items():
                self._metrics["train"][name].append(mean.item())
            return loss
        return self._forward_redirection(
            model, model, lambda *_, **__: self.compute_liger_loss(model, inputs, given), **inputs
        )

    def _get_last_hidden_state(self, model: Any, inputs: dict[str, Tensor], length: int) -> Tensor:
        return model.model(**inputs).last_hidden_state[:, -length - 1 : -1]

    def _get_logps_via_local_forward(
        self, model: Any, inputs: dict[str, Tensor], length: int, ids: Tensor, compute_entropy: bool = False
    ) -> tuple[Tensor, None]:
        logits = model(**inputs).logits[:, -length - 1 : -1] / self.temperature
        return selective_log_softmax(logits, ids[:, -length:]), None

    def rollout_weights(self, given: Any) -> Tensor | None:
        if self.rollout_importance_sampling_mode is None:
            return None
        return (given.old_per_token_logps - given.rollout_per_token_logps).exp().clamp(max=2.0)

    def compute_liger_loss(self, model: Any, inputs: dict[str, Tensor], given: Any) -> Tensor:
        assert not self.template.padding_free
        assert self.advantage_estimator == "grpo"
        mask = given.completion_mask
        loss, metrics = self.liger_grpo_loss(
            _input=self._get_last_hidden_state(model, inputs, given.logits_to_keep),
            lin_weight=model.lm_head.weight,
            selected_token_ids=inputs["input_ids"][:, -given.logits_to_keep :],
            attention_mask=mask,
            advantages=(given.advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1.0),
            bias=model.lm_head.bias,
            old_per_token_logps=given.old_per_token_logps,
            ref_per_token_logps=given.ref_per_token_logps,
            vllm_is_ratio=self.rollout_weights(given),
        )
        if self.beta != 0.0:
            self._metrics["train"]["kl"].append(metrics[0].mean().item())
        self._metrics["train"]["clip_ratio"].append(metrics[-1].mean().item())
        return loss

    def _compute_loss_and_metrics(self, model: Any, inputs: dict[str, Tensor], given: Any) -> Any:
        mask, advantages = given.completion_mask, given.advantages
        ids, length = inputs["input_ids"], given.logits_to_keep
        logp, _ = self._get_logps_via_local_forward(model, inputs, length, ids)
        lengths, change = mask.sum(-1).clamp(min=1), logp - given.old_per_token_logps
        kl = None
        if self.beta and not self.kl_in_reward:
            x = (given.ref_per_token_logps - logp).clamp(-20, 20)
            kl = (x.exp() - x - 1).clamp(-10, 10)
        if self.importance_sampling_level != "token":
            average = ((change * mask).sum(-1) / lengths)[:, None]
            own = logp - logp.detach() + average.detach()
            change = average.expand_as(logp) if self.importance_sampling_level == "sequence" else own
        ratio = change.exp()
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        if self.loss_type == "sapo":
            tau = torch.where(advantages > 0, self.tau_pos, self.tau_neg)
            loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
        else:
            free = ratio if self.args.delta is None else ratio.clamp(max=self.args.delta)
            loss = -torch.min(free * advantages, ratio.clamp(low, high) * advantages)
        loss = loss if kl is None else loss + self.beta * kl
        weights = self.rollout_weights(given)
        loss = loss if weights is None else loss * weights
        total = {
            "bnpo": lambda x: (x * mask).sum() / mask.sum(),
            "dr_grpo": lambda x: (x * mask).sum() / (len(x) * self.max_completion_length),
        }.get(self.loss_type, lambda x: ((x * mask).sum(-1) / lengths).mean())
        outside = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        means = {} if kl is None else {"kl": (kl * mask).sum() / mask.sum()}
        if self.loss_type != "sapo":
            means["clip_ratio/region_mean"] = (outside * mask).sum() / mask.sum()
        return total(loss), means


class ForwardRedirection:
    def __call__(self, wrapper: Any, module: Any, method: Callable[..., Tensor], **inputs: Any) -> Tensor:
        return method(**inputs)


@pytest.fixture(scope="module")
def swift() -> Iterator[Trainer]:
    """ms-swift as a whole, if it is installed. It cannot be imported a second time, so it stays."""
    module = "swift.rlhf_trainers.grpo_trainer"
    if importlib.util.find_spec("swift") is not None:
        yield Trainer(importlib.import_module(module), importlib.import_module(ADAPTER), False)
        return
    name = {"selective_log_softmax": selective_log_softmax}
    own = {
        "GRPOTrainer": GRPOTrainer,
        "GRPOBatch": SimpleNamespace,
        "_ForwardRedirection": ForwardRedirection,
    }
    stand_in = {module: name | own, "swift.rlhf_trainers.rlhf_mixin": name}
    for kind in ("CPO", "ORPO"):
        where = f"swift.rlhf_trainers.{kind.lower()}_trainer"
        stand_in[where] = name | {f"HF{kind}Trainer": type(f"{kind}Trainer", (), {"__module__": where})}
    with trainer(module, "swift", stand_in, version="4.6.0") as found:
        yield found


@pytest.fixture(autouse=True)
def restored(swift: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after each test what a plugin has changed."""
    for module in swift.ours.MODULES:
        monkeypatch.setattr(module, "selective_log_softmax", module.selective_log_softmax)
    kind = swift.theirs.GRPOTrainer
    monkeypatch.setattr(kind, "_prepare_liger_loss", kind._prepare_liger_loss)


@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_log_probabilities(swift: Trainer, shape: tuple[int, ...]) -> None:
    """Padded and without padding (`padding_free`), values and gradients are those of TRL's function."""
    torch.manual_seed(0)
    logits, index = torch.randn(*shape, V, dtype=torch.float64), torch.randint(0, V, shape)
    upstream, found = torch.randn(shape, dtype=torch.float64), []
    for function in (swift.theirs.selective_log_softmax, swift.ours.swift_logps):
        leaf = logits.clone().requires_grad_()
        logps = function(leaf, index)
        found.append((logps.detach(), gradient((logps * upstream).sum(), leaf)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_zeros_are_written_into_the_result(swift: Trainer) -> None:
    """ms-swift's DPO writes zeros at the prompt's positions, which then have no gradient."""
    torch.manual_seed(1)
    leaf, index = torch.randn(2, 4, V, requires_grad=True), torch.randint(0, V, (2, 4))
    prompt = torch.tensor([True, False, False, True])
    logps = swift.ours.swift_logps(leaf, index)
    logps[:, prompt] = 0
    grad = gradient(logps.sum(), leaf)
    assert not grad[:, prompt].any()
    assert grad[:, ~prompt].any(-1).all()


def test_every_trainer_calls_ours(swift: Trainer) -> None:
    """All modules call ours afterwards, and a second call changes nothing. CPO and ORPO use TRL's modules."""
    modules = [swift.theirs, swift.ours.rlhf_mixin]
    for kind in (swift.ours.cpo_trainer.HFCPOTrainer, swift.ours.orpo_trainer.HFORPOTrainer):
        modules.append(importlib.import_module(kind.__module__))
    for _ in range(2):
        swift.ours.fuse_swift_logps()
        for module in modules:
            assert module.selective_log_softmax is swift.ours.swift_logps


class Table(torch.nn.Module):
    """A model whose hidden states are a parameter, `[4, PROMPT + T, H]`, whatever the tokens."""

    def __init__(self, softcap: float | None = None) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(H, V, dtype=torch.float64)
        self.hidden = torch.nn.Parameter(torch.randn(4, PROMPT + T, H, dtype=torch.float64))
        self.config = SimpleNamespace(get_text_config=lambda: self.config, final_logit_softcapping=softcap)
        self.forwards = 0

    def model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def forward(self, **_: Any) -> Any:
        self.forwards += 1
        logits, softcap = self.lm_head(self.hidden), self.config.final_logit_softcapping
        return SimpleNamespace(logits=logits if softcap is None else softcap * torch.tanh(logits / softcap))


ARGUMENTS = {"delta": None, "log_entropy": False, "use_liger_kernel": False, "report_to": []}
ARGUMENTS |= {"per_device_train_batch_size": 4}
SETTINGS: dict[str, Any] = {
    "loss_type": "grpo",
    "beta": 0.0,
    "kl_in_reward": False,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "tau_pos": 1.0,
    "tau_neg": 1.3,
    "temperature": TEMPERATURE,
    "importance_sampling_level": "token",
    "max_completion_length": 16,
    "overlong_filter": False,
    "top_entropy_quantile": 1.0,
    "compute_entropy": False,
    "off_policy_sequence_mask_delta": None,
    "advantage_estimator": "grpo",
    "sdar_loss_coef": 0.0,
    "advantage_reweight": None,
    "chord_sft_iterator": None,
    "rollout_importance_sampling_mode": None,
    "rollout_importance_sampling_threshold": 2.0,
    "disable_rollout_importance_sampling": False,
    "log_rollout_offpolicy_metrics": False,
    "dynamic_num_samples": False,
    "is_multimodal": False,
    "model_kwarg_keys": (),
    "_teacher_model": None,
    "_has_teacher": True,  # of every trainer, because a batch may bring a teacher
}


def new_trainer(kind: Any, model: Table, **options: Any) -> Any:
    """A GRPOTrainer with the attributes that its losses read, and after the preparation of its loss."""
    made = kind.__new__(kind)
    made.model = model
    made.args = SimpleNamespace(**{name: options.pop(name, value) for name, value in ARGUMENTS.items()})
    made.template = SimpleNamespace(padding_free=options.pop("padding_free", False), sequence_parallel_size=1)
    made.accelerator = SimpleNamespace(
        unwrap_model=lambda x: x,
        gather_for_metrics=lambda x: x,
        autocast=nullcontext,
        num_processes=1,
        is_main_process=True,
    )
    made.control = SimpleNamespace(should_evaluate=False)
    made._metrics = {"train": defaultdict(list)}
    vars(made).update({**SETTINGS, **options})
    made._prepare_liger_loss()
    return made


def inputs_of(kind: Any, model: Table, given: Batch) -> dict[str, Any]:
    """A batch as ms-swift makes it, with old log-probabilities near those of the model."""
    ids = torch.randint(0, V, (4, PROMPT + T))
    logits = model().logits[:, PROMPT - 1 : -1] / TEMPERATURE
    near = selective_log_softmax(logits, ids[:, PROMPT:]).detach()
    old = near + given.ref - given.old
    return {
        "model_inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "grpo_batch": kind(
            completion_mask=given.mask > 0,
            truncated_mask=torch.zeros(4, dtype=torch.bool),
            seq_lengths=torch.full((4,), PROMPT + T),
            old_per_token_logps=old,
            ref_per_token_logps=near + given.logps - given.old,
            rollout_per_token_logps=old - 3 * given.sampler,
            teacher_per_token_logps=None,
            advantages=given.advantages[:, :1].expand(4, T),
            logits_to_keep=T,
        ),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "KL": {"beta": 0.1},
    "KL in the reward": {"beta": 0.1, "kl_in_reward": True},
    "two-sided": {"delta": 1.4},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.02},
    "gspo_token": {"importance_sampling_level": "sequence_token", "epsilon_low": 0.02, "epsilon_high": 0.02},
    "weights": {"rollout_importance_sampling_mode": "token_truncate"},
    "softcap": {"softcap": 0.7},
}


@pytest.fixture
def fuse(swift: Trainer) -> Callable[[], None]:
    return importlib.import_module(f"{ADAPTER}_loss").fuse_swift_loss


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_from_hidden_states(swift: Trainer, fuse: Callable[[], None], name: str) -> None:
    """Log-probabilities, loss, metrics and gradients of hidden states and head are ms-swift's, in fp64."""
    torch.manual_seed(2)
    options = dict(OPTIONS[name])
    model = Table(options.pop("softcap", None))
    inputs = inputs_of(swift.theirs.GRPOBatch, model, batch(9))
    found = []
    for plugin in (lambda: None, fuse):
        plugin()
        made = new_trainer(swift.theirs.GRPOTrainer, model, **options)
        assert made.use_liger_loss is (plugin is fuse)
        ids = inputs["model_inputs"]["input_ids"]
        with torch.no_grad():
            logps, _ = made._get_logps_via_local_forward(model, inputs["model_inputs"], T, ids)
        loss = made.compute_loss(model, inputs)
        metrics = dict(made._metrics["train"])
        clipped = (
            metrics["clip_ratio" if plugin is fuse else "clip_ratio/region_mean"] if name != "sapo" else []
        )
        grads = torch.autograd.grad(loss, tuple(model.parameters()))
        assert made.beta == options.get("beta", 0.0)
        assert model.forwards == 3  # of these two calls, and one of `inputs_of`: ours compute no logits
        found.append([logps, loss, *grads, *map(torch.tensor, (metrics.get("kl", []), clipped))])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


REFUSED: list[dict[str, Any]] = [
    {"loss_type": "dapo"},
    {"loss_type": "real"},
    {"advantage_estimator": "rloo"},
    {"overlong_filter": True},
    {"top_entropy_quantile": 0.2},
    {"off_policy_sequence_mask_delta": 0.1},
    {"log_entropy": True},
    {"log_rollout_offpolicy_metrics": True},
    {"_teacher_model": object()},
    {"padding_free": True},
    {"beta": 0.1, "rollout_importance_sampling_mode": "token_truncate"},
]


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_refused(swift: Trainer, fuse: Callable[[], None], options: dict[str, Any]) -> None:
    """An option that this loss would ignore raises in the constructor."""
    fuse()
    with pytest.raises(ValueError, match="fuse_swift_loss does not support"):
        new_trainer(swift.theirs.GRPOTrainer, Table(), **options)


def test_a_head_that_is_more_than_linear(swift: Trainer, fuse: Callable[[], None]) -> None:
    """ms-swift passes on only the weight and the bias of the head, so LoRA on it would be lost."""
    model = Table()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Identity())
    fuse()
    with pytest.raises(ValueError, match=r"does not support an lm_head of .*Sequential"):
        new_trainer(swift.theirs.GRPOTrainer, model)


def test_a_teacher_of_a_batch(swift: Trainer, fuse: Callable[[], None]) -> None:
    """A column `teacher_prompt` gives each token its own advantage, and ms-swift passes on their mean."""
    fuse()
    model = Table()
    inputs = inputs_of(swift.theirs.GRPOBatch, model, batch(9))
    inputs["grpo_batch"].teacher_per_token_logps = inputs["grpo_batch"].old_per_token_logps
    made = new_trainer(swift.theirs.GRPOTrainer, model)
    with pytest.raises(ValueError, match="does not support a teacher"):
        made.compute_loss(model, inputs)
