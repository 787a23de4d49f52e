"""The content of a folder that `moetrace replay -o` or `moetrace sweep -o` wrote: its summary, its sweep, its cells.

A report reads what it draws as structs. A gate reads a cell as plain values, since it compares all that are there.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from moetrace.results.publish import file_in
from moetrace.results.read_json import MOST_JSON_BYTES, convert_strict, decode_json, read_strict_json
from moetrace.results.record import (
    CELL_SCHEMA,
    CELLS_FOLDER,
    FIGURES,
    RESULT_SCHEMA,
    SUMMARY_FILE,
    SWEEP_FILE,
    SWEEP_SCHEMA,
    PlainSummary,
    Summary,
    value_in,
)
from moetrace.results.sweep_record import CellFile, ListedCell, SweepFile
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.ordinary_file import is_folder, read_ordinary

_HASH = re.compile(r"[0-9a-f]{8,128}")


class ResultCell(NamedTuple):
    """A cell: its inputs by kind (`trace`, `model`, `system`, `policy`, `slots`, ...), and its figures or its error."""

    name: str
    inputs: dict[str, Any]
    figures: dict[str, Any]  # of its policy, as in summary.json
    trace: dict[str, Any]  # what tells a person which one it was
    error: str | None = None


class ResultFolder(NamedTuple):
    """The content of a folder: the code that wrote it, and its cells in their order."""

    moetrace: str
    engine: str | None
    cells: list[ResultCell]


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of an existing folder; raises UsageError if there is no such folder."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}: name a folder that `moetrace replay -o` or `moetrace sweep -o` wrote.")
    return folder


def read_summary(folder: Path) -> tuple[Summary, str]:
    """Read `summary.json`; return it, and the hash that its other files are marked with.

    Raises MoetraceError (file, field) if it is not what docs/results.md says.
    """
    path = file_in(folder, SUMMARY_FILE)
    content = read_ordinary(path, MOST_JSON_BYTES, follow=False)
    summary = decode_json(path, content, Summary)
    check_summary(summary, path)
    return summary, hashlib.sha256(content).hexdigest()


def check_summary(summary: Summary, path: Path) -> None:
    """Raise MoetraceError if the schema is another one, policies are missing or twice, or a figure is negative."""
    _check_schema(path, summary.schema, RESULT_SCHEMA, "replay")
    names = [policy.name for policy in summary.policies]
    if not names or len(set(names)) < len(names):
        raise MoetraceError(f"{path} must have policies, each of another name.")
    for policy in msgspec.to_builtins(summary.policies):
        for name in FIGURES:
            value_in(policy, name, lambda value, name=name: _not_negative(value, f"{path}: {name}"))


def read_sweep(folder: Path) -> tuple[SweepFile[dict[str, Any]], str]:
    """Read `sweep.json`; return it, and the hash that its other files are marked with.

    Raises MoetraceError (file, field) if it is not what moetrace writes.
    """
    path = file_in(folder, SWEEP_FILE)
    content = read_ordinary(path, MOST_JSON_BYTES, follow=False)
    sweep = decode_json(path, content, SweepFile[dict[str, Any]])
    _check_schema(path, sweep.schema, SWEEP_SCHEMA, "sweep")
    return sweep, hashlib.sha256(content).hexdigest()


def read_cells(folder: Path) -> ResultFolder:
    """Read the cells of a sweep or of a replay, which has one a policy; of the sweep if both are there.

    Raises UsageError if it is no such folder, MoetraceError if a file in it cannot be read or is damaged.
    """
    if has_file(folder, SWEEP_FILE):
        return _cells_of_sweep(folder)
    if has_file(folder, SUMMARY_FILE):
        return _cells_of_replay(file_in(folder, SUMMARY_FILE))
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name one that moetrace sweep -o or replay -o wrote.")
    raise UsageError(f"{folder} holds neither sweep.json nor summary.json: moetrace sweep -o or replay -o writes them.")


def has_file(folder: Path, name: str) -> bool:
    """Whether a result folder has something of this name, be it readable or not."""
    return os.path.lexists(file_in(folder, name))


def _not_negative(value: float | None, where: str) -> float | None:
    if value is not None and value < 0:
        raise MoetraceError(f"{where} must not be negative, but is {value:g}.")
    return value


def _check_schema(path: Path, stated: str, wanted: str, command: str) -> None:
    if stated != wanted:
        raise MoetraceError(
            f"{path} has schema {printable(stated)!r}, but this moetrace reads {wanted}: {command} again."
        )


def _read_strict(path: Path, form: Any, schema: str) -> Any:
    """Return a file as the struct `form`; its schema is looked at first, as another one has other fields."""
    raw = read_strict_json(path, follow=False)
    stated = raw.get("schema") if isinstance(raw, dict) else None
    if stated != schema:
        raise MoetraceError(f"{path}: schema wants {schema!r}, got {str(stated)[:100]!r}.")
    return convert_strict(path, raw, form)


def _cells_of_replay(path: Path) -> ResultFolder:
    summary: PlainSummary = _read_strict(path, PlainSummary, RESULT_SCHEMA)
    names = [_policy_name(policy, path) for policy in summary.policies]
    cells = [
        _cell_of(f"{summary.model.get('name')}/{summary.system.get('name')}/{name}", summary, policy)
        for name, policy in zip(names, summary.policies, strict=True)
    ]
    return ResultFolder(summary.moetrace, summary.engine, _distinct(cells, path))


def _cells_of_sweep(folder: Path) -> ResultFolder:
    path = file_in(folder, SWEEP_FILE)
    sweep: SweepFile[ListedCell] = _read_strict(path, SweepFile[ListedCell], SWEEP_SCHEMA)
    cells = [_read_listed(folder, listed) for listed in sweep.cells]
    return ResultFolder(sweep.moetrace, sweep.engine, _distinct(cells, path))


def _read_listed(folder: Path, listed: ListedCell) -> ResultCell:
    if listed.error is not None or listed.cell is None:
        return ResultCell(listed.name, {}, {}, {}, listed.error or "it was not run to its end")
    if not _HASH.fullmatch(listed.cell):  # else a stranger's file might lead out of the folder
        raise MoetraceError(f"{folder / SWEEP_FILE}: the cell of {listed.name} is no hash.")
    if not is_folder(folder / CELLS_FOLDER):
        raise MoetraceError(f"{folder / CELLS_FOLDER} is not a folder, but the cells of a sweep lie in one.")
    path = folder / CELLS_FOLDER / f"{listed.cell}.json"
    file: CellFile[PlainSummary] = _read_strict(path, CellFile[PlainSummary], CELL_SCHEMA)
    if len(file.result.policies) != 1:
        raise MoetraceError(f"{path}: result.policies wants one policy.")
    cell = _cell_of(listed.name, file.result, file.result.policies[0])
    # The inputs of a sweep's cell also have the content of a policy's files and the sweep's own axes.
    given = {kind: value for kind, value in file.inputs.items() if value not in (None, False, {})}
    return cell._replace(inputs=cell.inputs | given)


def _cell_of(name: str, summary: PlainSummary, policy: dict[str, Any]) -> ResultCell:
    trace = summary.trace
    inputs = {
        "trace": trace.get("sha256") or {key: value for key, value in trace.items() if key != "sha256"},
        "model": summary.model,
        "system": summary.system,
        "policy": policy.get("choices", {}),
        "slots": summary.slots,
    }
    facts = {key: trace[key] for key in ("model", "rows", "steps", "requests") if key in trace}
    return ResultCell(name, inputs, policy, facts)


def _policy_name(policy: dict[str, Any], path: Path) -> str:
    name = policy.get("name")
    if not isinstance(name, str):
        raise MoetraceError(f"{path}: the name of a policy wants a text.")
    return name


def _distinct(cells: list[ResultCell], path: Path) -> list[ResultCell]:
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise MoetraceError(f"{path}: two cells are called {twice}.")
    if not cells:
        raise MoetraceError(f"{path} holds no cell.")
    return cells
