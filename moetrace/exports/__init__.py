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
    """Write `trace` (or the file of one) to `path` in the format `to`, a key of `FORMATS`, or the one of the suffix.

    The same trace gives the same bytes, in memory that does not grow with it, and the file is whole or not there.
    `progress` is told of rows as they are read. Raises UsageError if the format is not clear or `path` is the trace's
    own, MoetraceError if the trace holds only counts (but for "eplb") or an impossible id or differs from its sha256s,
    or the system refuses.
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
