"""The folder of a sweep: a file for each finished cell, there as soon as it is done, and the tables of all."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from moetrace.batch.cell import Cell, hash_of
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.results.folder import check_summary
from moetrace.results.publish import check_committed, staged
from moetrace.results.read_json import MOST_JSON_BYTES, convert_strict, decode_json
from moetrace.results.record import (
    CELL_SCHEMA,
    CELLS_FILE,
    CELLS_FOLDER,
    PARQUET_MARK,
    SWEEP_FILE,
    SWEEP_FILES,
    CellCosts,
    Summary,
)
from moetrace.results.sweep_record import CellFile
from moetrace.results.write import sha256_of, to_json
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.ordinary_file import is_folder, read_ordinary
from moetrace.trace.atomic import check_writable, remove_stale, temporary_of, whole_file
from moetrace.version import __version__

_TEMPORARY = temporary_of(r"[0-9a-f]{32}\.json|cell\.json")


class SweepFolder:
    """`cells/HASH.json`, `sweep.json` and `cells.parquet` under one path."""

    def __init__(self, path: Path, *, reads: bool = False) -> None:
        """Make the folder if need be, or only read what may be there.

        The folder may be a symbolic link, but nothing inside it: a stranger's link would lead writes out of it. Raises
        MoetraceError now, not after long work, if it cannot be written.
        """
        self.path, self._cells = path, path / CELLS_FOLDER
        if reads:
            return
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, but a sweep is written into a folder: name another.")
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoetraceError(f"{path} could not be written: {error.strerror or error}.") from None
        if not is_folder(self._cells):
            raise MoetraceError(
                f"{self._cells} is a symbolic link, and a sweep writes inside its folder only: remove it, or name "
                "another folder."
            )
        check_committed(path)
        remove_stale(self._cells, _TEMPORARY)
        check_writable(path / SWEEP_FILE, follow=False)
        check_writable(self._cells / "cell.json", follow=False)

    def finished(self, key: str) -> dict[str, Any] | None:
        """The content of a cell's file beside its inputs; None if there is no file, or it does not match its name."""
        path = self._cells / f"{key}.json"
        if not is_folder(self._cells):
            return None
        try:
            content = read_ordinary(path, MOST_JSON_BYTES, follow=False)
            cell = decode_json(path, content, CellFile[dict[str, Any]])
            found = _found(cell)
            if cell.schema != CELL_SCHEMA or hash_of(cell.inputs) != key or cell.found_sha256 != _sha256(found):
                return None
            # The hashes are of public things: that they are right says nothing about what a stranger wrote.
            summary = convert_strict(path, cell.result, Summary)
            check_summary(summary, path)
            convert_strict(path, cell.costs, CellCosts)
        except MoetraceError:
            return None
        return found if len(summary.policies) == 1 else None

    def keep(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Write a finished cell, whole or not at all. Raises MoetraceError if the system refuses (a full disk)."""
        content = CellFile(
            moetrace=__version__,
            engine=room_fingerprint("jit", "engine"),
            inputs=cell.inputs or {},
            result=found["result"],
            costs=found["costs"],
            warnings=found["warnings"],
        )
        content.found_sha256 = _sha256(_found(content))
        # Not synced: `finished` notices a file that a crash of the machine cut short, and the cell is replayed again.
        try:
            with whole_file(self._cells / f"{cell.key}.json", sync=False, follow=False) as file:
                file.write(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        except MoetraceError as error:
            raise MoetraceError(str(error).replace("nothing was changed", "finished cells are kept")) from None

    def count_others(self, keys: set[str]) -> int:
        """How many finished cells lie here that are not of this sweep."""
        return sum(1 for path in self._cells.glob("*.json") if path.stem not in keys)

    def publish(
        self,
        sweep: Mapping[str, Any],
        cells: pl.DataFrame,
        documents: Mapping[str, Mapping[str, Any]] | None = None,
        tables: Mapping[str, pl.DataFrame] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write the tables of all cells, and other documents, tables and texts by their names: all or none.

        Raises MoetraceError if the system refuses (a full disk).
        """
        written = {name: to_json(what) for name, what in {SWEEP_FILE: sweep, **(documents or {})}.items()}
        contents = {name: text.encode() for name, text in {**written, **(texts or {})}.items()}
        mark = {PARQUET_MARK: sha256_of(written[SWEEP_FILE])}
        for name, frame in {CELLS_FILE: cells, **(tables or {})}.items():
            table = io.BytesIO()
            frame.write_parquet(table, compression="zstd", compression_level=3, metadata=mark)
            contents[name] = table.getvalue()
        with staged(self.path, SWEEP_FILES) as temporary:
            try:
                for name, content in contents.items():
                    (temporary / name).write_bytes(content)
            except OSError as error:
                why = error.strerror or error
                raise MoetraceError(f"{self.path} could not be written: {why}; finished cells are kept.") from None


def _found(cell: CellFile[dict[str, Any]]) -> dict[str, Any]:
    """The content of a cell's file beside its inputs."""
    return {"result": cell.result, "costs": cell.costs, "warnings": cell.warnings}


def _sha256(found: Mapping[str, Any]) -> str:
    """SHA-256 of a cell's file without its inputs, so that no edit and no damage of the disk becomes a figure."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
