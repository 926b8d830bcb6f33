"""The losses that docs/custom_losses.md defines."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "custom_losses.md"


def page_code() -> list[str]:
    """Return the Python blocks of the page in order."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@functools.cache
def page() -> dict[str, Any]:
    """Run all blocks of the page in one namespace and return it."""
    names: dict[str, Any] = {}
    for number, code in enumerate(page_code()):
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
    return names
