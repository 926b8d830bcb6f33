"""A wrong tensor or number raises an error before the logits are read. The error names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import PER_TOKEN, B, S, T, V, case, check, ids, lengths, logps, packed, padded, zeros


def test_the_calls_are_right_before_their_changes() -> None:
    for call in (padded, packed, logps):
        call()
    packed(seq_lens=lengths(2, 3), advantages=zeros(S), temperature=zeros(S) + 1)


@pytest.mark.usefixtures("nothing_runs")
class TestTensors:
    @pytest.mark.parametrize("name", PER_TOKEN)
    @pytest.mark.parametrize("shape", [(B, T + 1), (B + 1, T), (B, T, 1), (1,), ()], ids=str)
    def test_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name == "temperature" and shape == ():
            return  # one temperature for all
        value = ids(*shape) if name == "completion_ids" else zeros(*shape)
        check(padded, {name: value}, ValueError, f"{name} must have shape {PER_TOKEN[name]}", f"got {shape}")

    @pytest.mark.parametrize("name", [*PER_TOKEN, "ref_logits"])
    def test_device(self, name: str) -> None:
        shape = (B, T, V) if name == "ref_logits" else (B, T)
        value = ids(*shape, device="meta") if name == "completion_ids" else zeros(*shape, device="meta")
        check(padded, {name: value}, ValueError, f"{name} is on meta, logits on cpu")

    @pytest.mark.parametrize(
        "name", [*(name for name in PER_TOKEN if name != "temperature"), "logits", "ref_logits"]
    )
    @pytest.mark.parametrize("value", [[1.0], "x", 1])
    def test_no_tensor(self, name: str, value: Any) -> None:
        check(padded, {name: value}, TypeError, f"{name} must be a tensor, got {type(value).__name__}")

    @pytest.mark.parametrize(
        "call, changes, parts",
        [
            case(
                padded,
                {"logits": zeros(B, T, V, 1)},
                "logits must be [B, T, V] or packed [N, V]",
                "(2, 3, 7, 1)",
            ),
            case(padded, {"logits": zeros(V)}, "logits must be [B, T, V] or packed [N, V]", "(7,)"),
            case(padded, {"logits": zeros(B, T, 0)}, "vocab_size must be between 1 and the 0 columns"),
            case(padded, {"logits": ids(B, T, V)}, "logits must be fp16, bf16, fp32 or fp64", "int64"),
            case(
                padded,
                {"logits": zeros(B, V, T).mT},
                "logits must have stride 1 along the vocabulary",
                "(21, 1, 3)",
            ),
            case(
                padded, {"ref_logits": zeros(B, T, V + 1)}, "ref_logits", "logits (2, 3, 7)", "got (2, 3, 8)"
            ),
            case(padded, {"ref_logits": zeros(B, V)}, "ref_logits", "logits (2, 3, 7)", "got (2, 7)"),
            case(padded, {"ref_logits": zeros(B, V, T).mT}, "ref_logits must have stride 1", "(21, 1, 3)"),
            case(
                padded, {"ref_logits": ids(B, T, V)}, "ref_logits must be fp16, bf16, fp32 or fp64", "int64"
            ),
            case(
                padded,
                {"ref_logits": zeros(B, T, V).double()},
                "ref_logits is torch.float64",
                "torch.float32",
            ),
            case(
                padded,
                {"ref_logits": zeros(B, T, 5), "vocab_size": 6},
                "ref_logits has 5 columns",
                "fewer than the 6",
            ),
            case(padded, {"completion_ids": zeros(B, T)}, "completion_ids must be int32 or int64", "float32"),
            case(
                padded,
                {"completion_ids": ids(B, T).short()},
                "completion_ids must be int32 or int64",
                "int16",
            ),
            *(
                case(padded, {name: zeros(B, T, dtype=torch.complex64)}, f"{name} must be real", "complex64")
                for name in PER_TOKEN
                if name != "completion_ids"
            ),
            case(logps, {"ids": ids(B, T + 1)}, "ids must have shape (2, 3), as logits (2, 3, 7)", "(2, 4)"),
            case(logps, {"ids": zeros(B, T)}, "ids must be int32 or int64", "float32"),
            case(logps, {"mask": zeros(B)}, "mask must have shape (2, 3)", "(2,)"),
            case(logps, {"mask": zeros(B, T, device="meta")}, "mask is on meta, logits on cpu"),
            case(logps, {"temperature": zeros(T)}, "temperature must have shape (2, 3)", "(3,)"),
        ],
    )
    def test_others(self, call: Callable[..., Any], changes: dict[str, Any], parts: tuple[str, ...]) -> None:
        check(call, changes, ValueError, *parts)


@pytest.mark.usefixtures("nothing_runs")
class TestNumbers:
    @pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf])
    @pytest.mark.parametrize(
        "name", ["temperature", "logit_scale", "logit_softcap", "ref_logit_scale", "ref_logit_softcap"]
    )
    def test_positive(self, name: str, value: float) -> None:
        check(padded, {name: value}, ValueError, f"{name} must be finite and > 0, got {value!r}")

    @pytest.mark.parametrize("value", ["1", True, [1.0]])
    @pytest.mark.parametrize(
        "name", ["temperature", "logit_scale", "logit_softcap", "normalizer", "vocab_size"]
    )
    def test_no_number(self, name: str, value: Any) -> None:
        check(padded, {name: value}, TypeError, f"{name} must be a", f"got {value!r}")

    @pytest.mark.parametrize("call", [padded, logps])
    @pytest.mark.parametrize("value", [0, -1, V + 1])
    def test_vocab_size(self, call: Callable[..., Any], value: int) -> None:
        bound = f"between 1 and the {V} columns" if value > V else ">= 1"
        check(call, {"vocab_size": value}, ValueError, f"vocab_size must be {bound}", f"got {value}")

    @pytest.mark.parametrize("value", [math.nan, math.inf, zeros(2)])
    def test_normalizer(self, value: Any) -> None:
        got = "(2,)" if isinstance(value, Tensor) else f"{value}"
        check(
            padded,
            {"normalizer": value},
            ValueError,
            "normalizer must be",
            f"got {'shape ' * (got == '(2,)')}{got}",
        )
