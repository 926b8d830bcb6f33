"""`pytest --pairwise` keeps every pair of parameter values and every test, and its choice is fixed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from pairwise import MOST, few, thinned

# Equal values of different types count as different: 1 == 1.0 == True.
PARAMETERS = {
    "loss": list("abcdefg"),
    "dtype": [1, 1.0, True],
    "packed": [False, True],
    "backend": ["x", "y"],
}


def grid(**parameters: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(parameters, values, strict=True)) for values in product(*parameters.values())]


def pairs_in(cases: list[Mapping[str, Any]]) -> set[frozenset[tuple[str, str]]]:
    """Return the pairs of values by their representations, independently of pairwise.py."""
    return {
        frozenset([(one, repr(case[one])), (other, repr(case[other]))])
        for case in cases
        for one, other in combinations(case, 2)
    }


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(grid(**PARAMETERS), id="every combination"),
        pytest.param([c for i, c in enumerate(grid(**PARAMETERS)) if i % 5 != 2], id="some combinations"),
        pytest.param([*grid(**PARAMETERS)[::7], {"loss": "a", "packed": True}], id="a parameter missing"),
    ],
)
def test_every_pair_stays(cases: list[dict[str, Any]]) -> None:
    kept = thinned(cases)
    assert kept == sorted(set(kept))
    assert pairs_in([cases[i] for i in kept]) == pairs_in(cases)


def test_few_cases_stay() -> None:
    """7 losses times 3 dtypes is the minimum."""
    assert len(grid(**PARAMETERS)) == 84
    assert 21 <= len(thinned(grid(**PARAMETERS))) <= 23


def test_every_value_stays_of_many_pairs() -> None:
    """The pairs of 9 losses and 5 dtypes are 45."""
    cases = grid(loss=list("abcdefghi"), dtype=list(range(5)), packed=[False, True])
    assert len(thinned(cases)) > MOST
    kept = [cases[i] for i in few(cases)]
    assert len(kept) == 9
    values = [{(name, value) for case in given for name, value in case.items()} for given in (kept, cases)]
    assert values[0] == values[1]
    others = {name: values for name, values in PARAMETERS.items() if name != "loss"}
    assert few(grid(**others)) == thinned(grid(**others))


def test_one_parameter_keeps_every_value() -> None:
    assert thinned(grid(value=[3, 1, 3.0, [1], [2], 3])) == [0, 1, 2, 3, 4]  # the last is the first again


def test_a_test_without_parameters_stays() -> None:
    assert thinned([{}]) == [0]


def test_values_that_cannot_be_hashed() -> None:
    one, other = {"a": 1}, {"a": 1}
    assert thinned(grid(options=[one, other], packed=[False, True])) == [0, 1, 2, 3]


EXAMPLE = """
import pytest

@pytest.fixture(scope="session", params=["torch", "triton"])
def backend(request):
    return request.param

@pytest.fixture(params=[1, 2, 3])
def unrelated(request):
    return request.param

class TestSome:
    @pytest.mark.parametrize("letter", "abc")
    @pytest.mark.parametrize("number", [1, "one", None, frozenset("xyz")])
    def test_three(self, letter, number, backend):
        pass

    def test_two(self, backend, unrelated):
        pass

@pytest.mark.parametrize("letter", [*"abcde", pytest.param("f", marks=pytest.mark.long)])
def test_one(letter):
    pass

def test_none():
    pass

@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.long)])
def ranks(request):
    return request.param

@pytest.mark.parametrize("name", "abc")
def test_ranks(ranks, name):
    pass
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    (folder / "test_example.py").write_text(EXAMPLE, encoding="utf-8")
    return folder


def collected(folder: Path, *options: str, seed: int = 0) -> list[str]:
    """Return the cases that pytest would run in a process with this hash seed."""
    env = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "pairwise", "--collect-only", "-q", *options, "."]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def functions(names: list[str]) -> list[str]:
    return [name.split("[")[0].split("::")[-1] for name in names]


def test_the_option(example: Path) -> None:
    every, kept = functions(collected(example)), functions(collected(example, "--pairwise"))
    assert {name: (every.count(name), kept.count(name)) for name in every} == {
        "test_three": (24, 12),
        "test_two": (6, 6),
        "test_one": (6, 5),  # one is marked long
        "test_none": (1, 1),
        "test_ranks": (6, 3),  # cases with 4 ranks are marked long
    }


@pytest.mark.long
def test_every_process_chooses_the_same(example: Path) -> None:
    """Strings hash differently in each process."""
    assert collected(example, "--pairwise", seed=1) == collected(example, "--pairwise", seed=2)


def test_cases_that_k_deselects_hold_no_pair(example: Path) -> None:
    """Within one backend, all 12 pairs of letter and number are needed."""
    assert len(collected(example, "--pairwise", "-k", "triton and three")) == 12
