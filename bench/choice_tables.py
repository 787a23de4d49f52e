"""The tables of every placement, dispatch, residency and prefetch in docs/policies.md, from their records.

python bench/choice_tables.py             write them into the page
python bench/choice_tables.py --print     print them, with what installed packages add
"""

import sys

from markers import write_between
from pages import ROOT
from reference import table

from moetrace.spec.choices import FOLDERS, described, source_of

PAGE = ROOT / "docs/policies.md"
_HEAD = ("name", "meaning", "parameters", "goes with", "used by")


def tables(built_in: bool) -> dict[str, str]:
    """Return a Markdown table of each kind of choice, of all records or of the built-in ones, by the kind's plural."""
    return {folder: _table(kind, built_in) for kind, folder in FOLDERS.items()}


def _table(kind: str, built_in: bool) -> str:
    rows = []
    for row in described(kind):
        name = row["name"].partition(",")[0]
        if not (built_in and source_of(kind, name)):
            cells = [_codes(row["name"]), row["meaning"], _codes(row["parameters"]), _partners(row["goes_with"])]
            rows.append((*cells, row["used_by"]))
    return table(_HEAD, rows)


def _codes(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", ") if name)


def _partners(text: str) -> str:
    """`residency none, prefetch none` and `prefetch none, oracle:d`, with the names as code."""
    parts = []
    for part in text.split(", "):
        kind, _, name = part.rpartition(" ")
        parts.append(part if part in ("", "any") else f"{kind} `{name}`".lstrip())
    return ", ".join(parts)


def main() -> None:
    for folder, text in tables(built_in="--print" not in sys.argv).items():
        if "--print" in sys.argv:
            print(f"{folder}\n\n{text}\n")
        else:
            write_between(PAGE, folder, text)


if __name__ == "__main__":
    main()
