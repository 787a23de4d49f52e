"""Write what a script found into a Markdown file, between markers: no number there is typed."""

import re
from pathlib import Path


def replaced_between(page: str, name: str, text: str) -> str:
    """Return the page with `text` between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"The page has no single pair of markers <!-- {name}:begin --> and <!-- {name}:end -->.")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def write_between(path: Path, name: str, text: str) -> bool:
    """Replace what stands between the markers in the file at `path`; return whether that changed it."""
    page = path.read_text(encoding="utf-8")
    changed = replaced_between(page, name, text)
    path.write_text(changed, encoding="utf-8")
    return changed != page
