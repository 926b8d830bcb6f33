"""Markdown tables of results, and the notes below them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    rules = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rules, *lines))


def notes(reasons: Iterable[tuple[str, str]], works: Collection[str]) -> str:
    """Why there are no figures, and of which works where it is not all of them: pairs of the two."""
    of: dict[str, dict[str, None]] = {}
    for why, work in reasons:
        of.setdefault(why, {})[work] = None
    return "".join(
        f"* {why}{'' if len(x) == len(works) else ' (' + '; '.join(x) + ')'}\n" for why, x in of.items()
    )
