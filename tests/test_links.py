"""Links lead somewhere: between pages, to headings, to files of the repository, and from docstrings to pages."""

import re
from functools import cache
from pathlib import Path

import pytest
import reference
from pages import ROOT

# A fence or a span of code: what only looks like a link in it.
_CODE = re.compile(r"^(`{3,}).*?^\1$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|\b(?:href|src)=\"([^\"]+)\"", re.MULTILINE)
# Pages of other projects that the code names -> where.
OF_OTHERS = {"docs/telemetry.md": "bigmoeonedge.py"}
_FILES = ("*.md", ".github/**/*.md", "docs/**/*.md", "bench/**/*.md", "findings/*.md", "traces/*.md")
PAGES = sorted({path for pattern in _FILES for path in ROOT.glob(pattern)})


def _plain(text: str) -> str:
    """The page without its fences and spans of code."""
    return _CODE.sub("", text)


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, without those to other servers."""
    found = [next(filter(None, target)) for target in _LINK.findall(_plain(text))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The headings of a page as parts of an address, as far as GitHub and the site agree on them."""
    found: set[str] = set()
    text = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    for head in re.findall(r"^#+ (.*)", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).replace("`", "")
        on_github = re.sub(r"[^\w -]", "", words.strip().lower()).replace(" ", "-")
        on_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        if on_github == on_site:
            found.add(on_site)
    return found


@cache
def anchors_of(path: Path) -> set[str]:
    return anchors(path.read_text(encoding="utf-8"))


def dead(path: Path, text: str, made: dict[str, str] | None = None) -> list[str]:
    """The links of a page that lead nowhere. `made` are pages that exist on the site only."""
    found = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        to = (path.parent / target).resolve() if target else path
        page = (made or {}).get(str(to.relative_to(ROOT))) if to.is_relative_to(ROOT) else None
        there = page is not None or to.exists()
        known = anchors(page) if page is not None else anchors_of(to) if there and to.suffix == ".md" else set()
        if not there or (anchor and anchor not in known):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(path):
    assert dead(path, path.read_text(encoding="utf-8")) == []


def test_links_of_the_reference_lead_somewhere():
    pages = {f"docs/{name}": text for name, text in reference.pages().items()}
    assert {name: lost for name, text in pages.items() if (lost := dead(ROOT / name, text, pages))} == {}


def test_pages_that_the_code_names_are_there():
    """Docstrings, help and messages name pages as docs/NAME.md; the reference makes links of them."""
    named = {}
    for path in sorted((ROOT / "moetrace").rglob("*.py")):
        for page in re.findall(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?", path.read_text(encoding="utf-8")):
            named.setdefault(page, path.name)
    lost = {}
    for page, by in named.items():
        target, _, anchor = page.partition("#")
        if not (ROOT / target).is_file() or (anchor and anchor not in anchors_of(ROOT / target)):
            lost[page] = by
    assert len(named) > 5 and lost == OF_OTHERS


def test_every_page_has_a_place_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert [page for page in [*pages, *reference.pages()] if f": {page}\n" not in nav] == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Other\n\n## A `part` of it\n")
    text = "# One\n\n[a](other.md) [b](other.md#a-part-of-it) [c](#one) [d](#two) [e](no.md) [f](other.md#no)\n"
    text += "`[g](no.md)` [h](https://example.org/no)\n```md\n[i](no.md)\n```\n![`j`](no.png)\n"
    (tmp_path / "one.md").write_text(text)
    assert dead(tmp_path / "one.md", text) == ["#two", "no.md", "other.md#no", "no.png"]
