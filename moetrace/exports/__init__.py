"""Exports, one file for each foreign format: a trace as other tools read it."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from moetrace.spec.errors import UsageError
from moetrace.trace.atomic import keep_inputs, whole_file
from moetrace.trace.format import Trace

# Format -> how its files' names end (the first is usual), and what it is. The module moetrace.exports.<format>,
# with "_" for "-", has `write(trace, file, progress)`.
FORMATS = {
    "npz": ((".npz",), "NumPy archive: the arrays that `moetrace import` reads"),
    "parquet": ((".parquet",), "a row for each choice of an expert"),
    "oracle-general": ((".oracleGeneral", ".bin"), "libCacheSim's binary trace, with the time of each next access"),
    "eplb": ((".json",), "expert counts as SGLang's --init-expert-location and EPLB take them"),
}


def export(
    trace: Trace | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a trace in the format of another tool. The same trace gives the same bytes.

    docs/export.md describes the formats. Memory does not grow with the trace.

    Args:
        trace: A trace or the path of its file.
        path: The new file. It is whole or not there.
        to: The format: "npz", "parquet", "oracle-general" or "eplb". By default the suffix of `path` says it.
        progress: A function that gets the number of rows read since its last call.

    Raises:
        UsageError: The format is unknown or not clear, or `path` is the trace's own.
        MoetraceError: The trace holds only counts (but for "eplb") or an impossible id, differs from its sha256s, or
            the system refuses.

    Examples:
        >>> import moetrace as mt
        >>> import polars as pl
        >>> mt.export("traces/tiny-olmoe.h5", "tiny.parquet")
        >>> pl.scan_parquet("tiny.parquet").select(pl.len()).collect().item()
        393936
    """
    path = Path(path)
    module = importlib.import_module(f"moetrace.exports.{_format(path, to).replace('-', '_')}")
    opened = trace if isinstance(trace, Trace) else Trace.open(trace)
    try:
        keep_inputs(path, [opened.path])
        opened.verify_hashes()
        with whole_file(path) as file:

            def told(rows: int) -> None:
                file.raise_error()  # a full disk need not wait for the rest
                if progress:
                    progress(rows)

            module.write(opened, file, told)
    finally:
        if opened is not trace:
            opened.close()


def _format(path: Path, to: str | None) -> str:
    if to is not None and to not in FORMATS:
        raise UsageError(f"there is no format {to!r} to export to; known are {', '.join(FORMATS)}.")
    for name, (suffixes, _) in FORMATS.items():
        if to == name or (to is None and path.suffix.lower() in map(str.lower, suffixes)):
            return name
    endings = ", ".join(suffix for suffixes, _ in FORMATS.values() for suffix in suffixes)
    raise UsageError(f"{path} does not say its format by its ending ({endings}): give one of {', '.join(FORMATS)}.")
