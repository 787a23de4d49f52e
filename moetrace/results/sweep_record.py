"""The fields of the files that hold a sweep: `sweep.json` and those of its cells. Their figures stand in `record`."""

from typing import Any, Generic, TypeVar

import msgspec

from moetrace.results.record import CELL_SCHEMA, SWEEP_SCHEMA

# How far the parts of a file are checked when it is read.
CellForm = TypeVar("CellForm")
ResultForm = TypeVar("ResultForm")


class ListedCell(msgspec.Struct):
    """A cell in `sweep.json`: its name and the hash in its file's name, or why it has none. Its axes are beside it."""

    name: str
    cell: str | None
    error: str | None = None


class SweepFile(msgspec.Struct, Generic[CellForm], kw_only=True):
    """`sweep.json`."""

    schema: str = SWEEP_SCHEMA
    moetrace: str
    engine: str | None = None
    pareto: str = "gpu_memory_bytes"
    axes: dict[str, Any]
    cells: list[CellForm]
    notes: list[str] = []
    slo: list[str] = []


class CellFile(msgspec.Struct, Generic[ResultForm], kw_only=True):
    """`cells/HASH.json` of a sweep; `found_sha256` is of `result`, `costs` and `warnings`."""

    schema: str = CELL_SCHEMA
    moetrace: str = ""
    engine: str | None = None
    inputs: dict[str, Any]
    found_sha256: str = ""
    result: ResultForm
    costs: dict[str, Any] = {}
    warnings: list[str] = []
