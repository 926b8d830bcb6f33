"""The table of machine code counts the right instructions of the peers' kernels."""

from __future__ import annotations

import os
from functools import partial

import pytest

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
pytest.importorskip("triton")

from benchmarks.machine_code import comparison, peers  # noqa: E402
from benchmarks.machine_code.cases import CASES  # noqa: E402
from benchmarks.machine_code.figures import OURS, compiled, kernel_name, read_passes  # noqa: E402
from benchmarks.machine_code.no_gpu import TARGETS, launches_for  # noqa: E402
from benchmarks.machine_code.resources import resources  # noqa: E402
from benchmarks.machine_code.sass import Sass  # noqa: E402

# Elements per thread in a block of the row.
KERNELS = {
    "liger": {
        "grpo_loss.selective_log_softmax": 2048 // 32,
        "grpo_loss.grpo_loss_fwd": 2048 // 32,
        "grpo_loss.grpo_loss_bwd": 4096 // 512,
    },
    "trl": {"logprob_entropy.forward": 1024 // 128, "logprob_entropy.backward": 1024 // 128},
    "trl, chunked head": {"chunked_logprob.forward": 1024 // 128, "chunked_logprob.backward": 1024 // 128},
}


@pytest.mark.parametrize("target", comparison.COMPARED)
@pytest.mark.parametrize("peer", KERNELS)
def test_kernels_of_peers(peer: str, target: str) -> None:
    """A kernel has one loop over the row with a block per iteration, or no loop and a block per program."""
    if not peers.installed(peer):
        pytest.skip("not installed")
    with launches_for(TARGETS[target]) as kernels:
        peers.call_peer(peer)
    assert {kernel_name(kernel) for kernel in kernels} == KERNELS[peer].keys()
    for kernel in dict.fromkeys(kernels):
        (p,) = read_passes(kernel, resources(kernel).threads)
        assert p.elements == KERNELS[peer][kernel_name(kernel)]
        sass = Sass(kernel.asm["cubin"])
        if p.narrowest_bits is None:
            code = sass.way_through()
            assert max(i.loaded_bits for i in code) == 16 * p.elements  # bits of bf16
            # The gradient of a masked row is stored on another path.
            assert [i.bits for i in code if i.opcode.startswith("STG")] == [16 * p.elements]
        else:
            assert p.narrowest_bits == 128
        assert sum(loop.loaded_bytes > 0 for loop in sass.loops) == (p.narrowest_bits is not None)
        # One exponential per element, and for statistics one that rescales the sum to a new maximum.
        assert p.exponentials * p.elements == p.elements + (p.name == "statistics")
        # At least those for conversion, scale, maximum, exponential and sum or rounding.
        assert 5 < p.instructions < 31


def test_every_comparison_is_found() -> None:
    names = [name for name in comparison.PEERS_OF_JOBS if peers.installed(name)]
    calls = [CASES[name] for name in comparison.CASES_OF_JOBS]
    calls += [partial(peers.call_peer, name) for name in names]
    rows = [row for call in calls for one in compiled(call, "sm_90") for row in comparison.rows_of(one)]
    titles, _, *lines = comparison.comparison(rows).splitlines()
    there = {OURS, *(peer.split(",")[0] for peer in names)}
    wanted = [(job.what, one) for job in comparison.JOBS for one in job.kernels if one in there]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [tuple(line[:2]) for line in cells] == wanted
    assert all(len(line) == titles.count("|") - 1 and "" not in line for line in cells)


def test_names_of_packages() -> None:
    """A package with several providers has one name in the table."""
    names = {job_name for job in comparison.JOBS for job_name in job.kernels}
    assert names == {comparison.provider_of(package) for package in (OURS, "liger_kernel", "trl")}
