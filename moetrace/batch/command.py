"""The command that replays a point of a sweep, a search or an advice again."""

import os
import shlex
from pathlib import Path
from typing import Any

from moetrace.batch.cell import Cell


def replay_command(cell: Cell) -> str:
    """Return the `moetrace replay` of a resolved cell; files as seen from the current folder."""
    values = {field: _seen_from_here(value) for field, value in cell.point.values.items() if _is_of(field, cell)}
    words = ["moetrace", "replay", values["trace"]]
    for option in ("model", "system", "policy", "slots"):
        words += [f"--{option}", str(values[option])] if values.get(option) is not None else []
    for field, value in values.items():
        if "." in field:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            words += ["--set", f"{field}={text}"]
    return shlex.join(words)


def _is_of(field: str, cell: Cell) -> bool:
    """Whether a field is the cell's: its replay does not know `policy.NAME.FIELD` of another policy."""
    kind, _, rest = field.partition(".")
    name = rest.rpartition(".")[0]
    return kind != "policy" or not name or name in (cell.policy.name, str(cell.point.labels["policy"]))


def _seen_from_here(value: Any) -> Any:
    here = f"{Path.cwd()}{os.sep}"
    return value.removeprefix(here) if isinstance(value, str) else value
