"""The hook of mkdocs.yml: adds the reference pages, and makes links to files outside docs/ lead somewhere in the site.

In the repository, a page links to `../traces/README.md` or `../bench/pages.py`. The site has such a file too: Markdown
and pictures at their own path, any other file as a page that shows it, a folder as a list of its files. The README's
part is played by the front page.
"""

import importlib
import inspect
import posixpath
import re
from html import escape
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
# A name in the reference, not of a public class: its module, and the name itself.
_NAMED = re.compile(r'<span title="(moetrace(?:\.[a-z_]+)+)\.([A-Z]\w*)">\2</span>')
# An item of a list whose text begins less than four places in.
_ITEM = re.compile(r"(?:[-*] {1,2}|\d\. )(?=\S)")
_CODE = re.compile(r"`[^`\n]+`")
# On GitHub a list may follow a line of text at once; here it would be part of the paragraph.
_GLUED = re.compile(r"^(?![-*|#>`]|\d+\. | |$).*\n(?:[-*]|\d+\.) ", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and what pages link to outside docs/."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    named = re.findall(r"'([^']+\.md)'", str(config.nav))
    waiting = [path for path in named if not files.get_file_from_path(path)]
    for file in files.documentation_pages():
        waiting += _targets(f"docs/{file.src_uri}", file.content_string)
    while waiting:
        source = waiting.pop()
        path = _place(source)
        if path is None or source.startswith("docs/") or files.get_file_from_path(path):
            continue
        if (ROOT / source).is_dir():
            names = sorted(file.name for file in (ROOT / source).iterdir() if file.is_file())
            waiting += [f"{source}/{name}" for name in names]
            links = "\n".join(f"- [{name}]({name}.md)" for name in names)
            files.append(File.generated(config, path, content=f"# {source}\n\n{links}\n"))
            continue
        content = (ROOT / source).read_bytes()
        if source.endswith(".md"):
            waiting += _targets(source, content.decode())
        elif path.endswith(".md"):
            content = _shown(source, content.decode()).encode()
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their places in the site."""
    here = page.file.src_uri
    source = f"docs/{here}" if page.file.src_dir or here.startswith("reference/") else here
    if glued := _GLUED.search(re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)):
        raise PluginError(f"{source}: leave an empty line before the list after {glued[0].splitlines()[0]!r}.")

    def moved(match: re.Match) -> str:
        place = _place(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1])))
        return posixpath.relpath(place, posixpath.dirname(here) or ".") if place else match[1]

    if here.startswith("source/"):
        return markdown
    markdown = _nested(markdown)
    # In a table GitHub wants \| for | in code, where the backslash would be shown here.
    return _CODE.sub(lambda code: code[0].replace("\\|", "|"), _LINK.sub(moved, markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """In the reference of Python, link the names of pages, as docs/results.md; show constants and types by value."""
    if page.file.src_uri != "reference/python.md":
        return output
    linked = re.sub(r"\bdocs/([\w/-]+)\.md\b", r'<a href="../\1.html">\g<0></a>', output)
    return _NAMED.sub(_by_value, linked)


def _by_value(match: re.Match) -> str:
    """Show a default that is a constant, or a type that is an alias, as what it stands for."""
    thing = getattr(importlib.import_module(match[1]), match[2])
    if isinstance(thing, (str, int, float, tuple)):
        return escape(repr(thing))
    if isinstance(thing, type) or "moetrace" in getattr(thing, "__module__", ""):
        return match[0]
    return escape(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(thing)))


def _nested(markdown: str) -> str:
    """Indent what belongs to a list's item by four spaces a level, as the site wants; on GitHub two or three do."""
    lines, in_list, in_code = [], False, False
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip())
        if line.startswith("```"):
            in_code = not in_code
        elif line and not indent:
            in_list = bool(_ITEM.match(line))
        lines.append(" " * indent + line if in_list and not in_code and indent >= 2 else line)
    return "\n".join(lines)


def _targets(source: str, text: str) -> list[str]:
    return [posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link in _LINK.findall(text)]


def _place(source: str) -> str | None:
    """Return where in the site a file of the repository is; None if there is no such file."""
    if source.startswith("../") or not (ROOT / source).exists():
        return None
    if (ROOT / source).is_dir():
        return f"source/{source}/index.md"
    if source == "README.md":
        return "index.md"
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return source if source.endswith((".md", ".png")) else f"source/{source}.md"


def _shown(source: str, text: str) -> str:
    """A page that shows a file."""
    kind = {".py": "python", ".toml": "toml", ".yml": "yaml"}.get(Path(source).suffix, "text")
    return f"# {source}\n\n`````{kind}\n{text}\n`````\n"
