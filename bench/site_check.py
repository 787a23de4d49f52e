"""Check a built site: it loads nothing from elsewhere, no link is dead, lists are lists, the search needs no server.

    python bench/site_check.py SITE

`python -m mkdocs build` makes SITE. `.ci/run` calls this. The search is tried where there is a Chromium.
"""

import argparse
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.browser import CHROMIUM, browser  # noqa: E402

_NO_LIST = re.compile(r"(?<=\n) *[-*] (?!\d).*|(?<=\S\n) *\d{1,2}\. .*")  # a title with a number begins its text
_LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
_VERBATIM = ("pre", "script", "style")
_PATIENCE_S = 30.0
_SEARCH = """(async () => {
    document.querySelector('label.md-header__button[for=__search]').click()
    await new Promise(done => setTimeout(done, 500))
    const input = document.querySelector('.md-search__input')
    input.value = 'lower bound'
    input.dispatchEvent(new Event('keyup', {bubbles: true}))
})()"""
_FOUND = "[...document.querySelectorAll('.md-search-result__item h1')].map(one => one.textContent)"


class Page(HTMLParser):
    """What a page loads, where it links to, and what can be linked to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.plain: list[str] = []  # text outside code
        self._code = 0
        self.feed(text)

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.plain.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in _VERBATIM

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag in _VERBATIM
        known = {name: value or "" for name, value in attrs}
        self.names |= {known[name] for name in ("id", "name") if name in known}
        if tag in _LOADS and _LOADS[tag] in known and known.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(known[_LOADS[tag]])
        self.loads += [one.split()[0] for one in known.get("srcset", "").split(",") if one.strip()]
        if tag == "a" and "href" in known:
            self.links.append(known["href"])


def faults(site: Path) -> list[str]:
    """What is wrong with the pages of a site, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        shown = path.relative_to(site)
        found += [f"{shown} loads {url}" for url in page.loads if re.match(r"(?:https?:)?//", url)]
        found += [f"{shown}: not shown as a list: {line}" for part in page.plain for line in _NO_LIST.findall(part)]
        # 404.html stands for any address, so its links begin at the root of the site.
        for url in page.links + page.loads if path.name != "404.html" else []:
            target, _, name = url.partition("#")
            if re.match(r"[a-z]+:|//", url):
                continue
            to = (path.parent / unquote(target)).resolve() if target else path
            if not to.is_file() or (name and to in pages and unquote(name) not in pages[to].names):
                found.append(f"{shown} links to {url}, which is not there")
    return found


def search(site: Path) -> list[str]:
    """What is wrong with the search, in a page that is read from the folder."""
    with browser() as tab:
        tab.call("Page.navigate", url=(site / "index.html").as_uri())
        end = time.monotonic() + _PATIENCE_S
        while not tab.value("document.readyState === 'complete'") and time.monotonic() < end:
            time.sleep(0.1)
        tab.value(_SEARCH)
        while not (titles := tab.value(_FOUND)) and time.monotonic() < end:
            time.sleep(0.2)
        asked = [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))]
    found = [f"The search asks for {url}" for url in asked]
    if not any(title.startswith("The timing model") for title in titles):
        found.append(f"The search for 'lower bound' finds {titles}, and not the timing model.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    site = parser.parse_args().site.resolve()
    found = faults(site)
    if CHROMIUM is None:
        print("No Chromium: the search is not tried.", file=sys.stderr)
    else:
        found += search(site)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
