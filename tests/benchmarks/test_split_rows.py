"""The split kernel of benchmarks/experiments/split_rows: its results, its protocol, and its machine code.

Triton's interpreter runs the programs of a grid one after another, so the first one would wait forever. But
its loads and atomics work on raw memory. `at_once` therefore runs each program in its own process, with
tensors in shared memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from benchmarks.experiments.split_rows.launch import VARIANTS, Plan, plan_for, slice_length, split_fused_loss
from benchmarks.experiments.split_rows.resources import compiled
from benchmarks.machine_code.figures import constants
from benchmarks.machine_code.no_gpu import TARGETS, no_device
from benchmarks.machine_code.resources import resources
from benchmarks.machine_code.sass import Sass
from benchmarks.work.workload import Workload
from grpo_kernels import KL, LogRatio, LossSpec, PPOClip, grpo_loss
from grpo_kernels.kernels import fused
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import RandomBatch, make_batch, relative_error

interpreted = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="TRITON_INTERPRET is not set")
compiles = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"
)

SECONDS = 1800  # until a launch counts as hung; on an idle machine it takes a second or two

# Two groups of three blocks. A slice of 64 columns has four chunks of 16.
SMALL = Plan(
    PARTS=3, CHUNKS=4, BLOCK=16, THREADS=2, GROUP=8, PREFETCH=False, num_warps=1, maxnreg=96, groups=2
)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, the programs of a launch of the split kernel run at the same time.

    A launch fails if one of its programs fails, or if it takes longer than SECONDS.
    """
    launch = interpreter.GridExecutor.__call__

    def launch_all(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.fn.__name__ != "split_loss_kernel":
            launch(self, *args, **kwargs)
            return
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                x.untyped_storage().share_memory_()
        (programs,), self.grid = self.grid, (1,)
        running = dict([fork(partial(launch, self, *args, **kwargs), p, programs) for p in range(programs)])
        try:
            wait_for(running)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch_all):
        yield


def fork(launch: Any, program: int, programs: int) -> tuple[int, int]:
    """Starts a process that runs one program of the grid. Returns its process id and the program."""
    pid = os.fork()
    if pid:
        return pid, program
    code = 1
    try:
        builder = interpreter.interpreter_builder
        builder.set_grid_dim = lambda *_: type(builder).set_grid_dim(builder, programs, 1, 1)
        builder.set_grid_idx = lambda *_: type(builder).set_grid_idx(builder, program, 0, 0)
        launch()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(running: dict[int, int]) -> None:
    """Waits until all programs have ended, and removes them from `running`."""
    deadline = time.monotonic() + SECONDS
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                program = running.pop(pid)
                assert status == 0, f"program {program} has failed"
        assert time.monotonic() < deadline, f"programs {sorted(running.values())} have not ended"
        time.sleep(0.01)


def run(
    batch: RandomBatch, spec: LossSpec, *, reference: bool, plan: Plan | None = SMALL, **options: Any
) -> tuple[Any, Tensor]:
    """Output and gradient of `grpo_loss` in place. With `plan=None`, the package's own kernel runs."""
    leaf = batch.logits.clone().requires_grad_()
    with contextlib.ExitStack() as patches:
        if plan is not None:
            split = mock.Mock(side_effect=partial(split_fused_loss, plan=lambda *_: plan))
            patches.enter_context(mock.patch.object(fused, "fused_loss", split))
            patches.enter_context(at_once())
        out = grpo_loss(
            leaf * 1,  # a copy, because a leaf must not be overwritten
            batch.completion_ids,
            batch.advantages,
            spec=spec,
            completion_mask=batch.completion_mask,
            ref_logits=batch.ref_logits if reference else None,
            old_logps=batch.old_logps,
            inplace=True,
            backend="triton",
            **options,
        )
    if plan is not None:
        split.assert_called_once()
    out.loss.backward()
    return out, leaf.grad


def same(got: tuple[Any, Tensor], expected: tuple[Any, Tensor]) -> None:
    """Asserts equality up to some ulp, because the kernels do the same in fp32 in another order."""
    (out, grad), (true_out, true_grad) = got, expected
    torch.testing.assert_close(out.loss, true_out.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(out.logps, true_out.logps, rtol=1e-6, atol=2e-6, equal_nan=True)
    if out.ref_logps is not None:
        torch.testing.assert_close(out.ref_logps, true_out.ref_logps, rtol=1e-6, atol=2e-6, equal_nan=True)
    for name, metric in out.metrics.items():
        torch.testing.assert_close(metric, true_out.metrics[name], rtol=1e-5, atol=1e-6, equal_nan=True)
    # Both round to the nearest number of the logits' dtype, so they differ by one ulp at most.
    rtol = 2 * torch.finfo(grad.dtype).eps if grad.dtype != torch.float32 else 2e-5
    torch.testing.assert_close(grad, true_grad, rtol=rtol, atol=1e-9, equal_nan=True)


K3 = LossSpec(PPOClip(), KL("k3", beta=0.3))
CASES = {
    "ppo": (LossSpec(PPOClip(), log_ratio_clamp=5.0), False),
    "k3": (K3, True),
    "log-ratio to the reference": (LossSpec(LogRatio(), log_ratio_clamp=None), True),
}


@interpreted
@pytest.mark.parametrize("prefetch", [False, True], ids=["", "prefetch"])
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case: str, prefetch: bool) -> None:
    """There are more rows than groups. V = 130 has two full slices and one that ends in a vector of 8."""
    spec, reference = CASES[case]
    batch = make_batch(3, 5, 130, seed=1)
    out, grad = run(
        batch, spec, reference=reference, plan=SMALL._replace(GROUP=1, BLOCK=16, PREFETCH=prefetch)
    )

    leaf = batch.logits.double().requires_grad_()
    truth = reference_loss(
        leaf,
        batch.completion_ids,
        batch.advantages,
        spec=spec,
        completion_mask=batch.completion_mask,
        ref_logits=batch.ref_logits.double() if reference else None,
        old_logps=batch.old_logps,
    )
    truth.loss.backward()
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logps.double(), truth.logps, rtol=0, atol=1e-5)
    shared = out.metrics.keys() & truth.metrics.keys()
    assert {"ratio", *(["kl_exact"] if reference else [])} <= shared
    for name in shared:
        metric, expected = out.metrics[name].double(), truth.metrics[name].double()
        torch.testing.assert_close(metric, expected, rtol=1e-5, atol=1e-5)
    # Log-probabilities in fp32 have errors of 1e-6, which the ratio multiplies in the gradient.
    assert relative_error(grad, leaf.grad).max() < 2e-5
    inactive = ~batch.completion_mask | ((batch.advantages == 0)[:, None] & (spec.kl is None))
    assert inactive.any() and not grad[inactive].any()
    assert grad[~inactive].any(-1).float().mean() > 0.3


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "reference", [pytest.param(False, marks=pytest.mark.long), True], ids=["", "reference"]
)
def test_against_the_fused_kernel(dtype: torch.dtype, reference: bool) -> None:
    """Options: weights and temperatures per token, a scale, padded columns, and a last slice of 8 columns."""
    batch = make_batch(2, 6, 136 + 24, dtype=dtype, seed=2)
    options = {
        "vocab_size": 136,
        "temperature": torch.linspace(0.7, 1.5, 12).view(2, 6),
        "logit_scale": 0.8,
        "token_weights": torch.linspace(0, 2, 12).view(2, 6),
    }
    batch = batch._replace(completion_ids=batch.completion_ids % 136)
    spec = K3 if reference else CASES["ppo"][0]
    for plan in (SMALL, SMALL._replace(groups=1, PREFETCH=True)):
        got = run(batch, spec, reference=reference, plan=plan, **options)
        same(got, run(batch, spec, reference=reference, plan=None, **options))
        assert not got[1][..., 136:].any()


@interpreted
@pytest.mark.long
def test_hard_rows() -> None:
    """Rows with -inf in a slice, in all but the taken token or in the taken token; NaN, inf, and a wrong id.

    The last row has only zeros, but its words must not be 0.
    """
    batch = make_batch(1, 9, 192, masked=0, inactive=0, seed=3)
    logits, ref_logits, ids = batch.logits, batch.ref_logits, batch.completion_ids
    ids[0] = torch.tensor([5, 70, 130, 191, 192, 7, 8, 9, 100])
    logits[0, 0, 64:128] = -torch.inf
    ref_logits[0, 0, 64:128] = -torch.inf
    logits[0, 1, :70] = logits[0, 1, 71:] = -torch.inf
    logits[0, 2, 130] = -torch.inf
    ref_logits[0, 3, 128:191] = -torch.inf
    logits[0, 5, 100] = torch.nan
    logits[0, 6, 150] = torch.inf
    logits[0, 7] = -torch.inf
    logits[0, 8] = ref_logits[0, 8] = 0.0
    batch = batch._replace(advantages=torch.ones(1))
    for spec, reference in CASES.values():
        got = run(batch, spec, reference=reference)
        same(got, run(batch, spec, reference=reference, plan=None))
        assert got[1][0, :2].isfinite().all()
        assert got[1][0, 5:8].isnan().any(-1).all() and got[0].logps[0, 4].isnan()
        assert got[1][0, 8].isfinite().all()


@interpreted
@pytest.mark.parametrize(
    "prefetch", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "prefetch"]
)
def test_masked_rows_are_not_read(prefetch: bool) -> None:
    """Addresses show that for the reference. The policy has NaN in its masked rows."""
    plan = SMALL._replace(PREFETCH=prefetch)
    batch = make_batch(2, 5, 192, seed=4)
    masked = ~batch.completion_mask
    assert 0 < masked.sum() < 10
    expected = run(batch, K3, reference=True, plan=plan)
    for x in (batch.logits, batch.ref_logits):
        x[masked] = torch.nan
    batch.completion_ids[masked] = 2**40
    start = batch.ref_logits.share_memory_().data_ptr()
    load = interpreter.InterpreterBuilder.create_masked_load

    def load_checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        rows = (pointers.data[mask.data].astype("int64") - start) // (192 * 4)
        here = rows[(rows >= 0) & (rows < 10)]
        assert not masked.flatten()[torch.from_numpy(here)].any(), "a masked row is read"
        return load(self, pointers, mask, *rest)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", load_checked):
        out, grad = run(batch, K3, reference=True, plan=plan)
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])
    assert not grad[masked].any()


@interpreted
@pytest.mark.parametrize("slow", [0, *(pytest.param(x, marks=pytest.mark.long) for x in (1, 2))])
def test_any_block_may_be_late(slow: int) -> None:
    """Each block in turn is the last to write its words, and the others wait for it in every row."""
    batch = make_batch(1, 4, 192, masked=0, inactive=0, seed=5)
    expected = run(batch, K3, reference=True, plan=None)
    launch = fork

    def fork_late(call: Any, program: int, programs: int) -> tuple[int, int]:
        def late() -> None:
            exchange = interpreter.InterpreterBuilder.create_atomic_rmw

            def exchange_late(*args: Any) -> Any:
                time.sleep(0.1 * (program == slow))
                return exchange(*args)

            with mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", exchange_late):
                call()

        return launch(late, program, programs)

    with mock.patch(f"{__name__}.fork", fork_late):
        same(run(batch, K3, reference=True, plan=SMALL._replace(groups=1)), expected)


@interpreted
def test_a_hang_is_detected() -> None:
    """If a block is missing, the others wait forever for its words."""
    batch = make_batch(1, 2, 192, masked=0, seed=6)
    launch = fork

    def fork_but_one(call: Any, program: int, programs: int) -> tuple[int, int]:
        return launch((lambda: None) if program == 1 else call, program, programs)

    with (
        mock.patch(f"{__name__}.fork", fork_but_one),
        mock.patch(f"{__name__}.SECONDS", 2),
        pytest.raises(AssertionError, match=r"programs .* have not ended"),
    ):
        run(batch, K3, reference=True)


def test_unsupported_options() -> None:
    batch = make_batch(1, 2, 192, seed=7)
    cases = {
        "entropy": {"return_entropy": True},
        "softcap": {"logit_softcap": 30.0},
        "kl_kind 'exact'": {"spec": LossSpec(PPOClip(), KL("exact"))},
    }
    for what, options in cases.items():
        options = {"spec": LossSpec(), **options}
        with (
            mock.patch.object(fused, "fused_loss", partial(split_fused_loss, plan=lambda *_: SMALL)),
            mock.patch("grpo_kernels.losses.choose_backend", lambda *_: "triton"),
            pytest.raises(ValueError, match=re.escape(what)),
        ):
            grpo_loss(
                batch.logits.clone().requires_grad_() * 1,
                batch.completion_ids,
                batch.advantages,
                ref_logits=batch.ref_logits,
                inplace=True,
                **options,
            )


@pytest.mark.compile
@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", ["grpo", "grpo_kl"])
def test_machine_code(loss: str, variant: str, target: str) -> None:
    """Few spills, each logit loaded once by 16-byte loads, no fence, and no barrier while polling."""
    kernel = compiled(Workload("logits", loss, 4096, 151936), target, **VARIANTS[variant])
    used = resources(kernel)
    assert used.spills <= 4 and used.shared_bytes < 1024, used
    ptx = kernel.asm["ptx"]
    assert not re.search(r"fence|membar|acquire|release|acq_rel", ptx)
    constant = constants(kernel)
    copies = (1 + (loss == "grpo_kl")) * (1 + constant["PREFETCH"])
    assert ptx.count("ld.global.v4.b32") == copies * constant["CHUNKS"]
    # The other loads are the target, the taken logits, and 4 bytes each of advantage, weight and old logp.
    assert len(re.findall(r"ld\.global\.\w+", ptx)) - copies * constant["CHUNKS"] <= 4 + copies
    assert ptx.count("ld.volatile.global.b64") == 2 * constant["KINDS"]
    polling = [x for x in Sass(kernel.asm["cubin"]).loops if x.count("LDG.E.64.STRONG") and not x.stores]
    assert len(polling) == 1 and polling[0].count("LDG.E.64.STRONG") == constant["KINDS"]
    assert not polling[0].count("BAR")


@pytest.mark.compile
@compiles
def test_the_grid_is_resident() -> None:
    """The 65536 registers of each of 132 multiprocessors suffice for all blocks."""
    for V, dtype in itertools.product(
        (32000, 50257, 128256, 151936, 201088), (torch.bfloat16, torch.float32)
    ):
        for options, kinds in itertools.product(VARIANTS.values(), (1, 2, 3)):
            with no_device(TARGETS["sm_90"]):
                plan = plan_for(torch.empty(1, 4, V, dtype=dtype, device="meta"), V, kinds, **options)
            blocks = -(-plan.PARTS * plan.groups // 132)
            assert plan.groups >= 1 and blocks * plan.THREADS * plan.maxnreg <= 65536
            assert plan.PARTS < 32
            assert V <= plan.PARTS * slice_length(V, plan.PARTS) <= plan.PARTS * plan.CHUNKS * plan.BLOCK
