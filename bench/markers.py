"""Write what a benchmark measured into a Markdown file, between markers: no number there is typed."""

import re
from pathlib import Path


def write_between(path: Path, name: str, text: str) -> bool:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; return whether that changed it."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"{path} has no single pair of markers <!-- {name}:begin --> and <!-- {name}:end -->.")
    changed = pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)
    path.write_text(changed)
    return changed != page
