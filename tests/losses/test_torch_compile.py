"""The losses from logits under torch.compile."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from parity import EVERYTHING, NEEDS_DYNAMO, Case, run, small, user_loss

from grpo_kernels import (
    KL,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    importance_weights,
    mismatch_metrics,
    rejection_mask,
    selective_logps,
)
from grpo_kernels.testing import make_batch

PROMPT_MEAN = LossSpec(PPOClip(), KL("exact"), aggregation="prompt-mean")


@NEEDS_DYNAMO
class TestCompile:
    """Forward and backward are one graph without a break and give the bits of eager execution.

    With Triton the loss may differ by roundings, because a graph computes it in PyTorch and eager code in one
    launch.
    """

    ROUNDINGS: ClassVar = {"torch": {"rtol": 0, "atol": 0}, "triton": {"rtol": 1e-6, "atol": 1e-8}}

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    def assert_equal_to_eager(self, case: Case, **options: Any) -> None:
        eager = run(grpo_loss, case, **options)
        compiled = run(torch.compile(grpo_loss, fullgraph=True, backend="aot_eager"), case, **options)
        near = self.ROUNDINGS[options["backend"]]
        torch.testing.assert_close(compiled.grad, eager.grad, **near)
        torch.testing.assert_close(tuple(compiled.out), tuple(eager.out), **near)

    @pytest.mark.parametrize(
        "spec, how",
        [
            (LossSpec.preset("grpo"), {"ref": None}),
            (LossSpec.preset("log_ratio"), {}),
            (LossSpec.preset("importance_ratio"), {"ref": "logps"}),
            (LossSpec.preset("dr_grpo", max_tokens=3, kl=KL("k3")), {"packed": True, "ref": "logps"}),
            (LossSpec.preset("grpo", kl=KL("k1")), {"packed": True}),
            (LossSpec.preset("gspo", kl=KL("k3", ratio_corrected=True)), {"packed": True}),
            (LossSpec.preset("gmpo"), {"ref": None}),
            (LossSpec.preset("vespo"), {"packed": True, "ref": None}),
            (EVERYTHING, {}),
            (LossSpec(PPOClip(), KL("exact")), {}),
            (LossSpec(Reinforce(), KL("exact_forward")), {"packed": True}),
            (LossSpec(Reinforce(), entropy_coef=0.1), {"ref": None}),
            (LossSpec(user_loss), {"ref": None}),
            (PROMPT_MEAN, {}),
            (PROMPT_MEAN, {"packed": True}),
        ],
        ids=[
            "grpo",
            "log_ratio",
            "ratio",
            "dr_grpo",
            "packed",
            "gspo",
            "gmpo",
            "vespo",
            "everything",
            "exact KL",
            "forward KL",
            "entropy",
            "callable",
            "prompts",
            "prompts, packed",
        ],
    )
    def test_losses(self, device: str, spec: LossSpec, how: dict[str, Any]) -> None:
        self.assert_equal_to_eager(small(device, spec, **how), backend="torch")

    def test_other_prompts_do_not_compile_again(self, device: str) -> None:
        """The number of prompts is no shape."""
        case = small(device, PROMPT_MEAN)
        compiled = torch.compile(grpo_loss, fullgraph=True, backend="aot_eager")
        run(compiled, case, backend="torch")
        for ids in ([0, 0, 0, 0], [3, 2, 1, 0], [-7, 2**60, -7, -7]):
            other = case.with_options(prompt_ids=torch.tensor(ids, device=device))
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = run(compiled, other, backend="torch")
            torch.testing.assert_close(got.grad, run(grpo_loss, other, backend="torch").grad)

    def test_kernels(self, device: str, backend: str) -> None:
        self.assert_equal_to_eager(small(device), backend=backend, return_entropy=True)

    def test_options_per_token(self, device: str) -> None:
        tokens = torch.linspace(0.5, 1.5, 12, device=device).view(4, 3)
        case = small(device).with_options(
            token_weights=tokens, temperature=tokens, logit_softcap=5.0, vocab_size=36
        )
        case.completion_ids.clamp_(max=35)
        self.assert_equal_to_eager(case, backend="torch")

    def test_in_place_takes_two_steps(self, device: str, backend: str) -> None:
        case = small(device)
        eager = run(grpo_loss, case, backend=backend)
        compiled = run(
            torch.compile(grpo_loss, fullgraph=True, backend="aot_eager"), case, backend=backend, inplace=True
        )
        torch.testing.assert_close(compiled.grad, eager.grad, **self.ROUNDINGS[backend])

    def test_dynamic_shapes_compile_once(self, device: str) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(grpo_loss, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for shape in ((2, 3, 37), (3, 5, 37), (4, 7, 41)):
            batch = make_batch(*shape, device=device)
            options = {name: getattr(batch, name) for name in ("completion_mask", "old_logps", "ref_logits")}
            case = Case(LossSpec(PPOClip(), KL("exact")), *batch[:3], options)
            eager, got = (run(loss, case, backend="torch") for loss in (grpo_loss, compiled))
            torch.testing.assert_close(got.grad, eager.grad, rtol=0, atol=0)
            torch.testing.assert_close(tuple(got.out), tuple(eager.out), rtol=0, atol=0)
            counts.append(counter.frame_count)
        assert counts[0] > 0 and len(set(counts)) == 1

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_selective_logps(self, device: str, dynamic: bool) -> None:
        batch = make_batch(2, 3, 37, device=device)
        compiled = torch.compile(selective_logps, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        results = []
        for call in (selective_logps, compiled):
            leaf = batch.logits.clone().requires_grad_()
            logps, entropy = call(leaf, batch.completion_ids, return_entropy=True, backend="torch")
            (logps - 0.1 * entropy).sum().backward()
            results.append((logps.detach(), entropy.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize(
        "helper, options",
        [
            (importance_weights, {"level": "token", "mode": "mask", "low": 0.5}),
            (importance_weights, {"level": "sequence"}),
            (importance_weights, {"level": "geometric", "high": 1.1, "normalize": True}),
            (rejection_mask, {"statistic": "tv", "high": 0.2}),
            (rejection_mask, {"statistic": "k1", "over": "sequence-mean", "low": -0.1, "high": 0.1}),
            (rejection_mask, {"statistic": "k3", "over": "sequence-max", "high": 0.2}),
            (mismatch_metrics, {"level": "sequence", "low": 0.5, "high": 2.0}),
        ],
        ids=lambda x: getattr(x, "__name__", None) or "-".join(map(str, x.values())),
    )
    def test_corrections_of_the_sampler(
        self, helper: Any, options: dict[str, Any], packed: bool, device: str
    ) -> None:
        """They are one graph without a break, and give the values of eager execution."""
        generator = torch.Generator().manual_seed(0)
        logps = -3 * torch.rand(4, 5, generator=generator)
        tokens = [logps, logps - 0.5 * torch.randn(4, 5, generator=generator), torch.ones(4, 5)]
        tokens[1][1, 2], tokens[2][2], tokens[2][0, 3:] = torch.nan, 0, 0
        if packed:
            tokens = [x.reshape(-1) for x in tokens]
            options = options | {"seq_lens": torch.tensor([5, 5, 5, 0, 5], device=device)}
        args = [x.to(device) for x in tokens]
        compiled = torch.compile(helper, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args, **options), helper(*args, **options), rtol=1e-6, atol=1e-7)


@NEEDS_DYNAMO
@pytest.mark.parametrize("call", [1, 2])
def test_a_process_group_makes_no_other_test_fail(call: int) -> None:
    """Dynamo looks up its functions again in a test of a process group. The next test still compiles."""
    torch.compiler.reset()
    if call == 1:
        torch._dynamo.trace_rules.clear_lru_cache()  # as `init_process_group` does
        torch._dynamo.trace_rules.get_torch_obj_rule_map()
        return
    logits = torch.randn(2, 3, 7)
    torch.compile(selective_logps, fullgraph=True, backend="eager")(
        logits, torch.ones(2, 3, dtype=torch.int64)
    )
