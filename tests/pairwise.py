"""`pytest --pairwise`: runs a few cases of each test function, which contain every pair of parameter values.

Most faults show at one value of one parameter, or at two values of two parameters together. A test of five
parameters finds them with a tenth of its cases or fewer. If the pairs need more than `MOST` cases, only every
value is kept. `make test` runs the chosen cases, `make test-all` every case. Cases marked `long` are left to
`make test-all` as well.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

MOST = 12  # cases of one test function


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairwise",
        action="store_true",
        help="of each test function, run only cases that together contain every pair of its parameters' "
        f"values (every value, if that takes more than {MOST}), and none marked long",
    )


@pytest.hookimpl(trylast=True)  # after -k and -m, so that no chosen case is deselected by them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--pairwise"):
        return
    kept = pairwise([item for item in items if item.get_closest_marker("long") is None])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pairwise(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return the items to keep, chosen for each test function separately."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(function_of(item), []).append(item)
    return {cases[i] for cases in functions.values() for i in few([parameters_of(item) for item in cases])}


def function_of(item: pytest.Item) -> str:
    """Return the test function's name with its file and class, without parameters."""
    callspec = getattr(item, "callspec", None)
    return item.nodeid if callspec is None else item.nodeid.removesuffix(f"[{callspec.id}]")


def parameters_of(item: pytest.Item) -> Mapping[str, Any]:
    """Return the values of a case's parameters, including those of its fixtures."""
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def few(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """Choose cases of one test function by pairs of values, or by values if that takes more than `MOST`."""
    by_pairs = thinned(cases)
    return by_pairs if len(by_pairs) <= MOST else thinned(cases, size=1)


def thinned(cases: Sequence[Mapping[str, Any]], *, size: int = 2) -> list[int]:
    """Choose cases that contain every combination of `size` values that occurs in `cases`.

    The choice is greedy. The next case is always the one with the most combinations that no chosen case
    holds, and the first of several such cases. So it depends on nothing but the order of the cases, and every
    process makes the same choice, as pytest-xdist requires.

    Args:
        cases: Values of the parameters by name, one mapping per case. They may all be empty.
        size: Number of parameters in a combination.

    Returns:
        Positions in `cases`, in ascending order.
    """
    numbers = Numbers()
    held = [combinations_in(params, numbers, size) for params in cases]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(held[i]))
        chosen.append(best)
        found = frozenset(held[best])
        missing -= found
        for each in held:
            each -= found
    return sorted(chosen)


def combinations_in(params: Mapping[str, Any], numbers: Numbers, size: int) -> set[tuple[Hashable, ...]]:
    """Return the combinations of `size` values. Fewer parameters give one combination of all values."""
    values = [(name, numbers[value]) for name, value in params.items()]
    return set(combinations(values, size)) if len(values) >= size else {tuple(values)}


class Numbers:
    """Numbers the values in the order of their first use.

    Two values are the same if they are equal and have the same type. Values that cannot be hashed are only
    the same if they are one object.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __getitem__(self, value: Any) -> int:
        try:
            hash(value)
        except TypeError:
            value = id(value)
        return self._numbers.setdefault((type(value), value), len(self._numbers))
