"""A system's TOML with some values replaced, its comments kept."""

import json
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import read_text
from moetrace.spec.named import list_presets, preset_text


class Change(NamedTuple):
    """A value to set: `table` ("" for the top), `key`, the value and the comment behind it ("" for none)."""

    table: str
    key: str
    value: str | float | int
    comment: str


def base_text(source: str | Path) -> str:
    """Text of a preset or of a TOML file of a system, comments included."""
    if isinstance(source, str) and source in list_presets("systems"):
        return preset_text("systems", source)
    return read_text(source)


def moved_beside(text: str, source: str | Path, folder: Path) -> str:
    """Return the TOML of a system read from `source` as it has to be in `folder` to name the same files."""
    if isinstance(source, str) and source in list_presets("systems"):
        return text
    raw, changes = tomllib.loads(text), []
    for table, key in (("link", "rates"), ("cluster", "rate_factors")):
        if isinstance(file := raw.get(table, {}).get(key), str) and not Path(file).is_absolute():
            moved = Path(os.path.relpath(Path(source).parent / file, folder)).as_posix()
            changes += [Change(table, key, moved, "")] if Path(moved) != Path(file) else []
    return rewritten(text, changes) if changes else text


def rewritten(text: str, changes: Iterable[Change]) -> str:
    """Return the TOML with every change made: in its place where the key is there, else at the end of its table.

    Raises:
        MoetraceError: The text is laid out in a way that single values cannot be replaced in (inline tables).
    """
    changes = list(changes)
    lines = text.splitlines()
    for change in changes:
        _set(lines, change)
    written = "\n".join(lines).rstrip() + "\n"
    wanted = _with(tomllib.loads(text), changes)
    try:
        same = tomllib.loads(written) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise MoetraceError(
            "The system's TOML cannot be changed line by line: write its tables as [table] and key = value."
        )
    return written


def _set(lines: list[str], change: Change) -> None:
    start, end = _table(lines, change.table)
    entry = f"{change.key} = {_literal(change.value)}"
    line = f"{entry}  # {change.comment}" if change.comment else entry
    for number in range(start, end):
        if re.match(rf"\s*{re.escape(change.key)}\s*=", lines[number]):
            lines[number] = line
            return
    while end > start and not lines[end - 1].strip():
        end -= 1
    lines.insert(end, line)


def _table(lines: list[str], table: str) -> tuple[int, int]:
    """Return first and last line (exclusive) of a table's body; append the table if it is not there."""
    heads = [
        (number, found[1].strip())
        for number, line in enumerate(lines)
        if (found := re.match(r"\s*\[([^\[\]]+)\]", line))
    ]
    if not table:
        return 0, heads[0][0] if heads else len(lines)
    for place, (number, name) in enumerate(heads):
        if name == table:
            return number + 1, heads[place + 1][0] if place + 1 < len(heads) else len(lines)
    while lines and not lines[-1].strip():
        lines.pop()
    lines += ["", f"[{table}]"]
    return len(lines), len(lines)


def _literal(value: str | float | int) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _with(raw: dict[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    for change in changes:
        table = raw
        for name in filter(None, change.table.split(".")):
            table = table.setdefault(name, {})
        table[change.key] = change.value
    return raw
