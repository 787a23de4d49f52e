"""The folder of a sweep: a file for each finished cell, there as soon as it is done, and the tables of all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from moetrace import __version__
from moetrace.batch.cell import CELL_SCHEMA, Cell, hash_of
from moetrace.engine.fingerprint import engine_fingerprint
from moetrace.results.write import staged, to_json
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import check_writable, whole_file

_FOUND = ("result", "costs", "warnings")


class Folder:
    """`cells/HASH.json`, `sweep.json` and `cells.parquet` under one path."""

    def __init__(self, path: Path) -> None:
        """Make the folder if need be. Raises MoetraceError now, not after long work, if it cannot be written."""
        self.path, self._cells = path, path / "cells"
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, but a sweep is written into a folder: name another.")
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoetraceError(f"{path} could not be written: {error.strerror or error}.") from None
        check_writable(path / "sweep.json")
        check_writable(self._cells / "cell.json")

    def finished(self, key: str) -> dict[str, Any] | None:
        """What a cell's file holds beside its inputs; None if there is none, or it is not what its name says."""
        try:
            text = (self._cells / f"{key}.json").read_text(encoding="utf-8")
            cell = json.loads(text)
            if (
                cell["schema"] == CELL_SCHEMA
                and hash_of(cell["inputs"]) == key
                and len(cell["result"]["policies"]) == 1
            ):
                return {part: cell[part] for part in _FOUND}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def keep(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Write a finished cell, whole or not at all. Raises MoetraceError if the system refuses (a full disk)."""
        content = {
            "schema": CELL_SCHEMA,
            "moetrace": __version__,
            "engine": engine_fingerprint(),
            "inputs": cell.inputs,
            **{part: found[part] for part in _FOUND},
        }
        # Not synced: what a crash of the machine cuts short is seen by `finished`, and replayed again.
        with whole_file(self._cells / f"{cell.key}.json", sync=False) as file:
            file.write(to_json(content).encode())

    def count_others(self, keys: set[str]) -> int:
        """How many finished cells lie here that are not of this sweep."""
        return sum(1 for path in self._cells.glob("*.json") if path.stem not in keys)

    def publish(self, sweep: Mapping[str, Any], cells: pl.DataFrame) -> None:
        """Write the tables of all cells: both or none."""
        with staged(self.path) as temporary:
            (temporary / "sweep.json").write_text(to_json(sweep), encoding="utf-8")
            cells.write_parquet(temporary / "cells.parquet", compression="zstd", compression_level=3)
