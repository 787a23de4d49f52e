"""The tables of figures in docs/results.md and docs/gate.md, and of ranges in docs/security.md, from their records.

python bench/figures.py     write all between their markers
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markers import replaced_between
from msgspec import Meta, inspect

from moetrace.results.record import METRICS, PolicyFigures, Spread, fields_of
from moetrace.spec import Model, PolicySpec, System
from moetrace.spec.field_types import range_of

DOCS = Path(__file__).parents[1] / "docs"
_DIRECTIONS = (("less", "lower"), ("more", "higher"), ("neither", None))


def pages() -> dict[Path, str]:
    """Return what each page should be, by its path."""
    results, gate, security = DOCS / "results.md", DOCS / "gate.md", DOCS / "security.md"
    return {
        results: replaced_between(results.read_text(encoding="utf-8"), "figures", "\n".join(_figures())),
        gate: replaced_between(gate.read_text(encoding="utf-8"), "metrics", "\n".join(_metrics())),
        security: replaced_between(security.read_text(encoding="utf-8"), "ranges", "\n".join(_ranges())),
    }


def _figures() -> Iterator[str]:
    """Yield the table of the keys of a policy in `summary.json`."""
    yield "| key | unit | better | meaning |"
    yield "| --- | --- | --- | --- |"
    better = {code: word for word, code in _DIRECTIONS} | {None: ""}
    for name, note, kind in fields_of(PolicyFigures):
        if isinstance(note, Meta):
            yield f"| `{name}` | | | {note.description} |"
            continue
        parts = f": {', '.join(f'`{part}`' for part in Spread.__struct_fields__)}" if kind is Spread else ""
        yield f"| `{name}` | {note.unit} | {better[note.better]} | {note.meaning}{parts} |".replace("|  |", "| |")


def _metrics() -> Iterator[str]:
    """Yield the table of what a baseline may hold, by direction."""
    yield "| better | metrics |"
    yield "| --- | --- |"
    for word, code in _DIRECTIONS:
        names = [name for name, figure in METRICS.items() if figure.better == code]
        yield f"| {word} | {'; '.join(_listed(names))} |"


def _ranges() -> Iterator[str]:
    """Yield the table of what each number of a spec may be."""
    yield "| spec | fields | from | to |"
    yield "| --- | --- | ---: | ---: |"
    for spec, struct in (("model", Model), ("system", System), ("policy", PolicySpec)):
        alike: dict[str, list[str]] = {}
        for path, kind in _numbers(inspect.type_info(struct)):
            alike.setdefault(range_of(kind), []).append(f"`{path}`")
        for ends, fields in alike.items():
            least, _, most = ends.removeprefix(" from ").partition(" to ")
            yield f"| {spec} | {', '.join(fields)} | {least} | {most} |"


def _numbers(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and type of each field that holds a number, or a table of numbers."""
    for field in kind.fields:
        path = f"{prefix}{field.encode_name}"
        for one in (getattr(one, "item_type", one) for one in getattr(field.type, "types", [field.type])):
            if isinstance(one, inspect.StructType):
                yield from _numbers(one, f"{path}.")
        if range_of(field.type):
            yield path, field.type


def _listed(names: list[str]) -> Iterator[str]:
    """Yield names by commas, those without parts first; then what has the same parts, with them behind."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name.partition(".")[2])
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, parts in groups.items():
        alike.setdefault(tuple(parts), []).append(f"`{name}`")
    for parts, several in sorted(alike.items()):
        ending = f" with {', '.join(f'`.{part}`' for part in parts)}" if parts != ("",) else ""
        yield f"{', '.join(several)}{ending}"


if __name__ == "__main__":
    for path, page in pages().items():
        path.write_text(page, encoding="utf-8")
