"""The cells of a folder, whether a sweep or a single replay wrote it: what went in, and what came out."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import read_text

T = TypeVar("T", bound=msgspec.Struct)

SWEEP_SCHEMA = "moetrace.sweep/1"
CELL_SCHEMA = "moetrace.cell/1"
RESULT_SCHEMA = "moetrace.result/1"
# Of a SHA-256's digits, as many as tell apart what one project ever has.
_DIGITS = 12
_HASH = re.compile(r"[0-9a-f]{8,128}")


class Measured(NamedTuple):
    """A cell: its inputs by kind (`trace`, `model`, `system`, `policy`, `slots`, ...), and its figures or its error."""

    name: str
    inputs: dict[str, Any]
    figures: dict[str, Any]  # of its policy, as in summary.json
    trace: dict[str, Any]  # what tells a person which one it was
    error: str | None = None


class Folder(NamedTuple):
    """What a folder holds: the code that wrote it, and its cells in their order."""

    moetrace: str
    engine: str | None
    cells: list[Measured]


class _Summary(msgspec.Struct):
    schema: str
    moetrace: str
    trace: dict[str, Any]
    model: dict[str, Any]
    system: dict[str, Any]
    slots: int
    policies: list[dict[str, Any]]
    engine: str | None = None


class _Listed(msgspec.Struct):
    name: str
    cell: str | None
    error: str | None = None


class _Sweep(msgspec.Struct):
    schema: str
    moetrace: str
    engine: str | None
    cells: list[_Listed]


class _Cell(msgspec.Struct):
    schema: str
    inputs: dict[str, Any]
    result: _Summary


def read_folder(folder: Path) -> Folder:
    """Read what `moetrace sweep -o` or `moetrace replay -o` left in `folder`; a sweep if both are there.

    Raises UsageError if it is no such folder, MoetraceError if a file in it cannot be read or is damaged.
    """
    if (folder / "sweep.json").exists():
        return _sweep(folder)
    if (folder / "summary.json").exists():
        return _replay(folder / "summary.json")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name one that moetrace sweep -o or replay -o wrote.")
    raise UsageError(f"{folder} holds neither sweep.json nor summary.json: moetrace sweep -o or replay -o writes them.")


def identity(value: object) -> str | int | None:
    """What stands for an input in a baseline: a number itself, a SHA-256's first digits, or those of the content.

    The top-level `name` of a spec is a label, and does not count; nor does a field that is not set, so that one which a
    later version adds changes nothing as long as nobody sets it.
    """
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:_DIGITS]
    if isinstance(value, Mapping):
        value = {key: inner for key, inner in _given(value).items() if key != "name"}
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:_DIGITS]


def _given(value: Any) -> Any:
    """A spec without the fields that are None."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return value


def read_json(path: Path) -> Any:
    """Read JSON as plain values: no key twice, no NaN or infinity. Raises MoetraceError with the line if it is not."""
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair alone is no text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        conflict = "; it has the marks of a merge conflict" if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE) else ""
        raise MoetraceError(f"{path}, line {error.lineno}: not JSON: {error.msg}{conflict}.") from None
    except UnicodeEncodeError:
        raise MoetraceError(f"{path}: a text in it is no Unicode.") from None
    except (ValueError, RecursionError) as error:
        why = "objects or lists lie too deep in each other" if isinstance(error, RecursionError) else error
        raise MoetraceError(f"{path}: {why}.") from None


def explained(error: Exception, path: str = "") -> str:
    """msgspec's message with the path of the bad field in front; `path` is where its `$` is."""
    what, _, at = str(error).partition(" - at `$")
    at = f"{path}{at.rstrip('`')}".lstrip(".")
    return f"{at}: {what}" if at else what


def _replay(path: Path) -> Folder:
    summary = _decoded(path, _Summary, RESULT_SCHEMA)
    names = [_policy_name(policy, path) for policy in summary.policies]
    cells = [
        _measured(f"{summary.model.get('name')}/{summary.system.get('name')}/{name}", summary, policy)
        for name, policy in zip(names, summary.policies, strict=True)
    ]
    return Folder(summary.moetrace, summary.engine, _distinct(cells, path))


def _sweep(folder: Path) -> Folder:
    path = folder / "sweep.json"
    sweep = _decoded(path, _Sweep, SWEEP_SCHEMA)
    return Folder(sweep.moetrace, sweep.engine, _distinct([_listed(folder, one) for one in sweep.cells], path))


def _listed(folder: Path, one: _Listed) -> Measured:
    if one.error is not None or one.cell is None:
        return Measured(one.name, {}, {}, {}, one.error or "it was not run to its end")
    if not _HASH.fullmatch(one.cell):  # else a stranger's file might lead out of the folder
        raise MoetraceError(f"{folder / 'sweep.json'}: the cell of {one.name} is no hash.")
    path = folder / "cells" / f"{one.cell}.json"
    cell = _decoded(path, _Cell, CELL_SCHEMA)
    if len(cell.result.policies) != 1:
        raise MoetraceError(f"{path}: result.policies wants one policy.")
    found = _measured(one.name, cell.result, cell.result.policies[0])
    # Of a sweep they say more: the content of a policy's files, axes of their own.
    given = {kind: value for kind, value in cell.inputs.items() if value not in (None, False, {})}
    return found._replace(inputs=found.inputs | given)


def _measured(name: str, summary: _Summary, policy: dict[str, Any]) -> Measured:
    trace = summary.trace
    inputs = {
        "trace": trace.get("sha256") or {key: value for key, value in trace.items() if key != "sha256"},
        "model": summary.model,
        "system": summary.system,
        "policy": policy.get("choices", {}),
        "slots": summary.slots,
    }
    facts = {key: trace[key] for key in ("model", "rows", "steps", "requests") if key in trace}
    return Measured(name, inputs, policy, facts)


def _decoded(path: Path, kind: type[T], schema: str) -> T:
    raw = read_json(path)
    stated = raw.get("schema") if isinstance(raw, dict) else None
    if stated != schema:
        raise MoetraceError(f"{path}: schema wants {schema!r}, got {str(stated)[:100]!r}.")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise MoetraceError(f"{path}: {explained(error)}.") from None


def _policy_name(policy: dict[str, Any], path: Path) -> str:
    name = policy.get("name")
    if not isinstance(name, str):
        raise MoetraceError(f"{path}: the name of a policy wants a text.")
    return name


def _distinct(cells: list[Measured], path: Path) -> list[Measured]:
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise MoetraceError(f"{path}: two cells are called {twice}.")
    if not cells:
        raise MoetraceError(f"{path} holds no cell.")
    return cells


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"{twice[:200]!r} is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
