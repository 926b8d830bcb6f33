"""ms-swift's log-probabilities and its GRPO loss from hidden states, called as its trainers call them.

Stand-ins, because its trainers need TRL below 1.0: two modules with the name that ms-swift 4.6.0 calls in
`swift/rlhf_trainers/grpo_trainer.py`, lines 38, 1489, 1592 and 1602, and in `rlhf_mixin.py`, lines 13, 169
and 177; the call of `liger_grpo_loss` in `compute_liger_loss`, lines 1775 to 1815; and the formula of
`_compute_loss_and_metrics`, lines 959 to 1102.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers import Trainer, batch, gradient, trainer
from torch import Tensor

V = 13


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's function, in plain PyTorch."""
    return torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0]


class GRPOTrainer:
    """ms-swift's GRPOTrainer, as far as it prepares and calls its loss from hidden states."""

    def __init__(self, **options: Any) -> None:
        delta, log_entropy = options.pop("delta", None), options.pop("log_entropy", False)
        self.args = SimpleNamespace(delta=delta, log_entropy=log_entropy)
        self.template = SimpleNamespace(padding_free=False, sequence_parallel_size=1)
        settings = {
            "loss_type": "grpo",
            "beta": 0.0,
            "kl_in_reward": False,
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "tau_pos": 1.0,
            "tau_neg": 1.3,
            "temperature": 0.9,
            "importance_sampling_level": "token",
            "max_completion_length": 16,
            "overlong_filter": False,
            "top_entropy_quantile": 1.0,
            "off_policy_sequence_mask_delta": None,
            "sdar_loss_coef": 0.0,
            "advantage_reweight": None,
            "_has_teacher": False,
            "rollout_importance_sampling_mode": None,
        }
        vars(self).update({**settings, **options})
        self._prepare_liger_loss()

    def _prepare_liger_loss(self) -> None:
        self.use_liger_loss = False

    def compute_liger_loss(self, hidden: Tensor, head: torch.nn.Linear, ids: Tensor, given: Any) -> Any:
        return self.liger_grpo_loss(
            _input=hidden,
            lin_weight=head.weight,
            selected_token_ids=ids,
            attention_mask=given.mask > 0,
            advantages=given.advantages[:, 0],
            bias=head.bias,
            old_per_token_logps=given.old,
            ref_per_token_logps=given.ref if self.beta else None,
            vllm_is_ratio=given.sampler.exp() if self.rollout_importance_sampling_mode else None,
        )


def loss_of(trainer: GRPOTrainer, hidden: Tensor, head: torch.nn.Linear, ids: Tensor, given: Any) -> Any:
    """ms-swift's loss from logits, and its mean KL and share of clipped tokens."""
    logp = selective_log_softmax(head(hidden) / trainer.temperature, ids)
    mask, advantages = given.mask, given.advantages[:, :1]
    lengths, change = mask.sum(-1).clamp(min=1), logp - given.old
    kl = None
    if trainer.beta:
        x = (given.ref - logp).clamp(-20, 20)
        kl = (x.exp() - x - 1).clamp(-10, 10)
    if trainer.importance_sampling_level != "token":
        average = ((change * mask).sum(-1) / lengths)[:, None]
        own = logp - logp.detach() + average.detach()
        change = average.expand_as(logp) if trainer.importance_sampling_level == "sequence" else own
    ratio = change.exp()
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
    outside = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    if trainer.loss_type == "sapo":
        tau = torch.where(advantages > 0, trainer.tau_pos, trainer.tau_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    else:
        free = ratio if trainer.args.delta is None else ratio.clamp(max=trainer.args.delta)
        loss = -torch.min(free * advantages, ratio.clamp(low, high) * advantages)
    loss = loss if kl is None else loss + trainer.beta * kl
    if trainer.rollout_importance_sampling_mode:
        loss = loss * given.sampler.exp()
    total = {
        "bnpo": lambda x: (x * mask).sum() / mask.sum(),
        "dr_grpo": lambda x: (x * mask).sum() / (len(x) * trainer.max_completion_length),
    }.get(trainer.loss_type, lambda x: ((x * mask).sum(-1) / lengths).mean())
    means = [None if x is None else (x * mask).sum() / mask.sum() for x in (kl, outside.to(loss.dtype))]
    return total(loss), means


@pytest.fixture(scope="module")
def swift() -> Iterator[Trainer]:
    name = {"selective_log_softmax": selective_log_softmax}
    own = {"GRPOTrainer": GRPOTrainer, "_ForwardRedirection": object}
    stand_in = {"swift.rlhf_trainers.grpo_trainer": name | own, "swift.rlhf_trainers.rlhf_mixin": name}
    module = "swift.rlhf_trainers.grpo_trainer"
    with trainer(module, "swift", stand_in, version="4.6.0") as found:
        yield found


@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_log_probabilities(swift: Trainer, shape: tuple[int, ...]) -> None:
    """Padded and without padding (`padding_free`), values and gradients are those of TRL's function."""
    torch.manual_seed(0)
    logits, index = torch.randn(*shape, V, dtype=torch.float64), torch.randint(0, V, shape)
    upstream, found = torch.randn(shape, dtype=torch.float64), []
    for function in (selective_log_softmax, swift.ours.swift_logps):
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
    """Both modules call our function afterwards, and a second call changes nothing."""
    for _ in range(2):
        swift.ours.fuse_swift_logps()
        for module in (swift.theirs, swift.ours.rlhf_mixin):
            assert module.selective_log_softmax is swift.ours.swift_logps


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "KL": {"beta": 0.1},
    "KL in the reward": {"beta": 0.1, "kl_in_reward": True},
    "two-sided": {"delta": 1.1},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.02},
    "gspo_token": {"importance_sampling_level": "sequence_token", "epsilon_low": 0.02, "epsilon_high": 0.02},
    "weights": {"rollout_importance_sampling_mode": "token_truncate"},
}


@pytest.fixture
def fused(swift: Trainer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ms-swift's GRPOTrainer after `fuse_swift_loss`, and the function of that name."""
    kind = swift.theirs.GRPOTrainer
    monkeypatch.setattr(kind, "_prepare_liger_loss", kind._prepare_liger_loss)
    importlib.import_module("grpo_kernels.integrations.swift_loss").fuse_swift_loss()
    return kind


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_from_hidden_states(fused: Any, name: str) -> None:
    """Loss, metrics and gradients of hidden states and head are those of ms-swift, in fp64."""
    torch.manual_seed(2)
    given = batch(9)
    head = torch.nn.Linear(6, V, dtype=torch.float64)
    hidden, ids = torch.randn(4, 7, 6, dtype=torch.float64), torch.randint(0, V, (4, 7))
    near = selective_log_softmax(head(hidden) / 0.9, ids).detach()
    given = given._replace(old=near + given.ref - given.old, ref=near + given.logps - given.old)
    trainer, found = fused(**OPTIONS[name]), []
    if trainer.kl_in_reward:
        trainer.beta = 0.0  # ms-swift's own loss has no KL then
    assert trainer.use_liger_loss
    for function in (lambda *x: loss_of(trainer, *x), trainer.compute_liger_loss):
        leaf = hidden.clone().requires_grad_()
        loss, (kl, clip) = function(leaf, head, ids, given)
        grads = torch.autograd.grad(loss, (leaf, *head.parameters()))
        found.append((loss, *grads, *([kl] if trainer.beta else []), *([] if name == "sapo" else [clip])))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "real"},
        {"overlong_filter": True},
        {"top_entropy_quantile": 0.2},
        {"off_policy_sequence_mask_delta": 0.1},
        {"log_entropy": True},
        {"_has_teacher": True},
        {"beta": 0.1, "rollout_importance_sampling_mode": "token_truncate"},
    ],
)
def test_what_is_refused(fused: Any, options: dict[str, Any]) -> None:
    """An option that this loss would ignore raises in the constructor."""
    with pytest.raises(ValueError, match="fuse_swift_loss does not support"):
        fused(**options)
