"""Files as engines write them, made from routing that a test knows: one module a format, for its tests and the fuzzer.

Each module has `samples(folder)`, which writes some small ones.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Files that belong to one import, and the hints that it needs (by name, of `Hints`)."""

    files: list[Path]
    hints: dict[str, Any] = {}  # noqa: RUF012 - not changed


def routing(rows: int, layers: int, top_k: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Ids int64 [rows, layers, top_k], none twice in a cell."""
    random = np.random.default_rng(seed)
    return np.argsort(random.random((rows, layers, num_experts)), axis=-1)[..., :top_k]


def imported(folder: Path, *sources: Path, **options: Any) -> Any:
    """The verified trace that an import of the sources writes; hints are given by their names."""
    from moetrace.importers.captured import Hints
    from moetrace.importers.importing import import_traces
    from moetrace.trace import Trace

    hints = Hints(**{name: options.pop(name) for name in ("num_experts", "top_k", "layers") if name in options})
    import_traces(sources, folder / "out.h5", hints=hints, **options)
    trace = Trace.open(folder / "out.h5")
    trace.verify()
    return trace


def refused(folder: Path, *sources: Path, **options: Any) -> str:
    """The one sentence with which an import is refused that leaves nothing behind."""
    from moetrace.spec.errors import MoetraceError

    out = folder / "refused"
    out.mkdir()
    try:
        imported(out, *sources, **options)
    except MoetraceError as error:
        assert not list(out.iterdir()), "nothing may be left"
        out.rmdir()
        assert "\n" not in str(error) and str(error).endswith(".")
        return str(error)
    raise AssertionError("it was imported")


def steps(trace: Any) -> list[tuple[int, int]]:
    """(rows, phase) of each step."""
    return list(zip(np.diff(trace.offset).tolist(), trace.phase.tolist(), strict=True))
