"""Formats Markdown tables, and the notes below them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table whose first `text_columns` columns are aligned left and the others right."""
    rules = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rules, *lines))


def notes(reasons: Iterable[tuple[str, str]], works: Collection[str]) -> str:
    """A list of `reasons`, pairs of a reason and the workload it applies to.

    The workloads are named unless a reason applies to all of `works`.
    """
    of: dict[str, dict[str, None]] = {}
    for why, work in reasons:
        of.setdefault(why, {})[work] = None
    return "".join(
        f"* {why}{'' if len(x) == len(works) else ' (' + '; '.join(x) + ')'}\n" for why, x in of.items()
    )
