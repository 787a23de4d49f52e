"""The command that replays a point of a sweep, a search or an advice again."""

import os
import shlex
from pathlib import Path
from typing import Any

from moetrace.batch.grid import Point


def replay_command(point: Point) -> str:
    """Return the `moetrace replay` of a point; files as seen from the current folder."""
    values = {field: _seen_from_here(value) for field, value in point.values.items()}
    words = ["moetrace", "replay", values["trace"]]
    for option in ("model", "system", "policy", "slots"):
        words += [f"--{option}", str(values[option])] if values.get(option) is not None else []
    for field, value in values.items():
        if "." in field:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            words += ["--set", f"{field}={text}"]
    return shlex.join(words)


def _seen_from_here(value: Any) -> Any:
    here = f"{Path.cwd()}{os.sep}"
    return value.removeprefix(here) if isinstance(value, str) else value
