"""Every variant of the kernels gives accurate results when its PTX runs in the emulator.

The cases take turns in how the program runs: the order of the warps, errors of approximations, contraction.
Faults of memory, races and outputs that were not written fail each of them (tests/ptx/emulator).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
    pytest.mark.skipif("EMULATE" in os.environ, reason="EMULATE is set: every launch is emulated already"),
]
triton = pytest.importorskip("triton")

from emulated_cases import CASES  # noqa: E402
from emulator import Mode, emulated  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.machine_code.cases import CASES as COMPILED  # noqa: E402
from benchmarks.machine_code.no_gpu import TARGETS, no_device  # noqa: E402
from grpo_kernels.kernels import surrogates  # noqa: E402
from grpo_kernels.kernels.kl import ESTIMATORS  # noqa: E402

MODES = (Mode(), Mode("backward"), Mode(7), Mode(perturb=True), Mode(contract=True))
SEVENTH = 7  # sm_80 runs one case in seven, because it compiles each of them again

TURNS = [("sm_90", name, MODES[i % len(MODES)]) for i, name in enumerate(CASES)]
TURNS += [("sm_80", name, MODES[(i + 2) % len(MODES)]) for i, name in enumerate(list(CASES)[::SEVENTH])]


def description(value: object) -> str | None:
    if not isinstance(value, Mode):
        return None
    return " ".join([str(value.order), *(name for name in ("perturb", "contract") if getattr(value, name))])


@pytest.mark.parametrize(("target", "case", "mode"), TURNS, ids=description)
def test_every_variant(target: str, case: str, mode: Mode) -> None:
    with emulated(target, mode) as launches:
        CASES[case].check(approximate=mode.perturb)
    assert launches


def tensors(x: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result in order."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors(tuple(x.values()))
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors(part)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", ["fp32, rows aligned, two kernels", "V = 31, in place"])
def test_every_mode(case: str, target: str) -> None:
    """No order of the warps changes a bit of the results, and approximations and contraction are harmless."""
    found = []
    for order in ("lockstep", "forward", "backward", 1, 2):
        with emulated(target, Mode(order)):
            found.append([x.detach() for x in tensors(CASES[case].run())])
    first, *others = found
    assert any(bool(x.any()) for x in first)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)
    for mode in (Mode(perturb=True), Mode(contract=True), Mode(3, perturb=True, contract=True)):
        with emulated(target, mode):
            CASES[case].check(approximate=mode.perturb)


Constant = tuple[str, str, str]  # kernel, parameter, value


def constants(calls: Iterable[Callable[[], object]]) -> set[Constant]:
    """Return what the launches of `calls` would compile. Nothing compiles or runs.

    Besides the constants these are the dtypes of the tensors, and None for those that are missing.
    """
    found: set[Constant] = set()

    def record(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for parameter in kernel.params:
            value = given[parameter.name]
            if parameter.name in ("BLOCK", "TAIL"):
                continue
            if parameter.name == "GROUP":
                value = "1" if value == 1 else "> 1"
            if isinstance(value, torch.Tensor):
                value = value.dtype
            elif not (parameter.is_constexpr or value is None):
                continue
            found.add((kernel.__name__, parameter.name, getattr(value, "__name__", str(value))))

    interpreted = mock.patch("grpo_kernels.kernels.launch.INTERPRETED", True)  # accepts CPU tensors
    with no_device(TARGETS["sm_90"]), interpreted, mock.patch.object(JITFunction, "run", record):
        for call in calls:
            call()
    return found


SURROGATE = ["logp", "log_ratio", "advantage", "clamp", "params"]  # the parameters of a surrogate


def wanted() -> set[Constant]:
    """Return the constants that the public functions are known to reach."""
    functions = [
        f for f in vars(surrogates).values() if isinstance(f, JITFunction) and f.arg_names == SURROGATE
    ]
    assert len(functions) >= 9
    found = constants(COMPILED.values())
    kernels = {kernel for kernel, name, _ in found if name == "SURROGATE"}
    assert kernels == {"token_loss_kernel", "token_metrics_kernel", "fused_loss_kernel"}
    for kernel in kernels:
        found |= {(kernel, "SURROGATE", f.__name__) for f in functions}
        found |= {(kernel, "ESTIMATOR", f.__name__) for f in ESTIMATORS.values()}
        found |= {(kernel, name, "True") for name in ("STRAIGHT_THROUGH", "RATIO_CORRECTED")}
    found |= {
        ("token_metrics_kernel", "CLIP", rule) for rule in ("None", "band", "log band", "cap", "region")
    }
    return found


def test_every_constant() -> None:
    """The cases reach every constant of every kernel that is known, and every dtype of its tensors."""
    missing = wanted() - constants(case.run for case in CASES.values())
    assert not missing, sorted(missing)
