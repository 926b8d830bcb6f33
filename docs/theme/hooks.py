"""Hooks of mkdocs: which files make the site, formulas as MathML, links from names to their pages."""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/dev/*.md", "docs/api/*.md")
STYLE = ROOT / "docs" / "theme" / "style.css"

LINK = re.compile(r"\]\(([^)\s#]+)")
DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)
DEFINITION = re.compile(r"^(?:def|class) ([A-Za-z]\w*)", re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
# Not the base of an index or exponent, which takes no further element.
FUNCTION = re.compile(
    r"(?<!<msub>)(?<!<msup>)(?<!<munder>)<mi>(log|exp|tanh|max|min|expm1|clip|KL)</mi>(?=<m(?!o))"
)
# A name of the API, or of a page as docstrings give it. Links, headings and blocks of code stay as they are.
NAMED = re.compile(
    r"<(?P<tag>a|h[1-6]|pre)\b.*?</(?P=tag)>"
    r"|<code>(?P<name>\w+)</code>"
    r"|(?<![\w/])(?P<page>docs/[\w/]+\.md)",
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the pages of `docs_dir` by those of the repository, with the files that they link to."""
    for page in files.documentation_pages():
        files.remove(page)
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    linked = {
        (page.parent / unquote(target)).resolve()
        for page in pages
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    }
    others = sorted(path for path in linked if path.is_file() and path.suffix != ".md")
    for path in (*pages, *others, STYLE):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let Markdown be read inside of `<details>`, as on GitHub."""
    return re.sub(r"^<details>", '<details markdown="1">', text, flags=re.MULTILINE)


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw without a script, and link the names in the text."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # its only entry would be the page itself
    names = api_names()

    def link(found: re.Match[str]) -> str:
        if found["name"] in names:
            return f'<autoref identifier="{names[found["name"]]}">{found[0]}</autoref>'
        target = files.get_file_from_path(found["page"]) if found["page"] else None
        if target is None:
            return found[0]
        return f'<a href="{get_relative_url(target.url, page.url)}">{found[0]}</a>'

    return NAMED.sub(link, MATH.sub(math, text))


def math(found: re.Match[str]) -> str:
    """Return a formula as MathML, with a space between the name of a function and its argument."""
    formula = html.unescape(found[2]).strip().replace("{aligned}", "{align*}")  # the converter's name of it
    drawn = convert(formula, display="block" if found[1] == "div" else "inline")
    return FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', drawn)


def api_names() -> dict[str, str]:
    """Return the public names that the API pages document, with their identifiers there."""
    found = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            source = (ROOT / path.replace(".", "/")).with_suffix(".py")
            if source.exists():  # a module: the page documents what it defines
                names = DEFINITION.findall(source.read_text(encoding="utf-8"))
                found |= {name: f"{path}.{name}" for name in names}
            else:
                found[path.rsplit(".", 1)[1]] = path
    return found
