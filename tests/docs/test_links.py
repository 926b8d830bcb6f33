"""The relative links of all Markdown files lead to files and headings that exist, as GitHub names them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs", "examples", "grpo_kernels", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])

FENCE = re.compile(r"^ *(```+)[^\n]*\n.*?^ *\1`*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")


def links(text: str) -> Iterator[str]:
    """Yield the targets of the links, without those in code."""
    text = FENCE.sub("", text)
    # Code is the text of many links. Its brackets may hold anything.
    text = INLINE.sub("code", text)
    yield from LINK.findall(text)
    yield from REFERENCE.findall(text)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading. The site is set to the same rule."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link is its text
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page. A repeated heading is numbered."""
    found: dict[str, int] = {}
    names = set(ANCHOR.findall(text))
    for heading in HEADING.findall(FENCE.sub("", text)):
        name = slug(heading)
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(name if not count else f"{name}-{count}")
    return names


def mistakes(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    found = []
    for target in links(text):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (page.parent / file).resolve() if file else page
        if target.startswith("/") or not path.is_file() or ROOT not in path.parents:
            found.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md":
            known = anchors(text if path == page else path.read_text(encoding="utf-8"))
            if anchor not in known:
                found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    assert not mistakes(page, page.read_text(encoding="utf-8"))


def test_wrong_links_are_found() -> None:
    """The check sees each kind of mistake, and none in code or in a right link."""
    text = """# A heading, `twice`

[right](#a-heading-twice-1) [wrong](#another) [wrong](nowhere.md) [`wrong`](math.md#no-such)
[right](math.md#3-surrogates) [right](https://example.org) [wrong](/math.md) `[no link](in code)`
![wrong](nothing.png) [right](../README.md)

```
[no link](in a block)
```

# A heading, twice
"""
    found = [mistake.split(":")[0] for mistake in mistakes(ROOT / "docs" / "parity.md", text)]
    assert found == ["#another", "nowhere.md", "math.md#no-such", "/math.md", "nothing.png"]
