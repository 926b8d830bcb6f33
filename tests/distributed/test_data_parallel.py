"""DDP and FSDP2 on several ranks equal one process, with `global_normalizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import data_parallel
from distributed.launch import run_workers, session_folder
from grpo_kernels.normalizers import global_normalizer

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
IDS = torch.tensor([4, 4, 5])


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.long)], ids="{} ranks".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    thin = request.config.getoption("--pairwise")
    folder = session_folder(tmp_path_factory)
    return run_workers(Path(data_parallel.__file__), request.param, folder, pairwise=thin)


@pytest.mark.parametrize("name", data_parallel.cases.params())
def test_data_parallel(outcomes: dict[str, str], name: str) -> None:
    if "fsdp2" in name and torch.__version__.startswith("2.8."):
        pytest.skip("over gloo, FSDP2 of torch 2.8 sums the gradients of the ranks instead of averaging them")
    assert outcomes[name] == "ok", outcomes[name]


@pytest.mark.parametrize(
    "mask, options, expected",
    [
        (MASK, {}, 3),
        ([MASK, MASK[:, :2]], {}, 6),
        (MASK.flatten(), {}, 3),
        (MASK, {"aggregation": "token-sum"}, 1),
        (MASK, {"aggregation": "seq-mean-token-mean"}, 3),  # an empty sequence counts, as in the loss
        (MASK.flatten(), {"aggregation": "seq-mean-token-sum", "seq_lens": torch.tensor([3, 6])}, 2),
        (iter([MASK, MASK[0]]), {"aggregation": "seq-mean-token-sum", "seq_lens": [torch.tensor([3])]}, 4),
        (MASK[:0], {"aggregation": "seq-mean-token-mean"}, 0),
        # A prompt without tokens counts, as in the loss. Ids of micro-batches are not compared.
        (MASK, {"aggregation": "prompt-mean", "prompt_ids": torch.tensor([2**60, -1, 2**60])}, 2),
        ([MASK, MASK[:2]], {"aggregation": "prompt-mean", "prompt_ids": [IDS, IDS[:2]]}, 3),
        (MASK.flatten(), {"aggregation": "prompt-mean", "prompt_ids": iter([IDS[:2]])}, 1),
        (MASK[:0], {"aggregation": "prompt-mean", "prompt_ids": IDS[:0]}, 0),
    ],
)
def test_one_process(mask: Any, options: dict[str, Any], expected: int) -> None:
    got = global_normalizer(mask, **options)
    assert (got.dtype, got.shape) == (torch.float32, ())
    assert got == expected


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "token-sum"])
def test_no_device_sync(aggregation: str) -> None:
    """A tensor on "meta" has no values, so reading one would fail."""
    assert global_normalizer([MASK.to("meta")] * 2, aggregation=aggregation).device.type == "meta"


@pytest.mark.parametrize(
    "mask, options, message",
    [
        ([], {}, "mask must hold at least one tensor, got 0"),
        (MASK[None], {}, r"mask must be \[B, T\] or packed \[N\], got shape \(1, 3, 3\)"),
        (MASK, {"aggregation": "mean"}, "aggregation must be one of 'token-mean', .* got 'mean'"),
        (
            MASK[0],
            {"aggregation": "seq-mean-token-mean"},
            "seq_lens must hold one tensor for each packed mask, got 0 for 1 masks",
        ),
        (
            [MASK, MASK],
            {"aggregation": "prompt-mean", "prompt_ids": IDS},
            "prompt_ids must hold one tensor for each mask, got 1 for 2",
        ),
        (MASK, {"aggregation": "prompt-mean"}, "prompt_ids must hold one tensor for each mask, got 0 for 1"),
        (
            MASK,
            {"aggregation": "prompt-mean", "prompt_ids": IDS[:2]},
            r"prompt_ids must be integers of shape \(3,\), got torch.int64 of shape \(2,\)",
        ),
        (
            MASK[0],
            {"aggregation": "prompt-mean", "prompt_ids": MASK},
            r"prompt_ids must be integers of one dimension, got torch.int64 of shape \(3, 3\)",
        ),
    ],
)
def test_refused(mask: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        global_normalizer(mask, **options)


def test_refused_types() -> None:
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        global_normalizer([[1, 0]])  # type: ignore[list-item]
